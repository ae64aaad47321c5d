r"""Elastic weight consolidation: a spring on every weight, as stiff as the Fisher information says.

After a task the posterior over the weights is approximated by a Gaussian around its optimum :math:`\theta^*` with
precision :math:`\propto F`; its negative logarithm is the penalty on the next task's loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from ewc import _checkpoint
from ewc import fisher as _fisher

ANCHORS = ("latest", "each")


class EWC:
    r"""The quadratic penalty of Kirkpatrick et al. (2017), for one task or many.

    .. math:: \Omega(\theta) = \frac{\lambda}{2} \sum_i F_i\,(\theta_i - \theta^*_i)^2

    :math:`F` is the *mean* Fisher per example. If the loss of the new task is a mean over its :math:`N_B` examples as
    well, Bayes' rule gives :math:`\lambda = N_A / N_B`: the old task counts with its :math:`N_A` examples. In practice
    a larger strength makes up for what the diagonal leaves out.

    Before the first `consolidate` the penalty is 0. Parameters that the memory has never seen (a new head) are free.

    Attributes:
        strength: λ, a finite number >= 0; may be changed at any time (one Fisher serves a whole sweep).
        fisher: parameter name -> F, tensor of the parameter's shape.
        theta_star: parameter name -> θ*, the anchor.
        constant: the penalty's value at the anchors, divided by λ; 0 unless ``anchors="each"``.
        tasks: how many tasks have been consolidated.

    Implements: eq-ewc-penalty

    References:
        Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, PNAS 2017; Huszár, *Note on the
        quadratic penalties in elastic weight consolidation*, PNAS 2018; Schwarz et al., *Progress and compress*, 2018.
    """

    def __init__(self, strength: float, *, estimator: str = "exact", anchors: str = "latest", decay: float = 1.0):
        r"""
        Args:
            strength: λ in (λ/2) Σ F (θ − θ*)².
            estimator: passed to `fisher.diagonal`.
            anchors: ``"latest"``: one penalty anchored at the newest optimum, Fishers added (Huszár's correction).
                ``"each"``: one penalty for every task, anchored at that task's optimum, as Kirkpatrick et al. wrote
                it; kept as the one quadratic that equals their sum, so memory does not grow with the tasks.
            decay: what remains of the old penalty (all of it: Fisher and value) when a task is added, 0 to 1.

        Raises:
            ValueError: a strength that is negative or not finite, an unknown estimator or kind of anchors, a decay
                outside 0 to 1.
        """
        _fisher._check_estimator(estimator)
        if anchors not in ANCHORS:
            raise ValueError(f'Unknown anchors {anchors!r}; choose "latest" or "each".')
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is the share of the old penalty that remains, from 0 to 1; got {decay!r}.")
        self.strength = strength
        self.estimator = estimator
        self.anchors = anchors
        self.decay = float(decay)
        self.fisher: dict[str, Tensor] = {}
        self.theta_star: dict[str, Tensor] = {}
        self.constant = 0.0
        self.tasks = 0
        self._match: _Match | None = None  # made when it is needed

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        value = float(value)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"strength is the λ of the penalty: a finite number, at least 0; got {value!r}.")
        self._strength = value

    @torch.inference_mode(False)  # a tensor made in that mode would be of no use for training
    def consolidate(
        self,
        model: nn.Module,
        data=None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        r"""Measures the Fisher of ``model`` on the task just learnt and sets the anchor.

        ``anchors="latest"`` (:math:`\gamma` is the decay):

        .. math:: F \leftarrow \gamma F + F_t, \qquad \theta^* \leftarrow \theta_t

        ``anchors="each"``, where a sum of quadratics is a quadratic:

        .. math:: \theta^* \leftarrow \frac{\gamma F \theta^* + F_t \theta_t}{\gamma F + F_t}, \qquad
                  F \leftarrow \gamma F + F_t

        and the constant, times :math:`\gamma`, grows by :math:`\tfrac12 \sum_i \frac{\gamma F_i F_{t,i}}{\gamma F_i + F_{t,i}}
        (\theta^*_i - \theta_{t,i})^2` so that the penalty's value is that of the sum, too.

        Args:
            model: the network at the task's optimum.
            data: the task's training data, as for `fisher.diagonal`.
            fisher: the mean Fisher, if it has been computed already (for instance with a tolerance), as a tensor for
                each parameter; ``data`` is then not needed. It is kept in float32 or better.
            classes: the classes that the softmax runs over, for a head chosen by task; all of them if not given.

        Raises:
            ValueError: what `fisher.diagonal` raises; a model or Fisher that does not match what is stored; weights
                that are not finite; nothing to protect. The memory is then as it was.
            TypeError: data or a Fisher of another kind.

        Implements: eq-online, eq-sum-of-quadratics
        """
        model = _fisher.unwrap(model)
        if (data is None) == (fisher is None):
            raise ValueError("consolidate needs either the task's data or its Fisher, and not both.")
        if self.tasks:
            self._matched(model)
        parameters = dict(model.named_parameters())
        if fisher is None:
            fisher = _fisher.diagonal(model, data, self.estimator, classes=classes)
        fisher = _checked(fisher, parameters)
        if not (fisher or self.fisher):
            raise ValueError("The Fisher has no entry (is every parameter frozen?), so there is nothing to protect.")

        new_fisher, new_star, gained = {}, {}, 0.0
        for name, p in parameters.items():
            if name not in fisher and name not in self.fisher:
                continue
            theta = p.detach()
            if not theta.isfinite().all():
                raise ValueError(f"Parameter {name!r} is not finite: an anchor has to be; go back to sound weights.")
            if name in fisher:
                f = fisher[name].detach().to(p.device)
            else:
                f = torch.zeros_like(self.fisher[name])
            old = torch.zeros_like(f)
            if name in self.fisher:
                old = self.decay * self.fisher[name]
            total = old + f
            if self.anchors == "latest" or name not in self.fisher:
                new_star[name] = theta.clone()
            else:
                # A step from the new optimum towards the old anchor;
                # a weight without any Fisher stays at the new one.
                share = torch.where(total > 0, old / total, 0)
                moved = self.theta_star[name] - theta
                value = (share * f * moved.square()).sum(dtype=torch.float64)
                gained += 0.5 * float(value)
                new_star[name] = (theta + share * moved).to(theta.dtype)
            new_fisher[name] = total
        self.constant = self.decay * self.constant + gained
        self.fisher, self.theta_star = new_fisher, new_star
        self.tasks += 1
        self._match = None

    def penalty(self, model: nn.Module) -> Tensor:
        r"""The value :math:`\tfrac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2`, a scalar with a gradient.

        ``DistributedDataParallel(find_unused_parameters=True)`` counts the weights of a head that is not in use as finished
        after the forward pass and refuses this gradient for them; there use `add_gradient` or `pull`.

        Args:
            model: the network being trained; its parameters are matched by name.

        Raises:
            ValueError: parameters missing, of another shape or on another device.

        Implements: eq-ewc-penalty
        """
        model = _fisher.unwrap(model)
        if not self.tasks:
            return _nothing(model)
        parameters, match = self._beside(model)
        return self.strength * (_Quadratic.apply(*match.fisher, *match.star, *parameters) + self.constant)

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> None:
        r"""Adds the penalty's gradient :math:`\lambda F_i (\theta_i - \theta^*_i)` to every ``.grad``.

        The same as ``penalty(model).backward()``, without building a graph. With a ``GradScaler`` call it after
        ``scaler.unscale_(optimizer)``: it adds the gradient of the penalty itself.

        Raises:
            ValueError: parameters missing, of another shape or on another device.

        Implements: eq-ewc-gradient
        """
        if not (self.tasks and self.strength):
            return
        parameters, match = self._beside(model)
        parameters, star, fisher = map(match.trained, (parameters, match.star, match.fisher))
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.is_sparse:  # the springs pull at every row
                p.grad = p.grad.to_dense()
        grads = [p.grad for p in parameters]
        if not grads:
            return
        delta = torch._foreach_sub(parameters, star)
        if all(f.dtype == g.dtype for f, g in zip(fisher, grads)):
            torch._foreach_addcmul_(grads, fisher, delta, value=self.strength)
        else:  # half-precision weights keep a float32 Fisher
            for g, f, d in zip(grads, fisher, delta):
                g.add_(f * d, alpha=self.strength)

    def pull(self, model: nn.Module, step: float | Tensor | Mapping[str, Tensor | float]) -> None:
        r"""The proximal step on the penalty, in place:

        .. math:: \theta_i \leftarrow \frac{\theta_i + s\lambda F_i \theta^*_i}{1 + s\lambda F_i}

        the minimiser of :math:`\tfrac{1}{2s}\|\theta' - \theta\|^2 + \Omega(\theta')`. Call it after the optimiser's
        step. Where the gradient of the penalty is unstable for :math:`s\lambda F > 2`, this is stable for every λ.

        Args:
            model: the network being trained.
            step: s, the learning rate, a number or a tensor with one; or parameter name -> s, a number or a tensor of
                the parameter's shape, for optimisers with a step for each weight, such as Adam.

        Raises:
            ValueError: parameters missing, of another shape or on another device; a single step that is negative or
                not finite; no step for a parameter. Steps by name, and tensors on a GPU, are taken as they are: to look at
                their values would make every step wait for the device.

        Implements: eq-proximal
        """
        if not (self.tasks and self.strength):
            return
        with torch.set_grad_enabled(False):  # `no_grad` takes twice as long, which a small network feels
            parameters, match = self._beside(model)
            if match.springs is None or not match.springs.fresh():
                match.springs = _Springs(match.fisher)
            shares = self._shares(step, match)
            if shares is not None:
                match.approach(parameters, shares)

    def state_dict(self) -> dict:
        """Everything the memory knows, as tensors, numbers and strings: ``torch.load(weights_only=True)`` reads it."""
        return {
            "strength": self.strength,
            "estimator": self.estimator,
            "anchors": self.anchors,
            "decay": self.decay,
            "constant": self.constant,
            "tasks": self.tasks,
            "fisher": dict(self.fisher),
            "theta_star": dict(self.theta_star),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping) -> None:
        """Takes over a `state_dict`, options included.

        Raises:
            ValueError: not the state of an `EWC`; the memory is then as it was.
        """
        expected = self.state_dict().keys()
        if not isinstance(state, Mapping) or set(state) != set(expected):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"This is not the state of an EWC memory: expected {sorted(expected)}, found {found}.")
        new = EWC(state["strength"], estimator=state["estimator"], anchors=state["anchors"], decay=state["decay"])
        fisher, star = state["fisher"], state["theta_star"]
        for part in (fisher, star):
            if not (isinstance(part, Mapping) and all(isinstance(t, Tensor) for t in part.values())):
                raise ValueError("The checkpoint's fisher and theta_star must map names to tensors; it is damaged.")
        if not (isinstance(state["constant"], (int, float)) and isinstance(state["tasks"], int)):
            raise ValueError("The checkpoint's constant and tasks must be numbers; it is damaged.")
        if {n: t.shape for n, t in fisher.items()} != {n: t.shape for n, t in star.items()}:
            raise ValueError("The checkpoint's fisher and theta_star differ in names or shapes; it is damaged.")
        new.constant, new.tasks = float(state["constant"]), int(state["tasks"])
        new.fisher = {name: fisher[name].detach().clone() for name in star}  # both in one order
        new.theta_star = {name: t.detach().clone() for name, t in star.items()}
        self.__dict__.update(new.__dict__)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state to a file, atomically: a kill at any moment leaves the old file or the new one.

        In an initialised process group only rank 0 writes; let the others wait (``torch.distributed.barrier()``)
        before they load.

        Raises:
            FileNotFoundError: no such folder.
        """
        _checkpoint.write(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str | None = None) -> EWC:
        """The memory that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a truncated file, or the file of something else.
        """
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable checkpoint: truncated, not written by EWC.save, or saved on a device that "
                "this machine lacks (then pass device='cpu')."
            ) from error
        memory = cls(0.0)
        memory.load_state_dict(state)
        return memory

    @torch.inference_mode(False)
    def to(self, *args, **kwargs) -> EWC:
        """Moves the stored tensors, as ``Tensor.to`` does; returns the memory itself."""
        self.fisher = {name: t.to(*args, **kwargs) for name, t in self.fisher.items()}
        self.theta_star = {name: t.to(*args, **kwargs) for name, t in self.theta_star.items()}
        self._match = None
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_match": None}  # a copy has a Fisher of its own

    def _shares(self, step: float | Tensor | Mapping[str, Tensor | float], match: _Match) -> list[Tensor] | None:
        """For each parameter the share of the way to its anchor that `pull` goes; None if it stays."""
        if isinstance(step, Mapping):
            missing = [name for name in match.trained(match.names) if name not in step]
            if missing:
                raise ValueError(f"step has no entry for parameter {missing[0]!r}; give one for each, or one number.")
            return match.springs.shares_of_each([step.get(name, 0.0) for name in match.names], self.strength)
        if not (isinstance(step, Tensor) and step.is_cuda) and not (math.isfinite(step) and step >= 0):
            raise ValueError(f"step is a learning rate: a finite number, at least 0; got {step!r}.")
        if isinstance(step, Tensor):
            return match.springs.shares_of_each([step] * len(match.names), self.strength)
        return match.springs.shares(step * self.strength) if step * self.strength else None

    def _beside(self, model: nn.Module) -> tuple[list[Tensor], _Match]:
        """The model's parameters, and what is stored of them in the same order."""
        model = _fisher.unwrap(model)
        match = self._match
        parameters = _found(model, match.routes) if match is not None else None
        if parameters is None or not match.holds(self, parameters):
            parameters = self._matched(model)
            match = self._match = _Match(self, parameters)
        return parameters, match

    def _matched(self, model: nn.Module) -> list[Tensor]:
        """The model's parameters in the order of the anchors, compared with them."""
        if list(self.fisher) != list(self.theta_star) and self.fisher.keys() != self.theta_star.keys():
            raise ValueError("The memory's fisher and theta_star must have the same names; give each parameter both.")
        found = _found(model, _routes(self.theta_star))
        if found is None or len(set(map(id, found))) < len(found):  # missing, tied by now, or named by other rules
            parameters = dict(model.named_parameters())
            found = [parameters.get(name) for name in self.theta_star]
        for p, (name, star) in zip(found, self.theta_star.items()):
            if p is None:
                names = ", ".join(name for name, _ in model.named_parameters())
                raise ValueError(
                    f"The memory holds a parameter {name!r} of shape {tuple(star.shape)} that the model does not have; "
                    f"the model has {names or 'no parameters'}. Use the model that was consolidated."
                )
            if p.shape != star.shape:
                raise ValueError(
                    f"Parameter {name!r} has shape {tuple(p.shape)} in the model and {tuple(star.shape)} in the memory; "
                    "use the model that was consolidated."
                )
            if p.device != star.device:
                raise ValueError(
                    f"Parameter {name!r} is on {p.device} and the memory on {star.device}; call memory.to({p.device})."
                )
        return found


def _nothing(model: nn.Module) -> Tensor:
    """The penalty before the first task: zero, of which a loop may ask for a gradient as of any other; no weight has one."""
    first = next(model.parameters(), torch.zeros(()))
    graph = torch.compiler.is_compiling()  # in whose graph nothing can be made that asks for a gradient
    return torch.zeros((), device=first.device, dtype=first.dtype, requires_grad=not graph)


class _Quadratic(torch.autograd.Function):
    """½ Σ F (θ − θ*)² of lists of tensors (F..., θ*..., θ...): one node instead of three for every parameter."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        third = len(tensors) // 3
        fisher, star, theta = tensors[:third], tensors[third : 2 * third], tensors[2 * third :]
        delta = [t - s for t, s in zip(theta, star)]
        pulls = [f * d for f, d in zip(fisher, delta)]
        halves = [
            torch.dot(pull.flatten(), d.to(pull.dtype).flatten()).to(theta[0].device)
            for pull, d in zip(pulls, delta)
        ]
        return 0.5 * torch.stack(halves).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Differentiable itself, so that Hessians of a penalised loss are right.
        tensors = ctx.saved_tensors
        third = len(tensors) // 3
        fisher, star, theta = tensors[:third], tensors[third : 2 * third], tensors[2 * third :]
        return (*[None] * (2 * third), *[(grad.to(f.device) * f * (p - s)).to(p.dtype) for f, s, p in zip(fisher, star, theta)])


class _Match:
    """What is stored of a model's parameters, in one order, after a comparison with them.

    To compare again at every step of training would take longer than the arithmetic of the step. So `holds` only asks
    whether all that was compared is as it was. Nothing of the model is kept: its parameters are looked up anew.
    """

    def __init__(self, memory: EWC, parameters: list[Tensor]):
        self.names = list(memory.theta_star)
        self.routes = _routes(self.names)
        self.fisher = [memory.fisher[name] for name in self.names]
        self.star = [memory.theta_star[name] for name in self.names]
        self.keys, self.values = _contents(memory.fisher, memory.theta_star)
        self.springs: _Springs | None = None  # what `pull` derives from the Fisher
        self.kinds = _kinds(parameters)
        self.used = [i for i, p in enumerate(parameters) if p.requires_grad]
        self.alike = all(p.dtype == s.dtype == f.dtype for p, s, f in zip(parameters, self.star, self.fisher))
        self.alike = self.alike and len({f.dtype for f in self.fisher}) < 2  # `springs` has one buffer for all

    def holds(self, memory: EWC, parameters: list[Tensor]) -> bool:
        """Is every stored tensor still the same, in the same place, and each parameter of the same kind?"""
        keys, values = _contents(memory.fisher, memory.theta_star)
        return (
            keys == self.keys
            and all(map(is_, values, self.values))
            and len(set(map(id, parameters))) == len(parameters)
            and _kinds(parameters) == self.kinds
        )

    def trained(self, things: list) -> list:
        """Those that belong to parameters that are not frozen."""
        return things if len(self.used) == len(things) else [things[i] for i in self.used]

    def approach(self, parameters: list[Tensor], shares: list[Tensor]) -> None:
        """Moves every weight by its share of the way to its anchor."""
        parameters, star, shares = self.trained(parameters), self.trained(self.star), self.trained(shares)
        if not self.alike:  # converted since, or a Fisher of another precision
            star = [s.to(p.dtype) for s, p in zip(star, parameters)]
            shares = [share.to(p.dtype) for share, p in zip(shares, parameters)]
        if parameters:
            torch._foreach_lerp_(parameters, star, shares)


_version = attrgetter("_version")


def _kinds(parameters: list[Tensor]) -> list[tuple]:
    return [(p.shape, p.dtype, p.device, p.requires_grad) for p in parameters]


def _contents(*stores: dict[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    return [*chain(*stores)], [*chain(*(store.values() for store in stores))]


def _routes(names: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """The names by module: the path from the model to it, and its own names for its parameters."""
    routes: list[tuple[list[str], list[str]]] = []
    for name in names:
        *path, last = name.split(".")
        if not routes or routes[-1][0] != path:
            routes.append((path, []))
        routes[-1][1].append(last)
    return routes


def _found(model: nn.Module, routes: list[tuple[list[str], list[str]]]) -> list[Tensor] | None:
    """The parameters at the end of these routes; None if one of them is not there."""
    found: list[Tensor] = []
    try:
        for path, names in routes:
            module = model
            for part in path:
                module = module._modules[part]
            for name in names:
                p = module._parameters[name]
                if p is None:
                    return None
                found.append(p)
    except (KeyError, AttributeError):  # the latter where a module is None
        return None
    return found


class _Springs:
    r"""The share sλF / (1 + sλF) of the way to the anchor that `EWC.pull` moves each weight.

    Written as 1 / (1 + (1/F) / (sλ)), with 1/F = ∞ where F = 0: two passes over memory that is already there for
    a new rate, none for a constant one. Each device has one flat buffer, of which `views` are the parameters' parts.
    """

    @torch.inference_mode(False)  # buffers made in that mode could not be written outside it
    def __init__(self, fisher: list[Tensor]):
        self.fisher, self.versions = fisher, list(map(_version, fisher))
        self.inverse: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.views: list[Tensor] = [torch.empty(0)] * len(fisher)
        self.factor: float | None = None  # sλ of the shares that the buffers hold
        for device in dict.fromkeys(f.device for f in fisher):
            own = [i for i, f in enumerate(fisher) if f.device == device]
            self.inverse.append(torch.cat([fisher[i].flatten() for i in own]).reciprocal_())
            self.buffers.append(torch.empty_like(self.inverse[-1]))
            parts = self.buffers[-1].split([fisher[i].numel() for i in own])
            for i, part in zip(own, parts):
                self.views[i] = part.view(fisher[i].shape)

    def fresh(self) -> bool:
        """No Fisher was edited in place since."""
        return list(map(_version, self.fisher)) == self.versions

    def shares(self, factor: float) -> list[Tensor]:
        """For one sλ > 0."""
        if factor != self.factor:
            for inverse, buffer in zip(self.inverse, self.buffers):
                limits = torch.finfo(inverse.dtype)
                if limits.tiny <= 1 / factor <= limits.max:
                    one = inverse.new_ones(())
                    torch.add(one, inverse, alpha=1 / factor, out=buffer).reciprocal_()
                else:  # rounded to 0 or ∞ the scale would make NaN
                    buffer.copy_((1 + inverse.double() / factor).reciprocal())
            self.factor = factor
        return self.views

    def shares_of_each(self, steps: Sequence[Tensor | float], strength: float) -> list[Tensor]:
        """For a step of its own for each parameter or weight."""
        self.factor = None
        for view, f, step in zip(self.views, self.fisher, steps):
            view.copy_(f).mul_(step)
        for buffer in self.buffers:
            buffer.mul_(strength).reciprocal_().add_(1.0).reciprocal_()
        return self.views


def _checked(fisher: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Fisher in float32 or better, if it is one of these parameters."""
    if not (isinstance(fisher, Mapping) and all(isinstance(f, Tensor) for f in fisher.values())):
        raise TypeError("The Fisher must be a mapping from the parameters' names to tensors, as fisher.diagonal gives it.")
    for name, f in fisher.items():
        if name not in parameters:
            raise ValueError(f"The Fisher has an entry {name!r}, but the model has no such parameter.")
        if f.shape != parameters[name].shape:
            raise ValueError(
                f"The Fisher of {name!r} has shape {tuple(f.shape)}, the parameter {tuple(parameters[name].shape)}."
            )
        if not torch.isfinite(f).all() or (f < 0).any():
            raise ValueError(f"The Fisher of {name!r} must be finite and not negative.")
    return {name: f.to(dtype=torch.promote_types(f.dtype, torch.float32)) for name, f in fisher.items()}
