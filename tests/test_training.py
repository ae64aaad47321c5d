"""Training: `fit` against a plain loop, `sweep` against `fit`, `run` against itself after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ewc import EWC, kfac, models, relatives, tasks, training


@pytest.fixture(scope="module")
def digits():
    return tasks.load("digits").take(300, 200)


@pytest.fixture(scope="module")
def letters():
    return tasks.load("letters").take(300, 200)


def net(task, seed=0):
    return models.mlp(task.features, [16, 16], task.classes, seed=seed)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fit_is_the_plain_loop(digits):
    model, twin = net(digits), net(digits)
    training.fit(model, digits, epochs=2, lr=0.05, schedule=None, seed=3)
    x, y = digits.train.tensors
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(3)
    for _ in range(2):
        for batch in torch.randperm(len(x), generator=order).split(128):
            optimizer.zero_grad()
            cross_entropy(twin(x[batch]), y[batch]).backward()
            optimizer.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)


def test_fit_learns_and_tells_what_it_saw(digits, letters):
    model = net(digits)
    history = training.fit(model, digits, epochs=20, lr=0.1, watch=[digits, letters])
    steps = 3 * 20
    assert history.steps == list(range(0, steps + 1, 3))
    assert set(history.accuracy) == {"digits", "letters"}
    assert history.accuracy["digits"][-1] > 0.75 > 0.3 > history.accuracy["digits"][0]
    assert len(history.loss) == 20 and history.loss[-1] < history.loss[0] / 2
    assert training.fit(model, digits, epochs=1, watch=[digits], every=2).steps == [0, 2]


@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_memory_holds_the_first_task(digits, letters, penalty, optimizer):
    model = net(digits)
    training.fit(model, digits, epochs=30, lr=0.05)
    memory = EWC(strength=100.0)
    memory.consolidate(model, digits.train)
    free = copy.deepcopy(model)
    lr = 0.02 if optimizer == "sgd" else 0.01
    options = dict(epochs=20, lr=lr, optimizer=optimizer, watch=[digits])
    held = training.fit(model, letters, memory=memory, penalty=penalty, **options).accuracy["digits"][-1]
    lost = training.fit(free, letters, **options).accuracy["digits"][-1]
    assert held > lost + 0.05


@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sweep_is_fit(digits, letters, penalty, optimizer):
    trained, memories = [], []
    for r in range(3):
        model = net(digits, seed=r)
        training.fit(model, digits, epochs=3, lr=0.05, seed=r)
        memory = EWC(strength=10.0 * 4**r) if r else None  # one run without a memory
        if memory is not None:
            memory.consolidate(model, digits.train)
        trained.append(model)
        memories.append(memory)
    together = [copy.deepcopy(m) for m in trained]
    options = dict(epochs=3, lr=0.01, optimizer=optimizer, penalty=penalty, watch=[digits, letters])
    histories = training.sweep(together, letters, seeds=[5, 6, 7], memories=memories, **options)
    for r, model in enumerate(trained):
        alone = training.fit(model, letters, memory=memories[r], seed=5 + r, **options)
        torch.testing.assert_close(flat(together[r]), flat(model), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(histories[r].loss, alone.loss, rtol=1e-4, atol=0)
        assert histories[r].steps == alone.steps
        for name in alone.accuracy:
            torch.testing.assert_close(histories[r].accuracy[name], alone.accuracy[name], rtol=0, atol=0.011)


def test_sweep_with_shared_batches_is_fit(digits):
    together = [net(digits, seed=r) for r in range(2)]
    alone = [copy.deepcopy(m) for m in together]
    training.sweep(together, digits, seeds=[4, 4], epochs=2)
    for a, b in zip(together, alone):
        training.fit(b, digits, epochs=2, seed=4)
        torch.testing.assert_close(flat(a), flat(b), rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay(digits):
    for train in (
        lambda m: training.fit(m, digits, epochs=1),
        lambda m: training.sweep([m], digits, seeds=[0], epochs=1),
    ):
        model = net(digits)
        model[1].weight.requires_grad_(False)
        before = copy.deepcopy(model)
        train(model)
        assert torch.equal(model[1].weight, before[1].weight)
        assert not torch.equal(model[3].weight, before[3].weight)


@pytest.mark.parametrize("many", [False, True])
def test_non_finite_loss_stops_with_the_last_finite_weights(digits, many):
    model = net(digits)
    with pytest.raises(training.NonFiniteLoss, match=r"step \d+.*Lower lr"):
        if many:
            training.sweep([model, net(digits, seed=1)], digits, seeds=[0, 1], epochs=40, lr=1e6)
        else:
            training.fit(model, digits, epochs=40, lr=1e6)
    assert flat(model).isfinite().all()


def test_a_strong_penalty_breaks_its_gradient_but_not_the_pull(digits, letters):
    model = net(digits)
    training.fit(model, digits, epochs=5, lr=0.05)
    memory = EWC(strength=1e9)
    memory.consolidate(model, digits.train)
    with pytest.raises(training.NonFiniteLoss, match="penalty='pull'"):
        training.fit(copy.deepcopy(model), letters, memory=memory, penalty="gradient", epochs=20)
    star = flat(model)
    training.fit(model, letters, memory=memory, epochs=20)
    assert flat(model).isfinite().all()
    fisher = torch.cat([f.flatten() for f in memory.fisher.values()])
    stiff = fisher > fisher.median()
    assert (flat(model) - star)[stiff].abs().max() < 1e-3


def sequence(digits, letters):
    return [digits, letters, tasks.permuted(digits, 1)]


@pytest.mark.parametrize("many", [False, True])
def test_run_resumes_after_a_kill_with_the_same_numbers(digits, letters, tmp_path, many):
    def start():
        if many:
            return [net(digits, 0), net(digits, 1)], [EWC(strength=50.0), EWC(strength=5.0)], [0, 1]
        return net(digits), EWC(strength=50.0), 0

    class Killed(Exception):
        pass

    class Dying(EWC):
        def consolidate(self, model, data):
            super().consolidate(model, data)
            Dying.count += 1
            if Dying.count == (4 if many else 2):
                raise Killed

    Dying.count = 0
    options = dict(epochs=2, lr=0.05)
    model, memory, seed = start()
    whole = training.run(model, sequence(digits, letters), memory, seed=seed, **options)
    assert whole.shape == ((2, 3, 3) if many else (3, 3)) and whole.dtype == torch.float64

    file = tmp_path / "run.pt"
    model, memory, seed = start()
    dying = [Dying(strength=m.strength) for m in memory] if many else Dying(strength=memory.strength)
    with pytest.raises(Killed):
        training.run(model, sequence(digits, letters), dying, checkpoint=file, seed=seed, **options)
    model, memory, seed = start()
    resumed = training.run(model, sequence(digits, letters), memory, checkpoint=file, seed=seed, **options)
    assert torch.equal(resumed, whole)
    assert [f.name for f in tmp_path.iterdir()] == ["run.pt"]  # no half-written file is left


def test_run_refuses_a_foreign_or_broken_checkpoint(digits, letters, tmp_path):
    file = tmp_path / "run.pt"
    training.run(net(digits), [digits], checkpoint=file, epochs=1)
    with pytest.raises(ValueError, match="belongs to another run"):
        training.run(net(digits), [letters], checkpoint=file, epochs=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        training.run(net(digits), [digits], checkpoint=file, epochs=1)


def test_synaptic_intelligence_watches_the_way(digits, letters):
    model, memory = net(digits), relatives.SynapticIntelligence(strength=1.0)
    training.fit(model, digits, epochs=3, memory=memory)
    memory.consolidate(model, digits.train)
    assert sum(f.sum() for f in memory.fisher.values()) > 0
    assert memory.penalty(model) == 0
    training.fit(model, letters, epochs=1, memory=memory)
    assert memory.penalty(model) > 0


def test_sweep_refuses_what_it_cannot_stack(digits):
    for memory in (relatives.SynapticIntelligence(strength=1.0), kfac.KFAC(strength=1.0)):
        with pytest.raises(ValueError, match="train this one with fit"):
            training.sweep([net(digits)], digits, seeds=[0], memories=[memory])


def test_sweep_with_a_module_at_two_places(digits):
    def twice(seed):
        torch.manual_seed(seed)
        middle = nn.Linear(16, 16)
        return nn.Sequential(nn.Flatten(), nn.Linear(digits.features, 16), middle, nn.ReLU(), middle, nn.ReLU(), nn.Linear(16, 10))

    together = [twice(r) for r in range(2)]
    alone = [copy.deepcopy(m) for m in together]
    training.sweep(together, digits, seeds=[0, 1], epochs=2)
    for r in range(2):
        training.fit(alone[r], digits, seed=r, epochs=2)
        torch.testing.assert_close(flat(together[r]), flat(alone[r]), rtol=1e-4, atol=1e-6)
        assert together[r][2] is together[r][4] and together[r][2].weight.is_leaf
        assert isinstance(together[r][4].weight, nn.Parameter)


def _two_tasks(rank, world, folder):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    first = tasks.load("digits").take(301, 100)  # 301: no batch and no share comes out even
    model, memory = net(first).double(), EWC(strength=30.0)
    pair = [replace(t, **{part: torch.utils.data.TensorDataset(getattr(t, part).tensors[0].double(), getattr(t, part).tensors[1])
                                for part in ("train", "test")}) for t in (first, tasks.permuted(first, 1))]
    matrix = training.run(model, pair, memory, epochs=2, lr=0.05, checkpoint=f"{folder}/run-{world}.pt")
    torch.save({"matrix": matrix, "weights": flat(model), **memory.fisher}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    _two_tasks(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(_two_tasks, (2, str(tmp_path)), nprocs=2)
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for other in two:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)
    assert (tmp_path / "run-2.pt").exists()


def test_bad_options_say_what_is_allowed(digits):
    for options in ({"optimizer": "lbfgs"}, {"schedule": "linear"}, {"penalty": "push"}):
        with pytest.raises(ValueError, match="must be one of"):
            training.fit(net(digits), digits, **options)
    with pytest.raises(ValueError, match="one seed and one memory"):
        training.sweep([net(digits)], digits, seeds=[0, 1])


def test_modes_and_dropout(digits):
    """`fit` trains in training mode, evaluates in evaluation mode, and goes back."""
    modes = []

    class Probe(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    model = nn.Sequential(nn.Flatten(), Probe(), nn.Linear(digits.features, 10))
    training.fit(model, digits, epochs=2, watch=[digits])
    assert modes[0] is False and True in modes  # the first look comes before the first step
    assert modes.count(True) == 6
