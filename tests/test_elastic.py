"""The penalty of elastic weight consolidation against autograd, closed forms and the quadratics it stands for."""

import copy
import gc
import math
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ewc import EWC, fisher


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(seed=0, n=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).to(dtype), torch.randint(3, (n,), generator=generator)


def move(model, seed=1, by=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def written_out(strength, terms, model):
    """The penalty as a sum over tasks of (lambda / 2) F (theta - theta*)^2, through autograd."""
    parameters = dict(model.named_parameters())
    return sum(
        0.5 * strength * weight * (f[name] * (parameters[name] - star[name]).square()).sum()
        for weight, f, star in terms
        for name in f
    )


def consolidated(strength=3.0, model=None, **options):
    memory = EWC(strength, **options)
    memory.consolidate(model or network(), data())
    return memory


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- value and gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "empirical", "argmax"])
def test_penalty_is_the_formula_and_its_gradient_that_of_autograd(estimator):
    model = network()
    memory = consolidated(model=model, estimator=estimator)
    assert all(torch.equal(memory.fisher[n], f) for n, f in fisher.diagonal(model, data(), estimator).items())
    star = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert float(memory.penalty(model).detach()) == 0.0
    move(model)
    assert all(torch.equal(memory.theta_star[n], s) for n, s in star.items())  # a copy, not a reference

    expected = written_out(3.0, [(1.0, memory.fisher, star)], model)
    expected.backward()
    by_hand = gradients(model)
    model.zero_grad()
    actual = memory.penalty(model)
    actual.backward()
    assert torch.allclose(actual, expected, rtol=1e-12, atol=0)
    for name, g in gradients(model).items():
        assert torch.allclose(g, by_hand[name], rtol=1e-12, atol=0)
    model.zero_grad(set_to_none=True)
    memory.add_gradient(model)
    for name, g in gradients(model).items():
        assert torch.allclose(g, by_hand[name], rtol=1e-12, atol=0)
    memory.add_gradient(model)  # adds
    for name, g in gradients(model).items():
        assert torch.allclose(g, 2 * by_hand[name], rtol=1e-12, atol=0)


def test_penalty_can_be_differentiated_twice():
    memory = consolidated()
    model = move(network())
    grads = torch.autograd.grad(memory.penalty(model), list(model.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in grads), list(model.parameters()))
    for h, f in zip(second, memory.fisher.values()):
        assert torch.allclose(h, 3.0 * f, rtol=1e-12, atol=0)


def test_penalty_in_a_training_loop_of_ones_own():
    x, y = data()
    memory, model = consolidated(), move(network())
    loss = F.cross_entropy(model(x), y) + memory.penalty(model)
    loss.backward()
    joint = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    memory.add_gradient(model)
    for name, g in gradients(model).items():
        assert torch.allclose(g, joint[name], rtol=1e-12, atol=1e-18)


def test_before_the_first_task_training_is_plain():
    model, memory = network(), EWC(10.0)
    before = copy.deepcopy(model.state_dict())
    loss = model(data()[0]).sum() + memory.penalty(model)
    loss.backward()
    plain = gradients(model)
    memory.add_gradient(model)
    memory.pull(model, 0.1)
    penalty = memory.penalty(model)
    penalty.backward()  # as a loop may do that treats all tasks alike
    assert float(penalty.detach()) == 0.0 and memory.tasks == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(g, plain[n]) for n, g in gradients(model).items())


def test_strength_is_changed_between_runs():
    memory = consolidated(1.0)
    model = move(network())
    one = float(memory.penalty(model).detach())
    memory.strength = 300
    assert float(memory.penalty(model).detach()) == pytest.approx(300 * one, rel=1e-12)
    memory.strength = 0
    assert float(memory.penalty(model).detach()) == 0.0
    before = copy.deepcopy(model.state_dict())
    memory.pull(model, 0.1)
    memory.add_gradient(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---- the proximal step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e12])
def test_pull_is_the_proximal_step(strength):
    memory, model = consolidated(strength), move(network())
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    memory.pull(model, 0.05)
    for n, p in model.named_parameters():
        scaled = 0.05 * strength * memory.fisher[n]
        expected = (theta[n] + scaled * memory.theta_star[n]) / (1 + scaled)
        assert torch.allclose(p, expected, rtol=1e-12, atol=1e-14)
        # the minimiser of |theta' - theta|^2 / (2 s) + penalty: its gradient vanishes there
        residual = (p - theta[n]) / 0.05 + strength * memory.fisher[n] * (p - memory.theta_star[n])
        assert residual.abs().max() < 1e-9 * max(1.0, strength)


def test_pull_with_a_step_for_every_parameter():
    memory, model = consolidated(2.0), move(network())
    twin = copy.deepcopy(model)
    memory.pull(model, 0.05)
    memory.pull(twin, {n: torch.full_like(p, 0.05) for n, p in twin.named_parameters()})
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-12)
    memory.pull(twin, {n: 0.0 for n, _ in twin.named_parameters()})  # numbers as well; no step, no change
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(model.parameters(), twin.parameters()))


def test_pull_follows_every_change_of_step_strength_and_fisher():
    memory, model = consolidated(2.0), network()
    for change in (
        lambda: None, lambda: setattr(memory, "strength", 7.0), lambda: memory.fisher["0.weight"].mul_(3), lambda: memory.consolidate(model, data(1)),
        lambda: memory.load_state_dict(consolidated(4.0, model=network(3)).state_dict()),
    ):
        change()
        for step in (0.1, 0.01):
            move(model)
            theta = [p.detach().clone() for p in model.parameters()]
            memory.pull(model, step)
            for t, p, f, s in zip(theta, model.parameters(), memory.fisher.values(), memory.theta_star.values()):
                scaled = step * memory.strength * f
                assert torch.allclose(p, (t + scaled * s) / (1 + scaled), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-320, 1e-30, 1.0, 1e30, 1e300])
def test_pull_of_any_size_is_never_nan(dtype, factor):
    memory, model = EWC(factor), nn.Linear(1, 4, bias=False).to(dtype)
    f = torch.tensor([0.0, torch.finfo(dtype).tiny, 1.0, torch.finfo(dtype).max], dtype=dtype).unsqueeze(1)
    memory.consolidate(model, fisher={"weight": f})
    theta = move(model).weight.detach().clone()
    memory.pull(model, 1.0)
    share = f.double().mul(factor).reciprocal().add(1).reciprocal()  # 1e-320 * F is below what float64 resolves
    expected = theta.double().lerp(memory.theta_star["weight"].double(), share)
    assert torch.allclose(model.weight.double(), expected, rtol=1e-6, atol=0)
    assert model.weight[0] == theta[0]


def test_a_copy_of_a_memory_pulls_with_its_own_fisher():
    model, memory = network(), consolidated(2.0)
    memory.pull(model, 0.1)
    twin = copy.deepcopy(memory)
    for f in twin.fisher.values():
        f.mul_(9)
    for keep in (memory, twin):
        move(model)
        theta = [p.detach().clone() for p in model.parameters()]
        keep.pull(model, 0.1)
        for t, p, f, s in zip(theta, model.parameters(), keep.fisher.values(), keep.theta_star.values()):
            assert torch.allclose(p, (t + 0.2 * f * s) / (1 + 0.2 * f), rtol=1e-12, atol=1e-14)


def test_pull_is_stable_where_the_gradient_step_is_not():
    memory = EWC(1.0)
    model = nn.Linear(1, 2, bias=False).double()
    memory.consolidate(model, fisher={"weight": torch.full((2, 1), 100.0).double()})
    implicit, explicit = move(copy.deepcopy(model)), move(copy.deepcopy(model))
    for _ in range(50):
        memory.pull(implicit, 0.1)  # step * strength * F = 10 > 2
        explicit.zero_grad()
        memory.add_gradient(explicit)
        with torch.no_grad():
            explicit.weight -= 0.1 * explicit.weight.grad
    assert (implicit.weight - model.weight).norm() < 1e-12
    assert (explicit.weight - model.weight).norm() > 1e10


def test_frozen_parameters_are_left_alone():
    model = network()
    memory = consolidated(50.0, model=model)
    move(model)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    memory.pull(model, 0.1)
    memory.add_gradient(model)
    assert torch.equal(model[0].weight, before) and model[0].weight.grad is None
    assert model[2].weight.grad is not None
    memory.consolidate(model, data(1))  # its old Fisher stays, its anchor is where it is
    assert torch.equal(memory.theta_star["0.weight"], before)
    model.requires_grad_(False)
    memory.pull(model, 0.1)
    memory.add_gradient(model)


# ---- many tasks ---------------------------------------------------------------------------------------------


def sequence_of_tasks(anchors, decay, tasks=4):
    model, memory = network(), EWC(2.5, anchors=anchors, decay=decay)
    fishers, stars = [], []
    for t in range(tasks):
        move(model, seed=10 + t)
        memory.consolidate(model, data(t))
        fishers.append(fisher.diagonal(model, data(t)))
        stars.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return memory, fishers, stars, move(model, seed=99)


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
def test_latest_adds_fishers_and_moves_the_anchor(decay):
    memory, fishers, stars, model = sequence_of_tasks("latest", decay)
    terms = [(decay ** (3 - t), f, stars[-1]) for t, f in enumerate(fishers)]
    assert torch.allclose(memory.penalty(model), written_out(2.5, terms, model), rtol=1e-12)
    assert memory.tasks == 4 and memory.constant == 0.0


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
def test_each_is_the_sum_of_all_penalties_stored_as_one(decay):
    memory, fishers, stars, model = sequence_of_tasks("each", decay)
    terms = [(decay ** (3 - t), f, s) for t, (f, s) in enumerate(zip(fishers, stars))]
    expected = written_out(2.5, terms, model)
    assert torch.allclose(memory.penalty(model), expected, rtol=1e-12)
    expected.backward()
    by_hand = gradients(model)
    model.zero_grad()
    memory.add_gradient(model)
    for name, g in gradients(model).items():
        assert torch.allclose(g, by_hand[name], rtol=1e-9, atol=1e-13)
    stored = sum(t.numel() for t in memory.fisher.values()) + sum(t.numel() for t in memory.theta_star.values())
    assert stored == 2 * sum(p.numel() for p in model.parameters())


def test_each_keeps_a_weight_without_fisher_at_the_newest_optimum():
    model = nn.Linear(1, 2, bias=False).double()
    memory = EWC(1.0, anchors="each")
    for weights in ([1.0, 2.0], [3.0, 5.0]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(weights)[:, None])
        memory.consolidate(model, fisher={"weight": torch.tensor([[0.0], [1.0]]).double()})
    assert memory.theta_star["weight"].flatten().tolist() == [3.0, 3.5]
    assert memory.constant == pytest.approx(0.5 * 0.5 * 3.0**2)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=6),
    st.floats(0, 1), st.sampled_from(["latest", "each"]), st.floats(0, 100),
)
def test_one_weight_through_any_tasks(tasks, decay, anchors, strength):
    model = nn.Linear(1, 2, bias=False).double()  # two equal weights
    memory = EWC(strength, anchors=anchors, decay=decay)
    for f, star in tasks:
        nn.init.constant_(model.weight, star)
        memory.consolidate(model, fisher={"weight": torch.full((2, 1), f, dtype=torch.float64)})
    nn.init.constant_(model.weight, 1.5)
    newest = tasks[-1][1]
    expected = sum(
        strength * decay ** (len(tasks) - 1 - t) * f * (1.5 - (newest if anchors == "latest" else star)) ** 2
        for t, (f, star) in enumerate(tasks)
    )
    assert float(memory.penalty(model).detach()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_head_consolidates_its_own_classes():
    model, (x, _) = network(), data()
    memory = consolidated(model=model)
    memory.consolidate(model, (x, torch.full((len(x),), 2)), classes=[0, 2])
    small = copy.deepcopy(model)
    small[2] = nn.Linear(6, 2).double()
    with torch.no_grad():
        small[2].weight.copy_(model[2].weight[[0, 2]])
        small[2].bias.copy_(model[2].bias[[0, 2]])
    expected = fisher.diagonal(model, data())
    for name, f in fisher.diagonal(small, (x, torch.zeros(len(x), dtype=torch.int64))).items():
        expected[name][[0, 2] if name.startswith("2") else slice(None)] += f
    for name, f in memory.fisher.items():
        torch.testing.assert_close(f, expected[name], rtol=1e-10, atol=1e-14)


def test_new_heads_are_free_until_they_are_consolidated():
    model = nn.ModuleDict({"body": nn.Linear(4, 5), "first": nn.Linear(5, 3)}).double()
    memory = EWC(1.0)
    memory.consolidate(model, fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    model["second"] = nn.Linear(5, 2).double()
    move(model)
    memory.add_gradient(model)
    assert model["second"].weight.grad is None and model["body"].weight.grad is not None
    memory.consolidate(model, fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    assert "second.weight" in memory.fisher and float(memory.fisher["second.weight"].max()) == 1.0
    assert float(memory.fisher["body.weight"].max()) == 2.0


# ---- what the penalty is for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(60, 60), (90, 30), (20, 200)])
def test_strength_n_a_over_n_b_returns_the_joint_optimum_of_a_quadratic(sizes):
    """Mean losses, mean Fisher, quadratic loss of the old task with a diagonal Hessian: lambda = N_A / N_B."""
    generator = torch.Generator().manual_seed(0)
    n_a, n_b = sizes
    # Linear regression on orthogonal inputs: the mean Hessian of task A is diagonal and equals its Fisher.
    x_a = torch.linalg.qr(torch.randn(n_a, 4, generator=generator, dtype=torch.float64)).Q * torch.arange(1.0, 5.0)
    x_b = torch.randn(n_b, 4, generator=generator, dtype=torch.float64)
    y_a, y_b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes)
    joint = torch.linalg.lstsq(torch.cat([x_a, x_b]), torch.cat([y_a, y_b])[:, None]).solution.flatten()
    theta_a = torch.linalg.lstsq(x_a, y_a[:, None]).solution.flatten()

    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta_a)
    memory = EWC(n_a / n_b)
    memory.consolidate(model, fisher={"weight": x_a.square().mean(0, keepdim=True)})

    def objective():
        return 0.5 * (model(x_b).flatten() - y_b).square().mean() + memory.penalty(model)

    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert torch.allclose(model.weight.flatten(), joint, atol=1e-8)
    memory.strength *= 2  # any other strength misses it
    optimiser.step(closure)
    assert (model.weight.flatten() - joint).norm() > 1e-3


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_state_survives_a_file_of_tensors_and_numbers(tmp_path):
    memory, *_, model = sequence_of_tasks("each", 0.7)
    torch.save(memory.state_dict(), tmp_path / "state")
    other = EWC(0.0)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(other.penalty(model), memory.penalty(model))
    assert (other.anchors, other.decay, other.tasks, other.strength) == ("each", 0.7, 4, 2.5)
    memory.consolidate(model, data(9))
    other.consolidate(model, data(9))
    move(model)
    assert torch.equal(other.penalty(model), memory.penalty(model))


def test_save_is_atomic(tmp_path, monkeypatch):
    memory = consolidated()
    path = tmp_path / "memory.pt"
    memory.save(path)
    assert torch.equal(EWC.load(path).fisher["0.weight"], memory.fisher["0.weight"])
    memory.consolidate(network(), data(1))

    def half(state, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        memory.save(path)
    assert EWC.load(path).tasks == 1
    assert [p.name for p in tmp_path.iterdir()] == ["memory.pt"]


def test_a_file_is_written_where_a_link_leads_and_readable_as_any_other(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "plain").touch()
    (tmp_path / "memory.pt").symlink_to(tmp_path / "disk" / "memory.pt")
    (tmp_path / "disk" / "memory.pt.part").write_text("left behind by a kill")
    consolidated().save(tmp_path / "memory.pt")
    (written,) = (tmp_path / "disk").iterdir()
    assert (tmp_path / "memory.pt").is_symlink() and EWC.load(written).tasks == 1
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere to write memory.pt"):
        consolidated().save(tmp_path / "nowhere" / "memory.pt")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        consolidated_before = list(tmp_path.iterdir())
        EWC(1.0).save(tmp_path / "memory.pt")
        assert consolidated_before == []
        assert len(list(tmp_path.iterdir())) == (rank == 0)


def test_damaged_or_foreign_checkpoints(tmp_path):
    memory = consolidated()
    path = tmp_path / "memory.pt"
    memory.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        EWC.load(path)
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match="not the state of an EWC memory"):
        EWC.load(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="not the state of an EWC memory"):
        EWC.load(path)
    torch.save(network(), path)  # a pickled module is refused
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        EWC.load(path)
    with pytest.raises(FileNotFoundError):
        EWC.load(tmp_path / "nothing")
    damaged = memory.state_dict()
    del damaged["theta_star"]["0.bias"]
    before = memory.state_dict()
    with pytest.raises(ValueError, match="differ in names or shapes"):
        memory.load_state_dict(damaged)
    assert memory.state_dict().keys() == before.keys() and "0.bias" in memory.theta_star


def test_loading_copies():
    memory = consolidated()
    state = memory.state_dict()
    other = EWC(1.0)
    other.load_state_dict(state)
    state["fisher"]["0.weight"].zero_()
    assert float(other.fisher["0.weight"].sum()) > 0


def test_to_moves_and_casts():
    memory = consolidated()
    assert memory.to(torch.float32) is memory
    assert {t.dtype for t in (*memory.fisher.values(), *memory.theta_star.values())} == {torch.float32}
    model = move(network().float())
    assert memory.penalty(model).dtype == torch.float32
    memory.pull(model, 0.1)
    memory.to("meta")
    with pytest.raises(ValueError, match=r"memory\.to\(cpu\)"):
        memory.penalty(model)


def test_half_precision_weights_keep_a_float32_fisher():
    model = network(dtype=torch.bfloat16)
    memory = EWC(3.0)
    memory.consolidate(model, data(dtype=torch.bfloat16))
    assert memory.fisher["0.weight"].dtype == torch.float32
    exact = EWC(3.0)
    exact.consolidate(copy.deepcopy(model).double(), fisher={n: f.double() for n, f in memory.fisher.items()})
    move(model)
    twin = copy.deepcopy(model).double()
    assert float(memory.penalty(model).detach()) == pytest.approx(float(exact.penalty(twin).detach()), rel=2e-2)
    memory.penalty(model).backward()
    first = gradients(model)
    model.zero_grad()
    memory.add_gradient(model)
    exact.add_gradient(twin)
    for name, g in gradients(model).items():
        assert g.dtype == torch.bfloat16
        assert torch.allclose(g, first[name], rtol=2e-2, atol=1e-6)
        assert torch.allclose(g.double(), dict(twin.named_parameters())[name].grad, rtol=2e-2, atol=1e-4)
    memory.pull(model, 0.5)
    exact.pull(twin, 0.5)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert p.dtype == torch.bfloat16 and torch.allclose(p.double(), q, rtol=2e-2, atol=1e-2)


def test_wrapped_models_are_the_same_model():
    model = network()
    memory = EWC(1.0)
    memory.consolidate(nn.DataParallel(model), data())
    move(model)
    assert torch.equal(memory.penalty(nn.DataParallel(model)), memory.penalty(model))
    memory.add_gradient(nn.DataParallel(model))
    memory.pull(nn.DataParallel(model), 0.1)
    assert list(memory.fisher) == [n for n, _ in model.named_parameters()]


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, -math.inf])
def test_strength_must_be_finite_and_not_negative(strength):
    with pytest.raises(ValueError, match="strength"):
        EWC(strength)
    memory = consolidated(2.0)
    with pytest.raises(ValueError, match="strength"):
        memory.strength = strength
    assert memory.strength == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "true"}, "'exact', 'sampled'"), ({"anchors": "first"}, '"latest" or "each"'),
        ({"decay": 1.1}, "from 0 to 1"), ({"decay": -0.1}, "from 0 to 1"), ({"decay": math.nan}, "from 0 to 1"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        EWC(1.0, **options)


def test_a_step_may_be_a_tensor_with_one_number():
    memory, model = consolidated(), network()
    twin = copy.deepcopy(model)
    memory.pull(model, 0.3)
    memory.pull(twin, torch.tensor(0.3))
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf, torch.tensor(-0.1), torch.tensor(math.nan)])
def test_step_must_be_finite_and_not_negative(step):
    with pytest.raises(ValueError, match="learning rate"):
        consolidated().pull(network(), step)


def test_steps_must_cover_every_parameter():
    with pytest.raises(ValueError, match="'2.weight'"):
        consolidated().pull(network(), {"0.weight": 0.1, "0.bias": 0.1, "2.bias": 0.1})


def call_all(memory, model):
    return [
        lambda: memory.penalty(model), lambda: memory.add_gradient(model), lambda: memory.pull(model, 0.1),
        lambda: memory.consolidate(model, data()),
    ]


def test_a_model_that_does_not_match_is_named_and_nothing_is_lost():
    memory = consolidated()
    before = copy.deepcopy(memory.state_dict())
    wider = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    shorter = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    for call in call_all(memory, wider):
        with pytest.raises(ValueError, match=r"'0.weight'.*\(7, 4\).*\(6, 4\)"):
            call()
    for call in call_all(memory, shorter):
        with pytest.raises(ValueError, match=r"'2.weight'.*\(3, 6\).*the model has 0.weight, 0.bias"):
            call()
    after = memory.state_dict()
    assert after["tasks"] == before["tasks"]
    for part in ("fisher", "theta_star"):
        assert all(torch.equal(after[part][n], t) for n, t in before[part].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {**f, "spare": f["0.bias"]}, "'spare'"),
        (lambda f: {**f, "0.bias": f["0.bias"][:2]}, r"\(2,\), the parameter \(6,\)"),
        (lambda f: {**f, "0.bias": -f["0.bias"]}, "not negative"),
        (lambda f: {**f, "0.bias": f["0.bias"] * math.nan}, "finite"),
    ],
)
def test_a_fisher_that_does_not_fit(change, message):
    model, memory = network(), EWC(1.0)
    with pytest.raises(ValueError, match=message):
        memory.consolidate(model, fisher=change(fisher.diagonal(model, data())))
    assert memory.tasks == 0 and not memory.fisher


def test_consolidate_needs_data_or_a_fisher():
    model, memory = network(), EWC(1.0)
    for arguments in ({}, {"data": data(), "fisher": fisher.diagonal(model, data())}):
        with pytest.raises(ValueError, match="either the task's data or its Fisher"):
            memory.consolidate(model, **arguments)
    with pytest.raises(ValueError, match="no example"):
        memory.consolidate(model, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
    assert memory.tasks == 0


def test_weights_that_are_not_finite_are_no_anchor():
    model, memory = network(), EWC(1.0)
    measured = fisher.diagonal(model, data())
    next(model.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="is not finite: an anchor has to be"):
        memory.consolidate(model, fisher=measured)
    assert memory.tasks == 0 and not memory.theta_star


# ---- the small print --------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", ["latest", "each"])
def test_a_parameter_frozen_from_the_start_is_not_remembered(anchors):
    """Neither the model's own Fisher nor one that is given has an entry for it."""
    model, memory = network(), EWC(1.0, anchors=anchors)
    model[0].bias.requires_grad_(False)
    for t in range(2):
        memory.consolidate(model, data(t))
        assert memory.fisher.keys() == memory.theta_star.keys() == {"0.weight", "2.weight", "2.bias"}
    other = EWC(1.0, anchors=anchors)
    for t in range(2):
        other.consolidate(network(), fisher=fisher.diagonal(model, data(t)))
    assert all(torch.equal(other.fisher[n], f) for n, f in memory.fisher.items())
    assert other.fisher.keys() == memory.fisher.keys()


def test_a_new_head_may_come_between_two_pulls():
    """What `pull` keeps from one step to the next belongs to the old parameters."""
    model, memory = network(), consolidated(2.0)
    memory.pull(move(model), 0.1)
    model.append(nn.Linear(3, 3).double())
    memory.consolidate(model, data(1))
    theta = {n: p.detach().clone() for n, p in move(model).named_parameters()}
    memory.pull(model, 0.1)
    assert "3.weight" in memory.fisher
    for n, p in model.named_parameters():
        scaled = 0.2 * memory.fisher[n]
        assert torch.allclose(p, (theta[n] + scaled * memory.theta_star[n]) / (1 + scaled), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_steps_of_zero_and_one_are_steps_like_any_other(step):
    memory, model = consolidated(2.0), move(network())
    theta = [p.detach().clone() for p in model.parameters()]
    memory.pull(model, step)
    for t, p, f, s in zip(theta, model.parameters(), memory.fisher.values(), memory.theta_star.values()):
        assert torch.allclose(p, (t + step * 2.0 * f * s) / (1 + step * 2.0 * f), rtol=1e-12, atol=1e-14)


def test_pull_at_one_step_follows_the_strength():
    """Neither the step alone nor its ratio to the strength tells two pulls apart."""
    memory, model = consolidated(2.0), network()
    for step, strength in [(0.1, 2.0), (0.1, 9.0), (0.2, 18.0), (0.6, 6.0), (0.1, 36.0)]:
        memory.strength = strength
        theta = [p.detach().clone() for p in move(model).parameters()]
        memory.pull(model, step)
        for t, p, f, s in zip(theta, model.parameters(), memory.fisher.values(), memory.theta_star.values()):
            scaled = step * strength * f
            assert torch.allclose(p, (t + scaled * s) / (1 + scaled), rtol=1e-12, atol=1e-14)


def test_gradients_are_added_outside_the_graph():
    memory, model = consolidated(), move(network())
    memory.add_gradient(model)
    assert all(not p.grad.requires_grad for p in model.parameters())


def test_everything_follows_the_model_to_its_device(monkeypatch):
    """The meta device computes nothing, but refuses tensors of any other: a second device wherever there is none."""
    memory, model = consolidated(anchors="each"), move(network())
    memory.pull(model, 0.1)
    measured = fisher.diagonal(model, data(1))
    memory.to("meta")
    model.to("meta")
    assert EWC(1.0).penalty(model).device.type == memory.penalty(model).device.type == "meta"
    memory.pull(model, 0.1)
    memory.add_gradient(model)
    fresh = EWC(1.0)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.ones(t.shape, dtype=torch.bool))  # it has no values
    fresh.consolidate(model, fisher=measured)  # a Fisher that was kept on the CPU
    assert {t.device.type for t in (*fresh.fisher.values(), *fresh.theta_star.values())} == {"meta"}
    assert EWC(1.0).penalty(network()).dtype == torch.float64


def test_each_keeps_the_types_of_weights_and_constant():
    model = network(dtype=torch.bfloat16)
    memory = EWC(1.0, anchors="each")
    for t in range(2):
        memory.consolidate(move(model, seed=t), data(t, dtype=torch.bfloat16))
    assert {s.dtype for s in memory.theta_star.values()} == {torch.bfloat16}
    assert {f.dtype for f in memory.fisher.values()} == {torch.float32}
    assert type(memory.constant) is float and memory.constant > 0


def test_the_memory_holds_numbers_not_graphs():
    model, memory = network(), EWC(1.0)
    memory.consolidate(model, fisher={n: p.square() for n, p in model.named_parameters()})
    assert not any(t.requires_grad for t in (*memory.fisher.values(), *memory.theta_star.values()))


def test_a_state_shares_no_dictionary_and_no_tensor_with_the_memory_that_loads_it():
    memory, other = consolidated(2.0, estimator="empirical"), EWC(0.0)
    state = copy.deepcopy(memory.state_dict())
    given = copy.deepcopy(state)
    other.load_state_dict(given)
    for part in ("fisher", "theta_star"):
        del memory.state_dict()[part]["0.bias"]
        for t in given[part].values():
            t.fill_(-1.0)
    assert other.estimator == "empirical"
    for kept in (memory, other):
        for part in ("fisher", "theta_star"):
            assert all(torch.equal(kept.state_dict()[part][n], t) for n, t in state[part].items())
    with pytest.raises(ValueError, match="not the state of an EWC memory.*int"):
        other.load_state_dict(3)


def test_load_puts_the_tensors_where_it_is_told(tmp_path):
    consolidated().save(str(tmp_path / "memory.pt"))  # a path may be a string
    memory = EWC.load(str(tmp_path / "memory.pt"), device="meta")
    assert {t.device.type for t in (*memory.fisher.values(), *memory.theta_star.values())} == {"meta"}


def test_a_checkpoint_is_whole_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Written beside its target, as a rename is atomic within one file system only."""
    synced, named = [], []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (named.append((Path(a).parent, len(synced))), replace(a, b)))
    consolidated().save(tmp_path / "memory.pt")
    assert named == [(tmp_path, 1)]
    assert synced == [(tmp_path / "memory.pt").stat().st_size]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    memory, model = consolidated(2.0), move(network())
    far = EWC(0.0)
    far.load_state_dict(memory.state_dict())
    far.to("cuda")
    twin = copy.deepcopy(model).cuda()
    sizes = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    for keep, net, device in ((memory, model, "cpu"), (far, twin, "cuda")):
        keep.add_gradient(net)
        for step in (0.1, 0.01, {n: s.to(device) for n, s in sizes.items()}):
            keep.pull(net, step)
    assert torch.allclose(memory.penalty(model), far.penalty(twin).cpu(), rtol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(p, q.cpu(), rtol=1e-12) and torch.allclose(p.grad, q.grad.cpu(), rtol=1e-12)
    with pytest.raises(ValueError, match="call memory.to"):
        memory.pull(twin, 0.1)


def test_pull_with_one_number_after_a_step_for_each_weight():
    """Both write to the same buffer."""
    memory, model = consolidated(2.0), network()
    for step in (0.1, {n: 0.7 for n, _ in model.named_parameters()}, 0.1):
        theta = [p.detach().clone() for p in move(model).parameters()]
        memory.pull(model, step)
        scaled = 2.0 * (0.7 if isinstance(step, dict) else step)
        for t, p, f, s in zip(theta, model.parameters(), memory.fisher.values(), memory.theta_star.values()):
            assert torch.allclose(p, (t + scaled * f * s) / (1 + scaled * f), rtol=1e-12, atol=1e-14)


def test_pull_sees_a_fisher_that_was_replaced():
    memory, model = consolidated(2.0), network()
    for _ in range(2):
        theta = move(model)[0].weight.detach().clone()
        memory.pull(model, 0.1)
        scaled = 0.2 * memory.fisher["0.weight"]
        expected = (theta + scaled * memory.theta_star["0.weight"]) / (1 + scaled)
        assert torch.allclose(model[0].weight, expected, rtol=1e-12, atol=1e-14)
        memory.fisher["0.weight"] = 50 * memory.fisher["0.weight"]


def test_pull_where_the_strength_makes_up_for_the_smallest_fisher():
    """In float32 the inverse of this strength is no normal number, and yet the share of the way is about a half."""
    memory, model = EWC(1e38), nn.Linear(1, 1, bias=False)
    memory.consolidate(model, fisher={"weight": torch.full((1, 1), 1.2e-38)})
    theta = move(model).weight.detach().clone()
    memory.pull(model, 1.0)
    scaled = 1e38 * memory.fisher["weight"].double()
    expected = (theta + scaled * memory.theta_star["weight"]) / (1 + scaled)
    assert torch.allclose(model.weight.double(), expected, rtol=1e-6, atol=0)


def test_pull_of_a_model_on_two_devices():
    memory, model = consolidated(2.0), move(network())
    model[0].to("meta")
    for name in ("0.weight", "0.bias"):
        memory.fisher[name], memory.theta_star[name] = memory.fisher[name].to("meta"), memory.theta_star[name].to("meta")
    theta = model[2].weight.detach().clone()
    memory.pull(model, 0.1)
    scaled = 0.2 * memory.fisher["2.weight"]
    expected = (theta + scaled * memory.theta_star["2.weight"]) / (1 + scaled)
    assert torch.allclose(model[2].weight, expected, rtol=1e-12, atol=1e-14)


def test_weights_tied_since_the_last_task_are_refused():
    """One tensor with two springs would be pulled twice."""
    model, memory = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), EWC(1.0)
    memory.consolidate(model, fisher={n: torch.ones_like(p) for n, p in model.named_parameters()})
    memory.pull(model, 0.1)
    model[2].weight = model[0].weight
    for call in call_all(memory, model)[:3]:
        with pytest.raises(ValueError, match="'2.weight'.*the model does not have"):
            call()


def test_a_fisher_given_in_another_type_is_kept_in_float32_or_better():
    theta = move(network(dtype=torch.float32))
    ones = {n: torch.ones_like(p) for n, p in theta.named_parameters()}
    values = []
    for dtype in (torch.float32, torch.float16, torch.int64, torch.bool, torch.float64):
        memory, model = EWC(2.0), network(dtype=torch.float32)
        memory.consolidate(model, fisher={n: f.to(dtype) for n, f in ones.items()})
        memory.pull(move(model), 0.5)
        values.append(memory.penalty(model).item())
        assert memory.fisher["0.weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values == pytest.approx([values[0]] * 5, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "nothing to protect"),
        ([torch.ones(6, 4)], TypeError, "mapping from the parameters' names to tensors"),
        ({"0.weight": 1.0}, TypeError, "mapping from the parameters' names to tensors"),
    ],
)
def test_what_is_no_fisher_is_refused(given, error, message):
    memory = EWC(1.0)
    with pytest.raises(error, match=message):
        memory.consolidate(network(), fisher=given)
    assert not memory.tasks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_after_the_task(dtype):
    memory, model = consolidated(model=network(dtype=torch.float32)), move(network(dtype=torch.float32))
    expected = copy.deepcopy(model)
    value = memory.penalty(expected)
    memory.pull(expected, 0.1)
    model.to(dtype)
    tolerance = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    assert torch.allclose(memory.penalty(model).float(), value, **tolerance)
    memory.pull(model, 0.1)
    for p, q in zip(model.parameters(), expected.parameters()):
        assert p.dtype == dtype and torch.allclose(p.float(), q, **tolerance)


def test_a_memory_made_in_inference_mode_serves_training():
    model, memory, examples = network(), EWC(1.0), data()
    with torch.inference_mode():
        memory.consolidate(model, examples)
    memory.penalty(move(model)).backward()
    assert all(p.grad.any() for p in model.parameters())


def test_a_first_pull_in_inference_mode_leaves_nothing_that_training_cannot_use():
    memory, model = consolidated(), move(network())
    twin, reference = copy.deepcopy(model), consolidated()
    with torch.inference_mode():
        memory.pull(model, 0.1)
    reference.pull(twin, 0.1)
    for m, one in ((memory, model), (reference, twin)):
        m.pull(one, 0.2)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_a_state_in_another_order_is_read_by_name():
    memory, model = consolidated(), move(network())
    state = memory.state_dict()
    state["fisher"] = dict(reversed(state["fisher"].items()))
    twin = EWC(0.0)
    twin.load_state_dict(state)
    assert torch.equal(twin.penalty(model), memory.penalty(model))


def test_a_model_of_which_one_layer_was_converted():
    memory, model = consolidated(), move(network())
    twin = copy.deepcopy(model)
    model[2].float()
    memory.pull(model, 0.1)
    memory.pull(twin, 0.1)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_are_added_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.randint(5, (8, 2)), torch.randint(3, (8,))
    memory = EWC(2.0)
    memory.consolidate(model, (x, y))
    move(model)
    F.cross_entropy(model(x), y).backward()
    twin = copy.deepcopy(model)
    expected = {n: p.grad.to_dense() for n, p in model.named_parameters()}
    for (name, p), g in zip(twin.named_parameters(), torch.autograd.grad(memory.penalty(twin), list(twin.parameters()))):
        expected[name] = expected[name] + g
    memory.add_gradient(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_a_parameter_that_is_frozen_by_now_needs_no_step():
    memory, model = consolidated(), move(network())
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    memory.pull(model, {name: torch.full_like(p, 0.1) for name, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="no entry for parameter '2.weight'"):
        memory.pull(model, {"2.bias": 0.1})


def test_states_taken_over_in_inference_mode_can_be_trained_with():
    state, model = consolidated().state_dict(), move(network())
    memory = EWC(0.0)
    with torch.inference_mode():
        memory.load_state_dict(state)
        memory.to(torch.float64)
    memory.penalty(model).backward()
    assert model[0].weight.grad.norm() > 0


def test_functional_gradients_of_the_penalty():
    memory, model = consolidated(), move(network())
    memory.penalty(model).backward()

    def value(parameters):
        return torch.func.functional_call(Penalised(model, memory), {f"model.{n}": p for n, p in parameters.items()}, ())

    class Penalised(nn.Module):
        def __init__(self, model, memory):
            super().__init__()
            self.model, self.memory = model, memory

        def forward(self):
            return self.memory.penalty(self.model)

    found = torch.func.grad(value)({n: p.detach() for n, p in model.named_parameters()})
    two = torch.func.vmap(torch.func.grad(value))(
        {n: torch.stack([p.detach(), memory.theta_star[n]]) for n, p in model.named_parameters()}
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
        torch.testing.assert_close(two[name], torch.stack([p.grad, torch.zeros_like(p)]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_model_feels_the_same_springs():
    memory, model = consolidated(), move(network())
    twin = torch.jit.script(copy.deepcopy(model))
    for m in (model, twin):
        memory.penalty(m).backward()
        memory.add_gradient(m)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)
    for m in (model, twin):
        memory.pull(m, 0.1)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("damage", [{"fisher": []}, {"theta_star": None}, {"tasks": None}, {"constant": "x"}])
def test_damaged_states_are_refused_in_words(damage):
    memory = consolidated()
    with pytest.raises(ValueError, match="damaged"):
        memory.load_state_dict(memory.state_dict() | damage)
    assert memory.tasks == 1


# ---- what a memory remembers of a model from one step to the next -----------------------------------


def _replace_a_layer(model, memory):
    model[2] = nn.Linear(6, 3).double()


def _replace_a_parameter(model, memory):
    model[2].weight = nn.Parameter(torch.ones_like(model[2].weight))


def _give_a_parameter_other_numbers(model, memory):
    model[2].weight.data = torch.full_like(model[2].weight, 2.0)


def _freeze(model, memory):
    model[0].weight.requires_grad_(False)


def _convert(model, memory):
    model.float()


def _convert_one_layer(model, memory):
    model[2].float()


def _replace_an_anchor(model, memory):
    memory.theta_star["2.weight"] = torch.ones_like(memory.theta_star["2.weight"])


def _replace_all_anchors(model, memory):
    memory.theta_star = {name: torch.ones_like(star) for name, star in memory.theta_star.items()}


def _replace_all_fishers(model, memory):
    memory.fisher = {name: 3 * f for name, f in memory.fisher.items()}


def _forget_a_parameter(model, memory):
    del memory.fisher["2.weight"], memory.theta_star["2.weight"]


def _store_in_another_order(model, memory):
    for store in (memory.fisher, memory.theta_star):
        store["0.weight"] = store.pop("0.weight")


def _store_fishers_in_another_order(model, memory):
    memory.fisher["0.weight"] = memory.fisher.pop("0.weight")


def _give_a_parameter_a_second_name(model, memory):
    """It comes first, so the model's own list of names leaves out the one that is remembered."""
    model[0].also = model[2].weight


CHANGES = [_replace_a_layer, _replace_a_parameter, _give_a_parameter_other_numbers, _freeze, _convert,
           _convert_one_layer, _replace_an_anchor, _replace_all_anchors, _replace_all_fishers,
           _forget_a_parameter, _store_in_another_order, _store_fishers_in_another_order, _give_a_parameter_a_second_name]


def outcome(memory, model):
    """The penalty, its gradients and the pulled weights."""
    for p in model.parameters():
        p.grad = None
    value = memory.penalty(model).detach().clone()
    memory.add_gradient(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    memory.pull(model, 0.1)
    return [value, *grads, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_seen(change):
    """As by a memory that has never met the model."""
    memory, model = consolidated(2.0), network()
    outcome(memory, move(model))
    change(model, memory)
    move(model, seed=2)
    newcomer, twin = copy.deepcopy(memory), copy.deepcopy(model)
    for mine, expected in zip(outcome(memory, model), outcome(newcomer, twin)):
        assert (mine is None) == (expected is None)
        assert mine is None or torch.equal(mine, expected)


def test_a_parameter_thawed_between_two_steps_is_pulled():
    memory, model = consolidated(2.0), network()
    model[0].weight.requires_grad_(False)
    before = move(model)[0].weight.clone()
    memory.pull(model, 0.1)
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_()
    memory.pull(model, 0.1)
    assert not torch.equal(model[0].weight, before)


def _reshape(model):
    model[2].bias.data = torch.zeros(3, 3, dtype=torch.float64)  # an anchor of shape (3,) would fit into it


def _move_away(model):
    model[2].to("meta")


def _lose_a_parameter(model):
    model[2].bias = None


@pytest.mark.parametrize(
    "change, message",
    [
        (_reshape, "'2.bias' has shape"),
        (_move_away, "'2.weight' is on meta and the memory on cpu"),
        (_lose_a_parameter, "'2.bias'.*the model does not have"),
    ],
)
def test_a_model_that_does_not_match_any_more_is_told_to_the_user(change, message):
    memory, model = consolidated(2.0), network()
    memory.pull(model, 0.1)
    change(model)
    for call in call_all(memory, model)[:3]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_parameter_remembered_since_the_last_step_is_pulled():
    memory, model = consolidated(2.0), network()
    f, star = memory.fisher.pop("2.bias"), memory.theta_star.pop("2.bias")
    before = move(model)[2].bias.clone()
    memory.pull(model, 0.1)
    assert torch.equal(model[2].bias, before)
    memory.fisher["2.bias"], memory.theta_star["2.bias"] = f, star
    memory.pull(model, 0.1)
    assert torch.allclose(model[2].bias, (before + 0.2 * f * star) / (1 + 0.2 * f), rtol=1e-12, atol=1e-14)


def test_models_taken_in_turn_are_told_apart():
    memory, models = consolidated(2.0), [network(1), network(2)]
    for _ in range(2):
        for model in models:
            twin, theta = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
            memory.pull(model, 0.1)
            copy.deepcopy(memory).pull(twin, 0.1)
            for p, t, before in zip(model.parameters(), twin.parameters(), theta):
                assert torch.equal(p, t) and not torch.equal(p, before)


def test_layers_that_are_removed_from_within_and_put_back():
    """A container gives itself a new dictionary when it loses a layer."""
    model, memory = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh()), nn.Linear(4, 3)).double(), EWC(2.0)
    memory.consolidate(model, data())
    memory.pull(move(model), 0.1)
    del model[0][2]
    model[0][0] = nn.Linear(4, 4).double()
    newcomer, twin = copy.deepcopy(memory), copy.deepcopy(model)
    for mine, expected in zip(outcome(memory, model), outcome(newcomer, twin)):
        assert torch.equal(mine, expected)
    del model[0][0]  # what was layer 1 is layer 0 now, and has no weight
    for call in call_all(memory, model)[:3]:
        with pytest.raises(ValueError, match="'0.0.weight'.*the model does not have"):
            call()


def test_an_emptied_memory_pulls_at_nothing():
    memory, model = consolidated(2.0), move(network())
    memory.pull(model, 0.1)
    memory.fisher.clear(), memory.theta_star.clear()
    before = [p.detach().clone() for p in model.parameters()]
    memory.pull(model, 0.1)
    memory.add_gradient(model)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before))


def test_a_fisher_without_its_anchor_is_refused():
    memory, model = consolidated(2.0), network()
    del memory.theta_star["2.weight"]
    for call in call_all(memory, model)[:3]:
        with pytest.raises(ValueError, match="must have the same names"):
            call()


def test_a_step_of_zero_touches_nothing():
    """Not even the count by which autograd notices a change between the passes forward and backward."""
    memory, model = consolidated(2.0), network()
    loss = model(data()[0]).square().sum()
    memory.pull(model, 0.0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_penalty_and_gradient_compile_into_one_graph():
    memory, model = consolidated(2.0), move(network())
    value = memory.penalty(model).detach()
    memory.add_gradient(model)
    expected = gradients(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    @torch.compile(fullgraph=True, backend="eager")
    def loss(x):
        memory.add_gradient(model)
        return memory.penalty(model) + 0 * x

    assert torch.equal(loss(torch.zeros(())).detach(), value)
    assert all(torch.allclose(g, expected[n], rtol=1e-12) for n, g in gradients(model).items())


def test_a_model_that_names_its_parameters_otherwise():
    """As some wrappers do, whose own layer does not show in the names."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def named_parameters(self, *args, **kwargs):
            return self.inner.named_parameters(*args, **kwargs)

    memory, model = consolidated(2.0), Wrapper()
    for _ in range(2):
        model.inner[2].weight = nn.Parameter(torch.ones_like(model.inner[2].weight))
        twin = copy.deepcopy(move(model.inner))
        memory.pull(model, 0.1)
        memory.pull(twin, 0.1)
        assert all(torch.equal(p, t) for p, t in zip(model.inner.parameters(), twin.parameters()))


def test_a_memory_keeps_no_model_alive_and_can_be_pickled():
    memory, model = consolidated(2.0), network()
    model[0].parent = [model]
    model[0].register_forward_hook(lambda *_: None)  # no pickle takes it
    memory.pull(model, 0.1)
    weight = weakref.ref(model[0].weight)
    again = pickle.loads(pickle.dumps(memory))
    twin = copy.deepcopy(move(model))
    memory.pull(model, 0.1)
    again.pull(twin, 0.1)
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), twin.parameters()))
    del model
    gc.collect()
    assert weight() is None


def test_a_pull_of_layers_in_several_precisions():
    class Mixed(nn.Sequential):
        def forward(self, x):
            return self[1](torch.tanh(self[0](x.float())).double())

    torch.manual_seed(0)
    model, (_, y) = Mixed(nn.Linear(4, 5), nn.Linear(5, 3).double()), data()
    memory = EWC(7.0)
    memory.consolidate(model, (torch.randn(12, 4), y))
    move(model)
    before = [p.detach().clone() for p in model.parameters()]
    memory.pull(model, 0.1)
    for p, old, f, star in zip(model.parameters(), before, memory.fisher.values(), memory.theta_star.values()):
        torch.testing.assert_close(p.detach(), ((old + 0.7 * f * star) / (1 + 0.7 * f)).to(p.dtype))


def test_before_the_first_task_a_step_is_compiled_and_transformed():
    model, memory = network(), EWC(10.0)
    x, _ = data()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).sum() + memory.penalty(model)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.func.grad(loss)(parameters)
    compiled = torch.compile(lambda: model(x).sum() + memory.penalty(model), backend="aot_eager", fullgraph=True)
    compiled().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
