r"""Closed forms: the squared gradients of a layer's parameters from its input a and the gradient δ at its output.

A call of a layer has, for each parameter, a rule that says how its gradient for one example follows from a and δ;
what the rules of a parameter's calls have in common decides how the squares are added up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


@functools.cache
def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(eq=False)
class Call:
    """One call of a layer that has a closed form, with what its backward pass needs."""

    layer: nn.Module
    input: Tensor
    shape: torch.Size  # of the output
    edge: GradientEdge  # where δ arrives; taken at once, so that a later in-place operation does not shift it
    source: object | None  # the autograd node that made the input
    version: int = field(init=False)

    def __post_init__(self):
        self.version = self.input._version

    def is_intact(self, examples: int) -> bool:
        """The input still holds what the layer saw, in whole rows for each example."""
        rows = len(self.input) if self.input.dim() else 0
        return self.version == self.input._version and rows and rows % examples == 0 and self.shape[0] == rows

    def signature(self, examples: int) -> tuple:
        # One example alone says nothing about the order of rows, so what it proves counts for one example only.
        return id(self.layer), examples > 1, len(self.input) / examples, self.input.shape[1:], self.shape[1:]


# ---- rules, layer by layer --------------------------------------------------------------------------------------------
# A rule says how the gradient of one parameter of a layer follows from the input a and δ, row by row of their first
# axis. It is one of: an outer product summed over positions, a plain sum, or rows of a table.


@dataclass
class Outer:
    """Gradient = sum over positions of left(δ) rightᵀ; left (R, groups, o, T), right (R, groups, i, T)."""

    right: Tensor
    left: Callable[[Tensor], Tensor]
    swapped: bool = False  # the parameter is laid out as (groups, i, o)

    @property
    def kind(self) -> tuple:
        return ("outer", self.swapped, self.right.shape[1:3])


@dataclass
class Sum:
    """Gradient = sum over positions of scale * δ, or of δ alone; `reduce` sums (R, ...) to (R, *parameter)."""

    reduce: Callable[[Tensor], Tensor]
    scale: Tensor | None = None
    kind = ("sum",)


@dataclass
class Table:
    """Gradient: rows of δ (R, T, width) added at the places ``index`` (R, T) of a table."""

    index: Tensor
    skipped: int | None
    kind = ("table",)


def _linear(layer: nn.Linear, name: str, a: Tensor):
    if a.dim() < 2:
        return None
    if name == "bias":
        return Sum(lambda d: d.flatten(1, -2).sum(1) if d.dim() > 2 else d)
    rows, width = len(a), a.shape[-1]
    return Outer(
        a.reshape(rows, 1, -1, width).transpose(2, 3),
        lambda d: d.reshape(rows, 1, -1, d.shape[-1]).transpose(2, 3),
    )


def _convolution(layer, name: str, a: Tensor):
    if a.dim() != len(layer.kernel_size) + 2:
        return None
    if name == "bias":
        return Sum(lambda d: d.flatten(2).sum(2))
    return _transposed(layer, a) if layer.transposed else _forward(layer, a)


def _forward(layer, a: Tensor) -> Outer:
    padding = _paddings(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a = F.pad(a, padding, mode=mode) if any(padding) else a
    return Outer(_windows(a, layer), lambda d: d.reshape(len(d), layer.groups, d.shape[1] // layer.groups, -1))


def _transposed(layer, a: Tensor) -> Outer:
    # The adjoint of a convolution: input and δ change places.
    padding = [p for p in reversed(layer.padding) for _ in range(2)]
    size = a.shape[2:]
    return Outer(
        a.reshape(len(a), layer.groups, a.shape[1] // layer.groups, -1),
        lambda d: _windows(F.pad(d, padding), layer, size),
        swapped=True,
    )


def _paddings(layer) -> list[int]:
    """As `F.pad` wants them: last axis first, before and after."""
    padding = layer.padding
    if padding == "valid":
        padding = [0] * len(layer.kernel_size)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return [p for t in reversed(totals) for p in (t // 2, t - t // 2)]
    return [p for q in reversed(padding) for p in (q, q)]


def _windows(a: Tensor, layer, size: Sequence[int] | None = None) -> Tensor:
    """What the kernel sees at each position: (R, groups, channels per group x kernel, positions)."""
    dims, groups = len(layer.kernel_size), layer.groups
    for i, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        a = a.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
        if size is not None:
            a = a.narrow(2 + i, 0, size[i])
    a = a.movedim(tuple(range(2, 2 + dims)), tuple(range(-dims, 0)))  # (R, C, *kernel, *positions)
    return a.reshape(len(a), groups, -1, math.prod(a.shape[-dims:]))


def _layer_norm(layer, name: str, a: Tensor):
    shape = tuple(layer.normalized_shape)
    if a.dim() <= len(shape):
        return None
    normalise = F.rms_norm if type(layer) is nn.RMSNorm else F.layer_norm
    return Sum(
        lambda g: g.reshape(len(g), -1, *shape).sum(1) if g.dim() > len(shape) + 1 else g,
        normalise(a, shape, eps=layer.eps) if name == "weight" else None,
    )


def _channel_norm(layer, name: str, a: Tensor):
    if a.dim() < 2:
        return None
    if name == "bias":
        a = None
    elif type(layer) is nn.GroupNorm:
        a = F.group_norm(a, layer.num_groups, eps=layer.eps)
    elif layer.running_mean is not None:
        shape = (1, -1, *[1] * (a.dim() - 2))
        a = (a - layer.running_mean.view(shape)) * (layer.running_var.view(shape) + layer.eps).rsqrt()
    elif isinstance(layer, INSTANCE_NORMS):
        a = F.instance_norm(a, eps=layer.eps)
    else:
        return None
    return Sum(lambda g: g.flatten(2).sum(2) if g.dim() > 2 else g, a)


def _prelu(layer: nn.PReLU, name: str, a: Tensor):
    if a.dim() < 2:
        return None
    if layer.num_parameters == 1:
        return Sum(lambda g: g.flatten(1).sum(1, True), a.clamp(max=0))
    return Sum(lambda g: g.flatten(2).sum(2) if g.dim() > 2 else g, a.clamp(max=0))


def _embedding(layer: nn.Embedding, name: str, a: Tensor):
    return None if layer.scale_grad_by_freq or a.dim() < 1 else Table(a.reshape(len(a), -1), layer.padding_idx)


INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
RULES = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, *INSTANCE_NORMS), _channel_norm),
}


# ---- squares of these gradients, added up over examples and vectors ----------------------------------------------------


class Pointwise:
    """One call, one position: the squares of δ add up over the vectors, and one product ends it."""

    def __init__(self, rule: Outer | Sum):
        self.rule = rule

    def finish(self, squared: Tensor) -> Tensor:
        if isinstance(self.rule, Outer):
            a = self.rule.right.flatten(1).to(squared.dtype)
            return squared.T @ a.square()
        if self.rule.scale is not None:
            squared = squared * self.rule.scale.to(squared.dtype).square()
        return squared.sum(0)


class Product:
    """Squares of outer products. All calls of the parameter count as further positions of the same example."""

    def __init__(self, rules: list[Outer], examples: int, budget: int):
        self.rules, self.examples, self.budget = rules, examples, budget
        self.right = self._by_example([r.right for r in rules])
        self.waiting: list[Tensor] = []
        self.total: Tensor | None = None

    def _by_example(self, parts: list[Tensor]) -> Tensor:
        """(R, g, o, T) of each call -> (examples, g, o, all positions)."""
        parts = [
            p if len(p) == self.examples
            else p.unflatten(0, (self.examples, -1)).movedim(1, -2).flatten(-2)
            for p in parts
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def add(self, deltas: list[Tensor]) -> None:
        self.waiting.append(self._by_example([rule.left(d) for rule, d in zip(self.rules, deltas)]))
        if sum(d.numel() for d in self.waiting) > self.budget:
            self._flush()

    def _flush(self) -> None:
        if not self.waiting:
            return
        left = torch.stack(self.waiting, 2) if len(self.waiting) > 1 else self.waiting[0].unsqueeze(2)
        n, groups, vectors, o, _ = left.shape
        i = self.right.shape[2]
        dtype = torch.promote_types(left.dtype, self.right.dtype)  # they differ under autocast inside the model
        left, right = left.flatten(2, 3).to(dtype), self.right.to(dtype)
        step = max(1, self.budget // (groups * vectors * o * i))
        for s in range(0, n, step):
            g = left[s : s + step] @ right[s : s + step].transpose(2, 3)  # (n, groups, vectors * o, i)
            part = g.unflatten(2, (vectors, o)).to(accumulator(g.dtype)).square_().sum((0, 2))
            self.total = part if self.total is None else self.total.add_(part)
        self.waiting = []

    def finish(self) -> Tensor:
        self._flush()
        return self.total.transpose(1, 2) if self.rules[0].swapped else self.total


class Added:
    """Squares of plain sums over positions and calls."""

    def __init__(self, rules: list[Sum], examples: int):
        self.rules, self.examples = rules, examples
        self.total: Tensor | None = None

    def add(self, deltas: list[Tensor]) -> None:
        parts = [rule.reduce(d if rule.scale is None else d * rule.scale) for rule, d in zip(self.rules, deltas)]
        g = sum(p if len(p) == self.examples else p.unflatten(0, (self.examples, -1)).sum(1) for p in parts)
        part = g.to(accumulator(g.dtype)).square().sum(0)
        self.total = part if self.total is None else self.total.add_(part)

    def finish(self) -> Tensor:
        return self.total


class Scattered:
    """Squares of rows of a table, after the rows that one example uses more than once have been added."""

    def __init__(self, rules: list[Table], examples: int, height: int):
        self.examples = examples
        self.height, self.skipped = height, rules[0].skipped
        index = torch.cat([r.index.reshape(examples, -1) for r in rules], 1)
        example = torch.arange(examples, device=index.device).unsqueeze(1)
        self.key, self.place = torch.unique(index + height * example, return_inverse=True)
        self.squared: Tensor | None = None

    def add(self, deltas: list[Tensor]) -> None:
        d = torch.cat([d.reshape(self.examples, -1, d.shape[-1]) for d in deltas], 1).flatten(0, 1)
        d = d.to(accumulator(d.dtype))  # a token that comes hundreds of times
        rows = d.new_zeros(len(self.key), d.shape[1]).index_add_(0, self.place.flatten(), d).square_()
        self.squared = rows if self.squared is None else self.squared.add_(rows)

    def finish(self) -> Tensor:
        total = self.squared.new_zeros(self.height, self.squared.shape[1])
        total.index_add_(0, self.key % self.height, self.squared)
        if self.skipped is not None:
            total[self.skipped] = 0
        return total


def closed_forms(calls: dict[str, list[Call]], parameters: dict[str, Tensor], examples: int, budget: int) -> dict:
    """For every parameter whose calls all have a rule of one kind: the object that adds up its squares."""
    forms = {}
    for name, own in calls.items():
        p = parameters[name]
        if not all(call.is_intact(examples) for call in own):
            continue
        rules = []
        for call in own:
            local = [k for k, q in call.layer._parameters.items() if q is p and k in ("weight", "bias")]
            rules += [RULES[type(call.layer)](call.layer, k, call.input) for k in local]
        if len(rules) != len(own) or None in rules or len({rule.kind for rule in rules}) != 1:
            continue
        single = len(own) == 1 and own[0].shape[:-1] == (examples,) and p.shape[:1] == own[0].shape[-1:]
        if single and not isinstance(rules[0], Table):
            forms[name] = Pointwise(rules[0])
        elif isinstance(rules[0], Outer):
            forms[name] = Product(rules, examples, budget)
        elif isinstance(rules[0], Sum):
            forms[name] = Added(rules, examples)
        elif len({rule.skipped for rule in rules}) == 1:
            forms[name] = Scattered(rules, examples, len(p))
    return forms
