"""Every room of the bug museum fails the check that the package's own function passes, and passes it once mended."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ewc import EWC, fisher, models, museum

PAGE = Path(__file__).parents[1] / "book/bug-museum.md"
ROOMS = {name: getattr(museum, name) for name in museum.REPAIRS}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example():
    """A small network and 70 examples: neither a whole number of batches nor fitted."""
    x = draws(70, 1, 3, 3)
    return models.mlp(9, [6], 4, seed=0).double(), x, draws(70, 4, seed=1).argmax(1)


def by_definition(model, x, y):
    """The empirical Fisher, one example after the other, with the network in eval mode."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        model.zero_grad()
        cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2
    return {name: t / len(x) for name, t in total.items()}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, by, seed):
    """A copy of the network somewhere else."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p += by * draws(*p.shape, seed=seed + k)
    return model


def brute(model, stiffness, anchor, strength):
    return sum(
        strength / 2 * f * (w - a) ** 2
        for name, p in model.named_parameters()
        for f, w, a in zip(stiffness[name].flatten(), p.flatten(), anchor[name].flatten())
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


# ---- the oracles ----------------------------------------------------------------------------------------------------


def is_the_empirical_fisher(function):
    model, x, y = example()
    close(function(model, x, y), by_definition(model, x, y))


def measures_and_leaves_the_network_alone(function):
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    _, x, y = example()
    model(x)  # running statistics that are not those of a new layer
    model.eval()
    before = copy.deepcopy(model.state_dict())
    expected = by_definition(model, x, y)
    close(function(model, x, y), expected)
    close(dict(model.state_dict()), dict(before))


def a_constant_added_to_all_logits_changes_nothing(function):
    torch.manual_seed(0)
    model = function(9, [6], 4).double()
    x = draws(50, 1, 3, 3)
    before = model(x).softmax(1)
    with torch.no_grad():
        list(model.parameters())[-1].sub_(2.0)
    close(model(x).softmax(1), before)


def is_the_penalty(function):
    model, x, y = example()
    stiffness, now = by_definition(model, x, y), moved(model, 0.1, seed=5)
    value = function(now, stiffness, weights(model), 300.0)
    close(value.double(), brute(now, stiffness, weights(model), 300.0))
    slopes = torch.autograd.grad(value, list(now.parameters()))
    for (name, p), slope in zip(now.named_parameters(), slopes):
        close(slope, (300.0 * stiffness[name] * (p - weights(model)[name])).detach())


def stays_where_it_is(function):
    model, _, _ = example()
    expected = weights(model)
    anchor = function(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    close(dict(anchor), expected)


def decays_the_old_fisher_once(function):
    model, x, y = example()
    stiffness = [by_definition(moved(model, 0.1, seed=k), x, y) for k in (3, 30, 300)]
    now, anchor = moved(model, 0.1, seed=5), weights(moved(model, 0.1, seed=300))
    first, second, third = stiffness
    total = {name: 0.25 * first[name] + 0.5 * second[name] + third[name] for name in first}
    close(function(now, stiffness, anchor, 300.0, 0.5).detach().double(), brute(now, total, anchor, 300.0).detach())


def has_an_anchor_for_each_task(function):
    networks = [moved(example()[0], 0.1, seed=k) for k in (3, 30, 300)]
    anchors = function(networks)
    assert len(anchors) == 3
    for anchor, network in zip(anchors, networks):
        close(dict(anchor), weights(network))


# ---- the package's own functions, with the rooms' arguments -----------------------------------------------------------


def our_fisher(model, x, y):
    return fisher.diagonal(model, (x, y), "empirical")


def our_penalty(model, stiffness, anchor, strength):
    memory, old = EWC(strength), copy.deepcopy(model)
    old.load_state_dict(dict(anchor))
    memory.consolidate(old, fisher=stiffness)
    return memory.penalty(model)


def our_anchor(model):
    memory = EWC(1.0)
    memory.consolidate(model, fisher={name: torch.ones_like(p) for name, p in model.named_parameters()})
    return memory.theta_star


def our_online_penalty(model, stiffness, anchor, strength, decay):
    memory, newest = EWC(strength, decay=decay), copy.deepcopy(model)
    newest.load_state_dict(dict(anchor))
    for f in stiffness:
        memory.consolidate(newest, fisher=f)
    return memory.penalty(model)


def our_anchors(networks):
    return [our_anchor(network) for network in networks]


OURS = {
    **dict.fromkeys(("room_1", "room_2", "room_4", "room_5", "room_6"), (is_the_empirical_fisher, our_fisher)),
    "room_3": (measures_and_leaves_the_network_alone, our_fisher),
    "room_7": (a_constant_added_to_all_logits_changes_nothing, models.mlp),
    **dict.fromkeys(("room_8", "room_9"), (is_the_penalty, our_penalty)),
    "room_10": (stays_where_it_is, our_anchor),
    "room_11": (decays_the_old_fisher_once, our_online_penalty),
    "room_12": (has_an_anchor_for_each_task, our_anchors),
}


def test_every_room_has_an_oracle():
    assert OURS.keys() == ROOMS.keys()


@pytest.mark.parametrize("name", ROOMS)
def test_ours_passes_where_the_twin_fails(name):
    oracle, ours = OURS[name]
    oracle(ours)
    with pytest.raises(AssertionError):
        oracle(ROOMS[name])


@pytest.mark.parametrize("name", ROOMS)
def test_the_twin_has_exactly_this_one_mistake(name):
    wrong, _ = museum.REPAIRS[name]
    assert inspect.getsource(ROOMS[name]).count(wrong) == 1
    OURS[name][0](museum.repaired(ROOMS[name]))


def test_only_a_room_can_be_repaired():
    with pytest.raises(KeyError):
        museum.repaired(museum.zeros)


@pytest.mark.parametrize("name", ROOMS)
def test_the_page_shows_every_room_from_its_source(name):
    assert f":pyobject: {name}\n" in PAGE.read_text()
