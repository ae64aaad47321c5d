r"""Twins of the book's functions, each with exactly one mistake, most of them seen in public code: wrong on purpose.

Every function here looks like a plain version of something in the package and differs from a right one in a single
place, which `REPAIRS` names and `repaired` mends. They are for the chapter on bugs and for the tests, which prove that
each fails the check that the package's function passes. Do not train with them.

The Fishers take a model, inputs and labels and return parameter name -> tensor; what each *means* to compute is in its
docstring.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.functional import cross_entropy, nll_loss

Named = dict[str, Tensor]  # by parameter name


def zeros(model: Module) -> Named:
    """A zero for every parameter, by name."""
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def gradient(model: Module, loss: Tensor) -> Named:
    """The gradient of a loss, by parameter name."""
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), grads))


# ---- the Fisher -----------------------------------------------------------------------------------------------------


def room_1(model: Module, x: Tensor, y: Tensor, batch_size: int = 32) -> Named:
    """Meant: the empirical Fisher, a mean over the examples."""
    model.eval()
    fisher = zeros(model)
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        loss = cross_entropy(model(images), labels)
        for name, g in gradient(model, loss).items():
            fisher[name] += g.square() * len(images) / len(x)
    return fisher


def room_2(model: Module, x: Tensor, y: Tensor) -> Named:
    """Meant: the empirical Fisher, a mean over the examples."""
    model.eval()
    fisher = zeros(model)
    for image, label in zip(x.split(1), y.split(1)):
        log_p = model(image).log_softmax(1)
        loss = nll_loss(log_p, log_p.argmax(1))
        for name, g in gradient(model, loss).items():
            fisher[name] += g.square() / len(x)
    return fisher


def room_3(model: Module, x: Tensor, y: Tensor) -> Named:
    """Meant: the empirical Fisher of the network as it will be used."""
    model.train()
    fisher = zeros(model)
    for image, label in zip(x.split(1), y.split(1)):
        loss = cross_entropy(model(image), label)
        for name, g in gradient(model, loss).items():
            fisher[name] += g.square() / len(x)
    return fisher


def room_4(model: Module, x: Tensor, y: Tensor, batch_size: int = 32) -> Named:
    """Meant: the empirical Fisher, a mean over the examples."""
    model.eval()
    fisher = zeros(model)
    batches = list(zip(x.split(batch_size), y.split(batch_size)))
    for images, labels in batches:
        for image, label in zip(images.split(1), labels.split(1)):
            loss = cross_entropy(model(image), label)
            for name, g in gradient(model, loss).items():
                fisher[name] += g.square()
    return {name: total / len(batches) for name, total in fisher.items()}


def room_5(model: Module, x: Tensor, y: Tensor) -> Named:
    """Meant: the empirical Fisher, a number for every weight."""
    model.eval()
    fisher = zeros(model)
    for image, label in zip(x.split(1), y.split(1)):
        loss = cross_entropy(model(image), label)
        for name, g in gradient(model, loss).items():
            fisher[name] += g.square().mean() / len(x)
    return fisher


def room_6(model: Module, x: Tensor, y: Tensor) -> Named:
    """Meant: the empirical Fisher, a mean over the examples."""
    model.eval()
    fisher = zeros(model)
    for image, label in zip(x.split(1), y.split(1)):
        loss = cross_entropy(model(image), label)
        for name, g in gradient(model, loss).items():
            fisher[name].add(g.square() / len(x))
    return fisher


# ---- the network ----------------------------------------------------------------------------------------------------


def room_7(features: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Meant: a perceptron whose outputs are the logits of a softmax."""
    layers: list[Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([features, *hidden, classes]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


# ---- the penalty ----------------------------------------------------------------------------------------------------


def room_8(
    model: Module, fisher: Named, anchor: Named, strength: float
) -> Tensor:
    """Meant: EWC's penalty, half of strength times F times the squared move."""
    total = torch.zeros(())
    for name, p in model.named_parameters():
        total = total + (fisher[name] * (p - anchor[name]) ** 2).sum()
    return strength * total


def room_9(
    model: Module, fisher: Named, anchor: Named, strength: float
) -> Tensor:
    """Meant: EWC's penalty again, for a network whose head may grow."""
    total = torch.zeros(())
    for name, p in model.named_parameters():
        saved = anchor[name]
        current = saved[: len(saved)]  # units that came later have no spring
        total = total + (fisher[name] * (current - saved) ** 2).sum()
    return strength / 2 * total


def room_10(model: Module) -> Named:
    """Meant: the anchor, the weights as they are at this moment."""
    return {name: p.detach() for name, p in model.named_parameters()}


# ---- many tasks -----------------------------------------------------------------------------------------------------


def room_11(
    model: Module,
    fishers: Sequence[Named],
    anchor: Named,
    strength: float,
    decay: float,
) -> Tensor:
    """Meant: online EWC. Old Fishers decay when one is added; oldest first."""
    total = zeros(model)
    for fisher in fishers:
        total = {name: decay * total[name] + fisher[name] for name in total}
    springs = torch.zeros(())
    for name, p in model.named_parameters():
        springs = springs + (decay * total[name] * (p - anchor[name]) ** 2).sum()
    return strength / 2 * springs


def room_12(models: Sequence[Module]) -> list[Named]:
    """Meant: the anchor of every task, the weights of each network in turn."""
    anchor, anchors = {}, []
    for model in models:
        for name, p in model.named_parameters():
            anchor[name] = p.detach().clone()
        anchors.append(anchor)
    return anchors


# ---- the repairs ----------------------------------------------------------------------------------------------------

REPAIRS = {
    "room_1": ("batch_size: int = 32", "batch_size: int = 1"),
    "room_2": ("nll_loss(log_p, log_p.argmax(1))", "nll_loss(log_p, label)"),
    "room_3": ("model.train()", "model.eval()"),
    "room_4": ("total / len(batches)", "total / len(x)"),
    "room_5": ("g.square().mean()", "g.square()"),
    "room_6": ("fisher[name].add(", "fisher[name].add_("),
    "room_7": ("nn.Sequential(*layers)", "nn.Sequential(*layers[:-1])"),
    "room_8": ("return strength * total", "return strength / 2 * total"),
    "room_9": ("current = saved[", "current = p["),
    "room_10": ("p.detach()", "p.detach().clone()"),
    "room_11": ("(decay * total[name] * (p", "(total[name] * (p"),
    "room_12": ("anchors.append(anchor)", "anchors.append(dict(anchor))"),
}
"""Room -> what its source says, and what it should say."""


def repaired(room: Callable) -> Callable:
    """The same function with its one mistake mended.

    Raises:
        KeyError: not one of the rooms.
    """
    wrong, right = REPAIRS[room.__name__]
    mended = inspect.getsource(room).replace(wrong, right)
    namespace = dict(vars(sys.modules[__name__]))
    exec(mended, namespace)
    return namespace[room.__name__]
