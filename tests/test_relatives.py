"""L2, SI and MAS: importances against their definitions, and the memory interface that they share with EWC."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc.elastic import EWC
from ewc.relatives import L2, MemoryAwareSynapses, SynapticIntelligence

F64 = torch.float64


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, dtype=F64, generator=generator), torch.randint(0, 2, (6,), generator=generator)


def close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.detach().abs().max().item())


class Weights(nn.Module):
    """A bare vector of weights, for losses written by hand."""

    def __init__(self, values):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values, dtype=F64))


def descend(model, loss, memory, lr, count, pull=False):
    for _ in range(count):
        model.zero_grad()
        loss(model.theta).backward()
        memory.record(model)
        with torch.no_grad():
            model.theta -= lr * model.theta.grad
        if pull:
            memory.pull(model, lr)


def learnt(memory, model, data):
    """The memory after one task."""
    if hasattr(memory, "record"):
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        memory.record(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.5 * p.grad
        model.zero_grad()
    memory.consolidate(model, data)
    return memory


MEMORIES = [L2, SynapticIntelligence, MemoryAwareSynapses]


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_interface_is_ewcs(kind, tmp_path):
    model, data, memory = network(), batch(), kind(3.0)
    assert memory.penalty(model) == 0
    learnt(memory, model, data)
    assert memory.penalty(model) == 0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    expected = 1.5 * sum(
        (memory.fisher[n] * (p - memory.theta_star[n]) ** 2).sum() for n, p in model.named_parameters()
    )
    assert expected > 0
    close(memory.penalty(model), expected)
    memory.add_gradient(model)
    for p, g in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()))):
        close(p.grad, g)
    pulled = copy.deepcopy(model)
    memory.pull(pulled, 0.2)
    for n, p in model.named_parameters():
        weight = 0.2 * 3.0 * memory.fisher[n]
        close(pulled.get_parameter(n).detach(), ((p + weight * memory.theta_star[n]) / (1 + weight)).detach())
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    new = kind(0.0)
    new.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert new.strength == 3.0 and torch.equal(new.penalty(model), memory.penalty(model))
    assert new.to(torch.float32).fisher["0.weight"].dtype == torch.float32
    for other in (EWC(1.0), *(k(1.0) for k in MEMORIES if k is not kind)):
        with pytest.raises(ValueError, match=f"not the state of a {kind.__name__}"):
            new.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not the state"):
        new.load_state_dict(None)
    with pytest.raises(ValueError, match="at least 0"):
        kind(-1.0)
    with pytest.raises(ValueError, match="0.weight"):
        memory.penalty(nn.Sequential(nn.Linear(3, 5)).double())


def test_l2_minimiser_and_its_limits():
    """With curvature H_B and strength α: (H_B + αI)⁻¹ (H_B θ_B + α θ_A)."""
    generator = torch.Generator().manual_seed(0)
    root, theta_a, theta_b = (torch.randn(*s, dtype=F64, generator=generator) for s in ((3, 3), (3,), (3,)))
    H = root @ root.T + torch.eye(3, dtype=F64)
    found = {}
    for strength in (1e-9, 0.7, 1e9):
        model, memory = Weights(theta_a.tolist()), L2(strength)
        memory.consolidate(model)
        with torch.no_grad():
            model.theta.zero_()
        # one Newton step on task B's loss plus the memory's penalty lands on the minimum
        delta = model.theta - theta_b
        total = delta @ H @ delta / 2 + memory.penalty(model)
        (g,) = torch.autograd.grad(total, model.theta, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g_i, model.theta, retain_graph=True)[0] for g_i in g])
        found[strength] = -torch.linalg.solve(hessian, g.detach())
        expected = torch.linalg.solve(H + strength * torch.eye(3), H @ theta_b + strength * theta_a)
        close(found[strength], expected, rtol=1e-8)
    close(found[1e-9], theta_b, rtol=1e-6)
    close(found[1e9], theta_a, rtol=1e-6)


def test_l2_does_not_grow_with_tasks_and_leaves_frozen_weights_out():
    model, memory = network(), L2(2.0)
    model[0].requires_grad_(False)
    for _ in range(3):
        memory.consolidate(model)
        with torch.no_grad():
            model[2].weight += 1
    assert memory.fisher.keys() == {"2.weight", "2.bias"}
    close(
        memory.penalty(model), torch.tensor(8.0, dtype=F64)
    )  # 2/2 · 8 weights, each one away from the newest anchor


def test_si_under_gradient_flow_on_a_diagonal_quadratic():
    """w_i = (h_i/2)(θ₀² - θ_T²), Σw = the loss's fall, and ω = 2w/(Δ² + ξ) → h at the minimum."""
    h, begin = torch.tensor([0.5, 2.0, 0.0], dtype=F64), [1.0, -2.0, 3.0]

    def loss(theta):
        return 0.5 * (h * theta.square()).sum()

    errors = []
    for lr in (1e-2, 1e-3):
        model, memory = Weights(begin), SynapticIntelligence(1.0, damping=1e-9)
        start = loss(model.theta).item()
        descend(model, loss, memory, lr, round(1 / lr))
        end = model.theta.detach().clone()
        memory.consolidate(model)
        exact = h * (torch.tensor(begin, dtype=F64).square() - end.square()) / 2
        moved = (end - torch.tensor(begin, dtype=F64)).square()
        work = memory.fisher["theta"] * (moved + 1e-9) / 2
        errors.append((work - exact).norm() / exact.norm())
        assert abs(work.sum() - (start - loss(end))) < 2 * lr * (start - loss(end))
    assert (
        errors[1] < 2e-3 and 8 < errors[0] / errors[1] < 12
    )  # flow is the limit of small steps, at first order
    model, memory = Weights(begin), SynapticIntelligence(1.0, damping=1e-9)
    descend(model, loss, memory, 1e-2, 2000)
    memory.consolidate(model)
    close(memory.fisher["theta"], h, rtol=0.011)  # the steps' own error is lr h / 2


def test_si_is_its_definition_over_two_tasks():
    model, memory = network(), SynapticIntelligence(1.0, damping=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    omega = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for task in range(2):
        x, y = batch(task)
        begin = {n: p.detach().clone() for n, p in model.named_parameters()}
        work = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            memory.record(model)
            before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
            memory.add_gradient(model)
            optimizer.step()
            memory.pull(model, 0.3)
            for n, p in model.named_parameters():
                work[n] -= before[n][1] * (p.detach() - before[n][0])
        for n, p in model.named_parameters():
            omega[n] += (2 * work[n] / ((p.detach() - begin[n]) ** 2 + 0.3)).clamp(min=0)
        memory.consolidate(model)
        for n, p in model.named_parameters():
            close(memory.fisher[n], omega[n])
            assert torch.equal(memory.theta_star[n], p)


def test_si_climbing_weights_get_no_importance():
    model, memory = Weights([1.0, 1.0]), SynapticIntelligence(1.0)
    model.theta.grad = torch.tensor([1.0, 1.0], dtype=F64)
    memory.record(model)
    with torch.no_grad():
        model.theta += torch.tensor([-0.5, 0.5], dtype=F64)
    memory.consolidate(model)
    close(memory.fisher["theta"], torch.tensor([2 * 0.5 / (0.25 + 0.1), 0.0], dtype=F64))


def test_si_resumes_in_the_middle_of_a_task():
    def loss(theta):
        return (theta - 1).square().sum()

    model, memory = Weights([3.0, 0.0]), SynapticIntelligence(1.0, damping=0.2)
    descend(model, loss, memory, 0.05, 3)
    resumed = SynapticIntelligence(0.0)
    resumed.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert resumed.damping == 0.2
    other = copy.deepcopy(model)
    for walker, path in ((model, memory), (other, resumed)):
        descend(walker, loss, path, 0.05, 3)
        path.consolidate(walker)
    assert torch.equal(memory.fisher["theta"], resumed.fisher["theta"]) and memory.fisher["theta"].min() > 0
    assert resumed.to(torch.float32).theta_star["theta"].dtype == torch.float32


def test_si_bad_input():
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive number"):
            SynapticIntelligence(1.0, damping=damping)
    model, memory = network(), SynapticIntelligence(1.0)
    with pytest.raises(ValueError, match=r"call record\(model\)"):
        memory.consolidate(model)
    model[0].requires_grad_(False)
    memory.record(model)  # no gradient at all: nothing is credited
    with pytest.raises(ValueError, match="'2.weight' of shape"):
        memory.consolidate(nn.Linear(3, 2).double())
    memory.consolidate(model)
    assert memory.fisher.keys() == {"2.weight", "2.bias"} and not memory.fisher["2.weight"].any()
    with pytest.raises(ValueError, match="No path"):
        memory.consolidate(model)  # the path was used up


def test_mas_is_its_definition_and_needs_no_labels():
    model, (x, y) = network(), batch()
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x_ in x:
        g = torch.autograd.grad(model(x_[None]).square().sum(), list(model.parameters()))
        for n, g_ in zip(expected, g):
            expected[n] += g_.abs() / len(x)
    model.train()
    for labels in (y, 1 - y):
        memory = MemoryAwareSynapses(1.0)
        memory.consolidate(model, (x, labels))
        for n in expected:
            close(memory.fisher[n], expected[n])
    memory.consolidate(model, (x, y))
    close(memory.fisher["0.bias"], 2 * expected["0.bias"])  # tasks add up
    assert model.training and all(p.grad is None for p in model.parameters())
    signed = torch.autograd.grad(model(x).square().sum() / len(x), model[0].weight)[0].abs()
    assert (expected["0.weight"] > 1.01 * signed).any()  # the absolute value comes before the mean


def test_mas_of_one_head_is_that_of_a_network_without_the_others():
    model, (x, y) = network(), batch()
    small = copy.deepcopy(model)
    small[2] = nn.Linear(4, 1).double()
    with torch.no_grad():
        small[2].weight.copy_(model[2].weight[1:])
        small[2].bias.copy_(model[2].bias[1:])
    memory, twin = MemoryAwareSynapses(1.0), MemoryAwareSynapses(1.0)
    memory.consolidate(model, (x, y), classes=[1])
    twin.consolidate(small, (x, y))
    for name, expected in twin.fisher.items():
        close(memory.fisher[name][1:] if name.startswith("2") else memory.fisher[name], expected)
    assert memory.fisher["2.weight"][0].eq(0).all() and memory.fisher["2.bias"][0] == 0


def test_mas_of_tied_and_frozen_weights():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2)).double()
    model[3].bias.requires_grad_(False)
    x, y = batch()
    memory = MemoryAwareSynapses(1.0)
    memory.consolidate(model, (x, y))
    assert memory.fisher.keys() == {"0.weight", "0.bias", "3.weight"}
    rows = [torch.autograd.grad(model(x_[None]).square().sum(), shared.weight)[0].abs() for x_ in x]
    close(memory.fisher["0.weight"], sum(rows) / len(x))
    with pytest.raises(ValueError, match="no example"):
        memory.consolidate(model, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="no trainable parameter"):
        MemoryAwareSynapses(1.0).consolidate(model.requires_grad_(False), (x, y))


@pytest.mark.parametrize(
    ("optimizer", "power"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 2),
        (lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0), 1),
    ],
)
def test_si_goes_with_the_squared_gradient_under_sgd_and_with_its_root_under_adam(optimizer, power):
    """The same gradients, c times as large: SGD moves c times as far, Adam as far as before."""
    found = []
    for c in (1.0, 8.0):
        model, memory = Weights([0.0] * 5), SynapticIntelligence(1.0, damping=1e12)
        rule = optimizer(model.parameters())
        for g in torch.randn(60, 5, dtype=F64, generator=torch.Generator().manual_seed(0)):
            model.theta.grad = c * (1 + g)
            memory.record(model)
            rule.step()
        memory.consolidate(model)
        found.append(memory.fisher["theta"])
    assert found[0].min() > 0
    close(found[1], 8.0**power * found[0], rtol=1e-5)  # the squared distance moved is lost in the damping


@pytest.mark.parametrize(("kind", "power"), [(EWC, 2), (MemoryAwareSynapses, 1), (L2, 0)])
def test_the_same_network_written_with_another_scale(kind, power):
    """A hidden ReLU unit's inputs times c, its outputs divided by c: only EWC's penalty does not notice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    other, c = copy.deepcopy(model), 8.0
    with torch.no_grad():
        other[0].weight[1] *= c
        other[0].bias[1] *= c
        other[2].weight[:, 1] /= c
    close(other(batch()[0]), model(batch()[0]))
    one, two = kind(1.0), kind(1.0)
    one.consolidate(model, batch())
    two.consolidate(other, batch())
    expected = one.fisher["0.weight"].clone()
    assert expected[1].abs().sum() > 0
    expected[1] /= c**power
    close(two.fisher["0.weight"], expected)


def test_l2_refuses_what_cannot_be_an_anchor():
    model, memory = network(), L2(1.0)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'0.weight' is not finite"):
        memory.consolidate(model)
    with pytest.raises(ValueError, match="nothing to protect"):
        memory.consolidate(network().requires_grad_(False))
    assert not memory.tasks


def test_si_adds_up_small_steps_in_half_precision():
    """To and fro, always downhill: 2000 moves of 2⁻⁸ credit 2⁻⁸ each, and a sum in bfloat16 would stop at 1."""
    model, memory = Weights([0.0]).to(torch.bfloat16), SynapticIntelligence(1.0, damping=1.0)
    for k in range(2000):
        up = k % 2 == 0
        model.theta.grad = torch.full_like(model.theta, -1.0 if up else 1.0)
        memory.record(model)
        model.theta.data.fill_(2.0**-8 if up else 0.0)
    memory.consolidate(model)
    assert memory.fisher["theta"].item() == 2 * 2000 * 2.0**-8


def test_mas_adds_up_many_examples_in_half_precision():
    """A mean over equal examples is that of one of them, however many sums it takes."""
    model = nn.Linear(2, 1).bfloat16()
    x = torch.full((2000, 2), 0.5, dtype=torch.bfloat16)
    one, many = MemoryAwareSynapses(1.0), MemoryAwareSynapses(1.0)
    one.consolidate(model, (x[:1], torch.zeros(1)))
    many.consolidate(model, DataLoader(TensorDataset(x, torch.zeros(2000)), batch_size=1))
    for name, importance in one.fisher.items():
        assert many.fisher[name].dtype == torch.float32
        close(many.fisher[name], importance, rtol=1e-5)


def test_mas_is_reduced_over_processes(monkeypatch):
    """With two processes that hold the same shard all sums double, and so must the count."""
    model, data = network(), batch()
    alone, together, reduced = MemoryAwareSynapses(1.0), MemoryAwareSynapses(1.0), []
    alone.consolidate(model, data)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: reduced.append(total.mul_(2)))
    together.consolidate(model, data)
    assert len(reduced) == 5  # the count, and the sums of four parameters
    for name, importance in alone.fisher.items():
        close(together.fisher[name], importance)


@pytest.mark.parametrize("classes", [[], [0, 0], [-1, 0], [0, 2], [0.0, 1.0]])
def test_mas_refuses_classes_that_do_not_exist(classes):
    memory = MemoryAwareSynapses(1.0)
    with pytest.raises(ValueError, match="at least one index, none twice, between 0 and 1"):
        memory.consolidate(network(), batch(), classes=classes)
    memory.consolidate(network(), batch(), classes=[1])
    assert memory.tasks == 1


def test_l2_survives_a_model_that_it_refuses():
    memory, model = L2(strength=1.0), nn.Linear(3, 2)
    memory.consolidate(model)
    with pytest.raises(ValueError, match="shape"):
        memory.consolidate(nn.Linear(4, 2))
    with torch.no_grad():
        model.weight.add_(1)
    assert memory.penalty(model).item() == pytest.approx(3.0)
    memory.consolidate(model)  # one spring, at the newest place
    assert memory.fisher["weight"].eq(1).all() and memory.penalty(model) == 0


def test_an_old_state_of_l2_keeps_one_spring():
    memory, model = L2(strength=1.0), nn.Linear(3, 2)
    memory.consolidate(model)
    loaded = L2(strength=0.0)
    loaded.load_state_dict(memory.state_dict() | {"decay": 1.0})
    loaded.consolidate(model)
    assert loaded.fisher["weight"].eq(1).all()


def test_memory_aware_synapses_of_a_recurrent_network():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Last().double(), torch.randn(5, 6, 3, dtype=F64)
    memory = MemoryAwareSynapses(strength=1.0)
    memory.consolidate(model, (x, torch.zeros(5, dtype=torch.int64)))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in x:
        grads = torch.autograd.grad(model(one[None]).square().sum(), list(model.parameters()))
        for value, g in zip(total.values(), grads):
            value += g.abs() / len(x)
    for name, value in total.items():
        close(memory.fisher[name], value)


def test_memory_aware_synapses_need_one_output():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="returned a tuple: it must return one tensor"):
        MemoryAwareSynapses(strength=1.0).consolidate(Pair(3, 2), (torch.randn(4, 3), torch.zeros(4)))


def test_synaptic_intelligence_with_sparse_gradients():
    def importances(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        memory, optimizer = SynapticIntelligence(1.0), torch.optim.SGD(model.parameters(), lr=0.1)
        words, y = torch.randint(20, (8, 3)), torch.randint(3, (8,))
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(words), y).backward()
            memory.record(model)
            optimizer.step()
        memory.consolidate(model)
        return memory.fisher

    dense = importances(False)
    assert all(torch.allclose(value, dense[name], atol=1e-6) for name, value in importances(True).items())


def same(state, other):
    """Are these two state dictionaries equal to the last bit?"""
    if isinstance(state, torch.Tensor):
        return state.dtype == other.dtype and torch.equal(state, other)
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(same(value, other[key]) for key, value in state.items())
    return state == other


def test_a_refused_consolidation_leaves_the_path_as_it_was():
    def walked():
        model, memory = Weights([3.0, 0.0]), SynapticIntelligence(1.0, damping=0.2)
        for _ in range(2):
            descend(model, lambda theta: (theta - 1).square().sum(), memory, 0.05, 3)
            if not memory.tasks:
                memory.consolidate(model)
        return model, memory

    model, memory = walked()
    before, sound = copy.deepcopy(memory.state_dict()), copy.deepcopy(model.state_dict())
    for value in (torch.nan, torch.inf):
        model.theta.data[1] = value
        with pytest.raises(ValueError, match="importance of 'theta' is not finite.*go back to sound weights"):
            memory.consolidate(model)
        assert same(memory.state_dict(), before)
    other = nn.ParameterDict({"theta": nn.Parameter(torch.ones(2, dtype=F64)), "more": nn.Parameter(torch.ones(1))})
    memory.fisher["more"], memory.theta_star["more"] = torch.ones(2), torch.ones(2)  # another network's
    with pytest.raises(ValueError, match="'more' has shape"):
        memory.consolidate(other)
    del memory.fisher["more"], memory.theta_star["more"]
    assert same(memory.state_dict(), before)
    model.load_state_dict(sound)
    memory.consolidate(model)
    untouched = walked()[1]
    untouched.consolidate(model)
    assert same(memory.state_dict(), untouched.state_dict()) and memory.fisher["theta"].min() > 0


@pytest.mark.parametrize(
    "damage",
    [
        {"damping": "x"},
        {"damping": float("nan")},
        {"damping": -1.0},
        {"path": None},
        {"path": {}},
        {"path": {"begin": {}, "last": {}, "gradient": {}, "work": {"theta": torch.zeros(2)}}},
        {"path": {"begin": {}, "last": {}, "gradient": {}, "work": None}},
        {"path": dict.fromkeys(("begin", "last", "gradient", "work"), {"theta": 1.0})},
        {"fisher": {}},
    ],
)
def test_a_damaged_state_of_si_is_refused_as_a_whole(damage):
    model, memory = Weights([3.0, 0.0]), SynapticIntelligence(1.0)
    descend(model, lambda theta: theta.square().sum(), memory, 0.05, 3)
    other = SynapticIntelligence(2.0, damping=0.7)
    descend(model, lambda theta: theta.square().sum(), other, 0.05, 3)
    other.consolidate(model)
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(ValueError, match="damaged"):
        memory.load_state_dict(other.state_dict() | damage)
    assert same(memory.state_dict(), before)
    memory.load_state_dict(other.state_dict())
    assert same(memory.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", [EWC, *MEMORIES])
def test_a_layer_frozen_later_keeps_its_springs(kind):
    model, memory = network(), kind(1.0)
    learnt(memory, model, batch())
    stiffness = memory.fisher["0.weight"].clone()
    model[0].requires_grad_(False)
    learnt(memory, model, batch(2))
    assert stiffness.any() and torch.equal(memory.fisher["0.weight"], stiffness)
    model[0].requires_grad_(True)
    with torch.no_grad():
        model[0].weight += 1
    close(memory.penalty(model).detach(), stiffness.sum() / 2)


def test_si_credits_small_steps_in_half_precision():
    """Gradient times move is 2⁻²⁶, of which float16 knows nothing, nor of a damping of 1e-9."""
    model, memory = Weights([0.0]).half(), SynapticIntelligence(1.0, damping=1e-9)
    for k in range(4):
        model.theta.grad = torch.full_like(model.theta, -(2.0**-13))
        memory.record(model)
        model.theta.data.fill_((k + 1) * 2.0**-13)
    memory.consolidate(model)
    expected = 2 * 4 * 2.0**-26 / (2.0**-22 + 1e-9)
    assert memory.fisher["theta"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rest", [lambda z: z - z.mean(0), lambda z: nn.functional.dropout(z, 0.5, training=True)])
def test_mas_refuses_a_model_without_an_answer_for_each_example(rest):
    class Mixing(nn.Linear):
        def forward(self, x):
            return rest(super().forward(x))

    torch.manual_seed(0)
    memory = MemoryAwareSynapses(1.0)
    with pytest.raises(ValueError, match="mixes the examples of a batch .* or is random in eval mode"):
        memory.consolidate(Mixing(3, 2).double(), batch())
    assert not memory.tasks


def test_mas_refuses_a_parameter_that_a_hook_holds():
    model, scale = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.Parameter(torch.rand(5) + 0.5)
    model.register_parameter("scale", scale)
    model[0].register_forward_hook(lambda module, inputs, output: output * scale)
    memory = MemoryAwareSynapses(1.0)
    with pytest.raises(ValueError, match="reached other than through their modules"):
        memory.consolidate(model, (torch.randn(6, 4), torch.arange(6) % 3))
    assert memory.tasks == 0


def test_si_passes_over_the_steps_that_a_gradient_scaler_skips():
    """Their gradients overflow, and the weights stay."""
    paths = []
    for overflows in (False, True):
        model, memory = Weights([3.0, 0.0]), SynapticIntelligence(1.0)
        for step in range(6):
            loss = (model.theta - 1).square().sum()
            loss.backward()
            if overflows and step in (0, 3):
                good = model.theta.grad.clone()
                for bad in (torch.inf, -torch.inf, torch.nan):
                    model.theta.grad[step % 2] = bad
                    memory.record(model)  # and no step is taken
                model.theta.grad = good
            memory.record(model)
            model.theta.data.add_(model.theta.grad, alpha=-0.1)
            model.theta.grad = None
        memory.consolidate(model)
        paths.append(memory.fisher["theta"])
    assert paths[0].gt(0).all()
    close(paths[1], paths[0])


def test_a_copy_of_synaptic_intelligence_walks_its_own_way():
    model, memory = Weights([3.0, 0.0]), SynapticIntelligence(1.0)
    descend(model, lambda theta: theta.square().sum(), memory, 0.05, 2)
    kept = copy.deepcopy(memory.state_dict())
    other = copy.copy(memory)
    descend(model, lambda theta: theta.square().sum(), other, 0.05, 2)
    assert same(memory.state_dict(), kept) and not same(other.state_dict(), kept)


def test_mas_in_inference_mode_and_under_autocast():
    model, (x, y) = network(), batch()
    model, x = model.float(), x.float()
    memories = []
    for outside in (torch.enable_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        memory = MemoryAwareSynapses(1.0)
        with outside:
            memory.consolidate(model, (x, y))
        memories.append(memory)
        memory.penalty(model).backward()
    for memory in memories[1:]:
        for name, value in memory.fisher.items():
            assert torch.equal(value, memories[0].fisher[name])


def test_mas_of_a_model_that_writes_into_its_input():
    body, (x, y) = network(), batch()
    model, before = nn.Sequential(nn.ReLU(inplace=True), *body), x.clone()
    memory, expected = MemoryAwareSynapses(1.0), MemoryAwareSynapses(1.0)
    memory.consolidate(model, (x, y))
    assert torch.equal(x, before)
    expected.consolidate(body, (x.relu(), y))
    for value, other in zip(memory.fisher.values(), expected.fisher.values()):
        close(value, other)
