"""The small networks that the chapters train; they return logits: nothing follows the last linear layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

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
    """A multilayer perceptron: linear layers with an activation between them, none after the last.

    Args:
        features: number of inputs, such as ``task.features``; images ``(N, 1, H, W)`` are flattened first.
        hidden: widths of the hidden layers; may be empty (softmax regression).
        classes: number of outputs K.
        activation: the module between linear layers.
        seed: makes the initial parameters a function of the seed alone and leaves PyTorch's global generator
            as it was.

    Raises:
        ValueError: a width is not positive.
    """
    widths = [features, *hidden, classes]
    _require_positive(widths)
    with _seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        return nn.Sequential(*layers[:-1])


def convnet(
    shape: tuple[int, int, int], classes: int, channels: Sequence[int] = (16, 32), *, seed: int | None = None
) -> nn.Sequential:
    """A small convolutional network: 3×3 convolutions, each with ReLU and 2×2 pooling, then one linear layer.

    Args:
        shape: ``(channels, H, W)`` of an image, such as ``task.shape``.
        classes: number of outputs K.
        channels: output channels of each convolution; every one of them halves the image.
        seed: as for ``mlp``.

    Raises:
        ValueError: a width is not positive, or the image is too small to be halved that often.
    """
    _require_positive([*shape, *channels, classes])
    inputs, height, width = shape
    height, width = height >> len(channels), width >> len(channels)
    if height < 1 or width < 1:
        raise ValueError(
            f"Images of {shape[1]}×{shape[2]} pixels cannot be halved {len(channels)} times; use fewer."
        )
    with _seeded(seed):
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *channels]):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        last = (channels or [inputs])[-1]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(last * height * width, classes))


def _require_positive(widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise ValueError(f"Every layer needs at least one unit, but the widths are {list(widths)}.")


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws come from ``seed`` and leave PyTorch's global generator alone; None draws from the latter."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
