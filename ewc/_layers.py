"""Sums of squared gradients per example: the engine behind `ewc.fisher`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Engine:
    """Adds up (J^T v)^2 over examples and output vectors, for every parameter that requires a gradient."""

    def __init__(self, model: nn.Module, batch_size: int | None = None):
        self.model = model
        self.wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.wanted:
            raise ValueError("No parameter of the model requires a gradient, so there is nothing to measure.")
        self.device = next(iter(self.wanted.values())).device
        self.totals = {
            name: torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device) for name, p in self.wanted.items()
        }
        self.count = 0
        self.batch_size = batch_size or 256

    def to_model(self, x: Tensor) -> Tensor:
        """Inputs on the model's device and, if they are floating-point numbers, in its precision."""
        dtype = next(iter(self.wanted.values())).dtype
        return x.to(self.device, dtype if x.is_floating_point() else None)

    def chunks(self, x: Tensor) -> Iterable[slice]:
        return [slice(i, i + self.batch_size) for i in range(0, len(x), self.batch_size)]

    def add(self, x: Tensor, vectors: Callable[[Tensor], Sequence[Tensor]]) -> None:
        with torch.no_grad():
            z = self.model(x)
        v = torch.stack([*vectors(z)], 1)
        names = list(self.wanted)
        frozen = {n: p.detach() for n, p in self.model.named_parameters() if n not in self.wanted}

        def squares(params, one, columns):
            def f(p):
                return functional_call(self.model, {**frozen, **p}, (one.unsqueeze(0),)).squeeze(0)

            pull = vjp(f, params)[1]
            return {name: g.square().sum(0) for name, g in vmap(pull)(columns)[0].items()}

        params = {n: p.detach() for n, p in self.wanted.items()}
        size = max(1, 2**24 // sum(p.numel() for p in params.values()) // v.shape[1])
        for i in range(0, len(x), size):
            out = vmap(squares, in_dims=(None, 0, 0))(params, x[i : i + size], v[i : i + size])
            for name in names:
                self.totals[name] += out[name].sum(0)
