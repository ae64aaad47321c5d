"""Kronecker factors against their definition, and the penalty against the dense quadratic form."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc import curvature, kfac
from ewc.kfac import KFAC

F64 = torch.float64
CLASSES = 3


class Sequence(nn.Module):
    """A linear layer at every position, a sum over positions, a linear head."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        self.body, self.head, self.activation = nn.Linear(3, 4), nn.Linear(4, CLASSES), activation

    def forward(self, x):
        return self.head(self.activation(self.body(x)).sum(1))


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, CLASSES, bias=False))


def convnet():
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), padding_mode="circular")
    return nn.Sequential(
        conv, nn.Tanh(), nn.Conv2d(3, 2, 3, padding="same"), nn.Flatten(), nn.Linear(12, CLASSES)
    )


MODELS = {"mlp": (mlp, (3,)), "sequence": (Sequence, (5, 3)), "convolution": (convnet, (2, 5, 4))}


def build(kind, seed=0, examples=6):
    torch.manual_seed(seed)
    make, shape = MODELS[kind]
    model, x = make().double(), torch.randn(examples, *shape, dtype=F64)
    model(x)
    return model, (x, torch.randint(0, CLASSES, (examples,)))


def close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.detach().abs().max().item())


def definition(model, x, labels_and_weights, setting):
    """Loops over examples, labels and positions; δ through a zero added to each layer's output."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    total = {}
    for i, x_ in enumerate(x):
        for label, weight in labels_and_weights(i, model(x_[None])[0].softmax(-1).detach()):
            seen, zeros, handles = {}, {}, []
            for name, layer in layers.items():

                def hook(module, args, out, name=name):
                    seen[name], zeros[name] = args[0].clone(), torch.zeros_like(out, requires_grad=True)
                    return out + zeros[name]

                handles.append(layer.register_forward_hook(hook))
            model(x_[None])[0].log_softmax(-1)[label].backward()
            for handle in handles:
                handle.remove()
            for name, layer in layers.items():
                pairs = [*positions(layer, seen[name], zeros[name].grad)]
                A, G = total.setdefault(name, [0.0, 0.0])
                if setting == "expand":
                    A = A + weight * sum(torch.outer(a, a) for a, _ in pairs) / len(pairs)
                    G = G + weight * sum(torch.outer(d, d) for _, d in pairs)
                else:
                    a, d = sum(a for a, _ in pairs) / len(pairs), sum(d for _, d in pairs)
                    A, G = A + weight * torch.outer(a, a), G + weight * torch.outer(d, d)
                total[name] = [A, G]
    model.zero_grad()
    return {name: (A / len(x), G / len(x)) for name, (A, G) in total.items()}


def positions(layer, x, delta):
    """(a, δ) at every position. A convolution's patch is its output's gradient in its weight."""
    one = [torch.ones(1, dtype=F64)] if layer.bias is not None else []
    if isinstance(layer, nn.Linear):
        for a, d in zip(x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])):
            yield torch.cat([a, *one]), d
        return
    single = copy.deepcopy(layer)
    for r, c in [(r, c) for r in range(delta.shape[2]) for c in range(delta.shape[3])]:
        patch = torch.autograd.grad(single(x)[0, 0, r, c], single.weight)[0][0]
        yield torch.cat([patch.reshape(-1), *one]), delta[0, :, r, c]


@pytest.mark.parametrize("setting", kfac.SETTINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_factors_are_their_definition(kind, setting):
    model, data = build(kind)
    found = kfac.factors(model, data, setting=setting, batch_size=4)
    expected = definition(model, data[0], lambda i, p: list(enumerate(p)), setting)
    assert found.keys() == expected.keys()
    for name, (A, G) in expected.items():
        close(found[name].A, A)
        close(found[name].G, G)


def test_empirical_factors_use_the_datas_labels():
    model, data = build("sequence")
    for name, (A, G) in definition(model, data[0], lambda i, p: [(data[1][i], 1.0)], "expand").items():
        found = kfac.factors(model, data, "empirical")[name]
        close(found.A, A)
        close(found.G, G)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "argmax"])
def test_one_head_is_a_network_without_the_other_outputs(estimator):
    model, (x, _) = build("mlp")
    y = torch.tensor([2, 0, 0, 2, 2, 0])
    small = nn.Sequential(*model[:-1], nn.Linear(4, 2, bias=False).double())
    with torch.no_grad():
        small[-1].weight.copy_(model[-1].weight[[2, 0]])
    got = kfac.factors(model, (x, y), estimator, classes=(2, 0))
    expected = kfac.factors(small, (x, (y == 0).long()), estimator)
    for name, (A, G) in expected.items():
        close(got[name].A, A)
        close(got[name].G[[2, 0]][:, [2, 0]] if name == "2" else got[name].G, G)
    assert got["2"].G[1].eq(0).all()
    memory = KFAC(1.0, estimator=estimator)
    memory.consolidate(model, (x, y), classes=(2, 0))
    close(memory.tasks[0]["2"].G, got["2"].G)
    with pytest.raises(ValueError, match="outside the classes"):
        kfac.factors(model, (x, y), estimator, classes=(1, 2))


@pytest.mark.parametrize("estimator", ["sampled", "probe"])
def test_random_estimators_are_unbiased_and_follow_the_seed(estimator):
    model, (x, y) = build("mlp")
    exact = kfac.factors(model, (x, y))["0"].G

    def draw(repeats, seed):
        data = x.repeat(repeats, 1), y.repeat(repeats)
        return kfac.factors(model, data, estimator, generator=torch.Generator().manual_seed(seed))["0"].G

    errors = [(draw(n, 1) - exact).norm() / exact.norm() for n in (10, 10_000)]
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5  # a thousandfold sample: about 30 times closer
    assert torch.equal(draw(1, 2), draw(1, 2)) and not torch.equal(draw(10, 2), draw(10, 3))


def dense(model, name, fisher):
    """The layer's block of the full Fisher matrix, ordered as its weight matrix with the bias as last column."""
    where = curvature.blocks(model)
    layer = model.get_submodule(name)
    index = torch.arange(fisher.shape[0])
    weight = index[where[f"{name}.weight"]].reshape(layer.weight.shape[0], -1)
    if layer.bias is not None:
        weight = torch.cat([weight, index[where[f"{name}.bias"]].unsqueeze(1)], 1)
    return fisher[weight.reshape(-1)][:, weight.reshape(-1)]


def test_one_example_is_exact():
    model, data = build("mlp", examples=1)
    F = curvature.full_fisher(model, data)
    for name, (A, G) in kfac.factors(model, data).items():
        close(torch.kron(G, A), dense(model, name, F))


def test_uncorrelated_factors_are_exact_and_correlated_ones_are_not():
    model, data = build("mlp", examples=40)
    first, last = kfac.factors(model, data)["0"], dense(model, "0", curvature.full_fisher(model, data))
    assert (torch.kron(first.G, first.A) - last).norm() > 0.05 * last.norm()
    with torch.no_grad():
        model[
            2
        ].weight.zero_()  # every class is equally likely: δ of the last layer has the same law for all a
    A, G = kfac.factors(model, data)["2"]
    close(torch.kron(G, A), dense(model, "2", curvature.full_fisher(model, data)))


def test_reduce_is_exact_where_positions_share_their_gradient():
    torch.manual_seed(0)
    model = Sequence(activation=lambda h: h).double()
    data = torch.randn(1, 5, 3, dtype=F64), torch.zeros(1, dtype=torch.long)
    block = dense(model, "body", curvature.full_fisher(model, data))
    A, G = kfac.factors(model, data, setting="reduce")["body"]
    close(torch.kron(G, A), block)
    A, G = kfac.factors(model, data, setting="expand")["body"]
    assert (torch.kron(G, A) - block).norm() > 0.1 * block.norm()


def test_data_dtype_batches_and_model_are_respected():
    model, (x, y) = build("mlp")
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    whole = kfac.factors(model, (x, y))
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=5), (x.float().double(), y)):
        close(kfac.factors(model, data, batch_size=2)["0"].G, whole["0"].G, rtol=1e-6)
    assert model.training and torch.equal(model[0].weight.grad, torch.ones(4, 3, dtype=F64))
    assert model[2].weight.grad is None and not model[0]._forward_hooks and not whole["0"].G.requires_grad
    single = kfac.factors(model.float(), (x, y))
    close(single["0"].A, whole["0"].A.float(), rtol=1e-5)
    half = kfac.factors(model.bfloat16(), (x, y))
    assert half["0"].G.dtype == torch.float32
    close(half["0"].A, whole["0"].A.float(), rtol=0.05)


def test_sums_and_counts_are_reduced_over_processes(monkeypatch):
    """With two processes that hold the same shard all sums double, and so must the counts."""
    model, data = build("sequence")
    alone, reduced = kfac.factors(model, data), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: reduced.append(total.mul_(2)))
    together = kfac.factors(model, data)
    assert len(reduced) == 5  # the counts, and two factors of two layers
    for name in alone:
        close(together[name].A, alone[name].A)
        close(together[name].G, alone[name].G)


def consolidated(kind="mlp", tasks=1, strength=2.5, **options):
    """A memory after some tasks, and the model moved away from the anchor."""
    memory = KFAC(strength, **options)
    for task in range(tasks):
        model, data = build(kind, seed=task)
        memory.consolidate(model, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return memory, model


def brute_penalty(memory, model):
    """λ/2 Σ vec(Δ)ᵀ (G ⊗ A) vec(Δ)."""
    total = 0.0
    for task in memory.tasks:
        for name, (A, G) in task.items():
            layer = model.get_submodule(name)
            delta = (layer.weight - memory.theta_star[f"{name}.weight"]).flatten(1)
            if layer.bias is not None:
                delta = torch.cat([delta, (layer.bias - memory.theta_star[f"{name}.bias"])[:, None]], 1)
            total = total + delta.reshape(-1) @ torch.kron(G, A) @ delta.reshape(-1)
    return memory.strength / 2 * total


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_penalty_and_gradient_are_the_quadratic_forms(kind, tasks):
    memory, model = consolidated(kind, tasks)
    expected = brute_penalty(memory, model)
    assert expected > 0 and len(memory.tasks) == tasks
    close(memory.penalty(model), expected)
    gradients = torch.autograd.grad(memory.penalty(model), list(model.parameters()))
    for g, h in zip(gradients, torch.autograd.grad(expected, list(model.parameters()))):
        close(g, h)
    memory.add_gradient(model)
    for p, g in zip(model.parameters(), gradients):
        close(p.grad, g)
    memory.add_gradient(model)
    for p, g in zip(model.parameters(), gradients):
        close(p.grad, 2 * g)


def test_pooled_factors_are_the_mean_a_and_the_sum_of_g():
    pooled, each = KFAC(1.0, keep="pooled"), KFAC(1.0)
    for seed in range(3):
        model, data = build("mlp", seed)
        pooled.consolidate(model, data)
        each.consolidate(model, data)
    assert len(pooled.tasks) == 1 and pooled.count == each.count == 3
    for name, (A, G) in pooled.tasks[0].items():
        close(A, sum(task[name].A for task in each.tasks) / 3)
        close(G, sum(task[name].G for task in each.tasks))
    assert torch.equal(pooled.theta_star["0.weight"], model[0].weight)


def test_pooling_is_exact_where_tasks_share_a_factor():
    """The first layer sees the same inputs in both tasks, so its A is shared, and differs in G."""
    pooled, each = KFAC(1.0, keep="pooled"), KFAC(1.0)
    _, (x, y) = build("mlp")
    for seed in range(2):
        model, _ = build("mlp", seed)
        pooled.consolidate(model, (x, y))
        each.consolidate(model, (x, y))

    def moved(layer):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[layer].weight += torch.linspace(-1, 1, other[layer].weight.numel(), dtype=F64).view_as(
                other[layer].weight
            )
        return pooled.penalty(other), each.penalty(other)

    close(*moved(0))
    assert abs(moved(2)[0] - moved(2)[1]) > 1e-3 * moved(2)[1]


def test_the_anchor_is_the_newest_optimum():
    memory = KFAC(1.0)
    for seed in range(2):
        model, data = build("mlp", seed)
        memory.consolidate(model, data)
        assert memory.penalty(model) == 0
    assert torch.equal(memory.theta_star["0.weight"], model[0].weight)
    with torch.no_grad():
        model[0].weight += 1  # the anchor is a copy
    assert memory.penalty(model) > 0


def steps(model, kind):
    if kind != "each":
        return {"short": 0.3, "long": 3000.0}[kind]
    generator = torch.Generator().manual_seed(9)
    return {n: torch.rand(p.shape, dtype=F64, generator=generator) for n, p in model.named_parameters()}


@pytest.mark.parametrize("strength", [0.01, 2.5, 1e6])
@pytest.mark.parametrize("step", ["short", "long", "each"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_pull_minimises_the_proximal_objective(tasks, step, strength):
    memory, model = consolidated(tasks=tasks, strength=strength)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    s = steps(model, step)
    penalty = memory.penalty(model).item()
    memory.pull(model, s)
    assert memory.penalty(model).item() < penalty
    # stationary: (θ' - θ) / s + λ Σ GΔA = 0
    for p, g in zip(model.parameters(), torch.autograd.grad(memory.penalty(model), list(model.parameters()))):
        name = next(n for n, q in model.named_parameters() if q is p)
        size = s[name] if step == "each" else s
        moved, wanted = p.detach() - before[name], -size * g
        torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4 * float(moved.norm()))
        assert moved.norm() > 0


@pytest.mark.parametrize("options", [{}, {"tasks": 3, "keep": "pooled"}], ids=["one task", "pooled"])
def test_pull_with_one_pair_of_factors_is_exact(options):
    memory, model = consolidated(strength=40.0, **options)
    A, G = memory.tasks[0]["2"]
    start = (model[2].weight - memory.theta_star["2.weight"]).detach()
    system = torch.eye(12, dtype=F64) + 0.3 * 40.0 * torch.kron(G, A)
    memory.pull(model, 0.3)
    expected = torch.linalg.solve(system, start.reshape(-1)).reshape(start.shape)
    close(model[2].weight.detach() - memory.theta_star["2.weight"], expected)


def test_pull_is_stable_in_single_precision_and_a_zero_step_stays():
    memory, model = consolidated(tasks=2, strength=1e8)
    memory.to(torch.float32)
    model.float()
    before = copy.deepcopy(model.state_dict())
    memory.pull(model, 0.0)
    memory.pull(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    penalties = [memory.penalty(model).item()]
    for _ in range(20):
        memory.pull(model, {n: torch.full_like(p, 0.1) for n, p in model.named_parameters()})
        penalties.append(memory.penalty(model).item())
    assert (
        penalties[0] > 1e6 and max(map(abs, penalties[1:])) < 1e-6 * penalties[0]
    )  # down to rounding, to stay


def test_an_empty_memory_is_silent():
    memory, (model, _) = KFAC(3.0), build("mlp")
    before = copy.deepcopy(model.state_dict())
    assert memory.penalty(model) == 0
    memory.add_gradient(model)
    memory.pull(model, 0.1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_frozen_layers_are_left_out():
    model, data = build("mlp")
    model[0].requires_grad_(False)
    memory = KFAC(1.0)
    memory.consolidate(model, data)
    assert memory.theta_star.keys() == {"2.weight"} and memory.tasks[0].keys() == {"2"}
    model[0].requires_grad_(True)
    with torch.no_grad():
        model[2].weight += 1
    memory.add_gradient(model)
    assert model[0].weight.grad is None and model[2].weight.grad is not None


def test_a_layer_frozen_later_is_not_moved():
    memory, model = consolidated()
    model[0].bias.requires_grad_(False)
    bias, weight = model[0].bias.clone(), model[0].weight.detach().clone()
    memory.pull(model, 1.0)
    memory.add_gradient(model)
    assert torch.equal(bias, model[0].bias) and model[0].bias.grad is None
    assert not torch.equal(weight, model[0].weight)


def test_a_single_layer_is_a_model():
    torch.manual_seed(0)
    model, x, y = (
        nn.Linear(3, CLASSES).double(),
        torch.randn(5, 3, dtype=F64),
        torch.zeros(5, dtype=torch.long),
    )
    memory = KFAC(1.0)
    memory.consolidate(model, (x, y))
    with torch.no_grad():
        model.weight[0] += 1
    before = memory.penalty(model)
    memory.pull(model, {"weight": 0.5, "bias": 0.5})
    assert 0 < memory.penalty(model) < before


def test_a_pooled_memory_goes_on_after_its_checkpoint():
    memory, _ = consolidated(tasks=2, keep="pooled")
    again = KFAC(0.0)
    again.load_state_dict(memory.state_dict())
    model, data = build("mlp", 7)
    for m in (memory, again):
        m.consolidate(model, data)
    assert again.keep == "pooled" and again.count == 3
    assert torch.equal(memory.tasks[0]["0"].A, again.tasks[0]["0"].A)


def test_checkpoints_survive_a_file(tmp_path):
    memory, model = consolidated(tasks=2, estimator="empirical", setting="reduce")
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    new = KFAC(0.0)
    new.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert (new.strength, new.estimator, new.setting) == (2.5, "empirical", "reduce")
    assert torch.equal(new.penalty(model), memory.penalty(model))
    for damaged in ({"strength": 1.0}, 3):
        with pytest.raises(ValueError, match="not the state of a KFAC memory"):
            new.load_state_dict(damaged)
    assert new.to(torch.float32).theta_star["0.weight"].dtype == torch.float32
    assert new.tasks[1]["0"].A.dtype == torch.float32 and memory.tasks[1]["0"].A.dtype == F64


class Functional(nn.Module):
    """Uses its layer's weight a second time, outside the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) @ self.layer.weight


class TimeFirst(nn.Module):
    """Hands its layer the positions on the first axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).sum(0)


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def partly():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    return model


class Unused(nn.Sequential):
    def forward(self, x):
        return self[0](x)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
            r"Layer '1' \(LayerNorm\) has no Kronecker form",
        ),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 3, 1, groups=3), nn.Flatten()),
            "'1'.*groups=3",
        ),
        (twice, r"Layer '0' \(Linear\) ran 2 times"),
        (lambda: Unused(nn.Linear(3, 3), nn.Linear(3, 3)), r"Layer '1' \(Linear\) ran 0 times"),
        (tied, r"Layer '1' \(Linear\) shares a parameter with layer '0'"),
        (partly, r"Layer '0' \(Linear\) is partly frozen"),
        (Functional, r"Layer 'layer' \(Linear\) does more with its weight"),
        (lambda: nn.Linear(3, 3).requires_grad_(False), "no trainable parameter"),
    ],
)
def test_layers_without_a_kronecker_form_are_named(make, message):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    model, memory = make(), KFAC(1.0)
    with pytest.raises(ValueError, match=message):
        memory.consolidate(model, (x, y))
    assert memory.tasks == [] and memory.theta_star == {}
    assert not any(m._forward_hooks for m in model.modules())


def test_expand_does_not_mind_the_order_of_axes_and_reduce_says_so():
    torch.manual_seed(0)
    model, x, y = TimeFirst().double(), torch.randn(4, 5, 3, dtype=F64), torch.zeros(4, dtype=torch.long)
    expected = definition(model, x, lambda i, p: list(enumerate(p)), "expand")["layer"]
    close(kfac.factors(model, (x, y))["layer"].A, expected[0])
    close(kfac.factors(model, (x, y))["layer"].G, expected[1])
    with pytest.raises(ValueError, match="Layer 'layer'.*'reduce' needs the examples on the first axis"):
        kfac.factors(model, (x, y), setting="reduce")


def test_bad_input_is_named():
    model, (x, y) = build("mlp")
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number, at least 0"):
            KFAC(strength)
    with pytest.raises(ValueError, match="Unknown estimator 'fisher'.*exact"):
        KFAC(1.0, estimator="fisher")
    with pytest.raises(ValueError, match="'expand' or 'reduce'"):
        KFAC(1.0, setting="sum")
    with pytest.raises(ValueError, match="'each' or 'pooled'"):
        KFAC(1.0, keep="sum")
    with pytest.raises(ValueError, match="'expand' or 'reduce'"):
        kfac.factors(model, (x, y), setting="sum")
    with pytest.raises(ValueError, match="no example"):
        kfac.factors(model, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="integer from 0 to 2"):
        kfac.factors(model, (x, y + 3))
    memory, model = consolidated()
    for step in (-0.1, float("nan"), {n: torch.full_like(p, -1.0) for n, p in model.named_parameters()}):
        with pytest.raises(ValueError, match="step is a learning rate"):
            memory.pull(model, step)
    with pytest.raises(ValueError, match="no entry for '0.bias'"):
        memory.pull(model, {"0.weight": 0.1})
    other = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    for method in (
        memory.penalty,
        memory.add_gradient,
        lambda m: memory.pull(m, 0.1),
        lambda m: memory.consolidate(m, (x, y)),
    ):
        with pytest.raises(ValueError, match=r"'0.weight' of shape \(4, 3\).*\(5, 3\)"):
            method(other)
    with pytest.raises(ValueError, match="the model has none"):
        memory.penalty(nn.Linear(3, 3))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_are_the_same_model(wrap):
    model, data = build("mlp")
    plain, memory = KFAC(2.0), KFAC(2.0)
    plain.consolidate(model, data)
    memory.consolidate(wrap(model), data)
    assert kfac.factors(wrap(model), data).keys() == {"0", "2"}
    assert memory.theta_star.keys() == plain.theta_star.keys() == {"0.weight", "0.bias", "2.weight"}
    with torch.no_grad():
        model[0].weight += 1
    twin = copy.deepcopy(model)
    assert memory.penalty(wrap(model)) == plain.penalty(twin) > 0
    for keep, one in ((memory, wrap(model)), (plain, twin)):
        keep.add_gradient(one)
        keep.pull(one, 0.1)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("options", [{"setting": "reduce"}, {"estimator": "empirical"}, {"estimator": "sampled"}])
def test_a_memory_measures_with_its_own_options(options):
    model, data = build("sequence")
    memory = KFAC(1.0, **options, generator=torch.Generator().manual_seed(4))
    memory.consolidate(model, data)
    expected = kfac.factors(model, data, **options, generator=torch.Generator().manual_seed(4))
    for name, (A, G) in expected.items():
        close(memory.tasks[0][name].A, A)
        close(memory.tasks[0][name].G, G)
    default = kfac.factors(model, data)["body"]
    assert not all(torch.allclose(m, d) for m, d in zip(memory.tasks[0]["body"], default))


@pytest.mark.parametrize("change", ["consolidate", "load_state_dict", "strength"])
def test_pull_follows_every_change(change):
    """The bases that it keeps from one step to the next belong to the old factors."""
    memory, model = consolidated(strength=40.0, keep="pooled")
    memory.pull(model, 0.3)
    if change == "consolidate":
        memory.consolidate(*build("mlp", 5))
    elif change == "load_state_dict":
        memory.load_state_dict(consolidated(tasks=2, strength=40.0, keep="pooled")[0].state_dict())
    else:
        memory.strength = 7.0
    A, G = memory.tasks[0]["2"]
    start = (model[2].weight - memory.theta_star["2.weight"]).detach()
    system = torch.eye(12, dtype=F64) + 0.3 * memory.strength * torch.kron(G, A)
    memory.pull(model, 0.3)
    expected = torch.linalg.solve(system, start.reshape(-1)).reshape(start.shape)
    close(model[2].weight.detach() - memory.theta_star["2.weight"], expected)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_pull_is_linear_in_the_distance(scale):
    """The error allowed to the iteration is a relative one."""
    memory, model = consolidated(tasks=2)
    anchor, far = memory.theta_star, copy.deepcopy(model)
    with torch.no_grad():
        for n, p in far.named_parameters():
            p.sub_(anchor[n]).mul_(scale).add_(anchor[n])
    for one in (model, far):
        memory.pull(one, steps(one, "each"))
    for (n, p), q in zip(model.named_parameters(), far.parameters()):
        torch.testing.assert_close((q - anchor[n]) / scale, p - anchor[n], rtol=1e-3, atol=1e-4)


def test_pull_with_a_step_of_zero_for_some_weights_leaves_those():
    memory, model = consolidated(tasks=2)
    before, step = copy.deepcopy(model.state_dict()), steps(model, "each")
    step["0.bias"].zero_()
    step["0.weight"][1] = 0
    memory.pull(model, step)
    assert torch.equal(model[0].bias, before["0.bias"]) and torch.equal(model[0].weight[1], before["0.weight"][1])
    assert not torch.equal(model[0].weight[0], before["0.weight"][0])
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("factor", ["A", "G"])
def test_pull_never_moves_away_whatever_the_strength(factor):
    """In float32 an eigenvalue of 0 may come out at -1e-9, and no strength may make a pole of it."""
    memory, model = KFAC(1.0), nn.Linear(30, 30, bias=False)
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(30, 3, generator=generator)
    memory.tasks = [{"": kfac.Factors(torch.eye(30), torch.eye(30))._replace(**{factor: thin @ thin.T})}]
    memory.theta_star, memory.count = {"weight": torch.zeros(30, 30)}, 1
    for strength in torch.logspace(3, 9, 25).tolist():
        nn.init.normal_(model.weight, generator=generator)
        before, memory.strength = model.weight.detach().norm(), strength
        memory.pull(model, 1.0)
        assert model.weight.norm() < before  # the proximal step of a convex function is a contraction


def test_half_precision_weights_keep_float32_factors():
    model, (x, y) = build("mlp")
    half, memory, exact = copy.deepcopy(model).bfloat16(), KFAC(3.0), KFAC(3.0)
    memory.consolidate(half, (x.bfloat16(), y))
    assert {m.dtype for m in memory.tasks[0]["0"]} == {torch.float32}
    exact.load_state_dict(memory.state_dict())
    exact.to(F64)
    model.load_state_dict(half.state_dict())
    with torch.no_grad():
        for p, q in zip(half.parameters(), model.parameters()):
            p.add_(torch.randn_like(p))
            q.copy_(p)
    torch.testing.assert_close(memory.penalty(half).double(), exact.penalty(model), rtol=0.02, atol=0)
    for keep, one in ((memory, half), (exact, model)):
        keep.add_gradient(one)
        keep.pull(one, 0.1)
    for p, q in zip(half.parameters(), model.parameters()):
        assert p.dtype == p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0.05, atol=0.05 * float(q.grad.abs().max()))
        torch.testing.assert_close(p.double(), q.detach(), rtol=0.02, atol=0.02)


def test_another_device_is_named():
    """The meta device stands for a second one wherever there is none."""
    memory, model = consolidated()
    memory.to("meta")
    for method in (memory.penalty, memory.add_gradient, lambda m: memory.pull(m, 0.1)):
        with pytest.raises(ValueError, match="on meta, the model has .* on cpu"):
            method(model)
    assert memory.penalty(model.to("meta")).device.type == "meta"


def test_a_state_shares_nothing_with_the_memory_that_loads_it():
    memory, _ = consolidated(tasks=2)
    state, other = copy.deepcopy(memory.state_dict()), KFAC(0.0)
    given = copy.deepcopy(state)
    other.load_state_dict(given)
    del memory.state_dict()["theta_star"]["0.bias"], memory.state_dict()["tasks"][0]["0"]
    for t in [*given["theta_star"].values(), *(m for task in given["tasks"] for f in task.values() for m in f.values())]:
        t.fill_(-1.0)
    for keep in (memory, other):
        assert keep.theta_star.keys() == state["theta_star"].keys()
        assert all(torch.equal(keep.theta_star[n], t) for n, t in state["theta_star"].items())
        for task, kept in zip(state["tasks"], keep.tasks):
            assert all(torch.equal(kept[n].A, f["A"]) and torch.equal(kept[n].G, f["G"]) for n, f in task.items())


class Faint(nn.Module):
    """Makes every gradient before it small."""

    def forward(self, x):
        return 1e-9 * x


def test_whether_a_layer_has_a_kronecker_form_does_not_depend_on_the_scale():
    torch.manual_seed(0)
    x, y, plain = torch.randn(4, 3, dtype=F64), torch.zeros(4, dtype=torch.long), nn.Linear(3, 3).double()
    with pytest.raises(ValueError, match="does more with its weight"):
        kfac.factors(nn.Sequential(Functional(), Faint()).double(), (x, y))
    with torch.no_grad():
        plain.weight.mul_(1e-9)  # so that the softmax does not saturate
    A = torch.cat([1e9 * x, torch.ones(4, 1, dtype=F64)], 1)
    close(kfac.factors(plain, (1e9 * x, y))[""].A, A.T @ A / 4)


class InVain(nn.Sequential):
    """Runs its second layer and drops what it returns."""

    def forward(self, x):
        self[1](x)
        return self[0](x)


def test_a_layer_that_runs_in_vain_has_inputs_and_no_gradient():
    torch.manual_seed(0)
    model, x, y = InVain(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=F64), torch.zeros(4).long()
    found, alone = kfac.factors(model, (x, y)), kfac.factors(model[0], (x, y))[""]
    close(found["0"].G, alone.G)
    close(found["1"].A, alone.A)
    assert found["1"].G.shape == (2, 2) and found["1"].G.eq(0).all()


def test_a_layer_of_one_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, CLASSES)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(0, CLASSES, (6,))
    memory = KFAC(2.5)
    memory.consolidate(model, (x, y))
    for name, (A, G) in definition(model, x, lambda i, p: list(enumerate(p)), "expand").items():
        close(memory.tasks[0][name].A, A)
        close(memory.tasks[0][name].G, G)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    expected = torch.autograd.grad(brute_penalty(memory, model), list(model.parameters()))
    memory.add_gradient(model)
    for p, g in zip(model.parameters(), expected):
        close(p.grad, g)
        assert not p.grad.requires_grad


def test_equal_steps_by_name_are_one_step():
    memory, model = consolidated(strength=40.0)
    twin = copy.deepcopy(model)
    memory.pull(model, 0.3)  # no number of float32
    memory.pull(twin, {n: 0.3 for n, _ in twin.named_parameters()})
    for p, q in zip(twin.parameters(), model.parameters()):
        close(p.detach(), q.detach(), rtol=1e-12)
    for step in (1, torch.tensor(1.0)):  # numbers of another type
        memory.pull(model, step)
        memory.pull(twin, 1.0)
        for p, q in zip(twin.parameters(), model.parameters()):
            close(p.detach(), q.detach())
    with pytest.raises(ValueError, match="step is a learning rate"):
        memory.pull(model, float("inf"))
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="step is a learning rate"):
            memory.pull(model, {n: bad for n, _ in model.named_parameters()})


def test_a_linear_layer_with_a_parameter_more_is_refused():
    layer = nn.Linear(3, 3)
    layer.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"Layer '0' \(Linear\) has no Kronecker form"):
        kfac.factors(nn.Sequential(layer), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))


def test_labels_outside_the_head_are_refused_and_absent_classes_are_not():
    model, (x, _) = build("mlp")
    with pytest.raises(ValueError, match="outside the classes"):  # although both classes occur
        kfac.factors(model, (x, torch.tensor([0, 1, 2, 0, 1, 0])), classes=(0, 1))
    only = kfac.factors(model, (x, torch.zeros(6, dtype=torch.long)), "empirical", classes=(1, 0))
    expected = kfac.factors(model, (x, torch.zeros(6, dtype=torch.long)), "empirical", classes=(0, 1))
    close(only["0"].G, expected["0"].G)


def test_loading_keeps_the_memorys_own_generator():
    generator = torch.Generator()
    memory = KFAC(0.0, generator=generator)
    memory.load_state_dict(consolidated()[0].state_dict())
    assert memory.generator is generator


@pytest.mark.parametrize("strength", [1.0, 1e3, 1e6, 1e9])
def test_pull_is_exact_when_the_factors_span_many_orders_of_magnitude(strength):
    """The factors of a network that is nearly certain, on images with black pixels, in single precision."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5, 40, dtype=F64, generator=generator)
    scale = torch.logspace(0, -6, 5, dtype=F64)
    G = (scale[:, None] * (mixed @ mixed.T / 40) * scale).float()
    pixels = torch.randint(0, 3, (16, 7), generator=generator).float()
    pixels[:, 2], pixels[:, 4] = 0, pixels[:, 5]  # a black pixel, and two that are always equal
    pixels[:, -1] = 1
    A = pixels.T @ pixels / 16  # exact in binary: its smallest eigenvalues are 0, not rounding
    assert G.diagonal().max() > 1e11 * G.diagonal().min() and torch.linalg.matrix_rank(A.double()) < 7
    layer, memory = nn.Linear(6, 5), KFAC(strength)
    memory.tasks, memory.count = [{"": kfac.Factors(A, G)}], 1
    memory.theta_star = {"weight": torch.zeros(5, 6), "bias": torch.zeros(5)}
    start = torch.randn(5, 7, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(start[:, :-1]), layer.bias.copy_(start[:, -1])
    system = torch.eye(35, dtype=F64) + strength * torch.kron(G.double(), A.double())
    expected = torch.linalg.solve(system, start.double().reshape(-1)).reshape(5, 7)
    memory.pull(layer, 1.0)
    found = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    assert found.dtype == torch.float32
    close(found.double(), expected, rtol=2e-6)


def test_half_precision_is_pulled_in_single():
    """In float16 the sums of the conjugate gradients overflow."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4).half(), torch.randint(0, 3, (40,))
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).half()
    memory = KFAC(1.0)
    memory.consolidate(model, (x, y))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    before = memory.penalty(model).item()
    memory.pull(model, {n: torch.full_like(p, 0.1) for n, p in model.named_parameters()})
    assert all(p.isfinite().all() and p.dtype == torch.float16 for p in model.parameters())
    assert 0 < memory.penalty(model).item() < before


def test_gradient_of_a_model_converted_after_the_task():
    memory, model = consolidated()
    memory.to(torch.float32)
    memory.add_gradient(model.bfloat16())
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in model.parameters())


def test_odd_data_and_models_are_named():
    model, (x, y) = build("mlp")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        kfac.factors(model, (x, y), batch_size=0)
    with pytest.raises(TypeError, match="data must be a Dataset"):
        kfac.factors(model, zip([x], [y]))
    with pytest.raises(ValueError, match="logits are not finite"):
        kfac.factors(model, (x * float("nan"), y))
    memory, _ = consolidated()
    for keep in (KFAC(1.0), memory):
        bare = nn.Flatten()
        if keep.tasks:
            with pytest.raises(ValueError, match="the model has none"):
                keep.penalty(bare)
        else:
            assert keep.penalty(bare) == 0


def test_a_memory_made_in_inference_mode_serves_training():
    model, data = build("mlp")
    memory = KFAC(1.0)
    with torch.inference_mode():
        memory.consolidate(model, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    memory.penalty(model).backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("keep", ["each", "pooled"])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_frozen_or_thawed_between_tasks_is_refused(keep, first):
    model, data = build("mlp")
    memory = KFAC(1.0, keep=keep)
    model[0].requires_grad_(first)
    memory.consolidate(model, data)
    model[0].requires_grad_(not first)
    with pytest.raises(ValueError, match="layers of a memory stay the same"):
        memory.consolidate(model, data)
    model[0].requires_grad_(first)
    memory.consolidate(model, data)
    assert memory.penalty(model).isfinite()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_the_pull_is_the_proximal_step_of_what_is_not_frozen(frozen):
    """Against the linear system of the free entries, written out."""
    torch.manual_seed(0)
    model = nn.Linear(3, CLASSES).double()
    data = torch.randn(8, 3, dtype=F64), torch.randint(0, CLASSES, (8,))
    memory = KFAC(5.0)
    memory.consolidate(model, data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    getattr(model, frozen).requires_grad_(False)
    G, A = memory.tasks[0][""].G, memory.tasks[0][""].A
    delta = torch.cat([model.weight, model.bias[:, None]], 1).detach() - memory._anchor("")
    free = torch.zeros_like(delta, dtype=torch.bool)
    free[:, 3:] = frozen == "weight"
    free[:, :3] = frozen == "bias"
    free = free.flatten()
    H = 0.7 * 5.0 * torch.kron(G, A)
    system = torch.eye(int(free.sum()), dtype=F64) + H[free][:, free]
    expected = delta.flatten().clone()
    expected[free] = torch.linalg.solve(system, delta.flatten()[free] - H[free][:, ~free] @ delta.flatten()[~free])
    memory.pull(model, 0.7)
    after = torch.cat([model.weight, model.bias[:, None]], 1).detach() - memory._anchor("")
    torch.testing.assert_close(after.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_used_elsewhere_is_found_out_at_zero_too():
    """A network that finds all classes alike has scores that add up to zero."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, CLASSES)
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def forward(self, x):
            return self.layer(x) + nn.functional.linear(x**2, self.layer.weight)

    with pytest.raises(ValueError, match="does more with its weight"):
        kfac.factors(Twice().double(), (torch.randn(6, 3, dtype=F64), torch.randint(0, CLASSES, (6,))))


def test_a_layer_that_is_called_with_a_named_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.layer(input=x)

    torch.manual_seed(0)
    model = Named().double()
    data = torch.randn(6, 3, dtype=F64), torch.randint(0, CLASSES, (6,))
    named, plain = kfac.factors(model, data)["layer"], kfac.factors(model.layer, data)[""]
    close(named.A, plain.A)
    close(named.G, plain.G)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_needs_an_example(batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        kfac.factors(*build("mlp"), batch_size=batch_size)
    assert kfac.factors(*build("mlp"), batch_size=1).keys() == {"0", "2"}


def test_convolutions_are_measured_in_full_precision():
    """Not in TF32, cuDNN's default; the setting is as before afterwards."""
    model, data = build("convolution")
    seen, before = set(), torch.backends.cudnn.conv.fp32_precision
    model[0].register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.conv.fp32_precision))
    kfac.factors(model, data)
    assert seen == {"ieee"} and torch.backends.cudnn.conv.fp32_precision == before


def stiff(strength, rank=2, seed=0):
    """Two tasks in float32, factors of low rank with rounded eigenvalues, some below 0; and a layer elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    memory, layer = KFAC(strength), nn.Linear(5, 3, bias=False)
    roots = [[torch.randn(n, r, generator=generator) for n, r in ((5, 5), (3, rank))] for _ in range(2)]
    memory.tasks, memory.count = [{"": kfac.Factors(a @ a.T, g @ g.T)} for a, g in roots], 2
    memory.theta_star = {"weight": torch.zeros(3, 5)}
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 5, generator=generator))
    return memory, layer


def proximal(memory, layer, step):
    """The linear system of the step, in float64, with the factors' eigenvalues at least 0."""

    def sound(matrix):
        values, vectors = torch.linalg.eigh(matrix.double())
        return (vectors * values.clamp(min=0)) @ vectors.T

    K = sum(torch.kron(sound(task[""].G), sound(task[""].A)) for task in memory.tasks)
    system = torch.eye(15, dtype=F64) + memory.strength * torch.as_tensor(step, dtype=F64).reshape(-1, 1) * K
    start = layer.weight.detach().double().flatten()
    return torch.linalg.solve(system, start).view(3, 5), K


@pytest.mark.parametrize("strength", [1e4, 1e8, 1e10])
def test_several_tasks_never_throw_the_weights_away(strength):
    for seed in range(10):
        memory, layer = stiff(strength, rank=1, seed=seed)
        expected, K = proximal(memory, layer, 0.1)
        start = layer.weight.detach().double().flatten()
        memory.pull(layer, 0.1)
        after = layer.weight.detach().double().flatten()
        assert after.norm() < start.norm() and after @ K @ after < start @ K @ start
        if strength == 1e4:
            torch.testing.assert_close(after, expected.flatten(), rtol=0, atol=1e-5 * float(start.norm()))


@pytest.mark.parametrize("strength", [1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("each", [False, True])
def test_small_moves_are_made(strength, each):
    """However little a step moves the weights, its error is small beside it."""
    memory, layer = stiff(strength)
    memory.to(F64), layer.double()
    start, step = layer.weight.detach().clone(), torch.full((3, 5), 0.1, dtype=F64)
    expected = proximal(memory, layer, step)[0] - start
    memory.pull(layer, {"weight": step} if each else 0.1)
    moved = layer.weight.detach() - start
    assert (moved - expected).norm() < max(1e-5 * expected.norm(), 1e-15 * start.norm())


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("step", [1.0, 10.0, {"weight": 1.0}])
def test_no_finite_strength_makes_nan(tasks, step):
    memory, layer = KFAC(1e39), nn.Linear(3, 3, bias=False)
    corner = torch.zeros(3, 3)
    corner[0, 0] = 1
    memory.tasks, memory.count = [{"": kfac.Factors(corner, corner)}] * tasks, tasks
    memory.theta_star = {"weight": torch.zeros(3, 3)}
    nn.init.ones_(layer.weight)
    memory.pull(layer, step)
    torch.testing.assert_close(layer.weight.detach(), 1 - corner)


def test_a_strength_of_zero_changes_nothing():
    memory, model = consolidated(strength=0.0, tasks=2)
    before = copy.deepcopy(model.state_dict())
    memory.pull(model, 0.1)
    memory.add_gradient(model)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, "autocast"])
def test_penalty_and_gradient_are_computed_in_single_precision(kind):
    """Curvatures of 1e-9, which float16 does not know, and a move that the penalty hardly sees."""
    torch.manual_seed(0)
    layer, memory = nn.Linear(64, 10), KFAC(1e3)
    if kind != "autocast":
        layer.to(kind)
    memory.consolidate(layer, (1 + 0.05 * torch.randn(50, 64), torch.zeros(50, dtype=torch.long)))
    memory.tasks = [{n: kfac.Factors(A, 1e-7 * G) for n, (A, G) in memory.tasks[0].items()}]
    with torch.no_grad():
        layer.weight.add_(0.02 * torch.randn(64) + 1e-3 * torch.randn(10, 64))
    exact, double = KFAC(0.0), copy.deepcopy(layer).double()
    exact.load_state_dict(memory.state_dict())
    exact.to(F64).add_gradient(double)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        penalty = memory.penalty(layer)
        memory.add_gradient(layer)
    torch.testing.assert_close(penalty.double(), exact.penalty(double), rtol=1e-4, atol=0)
    rounding = 1e-5 if kind == "autocast" else torch.finfo(kind).eps
    found, expected = layer.weight.grad.double(), double.weight.grad
    torch.testing.assert_close(found, expected, rtol=rounding, atol=6e-8 if kind == torch.float16 else 1e-9)


def test_a_memory_of_what_is_not_finite_is_refused():
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for weight, data, message in (
        (1.0, (x, y), "Parameter '0.bias' is not finite"),
        (1e-30, (1e25 * x, y), "factors of layer '0' are not finite"),
    ):
        model, memory = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, CLASSES)), KFAC(1.0)
        with torch.no_grad():
            model[0].weight.mul_(weight)
            if weight == 1.0:
                model[0].bias[0] = -float("inf")  # a unit that never fires
        with pytest.raises(ValueError, match=message):
            memory.consolidate(model, data)
        assert memory.tasks == [] and memory.theta_star == {} and memory.count == 0


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s | {"strength": "x"},
        lambda s: s | {"strength": None},
        lambda s: s | {"keep": "pooled"},
        lambda s: s | {"count": "a"},
        lambda s: s | {"count": 7},
        lambda s: s | {"tasks": None},
        lambda s: s | {"tasks": []},
        lambda s: s | {"tasks": [s["tasks"][0], without(s["tasks"][1], "2")]},
        lambda s: s | {"tasks": [{n: without(pair, "A") for n, pair in task.items()} for task in s["tasks"]]},
        lambda s: s | {"tasks": [{n: f | {"A": f["A"][:2, :2]} for n, f in task.items()} for task in s["tasks"]]},
        lambda s: s | {"theta_star": None},
        lambda s: s | {"theta_star": {}},
        lambda s: s | {"theta_star": without(s["theta_star"], "0.bias")},
        lambda s: s | {"theta_star": without(s["theta_star"], "2.weight")},
        lambda s: s | {"theta_star": s["theta_star"] | {"4.weight": torch.zeros(2, 2)}},
    ],
)
def test_a_damaged_state_is_refused(damage):
    memory, model = consolidated(tasks=2)
    before = memory.penalty(model)
    with pytest.raises(ValueError, match="damaged"):
        memory.load_state_dict(damage(memory.state_dict()))
    assert memory.strength == 2.5 and memory.keep == "each" and torch.equal(memory.penalty(model), before)


class Mixing(nn.Sequential):
    def forward(self, x):
        z = self[0](x)
        return self[1](torch.tanh(z - z.mean(0)))


class Random(nn.Sequential):
    def forward(self, x):
        return self[1](nn.functional.dropout(torch.tanh(self[0](x)), 0.5, training=True))


@pytest.mark.parametrize("make", [Mixing, Random])
def test_models_without_factors_per_example_are_refused(make):
    torch.manual_seed(0)
    model, data = make(nn.Linear(3, 4), nn.Linear(4, 3)), (torch.randn(6, 3), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="when it is run alone"):
        kfac.factors(model, data)


def test_a_model_compiled_in_place_is_the_same_model():
    model, data = build("mlp")
    expected = kfac.factors(model, data)
    model.compile(backend="eager")
    model(data[0])  # what is compiled now knows of no hook
    for name, (A, G) in kfac.factors(model, data).items():
        close(A, expected[name].A)
        close(G, expected[name].G)


def test_a_layer_with_a_parametrised_weight_is_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, CLASSES))
    layer.parametrizations.requires_grad_(False)
    with pytest.raises(ValueError, match="Layer '0' .* has no Kronecker form"):
        kfac.factors(nn.Sequential(layer), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))


def test_data_made_in_inference_mode_serve():
    model, (x, y) = build("mlp")
    with torch.inference_mode():
        data = x.clone(), y.clone()
    close(kfac.factors(model, data)["0"].G, kfac.factors(model, (x, y))["0"].G)


def test_a_step_of_another_shape_is_refused():
    memory, model = consolidated()
    step = {n: torch.full(p.shape[-1:], 0.1) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"step of '0.weight' has shape \(3,\), the parameter \(4, 3\)"):
        memory.pull(model, step)


class Named(nn.Module):
    """Compares each example with what a layer makes of a constant, as CLIP does with the names of the classes."""

    def __init__(self, layer, *shape):
        super().__init__()
        self.image, self.layer = nn.Linear(4, 5), layer
        self.register_buffer("names", torch.randn(shape))

    def forward(self, x):
        return self.image(x) @ self.layer(self.names).reshape(-1, 5).T


@pytest.mark.parametrize("setting", kfac.SETTINGS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Named(nn.Linear(2, 5), 3, 2),
        lambda: Named(nn.Linear(2, 5), 6, 2),  # as many rows as examples
        lambda: Named(nn.Linear(2, 15), 2),  # no axis besides the features
        lambda: Named(nn.Conv2d(2, 5, 1), 1, 2, 3, 1),
    ],
)
def test_an_output_that_examples_share_is_refused(make, setting):
    torch.manual_seed(0)
    data = torch.randn(6, 4), torch.arange(6) % CLASSES
    message = "'reduce' needs the" if setting == "reduce" else "shares an output row between examples"
    with pytest.raises(ValueError, match=f"Layer 'layer'.*{message}"):
        kfac.factors(make(), data, setting=setting)


def test_an_output_for_one_example_at_a_time_is_not_shared():
    torch.manual_seed(0)
    model, x = Named(nn.Linear(2, 5), 3, 2).double(), torch.randn(6, 4, dtype=F64)
    expected = definition(model, x, lambda i, p: list(enumerate(p)), "expand")["layer"]
    for found, matrix in zip(kfac.factors(model, (x, torch.arange(6) % CLASSES), batch_size=1)["layer"], expected):
        close(found, matrix)


class Sorted(Sequence):
    """Hands its layer the examples in another order."""

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return super().forward(x[order])[order.argsort()]


def test_reduce_minds_where_the_examples_are_and_not_their_order():
    torch.manual_seed(0)
    x, y = torch.randn(5, 5, 3, dtype=F64), torch.arange(5) % CLASSES
    with pytest.raises(ValueError, match="Layer 'layer'.*'reduce' needs the examples there. Use 'expand'"):
        kfac.factors(TimeFirst().double(), (x, y), setting="reduce")  # as many positions as examples
    model, model_sorted = Sequence().double(), Sorted().double()
    model_sorted.load_state_dict(model.state_dict())
    expected = kfac.factors(model, (x, y), setting="reduce")
    for name, pair in kfac.factors(model_sorted, (x, y), setting="reduce").items():
        close(pair.A, expected[name].A)
        close(pair.G, expected[name].G)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_factors_in_inference_mode(mode):
    model, data = build("mlp")
    with mode():
        found = kfac.factors(model, data)
    for name, pair in kfac.factors(model, data).items():
        assert torch.equal(found[name].G, pair.G) and not found[name].G.is_inference()


class Backbone(nn.Module):
    """A frozen backbone in half precision below a head in single precision."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 5).bfloat16().requires_grad_(False), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x)).float())


def test_a_frozen_backbone_in_half_precision():
    torch.manual_seed(0)
    model, x, y = Backbone(), torch.randn(6, 4), torch.arange(6) % CLASSES
    expected = kfac.factors(model.head, (torch.tanh(model.backbone(x.bfloat16())).float(), y))[""]
    for found, matrix in zip(kfac.factors(model, (x, y))["head"], expected):
        assert found.dtype == torch.float32
        close(found, matrix, rtol=1e-2)


def test_a_model_with_a_compiled_part_is_the_same_model():
    model, data = build("mlp")
    expected = kfac.factors(model, data)
    model = nn.Sequential(torch.compile(model[:2], backend="eager"), model[2])
    model(data[0])  # what is compiled now knows of no hook
    for found, pair in zip(kfac.factors(model, data).values(), expected.values(), strict=True):
        close(found.A, pair.A)
        close(found.G, pair.G)


class Overwriting(nn.Sequential):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


def test_a_model_that_writes_into_its_input():
    model, (x, y) = build("mlp")
    before, rectified = x.clone(), nn.Sequential(nn.ReLU(inplace=True), model)
    for writing, seen in ((Overwriting(model), x - 0.5), (rectified, x.relu())):
        expected = kfac.factors(model, (seen, y))
        for found, pair in zip(kfac.factors(writing, (x, y)).values(), expected.values(), strict=True):
            close(found.A, pair.A)
            close(found.G, pair.G)
        assert torch.equal(x, before)


class Ungraded(nn.Sequential):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(4, 1), "The model has one output: a softmax needs at least two classes"),
        (lambda: Ungraded(nn.Linear(4, 3)), r"do not depend on any parameter .*\(is there a no_grad\?\)"),
        (lambda: nn.Sequential(Ungraded(nn.Linear(4, 3)), nn.Linear(3, 3)), "Layer '0.0' .* runs without a gradient"),
    ],
)
def test_models_without_a_softmax_or_a_gradient_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        kfac.factors(make(), (torch.randn(6, 4), torch.zeros(6, dtype=torch.long)))


def test_a_pooled_memory_goes_on_in_another_precision():
    (model, data), memories = build("mlp"), (KFAC(1.0, keep="pooled"), KFAC(1.0, keep="pooled"))
    for memory, first in zip(memories, (torch.float32, F64)):
        for kind in (first, F64):
            memory.consolidate(model.to(kind), data)
    pair, expected = (memory.tasks[0]["0"] for memory in memories)
    close(pair.A, expected.A, rtol=1e-6)
    close(pair.G, expected.G, rtol=1e-6)


@pytest.mark.parametrize("keep", ["each", "pooled"])
def test_a_shallow_copy_consolidates_by_itself(keep):
    memory, _ = consolidated(keep=keep)
    before = memory.state_dict()
    other = copy.copy(memory)
    other.consolidate(*build("mlp", seed=1))
    assert memory.count == 1 and len(memory.tasks) == 1 and other.count == 2
    assert memory.state_dict()["tasks"] == before["tasks"]
    KFAC(1.0).load_state_dict(other.state_dict())


def test_the_penalty_before_the_first_task_has_a_gradient_of_zero():
    model = mlp()
    memory = KFAC(3.0)
    penalty = memory.penalty(model)
    penalty.backward()
    assert penalty.item() == 0.0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="step has shape .4, 3.: give one number"):
        memory.consolidate(model, (torch.randn(8, 3), torch.randint(CLASSES, (8,))))
        memory.pull(model, torch.ones(4, 3))
