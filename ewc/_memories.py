"""Memories as the training loop uses them: one beside its model, or those of many runs on stacked parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kfac import KFAC, _shrunk
from .relatives import SynapticIntelligence


class Single:
    """A memory and its model, as the loop sees them."""

    def __init__(self, model: nn.Module, memory) -> None:
        self.model, self.memory = model, memory

    def record(self) -> None:
        """Synaptic intelligence watches the task's own gradient along the way; other memories do not."""
        if hasattr(self.memory, "record"):
            self.memory.record(self.model)

    def path(self) -> list[Tensor]:
        """What synaptic intelligence notes on its way."""
        if not isinstance(self.memory, SynapticIntelligence):
            return []
        self.model.zero_grad()
        self.memory.record(self.model)  # without a gradient: the path begins here, or goes on
        return [t for part in self.memory._path.values() for t in part.values()]

    def add_gradient(self) -> None:
        self.memory.add_gradient(self.model)

    def pull(self, step) -> None:
        self.memory.pull(self.model, step)


class Stacked:
    """R quadratic memories on stacked parameters: the penalties of all runs in a few element-wise operations."""

    def __init__(self, parameters: dict[str, Tensor], memories: Sequence) -> None:
        self.names, self.tensors = list(parameters), [p.detach() for p in parameters.values()]
        self.parameters = list(parameters.values())
        self.weights = [torch.zeros_like(p) for p in self.tensors]  # lambda * F, stacked as the parameters are
        self.anchors = [p.clone() for p in self.tensors]
        self.inverse: list[Tensor] = []  # 1 / (lambda * F), made when it is first asked for
        self.shares: list[Tensor] = []  # memory that `pull` need not ask for at each step
        for name, weight, anchor in zip(self.names, self.weights, self.anchors):
            for r, memory in enumerate(memories):
                if memory is not None and name in memory.fisher:  # one that it never saw is free, as in `fit`
                    weight[r] = memory.strength * memory.fisher[name]
                    anchor[r] = memory.theta_star[name]

    def record(self) -> None:
        """Quadratic memories only: nothing watches the way."""

    def add_gradient(self) -> None:
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        moved = torch._foreach_sub(self.tensors, self.anchors)
        torch._foreach_addcmul_([p.grad for p in self.parameters], self.weights, moved)

    def pull(self, step: float | Tensor | dict[str, Tensor]) -> None:
        if not self.inverse:
            self.inverse = [w.reciprocal() for w in self.weights]
            self.shares = [torch.empty_like(w) for w in self.weights]
        for name, inverse, share in zip(self.names, self.inverse, self.shares):  # w / (1 + w) = 1 / (1 + 1 / w)
            torch.div(inverse, step[name] if isinstance(step, dict) else step, out=share)
        torch._foreach_add_(self.shares, 1.0)
        torch._foreach_reciprocal_(self.shares)
        torch._foreach_lerp_(self.tensors, self.anchors, self.shares)


class Kronecker:
    """R memories with one pair of Kronecker factors for each layer, on stacked parameters: `KFAC.pull` for all runs.

    The anchors, bases and stiffnesses are stacked and fixed: a graph may hold them.
    """

    def __init__(self, parameters: dict[str, Tensor], memories: Sequence[KFAC]) -> None:
        self.layers = []
        for layer in memories[0].tasks[0]:
            prefix = f"{layer}." if layer else ""
            weight, bias = (parameters.get(prefix + key) for key in ("weight", "bias"))
            U, V, curvatures = (torch.stack(parts) for parts in zip(*(memory._basis(layer) for memory in memories)))
            strengths = curvatures.new_tensor([memory.strength for memory in memories])
            anchor = torch.stack([memory._anchor(layer) for memory in memories])
            fixed = anchor, U, V, strengths[:, None, None] * curvatures
            kind = torch.promote_types(weight.dtype, torch.float32)  # sums of products overflow in half precision
            own = weight.detach(), None if bias is None else bias.detach()
            self.layers.append((*own, *(part.to(weight.device, kind) for part in fixed)))

    def record(self) -> None:
        """Nothing watches the way."""

    @torch.no_grad()
    def pull(self, step: float | Tensor) -> None:
        for weight, bias, anchor, U, V, stiffness in self.layers:
            rows = weight.flatten(2)
            delta = (rows if bias is None else torch.cat([rows, bias[:, :, None]], 2)) - anchor
            place = anchor + _shrunk(delta, U, V, step * stiffness)
            weight.copy_(place[:, :, : rows.shape[2]].view_as(weight))
            if bias is not None:
                bias.copy_(place[:, :, -1])
