r"""The diagonal of the Fisher information of a network with a softmax output.

One example :math:`x` with logits :math:`z = f_\theta(x)` and :math:`p = \mathrm{softmax}(z)` has the Fisher
:math:`J^\top (\mathrm{diag}\,p - pp^\top) J`, where :math:`J = \partial z / \partial\theta`. Every estimator here
writes the matrix in the middle, or an unbiased guess of it, as :math:`\sum_k v_k v_k^\top`, so that the diagonal is
:math:`\sum_k (J^\top v_k)^2`: a sum of squared gradients, one backward pass for each output vector :math:`v_k`.
This module chooses the vectors; ``_layers`` pushes them back and squares, example by example, with the closed forms
of ``_closed`` where a layer has one.

With several labels per example (logits of shape ``(N, C, *positions)``) the example's log probability is the sum
over positions, and labels at different positions are independent given the input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import length_hint

import torch
import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ewc import _layers
from ewc._closed import accumulator

ESTIMATORS = ("exact", "sampled", "probe", "empirical", "argmax")
IGNORED = -100  # the label that torch's cross-entropy skips too: padding in dense prediction


def diagonal(
    model: nn.Module,
    data: Dataset | DataLoader | Sequence[Tensor],
    estimator: str = "exact",
    *,
    tolerance: float = 0.0,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    classes: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of ``model`` on ``data``, the mean per example.

    .. math:: F_{ii} = \frac1N \sum_{n=1}^N \sum_k \bigl(J_n^\top v_{nk}\bigr)_i^2

    The estimators differ in the output vectors :math:`v_k` alone (:math:`p` is the softmax of the logits and
    :math:`e_c` the unit vector of class :math:`c`):

    - ``"exact"``: the expectation over the model's own labels; C − 1 vectors, a square root of
      :math:`\mathrm{diag}\,p - pp^\top`. This is the Fisher information.
    - ``"sampled"``: :math:`e_y - p` with one label drawn, :math:`y \sim p`. Unbiased for ``"exact"``.
    - ``"probe"``: :math:`\sum_c \varepsilon_c \sqrt{p_c}\,(e_c - p)` with one random sign for each class. Unbiased
      for ``"exact"``; the variance for one example is at most twice the squared mean.
    - ``"empirical"``: :math:`e_y - p` with the label of the data. Not the Fisher information.
    - ``"argmax"``: :math:`e_y - p` with the most probable label; biased, kept for comparison.

    The pass runs in eval mode. Parameters, gradients, buffers, hooks and train/eval mode are left as they were. In
    an initialised process group each rank passes its own shard, and every rank gets the mean over all of them.

    Args:
        model: any module that maps inputs ``(N, ...)`` to logits ``(N, C)`` or ``(N, C, *positions)``, one example
            independent of the others.
        data: a dataset or loader of ``(inputs, labels)``, or the pair of tensors itself. Labels are integers of
            shape ``(N,)`` or ``(N, *positions)``; in the latter, positions labelled -100 do not count.
        estimator: one of the five above.
        tolerance: for ``"exact"`` only: the share of the total trace of :math:`\mathrm{diag}\,p - pp^\top` that may
            be left out, smallest vectors first. The result is then too small by about this relative amount.
        batch_size: examples in one pass; chosen by memory if not given. The result does not depend on it.
        generator: source of the random labels and signs, on any device; torch's default on the CPU if not given.
        classes: the classes that the softmax runs over, for a head chosen by task; all of them if not given.

    Returns:
        Parameter name -> tensor of its shape, for every parameter that requires a gradient; float32 where the
        parameter has half precision.

    Raises:
        ValueError: unknown estimator, empty data, labels out of range, logits of the wrong shape or not finite,
            nothing to differentiate, a model that mixes the examples of a batch or is random in eval mode.
        TypeError: data of another kind, or that does not hold pairs of tensors.
        RuntimeError: a layer whose gradients per example cannot be had; the message names the parameter.

    Implements: eq-fisher-exact, eq-fisher-sampled, eq-fisher-probe, eq-fisher-empirical, eq-fisher-argmax

    References:
        Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, 2017. Kunstner, Balles and
        Hennig, *Limitations of the empirical Fisher approximation for natural gradient descent*, 2019. The probe:
        Martens, Sutskever and Swersky, *Estimating the Hessian by back-propagating curvature*, 2012. Squares from
        inputs and backpropagated vectors: Dangel, Kunstner and Hennig, *BackPACK: packing more into backprop*, 2020.
    """
    _check_estimator(estimator)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is a share of the trace, at least 0 and below 1; got {tolerance!r}.")
    if tolerance and estimator != "exact":
        raise ValueError(f"tolerance shortens the exact estimator only; {estimator!r} takes a single vector.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size!r}.")

    model = unwrap(model)
    with _untouched(model), _progress("Fisher", _length(data), "examples") as bar:
        engine = _layers.Engine(model, batch_size)
        enter = _layers.entrance(model)
        for x, y in _blocks(data):
            # Labels as long integers: an unsigned 156 would be equal to -100.
            x, y = enter(x), y.to(engine.device, None if y.is_floating_point() else torch.long)
            shortlist = None
            if tolerance:
                shortlist = _Shortlist(engine, x, y, classes, tolerance)
            for rows in shortlist.chunks(engine) if shortlist else engine.chunks(x):
                softmax = _Softmax(engine.forward(x[rows]), y[rows], classes)
                if estimator == "exact":
                    columns = shortlist and shortlist.columns(rows)
                    engine.backward(_Columns(softmax, columns))
                else:
                    engine.backward([softmax.vector(estimator, generator)])
                bar.update(len(softmax.z))
            engine.count += len(x)
        return _mean(engine)


def _check_estimator(name: str) -> None:
    if name not in ESTIMATORS:
        raise ValueError(f"Unknown estimator {name!r}; choose one of {', '.join(map(repr, ESTIMATORS))}.")


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself inside DistributedDataParallel, DataParallel or torch.compile: same parameters, plain names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


# ---- output vectors -------------------------------------------------------------------------------------------------


class _Softmax:
    """The output distribution of a batch, and the vectors of its single-vector estimators.

    Works on logits brought to the shape (n, classes, positions), at least in float32. Every vector sums to zero over
    the classes, so its largest entry is computed as minus the sum of the others: near interpolation 1 - p would
    cancel and lose all digits.
    """

    def __init__(self, z: Tensor, labels: Tensor, classes: Sequence[int] | Tensor | None):
        _check_shapes(z, labels)
        self.z = z.detach()
        self.classes = class_index(classes, z)
        _check_values(self.z, labels, self.classes)
        z = self.z.flatten(2) if z.dim() > 2 else self.z.unsqueeze(-1)
        z = z if self.classes is None else z[:, self.classes]
        self.log_p = z.to(accumulator(z.dtype)).log_softmax(1)
        self.labels = labels.flatten(1) if labels.dim() > 1 else labels.unsqueeze(-1)
        # Padding exists in dense prediction only; elsewhere -100 is a label out of range.
        self.counted = self.labels != IGNORED if labels.dim() > 1 and not labels.is_floating_point() else None

    def vector(self, estimator: str, generator: torch.Generator | None) -> Tensor:
        """The one vector of "sampled", "probe", "empirical" or "argmax"; shape of the logits."""
        if estimator == "probe":
            # A sum of the columns sqrt(p_c) (e_c - p), each with its own sign.
            signed = self.log_p.div(2).exp() * (_random(self.log_p, generator) < 0.5).mul(2).sub(1)
            return self.restore(_balanced(signed - self.log_p.exp() * signed.sum(1, True), self.log_p.argmax(1, True)))
        if estimator == "sampled":
            # Gumbel's trick, in double precision: true also to probabilities far below those of float32's grid.
            noise = -_random(self.log_p.double(), generator).log()
            y = (self.log_p - noise.log()).argmax(1, True)
        elif estimator == "empirical":
            y = self._position_of_labels()
        else:
            y = self.log_p.argmax(1, True)
        return self.restore(_balanced(-self.log_p.exp(), y))

    def restore(self, v: Tensor) -> Tensor:
        """A vector over (n, chosen classes, positions) as one over the model's logits."""
        if self.counted is not None:
            v = v * self.counted.unsqueeze(1)
        v = v.to(self.z.dtype)
        if self.classes is not None:
            full = v.new_zeros(len(v), self.z.shape[1], v.shape[2])
            v = full.index_copy_(1, self.classes, v)
        return v.reshape(self.z.shape)

    def _position_of_labels(self) -> Tensor:
        y = self.labels if self.counted is None else self.labels.masked_fill(~self.counted, 0)
        if y.is_floating_point():
            raise ValueError('estimator "empirical" needs integer labels; the data hold floating-point targets.')
        y = y.long()  # an index of bytes would be taken for a mask
        if self.classes is not None:
            place = torch.full((self.z.shape[1],), -1, device=y.device)
            place[self.classes] = torch.arange(len(self.classes), device=y.device)
            y = place[y]
            if (y if self.counted is None else y[self.counted]).lt(0).any():
                raise ValueError(f"Some labels are outside the classes given: {self.classes.tolist()}.")
        return y.clamp(min=0).unsqueeze(1)


class _Columns(Sequence):
    r"""The C - 1 columns of a square root of diag(p) - pp^T, computed one at a time.

    With u = sqrt(p), m the most probable class and w = u + e_m, the matrix I - w w^T / (1 + u_m) is a Householder
    reflection that maps e_m to -u. Hence diag(u) times it is a square root of diag(p) whose column m is -p; without
    that column it is a square root of diag(p) - pp^T. Column j is u_j (e_j + q), with q_m = -u_m and
    q_i = -p_i / (1 + u_m) elsewhere. As p_j <= 1/2 for j != m, no entry suffers from cancellation.

    Implements: eq-householder-root
    """

    def __init__(self, softmax: _Softmax, chosen: Tensor | None = None):
        self.softmax = softmax
        log_p = softmax.log_p
        self.u = log_p.div(2).exp()  # (n, C, T)
        self.top = log_p.argmax(1, True)  # (n, 1, T)
        u_top = self.u.gather(1, self.top)
        self.q = (-log_p.exp() / (1 + u_top)).scatter(1, self.top, -u_top)
        self.chosen = chosen
        self.ready: dict[int, Tensor] = {}
        self.positions = range(log_p.shape[2])
        if softmax.counted is not None:
            self.positions = softmax.counted.any(0).nonzero().flatten().tolist()

    def __len__(self) -> int:
        return self.chosen.shape[1] if self.chosen is not None else len(self.positions) * (self.u.shape[1] - 1)

    def __getitem__(self, k: int) -> Tensor:
        if not 0 <= k < len(self):
            raise IndexError(k)
        if self.u.shape[2] > 1:
            return self._columns(k, k + 1)[0]
        if k not in self.ready:  # made many at a time: a small operation costs more than its arithmetic
            stop = min(len(self), k + max(1, _layers.SMALL // self.u.numel()))
            self.ready = dict(zip(range(k, stop), self._columns(k, stop)))
        return self.ready[k]

    def _columns(self, start: int, stop: int) -> list[Tensor]:
        n, classes, positions = self.u.shape
        if self.chosen is not None:
            index = self.chosen[:, start:stop]
            j, t = index // positions, index % positions
        else:
            k = torch.arange(start, stop, device=self.u.device)
            t = torch.tensor(self.positions, device=k.device)[k // (classes - 1)].expand(n, -1)
            j = k % (classes - 1)
            top = self.top[:, 0].gather(1, t)
            j = torch.where(top == j, classes - 1, j)  # the last class stands in for the top one
        rows = torch.arange(n, device=j.device).unsqueeze(1)
        u = self.u[rows, j, t]  # (n, vectors)
        column = u.T.unsqueeze(2) * self.q[rows, :, t].transpose(0, 1)  # (vectors, n, C)
        column.scatter_add_(2, j.T.unsqueeze(2), u.T.unsqueeze(2))
        if positions == 1:
            return [self.softmax.restore(c.unsqueeze(2)) for c in column]
        v = torch.zeros_like(self.u)
        v[rows[:, 0], :, t[:, 0]] = column[0]
        return [self.softmax.restore(v)]

    def weights(self) -> Tensor:
        """Squared length of every column, shape (n, C * T); 0 in the place of the column that is left out."""
        w = self.u.square() * (1 + 2 * self.q + self.q.square().sum(1, True))
        w = w.scatter(1, self.top, 0)
        return (w if self.softmax.counted is None else w * self.softmax.counted.unsqueeze(1)).flatten(1)


class _Shortlist:
    """The columns that hold all but a share ``tolerance`` of the trace."""

    def __init__(self, engine: _layers.Engine, x: Tensor, y: Tensor, classes, tolerance: float):
        with torch.no_grad():
            weights = torch.cat([
                _Columns(_Softmax(engine.forward(x[rows]), y[rows], classes)).weights() for rows in engine.chunks(x)
            ])
        ordered = weights.flatten().sort().values
        left_out = ordered.cumsum(0, dtype=torch.float64)
        smallest = ordered[torch.searchsorted(left_out, tolerance * left_out[-1])]
        self.weights = weights
        self.numbers = (weights >= smallest).sum(1)

    def chunks(self, engine: _layers.Engine) -> Iterator[Tensor]:
        """Examples with the same number of columns, so that no pass is wasted; those without any are left out."""
        for number in self.numbers.unique().tolist():
            if number:
                yield from (self.numbers == number).nonzero().flatten().split(engine.batch_size)

    def columns(self, rows: Tensor) -> Tensor:
        """Indices of the columns of these examples, shape (n, number)."""
        return self.weights[rows].topk(int(self.numbers[rows[0]]), dim=1).indices


def _balanced(v: Tensor, entry: Tensor) -> Tensor:
    """Sets the given entry so that each vector sums to zero over the classes."""
    v = v.scatter(1, entry, 0)
    return v.scatter(1, entry, -v.sum(1, True))


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in (0, 1]; drawn where the generator lives."""
    device = generator.device if generator is not None else "cpu"
    return (1 - torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device)).to(like.device)


# ---- checks and housekeeping ----------------------------------------------------------------------------------------


def _check_shapes(z: Tensor, labels: Tensor) -> None:
    if z.dim() < 2 or z.shape[0] != len(labels):
        raise ValueError(
            f"The model returned shape {tuple(z.shape)} for {len(labels)} examples; it must return logits of shape "
            "(examples, classes) or (examples, classes, *positions)."
        )
    if z.shape[1] < 2:
        raise ValueError("The model has one output; a softmax needs at least two classes (axis 1 of the logits).")
    if labels.shape[1:] != z.shape[2:]:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(z.shape)}; as in torch's "
            "cross_entropy, axis 1 of the logits runs over the classes and the other axes are those of the labels."
        )


def _check_values(z: Tensor, labels: Tensor, classes: Tensor | None) -> None:
    used = z if classes is None else z[:, classes]  # the others may be masked, with -inf
    sound = [used.sum(dtype=torch.float64)]  # finite if all of them are
    if not labels.is_floating_point():
        in_range = (labels >= 0) & (labels < z.shape[1])
        sound.append((in_range if labels.dim() == 1 else in_range | (labels == IGNORED)).all().double())
    total, *in_range = _layers.numbers(sound)
    if not math.isfinite(total):
        raise ValueError(
            "The model's logits are not finite; check its weights and the scale of the inputs. If it masks classes with "
            "-inf, list the others as classes."
        )
    if not all(in_range):
        used = labels if labels.dim() == 1 else labels[labels != IGNORED]
        raise ValueError(
            f"Labels run from {int(used.min())} to {int(used.max())}, but the model has {z.shape[1]} classes: "
            f"they must lie between 0 and {z.shape[1] - 1}"
            + (f", or be {IGNORED} at positions that do not count." if labels.dim() > 1 else ".")
        )


def class_index(classes: Sequence[int] | Tensor | None, z: Tensor, least: int = 2) -> Tensor | None:
    """The classes that the softmax over logits ``z`` runs over, checked, ``least`` or more; None for all of them."""
    if classes is None:
        return None
    index = torch.as_tensor(classes if isinstance(classes, Tensor) else list(classes), device=z.device)
    if index.dtype == torch.bool and index.shape == z.shape[1:2]:
        index = index.nonzero().flatten()
    ok = index.dim() == 1 and not index.is_floating_point() and index.dtype != torch.bool and len(index) >= least
    if not ok or index.unique().numel() < len(index) or index.min() < 0 or index.max() >= z.shape[1]:
        raise ValueError(
            f"classes must list at least {'two different indices' if least > 1 else 'one index, none twice,'} "
            f"between 0 and {z.shape[1] - 1}; got {classes!r}."
        )
    return index.long()


def _blocks(data) -> Iterator[tuple[Tensor, Tensor]]:
    """The data as pairs of tensors, in as few blocks as they come."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data):
        data = [tuple(data)]
    elif isinstance(data, Dataset):
        own = torch.Generator(torch.get_default_device())  # torch's stays as it is
        data = DataLoader(data, batch_size=512, generator=own)
    elif not isinstance(data, DataLoader):
        raise TypeError(f"data must be a Dataset, a DataLoader or a pair of tensors; got {type(data).__name__}.")
    for block in data:
        if not (isinstance(block, (tuple, list)) and len(block) == 2 and all(isinstance(b, Tensor) for b in block)):
            raise TypeError("data must hold pairs (inputs, labels), each of them one tensor with an axis of examples.")
        x, y = block
        if not (x.dim() and y.dim() and len(x) == len(y)):
            raise ValueError(
                f"Inputs {tuple(x.shape)} and labels {tuple(y.shape)} must share their first axis, the examples."
            )
        if len(x):
            yield x, y


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _add_over_processes(*totals: Tensor) -> None:
    """Replaces each tensor by its sum over the processes of the group, if there is one."""
    if _distributed():
        for total in totals:
            torch.distributed.all_reduce(total)


def _mean(engine: _layers.Engine) -> dict[str, Tensor]:
    """Sums divided by the count, both over all the processes of the group."""
    count = torch.tensor(engine.count, dtype=torch.int64, device=engine.device)
    _add_over_processes(count, *engine.totals.values())
    fisher = dict(zip(engine.totals, torch._foreach_div(list(engine.totals.values()), count)))
    counted, *traces = _layers.numbers([count.double(), *(value.sum(dtype=torch.float64) for value in fisher.values())])
    if not counted:
        raise ValueError("The data hold no example; the Fisher information is a mean over at least one.")
    for name, trace in zip(fisher, traces):
        if not math.isfinite(trace):
            raise ValueError(f"The Fisher information of {name!r} is not finite; the gradients overflow.")
    return fisher


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients on and without hooks of parameters, which change gradients; puts back modes, weights,
    buffers, attributes and hooks, whatever happens inside."""
    modules = list(model.modules())
    weights = [(p, p.detach().clone(), p._backward_hooks) for p in model.parameters()]
    before = [(module, module.training, dict(vars(module)), dict(module._buffers)) for module in modules]
    contents = [
        (b, None if b.is_inference() else b._version, b.clone())  # one made in that mode has no version
        for module in modules
        for b in module._buffers.values()
        if b is not None
    ]
    try:
        for p, _, hooks in weights:
            if hooks:
                p._backward_hooks = None
        _evaluate(modules)
        with torch.inference_mode(False), torch.enable_grad(), _full_precision(_layers.recurrent(model)):
            yield
    finally:
        for p, value, hooks in weights:
            if hooks:
                p._backward_hooks = hooks
            if not p.is_inference():
                p.data.copy_(value)  # some layers keep their weights in bounds whenever they run
        for module, training, attributes, buffers in before:
            module.training = training
            if isinstance(module, torch.jit.ScriptModule):
                for key, buffer in buffers.items():
                    module._buffers[key] = buffer
                continue
            _put_back([(module, attributes)])  # what the forward pass left there, too: caches and whether they are filled
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, copy in contents:
                if version is not None and buffer._version != version:
                    buffer.copy_(copy)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode, and what a `train` of its own had set."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    attributes = [(m, dict(vars(m))) for module in _with_own_train(modules) for m in module.modules()]
    try:
        _evaluate(modules)
        yield
    finally:
        _put_back(attributes)
        for module, mode in modes:
            module.training = mode


def _put_back(attributes: list[tuple[nn.Module, dict]]) -> None:
    for module, values in attributes:
        vars(module).clear()
        vars(module).update(values)


def _with_own_train(modules: list[nn.Module]) -> list[nn.Module]:
    return [m for m in modules if type(m).train is not nn.Module.train and not isinstance(m, torch.jit.ScriptModule)]


def _evaluate(modules: list[nn.Module]) -> None:
    """Eval mode; of what a model's own `train` does besides, all but changes of the weights, such as merged adapters."""
    for module in modules:
        module.training = False
    for module in _with_own_train(modules):
        weights = [(p, p.detach().clone()) for p in module.parameters()]
        attributes = [(m, dict(vars(m))) for m in module.modules()]
        module.train(False)
        if not all(torch.equal(p, before) for p, before in weights):
            for p, before in weights:
                p.data.copy_(before)
            _put_back(attributes)


@contextmanager
def _full_precision(recurrent: bool) -> Iterator[None]:
    """Products and convolutions in full float32, also under autocast and where the user allows TF32, cuDNN's default,
    which keeps three digits. And no cuDNN for recurrent layers, of which it has no backward pass in eval mode."""
    cudnn, kinds = torch.backends.cudnn, (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = cudnn.enabled, [kind.fp32_precision for kind in kinds]
    try:
        cudnn.enabled = cudnn.enabled and not recurrent
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        cudnn.enabled = before[0]
        for kind, precision in zip(kinds, before[1]):
            kind.fp32_precision = "none"  # as the general setting says, if that is what it was
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


def _progress(what: str, total: int | None, unit: str) -> tqdm.tqdm:
    """A progress bar, on a terminal only and only after three seconds."""
    return tqdm.tqdm(total=total, desc=what, unit=f" {unit}", delay=3, leave=False, disable=not sys.stderr.isatty())


def _length(data) -> int | None:
    """How many examples; None for what has no length, such as a single number: `_blocks` says what is wrong with it."""
    first = data[0] if isinstance(data, (tuple, list)) and data else getattr(data, "dataset", data)
    return length_hint(first) or None
