r"""Kronecker-factored Fisher information, and a penalty that sees pairs of weights.

A linear layer with input a (a one appended for the bias) and gradient δ at its output has the score δaᵀ for
its weights, so its block of the Fisher matrix is :math:`\mathbb E[a a^\top \otimes \delta \delta^\top]`.
K-FAC replaces the mean of the product by the product of the means, :math:`A \otimes G`: two small matrices in
place of one huge one. It is exact for one example, and whenever :math:`a a^\top` and
:math:`\delta \delta^\top` are uncorrelated over the examples. Layers are taken to be independent of each
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ewc import curvature
from ewc._layers import check_differentiable, entrance, run_alone
from ewc.elastic import EWC, _nothing
from ewc.fisher import _add_over_processes, _check_estimator, _untouched, class_index, unwrap

__all__ = ["KFAC", "Factors", "factors"]

SETTINGS = ("expand", "reduce")
KEEP = ("each", "pooled")


class Factors(NamedTuple):
    """One layer's Kronecker factors: A of its inputs, the bias last, and G of its outputs."""

    A: Tensor
    G: Tensor


@torch.inference_mode(False)  # what is made in that mode serves nobody outside it
def factors(
    model: nn.Module,
    data: Dataset | DataLoader | tuple[Tensor, Tensor],
    estimator: str = "exact",
    *,
    setting: str = "expand",
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    classes: Sequence[int] | None = None,
) -> dict[str, Factors]:
    r"""The Kronecker factors of every trainable Linear and Conv2d layer, as means per example.

    :math:`A = \mathbb E[a a^\top]`, :math:`G = \mathbb E[\delta \delta^\top]`, where a is the layer's input
    with a one appended (a patch of it, for a convolution) and δ the gradient of the log probability of a
    label at the layer's output, the label drawn from the model.

    Where a layer is applied at R positions (of a sequence, of an image) the score is
    :math:`\sum_r \delta_r a_r^\top`:

    - ``"expand"`` takes positions for independent: :math:`A = \frac1{NR} \sum_{nr} a_{nr} a_{nr}^\top`,
      :math:`G = \frac1N \sum_{nr} \delta_{nr} \delta_{nr}^\top`;
    - ``"reduce"`` takes a or δ for equal at all positions: :math:`A = \frac1N \sum_n \bar a_n \bar a_n^\top`
      with the mean :math:`\bar a_n` over positions, :math:`G = \frac1N \sum_n d_n d_n^\top` with the sum
      :math:`d_n = \sum_r \delta_{nr}`. Needs the examples on the first axis of every layer's output.

    At one position both are the same. No damping is added: nothing here is inverted.

    Args:
        model: a network that maps (N, ...) to logits (N, C), one example independent of the others; all its
            trainable parameters belong to Linear or (ungrouped) Conv2d layers that run once and whose output has no
            row in common for several examples. Freeze the others. The pass runs in eval mode, and not compiled.
        data: a dataset, a loader or a pair of tensors (inputs, labels); in an initialised process group each
            rank passes its own shard, and all get the mean over all of them.
        estimator: whose labels, as in :func:`ewc.curvature.full_fisher`: ``"exact"`` (all classes, weighed by
            the model's probabilities), ``"sampled"``, ``"probe"``, ``"empirical"`` or ``"argmax"``.
        setting: ``"expand"`` or ``"reduce"``.
        batch_size: examples in one pass, at least 1.
        generator: the source of randomness of ``"sampled"`` and ``"probe"``.
        classes: the classes that the softmax runs over, for a head chosen by task; all of them if not given.

    Returns:
        layer name -> :class:`Factors`, A of shape (inputs + 1, inputs + 1), or without the one if the layer
        has no bias, and G (outputs, outputs).

    Raises:
        ValueError: a layer without a Kronecker form (named), an unknown setting or estimator, empty data,
            labels out of range, logits or factors that are not finite, a model that mixes the examples of a
            batch or is random in eval mode.
        TypeError: data of another kind.

    References:
        Martens and Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature* (2015);
        Grosse and Martens (2016) for convolutions; Eschenhagen et al., *Kronecker-factored approximate
        curvature for modern neural network architectures* (2023) for expand and reduce.

    Implements: eq-kfac-factors
    """
    if setting not in SETTINGS:
        raise ValueError(f"Unknown setting {setting!r}: use 'expand' or 'reduce'.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size!r}.")
    model = unwrap(model)
    layers = _kronecker_layers(model)
    weight = next(iter(layers.values())).weight
    kind = torch.promote_types(weight.dtype, torch.float32)
    sums = {
        name: Factors(
            *(torch.zeros(n, n, dtype=kind, device=weight.device) for n in reversed(_matrix(layer).shape))
        )
        for name, layer in layers.items()
    }
    # Examples, then each layer's rows; counted on the host, so that no batch has to wait for the device.
    counts = torch.zeros(1 + len(layers), dtype=kind)
    with _untouched(model), _uncompiled(model):
        enter = entrance(model)
        for x, y in curvature.batches(data, batch_size):
            x, y = enter(x), curvature.whole(y, weight)
            with _recorded(layers) as records:  # and on a copy, as some models write into their input
                logits = check_differentiable(curvature.check(model(x.clone()), len(x), y))
            if not counts[0]:
                run_alone(model, x[:1].clone(), logits[:1])
            outputs = [_one_output(name, layers[name], records[name]) for name in layers]
            inputs = [_rows(name, layers[name], records[name][0][0], len(x), setting) for name in layers]
            if classes is not None:
                logits, y = _among(classes, logits, y)
            columns = curvature.score_columns(logits, y, estimator, generator=generator)
            if not counts[0]:
                _rehearse(layers, records, logits, setting)
            for a, total in zip(inputs, sums.values()):
                total.A.addmm_(a.T.to(kind), a.to(kind))
            for column in columns:
                deltas = torch.autograd.grad(
                    logits, outputs, column, retain_graph=True, materialize_grads=True
                )
                for (name, total), delta in zip(sums.items(), deltas):
                    d = _positions(layers[name], delta)
                    if setting == "reduce":
                        d = _by_example(name, d, len(x)).sum(1)
                    else:
                        d = d.reshape(-1, d.shape[-1])
                    total.G.addmm_(d.T.to(kind), d.to(kind))
            counts += torch.tensor([len(x), *map(len, inputs)])
    counts = counts.to(weight.device)
    _add_over_processes(counts, *(matrix for pair in sums.values() for matrix in pair))
    if not counts[0]:
        raise ValueError("The data holds no example: the factors are means over at least one.")
    means = {name: Factors(A / rows, G / counts[0]) for (name, (A, G)), rows in zip(sums.items(), counts[1:])}
    for name, pair in means.items():
        if not all(matrix.isfinite().all() for matrix in pair):
            raise ValueError(f"The factors of layer {name!r} are not finite: its inputs or gradients overflow.")
    return means


def _exactly(method: Callable) -> Callable:
    """The method without autocast, which would round its products to half precision."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(method))


class KFAC:
    r"""A memory like :class:`ewc.elastic.EWC` that also knows which weights of a layer move together.

    :math:`\Omega(\theta) = \frac\lambda2 \sum_{\text{layer}} \sum_t \operatorname{tr}(G_t \Delta A_t \Delta^\top)`,
    where Δ (outputs, inputs + 1) is a layer's weight and, as its last column, its bias, minus the anchor θ*.

    As for EWC, the factors are means per example and λ = N_A / N_B is what Bayes' rule asks for when the new
    task's loss is a mean. There is no damping, because the penalty multiplies by the Fisher and never inverts
    it: directions without curvature stay free.

    Several tasks: the penalties are added and anchored at the newest optimum (the online Laplace approximation
    of Ritter et al.; Huszár's correction in EWC's terms). A sum of Kronecker products is in general not a
    Kronecker product, so there are two ways to keep it:

    - ``keep="each"``: the factors of every task. The sum is exact; memory grows by
      (inputs + 1)² + outputs² per layer and task (:meth:`pull` adds copies in float64), and so does the work of a
      step.
    - ``keep="pooled"``: one pair, :math:`\sum_t A_t \otimes G_t \approx \bar A \otimes \sum_t G_t` with the mean
      :math:`\bar A` of the tasks' A. The size stays, and so does the closed form of :meth:`pull`. Exact if the
      tasks share A, or share G; otherwise it drops a covariance over the tasks, as K-FAC does over examples.

    Before the first :meth:`consolidate` the penalty is 0.

    Attributes:
        strength: λ, finite and at least 0; may be changed at any time.
        tasks: a list with, for each task, layer name -> :class:`Factors`; a single entry if pooled.
        count: how many tasks have been consolidated.
        theta_star: parameter name -> θ*, the newest optimum.

    References:
        Ritter, Botev and Barber, *Online structured Laplace approximations for overcoming catastrophic
        forgetting* (NeurIPS 2018).

    Implements: eq-kfac-penalty
    """

    def __init__(
        self,
        strength: float,
        *,
        estimator: str = "exact",
        setting: str = "expand",
        keep: str = "each",
        generator: torch.Generator | None = None,
    ):
        """
        Args:
            strength: λ.
            estimator: as for :func:`factors`.
            setting: as for :func:`factors`.
            keep: ``"each"`` or ``"pooled"``, see above.
            generator: as for :func:`factors`; it is no part of the :meth:`state_dict`.

        Raises:
            ValueError: a strength that is negative or not finite, or an unknown estimator, setting or way to keep.
        """
        _check_estimator(estimator)
        if setting not in SETTINGS:
            raise ValueError(f"Unknown setting {setting!r}: use 'expand' or 'reduce'.")
        if keep not in KEEP:
            raise ValueError(f"Unknown way to keep the factors, {keep!r}: use 'each' or 'pooled'.")
        self.strength = strength
        self.estimator, self.setting, self.keep, self.generator = estimator, setting, keep, generator
        self.count = 0
        self.tasks: list[dict[str, Factors]] = []
        self.theta_star: dict[str, Tensor] = {}
        self._bases: dict = {}  # what `pull` derives from the factors

    strength = EWC.strength  # finite, at least 0

    @torch.inference_mode(False)  # a tensor made in that mode would be of no use for training
    def consolidate(
        self,
        model: nn.Module,
        data: Dataset | DataLoader | tuple[Tensor, Tensor],
        *,
        classes: Sequence[int] | None = None,
    ) -> None:
        r"""Measures the factors on the task just learnt, keeps them, and moves the anchor here.

        With ``keep="pooled"`` the T-th task changes the factors to
        :math:`A \leftarrow A + \frac1T (A_T - A)` and :math:`G \leftarrow G + G_T`.

        Args:
            model: the network at the task's optimum.
            data: as for :func:`factors`.
            classes: as for :func:`factors`.

        Raises:
            ValueError: what :func:`factors` raises, weights that are not finite, or a model that is not the
                stored one. The memory is then as it was.

        Implements: eq-kfac-pooled
        """
        model = unwrap(model)
        if self.tasks:
            self._layers(model)
            now = _kronecker_layers(model)
            if now.keys() != self.tasks[0].keys():
                raise ValueError(
                    f"The memory holds the layers {list(self.tasks[0])}, and {list(now)} are trainable: the layers of "
                    "a memory stay the same. Freeze and unfreeze as at the first task, or use EWC."
                )
        new = factors(
            model, data, self.estimator, setting=self.setting, generator=self.generator, classes=classes
        )
        anchors = {n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[0] in new}
        for name, anchor in anchors.items():
            if not anchor.isfinite().all():
                raise ValueError(f"Parameter {name!r} is not finite: an anchor has to be; go back to sound weights.")
        if self.keep == "pooled" and self.tasks:
            share, (old,) = 1 / (self.count + 1), self.tasks  # perhaps of another precision than the new ones
            new = {name: Factors(A + share * (new[name].A - A), G + new[name].G) for name, (A, G) in old.items()}
            self.tasks = []
        self.tasks = [*self.tasks, new]  # a copy of the memory goes on with its own list
        self.count += 1
        self.theta_star = anchors
        self._bases = {}

    @_exactly
    def penalty(self, model: nn.Module) -> Tensor:
        r"""The value :math:`\frac\lambda2 \sum \operatorname{tr}(G \Delta A \Delta^\top)`, which has a gradient.

        In float32 or better, like the gradient and the step below, for weights of any precision.

        Raises:
            ValueError: a model that is not the stored one, or on another device.

        Implements: eq-kfac-penalty
        """
        model = unwrap(model)
        total = _nothing(model)
        for name, layer in self._layers(model).items():
            delta = _matrix(layer) - self._anchor(name)
            total = total + (delta * self._curved(name, delta)).sum()
        return self.strength / 2 * total

    @_exactly
    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> None:
        r"""Adds the penalty's gradient, :math:`\lambda \sum_t G_t \Delta A_t`, to every ``.grad``.

        Raises:
            ValueError: a model that is not the stored one, or on another device.
        """
        if not self.strength:
            return
        for name, layer in self._layers(unwrap(model)).items():
            gradient = self.strength * self._curved(name, _matrix(layer) - self._anchor(name))
            for parameter, part in _parts(layer, gradient):
                if parameter.grad is None:
                    parameter.grad = part.to(parameter.dtype, copy=True)
                else:
                    parameter.grad.add_(part)

    @_exactly
    @torch.no_grad()
    def pull(self, model: nn.Module, step: float | Tensor | Mapping[str, Tensor]) -> None:
        r"""The proximal step on the penalty, in place: the Δ that solves
        :math:`\Delta + s\lambda\sum_t G_t\Delta A_t = \Delta_0`.

        With one pair of factors (one task, or pooled) and a step s that is a number, this is exact and costs four
        small products: in the bases :math:`G = U g U^\top, A = V a V^\top` every entry of
        :math:`U^\top \Delta V` is divided by :math:`1 + s\lambda g_i a_j`. With several pairs, or a step for each
        weight (Adam's), no basis diagonalises the system; conjugate gradients in float64, preconditioned by the mean
        factors and the mean step, solve it to an error of 1e-6 of the move or stop after 50 products. Wherever they
        stop, the penalty has not risen (but for rounding), whatever λ.

        Args:
            model: the network being trained.
            step: s, the learning rate, a number or a tensor with one, which on a GPU is taken as it is; or parameter name
                -> s, a number or a tensor of the parameter's shape.

        Raises:
            ValueError: a step that is negative, not finite, missing or of another shape than its parameter, or a
                model that is not the stored one.

        Implements: eq-kfac-proximal
        """
        if not self.strength:
            return
        for name, layer in self._layers(unwrap(model)).items():
            size = _step(layer, name, step)
            single = isinstance(size, float) or not size.dim()  # one step for all the layer's weights
            idle = size == 0 if isinstance(size, float) else not single and not size.any()
            if idle:
                continue
            anchor = self._anchor(name)
            start = _matrix(layer) - anchor
            if len(self.tasks) == 1 and single:
                delta = self._shrink(name, start, size)
            else:
                size = torch.as_tensor(size, dtype=torch.float64, device=start.device)
                delta = self._conjugate_gradients(name, start, size)
            for parameter, part in _parts(layer, anchor + delta):
                parameter.copy_(part)

    def state_dict(self) -> dict:
        """Everything the memory knows; ``torch.load(weights_only=True)`` reads it back."""
        return {
            "strength": self.strength,
            "estimator": self.estimator,
            "setting": self.setting,
            "keep": self.keep,
            "count": self.count,
            "tasks": [{name: {"A": A, "G": G} for name, (A, G) in task.items()} for task in self.tasks],
            "theta_star": dict(self.theta_star),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping) -> None:
        """Takes over a :meth:`state_dict`, options included.

        Raises:
            ValueError: not the state of a `KFAC` memory, or a damaged one; the memory is then as it was.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or set(state) != set(expected):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"This is not the state of a KFAC memory: expected {sorted(expected)}, found {found}."
            )
        options = {key: state[key] for key in ("strength", "estimator", "setting", "keep")}
        try:
            new = KFAC(**options, generator=self.generator)
            new.count = int(state["count"])
            new.tasks = [
                {name: Factors(*(pair[key].detach().clone() for key in "AG")) for name, pair in task.items()}
                for task in state["tasks"]
            ]
            new.theta_star = {name: value.detach().clone() for name, value in state["theta_star"].items()}
            shapes = {}
            for name in {key.rpartition(".")[0] for key in new.theta_star}:
                outputs, inputs = new._anchor(name).shape
                shapes[name] = (inputs, inputs), (outputs, outputs)
            found = [{name: (A.shape, G.shape) for name, (A, G) in task.items()} for task in new.tasks]
            pairs = new.count if new.keep == "each" else min(new.count, 1)
            if found != [shapes] * pairs or bool(found) != bool(shapes):
                raise ValueError("its tasks, count and theta_star differ in number, names or shapes")
        except Exception as error:
            raise ValueError(f"This state is damaged: {type(error).__name__}, {error}.") from error
        self.__dict__.update(new.__dict__)

    @torch.inference_mode(False)
    def to(self, *args, **kwargs) -> KFAC:
        """Moves the stored tensors, as ``Tensor.to`` does; returns the memory itself."""
        self.tasks = [
            {name: Factors(*(matrix.to(*args, **kwargs) for matrix in pair)) for name, pair in task.items()}
            for task in self.tasks
        ]
        self.theta_star = {name: value.to(*args, **kwargs) for name, value in self.theta_star.items()}
        self._bases = {}
        return self

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The stored layers in this model, after checking every parameter's name, shape and device."""
        have = dict(model.named_parameters())
        for name, star in self.theta_star.items():
            if name not in have or have[name].shape != star.shape or have[name].device != star.device:
                found = f"{tuple(have[name].shape)} on {have[name].device}" if name in have else "none"
                raise ValueError(
                    f"The memory holds {name!r} of shape {tuple(star.shape)} on {star.device}, the model has "
                    f"{found}: use the model that was consolidated, and memory.to(device)."
                )
        return {name: model.get_submodule(name) for name in (self.tasks[0] if self.tasks else ())}

    def _anchor(self, name: str) -> Tensor:
        prefix = f"{name}." if name else ""
        return _joined(self.theta_star[prefix + "weight"], self.theta_star.get(prefix + "bias"))

    def _curved(self, name: str, delta: Tensor) -> Tensor:
        """Σ_t G_t Δ A_t."""
        pairs = [task[name] for task in self.tasks]
        return sum(pair.G.to(delta) @ delta @ pair.A.to(delta) for pair in pairs)

    def _basis(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U, V and the products of eigenvalues g_i a_j of the summed G and the mean A."""
        if name not in self._bases:
            G = sum(task[name].G for task in self.tasks)
            A = sum(task[name].A for task in self.tasks) / len(self.tasks)
            # In single precision a sure network's G, whose entries span many orders of magnitude, loses its small
            # eigenvalues, and on a GPU the iteration may not converge.
            (g, U), (a, V) = (torch.linalg.eigh(matrix.cpu().double()) for matrix in (G, A))
            curvatures = torch.outer(g.clamp(min=0), a.clamp(min=0))  # rounding may leave -1e-18
            self._bases[name] = U.to(G), V.to(A), curvatures.to(G)
        return self._bases[name]

    def _stacks(self, name: str) -> tuple[Tensor, Tensor]:
        """The tasks' A and G in float64, without the negative eigenvalues that rounding to float32 left."""
        if (name, "each") not in self._bases:
            self._bases[name, "each"] = tuple(
                torch.stack(list(map(_positive, matrices))) for matrices in zip(*(task[name] for task in self.tasks))
            )
        return self._bases[name, "each"]

    def _shrink(self, name: str, delta: Tensor, step: float | Tensor) -> Tensor:
        U, V, curvatures = (part.to(delta) for part in self._basis(name))
        strength = min(self.strength, 1e32)  # beyond, float32 may know ∞ only, and ∞ times a curvature of 0 is NaN
        return _shrunk(delta, U, V, step * strength * curvatures)

    def _conjugate_gradients(self, name: str, start: Tensor, step: Tensor) -> Tensor:
        """Δ = Δ₀ - √s u with (1 + √s λK √s) u = √s λK Δ₀, symmetric; K is Δ -> Σ GΔA.

        In float64: in float32 the rounding of λK would exceed the identity that is added to it.
        """
        kind, start, (A, G) = start.dtype, start.double(), self._stacks(name)
        U, V, curvatures = (part.double() for part in self._basis(name))
        root, stiffness = step.sqrt(), self.strength * curvatures * step.mean()

        def product(delta: Tensor) -> Tensor:
            return root * self.strength * (G @ delta @ A).sum(0)

        residual = product(start)
        # The matrix is at least the identity: the error of u is below the residual. Small beside Δ₀ and the move.
        goal = 1e-6 * torch.minimum(start.norm() / root.max(), residual.norm())
        u, direction, old = torch.zeros_like(start), torch.zeros_like(start), residual.new_ones(())
        for _ in range(50):
            if not residual.norm() > goal:
                break
            better = _shrunk(residual, U, V, stiffness)
            new = (residual * better).sum()
            direction = better + (new / old) * direction
            image = direction + product(root * direction)
            along = (direction * image).sum()
            if not along > direction.square().sum() / 2:  # never below the whole, but for rounding
                break
            u, residual, old = u + new / along * direction, residual - new / along * image, new
        return (start - root * u).to(kind)


# --- layers -------------------------------------------------------------------------------------------------


def _shrunk(delta: Tensor, U: Tensor, V: Tensor, stiffness: Tensor) -> Tensor:
    """Δ with every entry of UᵀΔV divided by 1 + its stiffness; also for stacks of such matrices."""
    return U @ ((U.mT @ delta @ V) / (1 + stiffness)) @ V.mT


def _positive(matrix: Tensor) -> Tensor:
    """The nearest matrix without negative eigenvalues, in float64."""
    values, vectors = torch.linalg.eigh(matrix.cpu().double())
    return ((vectors * values.clamp(min=0)) @ vectors.T).to(matrix.device)


def _among(classes: Sequence[int], logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of these classes alone, and the labels as positions among them."""
    chosen = class_index(classes, logits)
    same = y[:, None] == chosen
    if not same.any(1).all():
        raise ValueError(f"Some labels are outside the classes given: {chosen.tolist()}.")
    return logits[:, chosen], same.int().argmax(1)


def _kronecker_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The trainable layers by name; refuses what has no single pair of Kronecker factors."""
    layers, owner = {}, {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        trainable = [key for key, p in own.items() if p.requires_grad]
        if not trainable:
            continue
        what = f"Layer {name!r} ({type(module).__name__})"
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or set(own) not in ({"weight"}, {"weight", "bias"}):
            raise ValueError(
                f"{what} has no Kronecker form: K-FAC covers Linear and Conv2d. Freeze its parameters "
                "(requires_grad_(False)) or use EWC."
            )
        if getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"{what} has groups={module.groups}: K-FAC covers ungrouped convolutions. Use EWC."
            )
        if len(trainable) < len(own):
            raise ValueError(f"{what} is partly frozen: freeze both its weight and its bias, or neither.")
        for p in own.values():
            if owner.setdefault(id(p), name) != name:
                raise ValueError(
                    f"{what} shares a parameter with layer {owner[id(p)]!r}: K-FAC has no form for it."
                )
        layers[name] = module
    if not layers:
        raise ValueError("The model has no trainable parameter: there is nothing to measure.")
    return layers


def _uncompiled(model: nn.Module):
    """What was compiled, or a part of it, ignores new hooks: such a model runs as it was written."""
    compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Notes each layer's input and output; hands on a copy of the output, safe from in-place activations."""
    records = {name: [] for name in layers}

    def note(name):
        def hook(module, arguments, named, output):
            given = arguments[0] if arguments else named["input"]
            records[name].append((given.detach().clone(), output))
            return output.clone()

        return hook

    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _one_output(name: str, layer: nn.Module, record: list[tuple[Tensor, Tensor]]) -> Tensor:
    if len(record) != 1:
        raise ValueError(
            f"Layer {name!r} ({type(layer).__name__}) ran {len(record)} times in one pass; K-FAC needs "
            "it to run once, through its own forward. Freeze it or use EWC."
        )
    if not record[0][1].requires_grad:
        raise ValueError(
            f"Layer {name!r} ({type(layer).__name__}) runs without a gradient (is there a no_grad?). Freeze it or "
            "use EWC."
        )
    return record[0][1]


def _rows(name: str, layer: nn.Module, x: Tensor, examples: int, setting: str) -> Tensor:
    """The layer's inputs as rows of a matrix, a one appended for the bias."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
        x = functional.unfold(
            x, layer.kernel_size, layer.dilation, stride=layer.stride
        ).mT  # (N, positions, inputs)
    x = _by_example(name, x, examples).mean(1) if setting == "reduce" else x.reshape(-1, x.shape[-1])
    return x if layer.bias is None else functional.pad(x, (0, 1), value=1.0)


def _positions(layer: nn.Module, delta: Tensor) -> Tensor:
    """A gradient at the output, channels last."""
    return delta.flatten(2).mT if isinstance(layer, nn.Conv2d) else delta


def _by_example(name: str, x: Tensor, examples: int) -> Tensor:
    """(N, ..., features) as (N, positions, features)."""
    if x.dim() < 2 or len(x) != examples:
        raise ValueError(
            f"Layer {name!r} sees shape {tuple(x.shape)} for {examples} examples: setting 'reduce' needs the "
            "examples on the first axis. Use 'expand'."
        )
    return x.reshape(examples, -1, x.shape[-1])


def _rehearse(layers, records, logits: Tensor, setting: str) -> None:
    """Refuses a layer whose δaᵀ is not the gradient that autograd finds: its weight is used elsewhere too.

    And one whose output has a row, or for "reduce" a place on the first axis, that belongs to several examples: G would
    be of the sum of their δ.
    """
    # Any column but a score's: these add up to zero where the model finds all classes alike.
    column = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(logits)
    outputs = [records[name][0][1] for name in layers]
    weights = [layer.weight for layer in layers.values()]
    found = torch.autograd.grad(logits, outputs + weights, column, retain_graph=True, materialize_grads=True)
    alone = functional.pad(column[:1], (0, 0, 0, len(column) - 1))  # the first example's part of it
    firsts = torch.autograd.grad(logits, outputs, alone, retain_graph=True, materialize_grads=True)
    for (name, layer), delta, gradient, first in zip(layers.items(), found, found[len(layers) :], firsts):
        what, slack = f"Layer {name!r} ({type(layer).__name__})", torch.finfo(gradient.dtype).eps ** 0.5
        delta, first = _positions(layer, delta), _positions(layer, first)
        a = _rows(name, layer, records[name][0][0], len(logits), "expand")[:, : gradient[0].numel()]
        product = delta.reshape(-1, delta.shape[-1]).T @ a
        if not (product - gradient.flatten(1)).norm() <= slack * gradient.norm():
            raise ValueError(
                f"{what} does more with its weight than multiply its input, so it has no Kronecker form. Freeze it or "
                "use EWC."
            )
        both = torch.stack([first, delta - first])
        both = both.flatten(2) if setting == "reduce" else both.reshape(2, -1, both.shape[-1])
        sizes = both.norm(dim=2)
        if sizes.amin(0).norm() > slack * sizes.norm(dim=1).min():
            raise ValueError(
                f"{what} shares an output row between examples: K-FAC has no form for it; freeze it or use EWC."
                if setting == "expand"
                else f"{what} shares a place on its output's first axis between examples: setting 'reduce' needs the "
                "examples there. Use 'expand'."
            )


def _joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


def _matrix(layer: nn.Module) -> Tensor:
    """The layer's weight with its bias as last column: (outputs, inputs + 1), in float32 or better."""
    matrix = _joined(layer.weight, layer.bias)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # sums of products overflow in half precision


def _parts(layer: nn.Module, matrix: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The layer's trainable parameters with their parts of such a matrix."""
    inputs = layer.weight[0].numel()
    parts = [(layer.weight, matrix[:, :inputs].reshape(layer.weight.shape))]
    if layer.bias is not None:
        parts.append((layer.bias, matrix[:, inputs]))
    return [(parameter, part) for parameter, part in parts if parameter.requires_grad]


def _step(layer: nn.Module, name: str, step: float | Tensor | Mapping[str, Tensor]) -> float | Tensor:
    """The step as a number or, if it differs between weights, as a matrix of the layer's shape."""
    prefix = f"{name}." if name else ""
    own = dict(layer.named_parameters(recurse=False))
    if not isinstance(step, Mapping) and all(p.requires_grad for p in own.values()):
        if isinstance(step, Tensor) and step.numel() != 1:
            raise ValueError(f"step has shape {tuple(step.shape)}: give one number, or a mapping with one for each parameter.")
        size = step.reshape(()) if isinstance(step, Tensor) else float(step)
        # To ask a GPU for its value would stop the queue at every step.
        sound = getattr(size, "is_cuda", False) or (math.isfinite(size) and size >= 0)
    else:
        spread = {}
        for key, p in own.items():
            s = (step.get(prefix + key) if isinstance(step, Mapping) else step) if p.requires_grad else 0.0
            if s is None:
                raise ValueError(f"step has no entry for {prefix + key!r}: give one for each parameter, or one number.")
            if getattr(s, "shape", ()) not in ((), p.shape):
                raise ValueError(
                    f"The step of {prefix + key!r} has shape {tuple(s.shape)}, the parameter {tuple(p.shape)}: "
                    "give one of this shape, or one number."
                )
            # The weight's type from the start: a plain number would pass through float32.
            spread[key] = torch.as_tensor(s, dtype=p.dtype, device=p.device).expand_as(p)
        size = _joined(spread["weight"], spread.get("bias"))
        sound = bool(size.isfinite().all() and (size >= 0).all())
    if not sound:
        raise ValueError(f"step is a learning rate: finite and at least 0; got {step!r}.")
    return size
