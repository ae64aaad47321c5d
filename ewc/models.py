"""The small networks that the chapters train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def mlp(
    features: int,
    hidden: Sequence[int],
    classes: int,
    activation: type[nn.Module] = nn.ReLU,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """A multilayer perceptron that returns logits: the output layer is linear, with no activation after it.

    Args:
        features: number of inputs, such as `task.features`; images `(N, 1, H, W)` are flattened first.
        hidden: widths of the hidden layers; may be empty (softmax regression).
        classes: number of outputs K.
        activation: the module between linear layers.
        seed: makes the initial parameters a function of the seed alone and leaves PyTorch's global generator as it was.

    Raises:
        ValueError: a width is not positive.
    """
    widths = [features, *hidden, classes]
    _require_positive(widths)
    with _seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1])


def _require_positive(widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise ValueError(f"Every layer needs at least one unit, but the widths are {list(widths)}.")


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws inside come from `seed`, and PyTorch's global generator is left as it was; `None` draws from the latter."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
