"""Models: shapes, linear outputs, initial values that depend on the seed alone."""

import pytest
import torch
from torch import nn

from ewc import models

MAKERS = {
    "mlp": lambda seed: models.mlp(64, [7, 5], 3, seed=seed),
    "convnet": lambda seed: models.convnet((1, 8, 8), 3, (2, 4), seed=seed),
}
make = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@make
def test_logits_for_every_image(maker):
    model = maker(0)
    logits = model(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (6, 3)
    assert (logits < 0).any() and (logits > 0).any()  # no ReLU after the last layer


@make
def test_the_seed_decides_alone(maker):
    torch.manual_seed(1)
    first = maker(5)
    torch.manual_seed(2)
    assert flat(maker(5)).equal(flat(first))
    assert not flat(maker(6)).equal(flat(first))


@make
def test_the_global_generator_is_left_alone(maker):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    maker(5)
    assert torch.rand(3).equal(expected)


@make
def test_without_a_seed_the_global_generator_decides(maker):
    torch.manual_seed(1)
    first, second = maker(None), maker(None)
    assert not flat(first).equal(flat(second))
    torch.manual_seed(1)
    assert flat(maker(None)).equal(flat(first))


def test_mlp_is_the_layers_in_order():
    model = models.mlp(784, [256, 100], 10, nn.Tanh)
    kinds = [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [type(layer) for layer in model] == kinds
    assert [tuple(p.shape) for p in model.parameters()] == [
        (256, 784), (256,), (100, 256), (100,), (10, 100), (10,),
    ]  # fmt: skip
    assert [type(layer) for layer in models.mlp(4, [], 2)] == [nn.Flatten, nn.Linear]


def test_convnet_halves_the_image_at_each_convolution():
    model = models.convnet((1, 28, 28), 10)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert model[-1].in_features == 32 * 7 * 7
    assert models.convnet((3, 4, 4), 2, ())[-1].in_features == 48
    with pytest.raises(ValueError, match="8×8 pixels cannot be halved 4 times"):
        models.convnet((1, 8, 8), 10, (2, 2, 2, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.mlp(0, [3], 2),
        lambda: models.mlp(4, [3, 0], 2),
        lambda: models.mlp(4, [3], -2),
        lambda: models.convnet((1, 8, 8), 2, (0,)),
    ],
)
def test_widths_must_be_positive(build):
    with pytest.raises(ValueError, match="at least one unit"):
        build()
