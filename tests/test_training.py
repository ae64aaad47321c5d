"""Training: `fit` against a plain loop, `sweep` against `fit`, `run` against itself after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ewc import EWC, fisher, kfac, models, relatives, tasks, training


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
    assert training.fit(model, digits, epochs=1, watch=[digits], every=2).steps == [0, 2, 3]  # and the end


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
        def consolidate(self, model, data, **options):
            super().consolidate(model, data, **options)
            Dying.count += 1
            if Dying.count == (4 if many else 2):
                raise Killed

    Dying.count = 0
    options = dict(epochs=2, lr=0.05, keep_moments=True)
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


def double(task):
    parts = {"train": task.train.tensors, "test": task.test.tensors}
    return replace(task, **{name: TensorDataset(x.double(), y) for name, (x, y) in parts.items()})


class Heads(nn.Module):
    """The slow twin of a masked output layer: a body, and an output layer of its own for each task."""

    def __init__(self, model, size):
        super().__init__()
        self.body = copy.deepcopy(model[:-1])
        self.heads = nn.ModuleList(nn.Linear(16, size).double() for _ in range(10 // size))
        with torch.no_grad():
            for t, head in enumerate(self.heads):
                head.weight.copy_(model[-1].weight[size * t : size * (t + 1)])
                head.bias.copy_(model[-1].bias[size * t : size * (t + 1)])

    def forward(self, x, t):
        return self.heads[t](self.body(x))


def test_a_masked_output_layer_is_separate_heads(digits):
    """Weights and accuracies after three tasks with EWC, against a loop that knows nothing of this package."""
    parts = [double(part).take(40, 40) for part in tasks.split(digits, scenario="task")[:3]]
    model, stacked = (net(digits).double() for _ in range(2))
    twin, strength = Heads(model, 2), 3.0
    options = dict(epochs=6, lr=0.01, optimizer="adam", schedule=None, penalty="gradient", batch_size=16)
    matrix = training.run(model, parts, EWC(strength=strength), **options)
    together = training.run([stacked], parts, [EWC(strength=strength)], seed=[0], **options)[0]

    expected = torch.zeros(3, 3, dtype=torch.float64)
    fisher = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    star = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for t, part in enumerate(parts):
        x, y = part.train.tensors
        optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
        order = torch.Generator().manual_seed(t)
        for _ in range(6):
            for batch in torch.randperm(len(x), generator=order).split(16):
                optimizer.zero_grad()
                loss = cross_entropy(twin(x[batch], t), y[batch] - 2 * t)
                for name, p in twin.named_parameters():
                    loss = loss + strength / 2 * (fisher[name] * (p - star[name]) ** 2).sum()
                loss.backward()
                optimizer.step()
        for image in x:
            log_p = twin(image[None], t)[0].log_softmax(0)
            for k in range(2):
                twin.zero_grad()
                log_p[k].backward(retain_graph=True)
                for name, p in twin.named_parameters():
                    if p.grad is not None:
                        fisher[name] += log_p[k].exp().item() * p.grad**2 / len(x)
        star = {name: p.detach().clone() for name, p in twin.named_parameters()}
        for j, other in enumerate(parts):
            images, labels = other.test.tensors
            expected[t, j] = (twin(images, j).argmax(1) == labels - 2 * j).double().mean()

    for trained, seen in ((model, matrix), (stacked, together)):
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
        body = torch.cat([p.detach().flatten() for p in twin.body.parameters()])
        torch.testing.assert_close(flat(trained[:-1]), body, rtol=1e-8, atol=1e-10)
        weight = torch.cat([head.weight for head in twin.heads]).detach()
        torch.testing.assert_close(trained[-1].weight.detach(), weight, rtol=1e-8, atol=1e-10)
    assert (expected.diagonal() > 0.8).all()


def test_sweep_with_heads_is_fit(digits):
    part = tasks.split(digits, scenario="task")[1]
    together = [net(digits, seed=r) for r in range(2)]
    alone = [copy.deepcopy(m) for m in together]
    histories = training.sweep(together, part, seeds=[4, 5], epochs=3, watch=[part])
    for r in range(2):
        history = training.fit(alone[r], part, seed=4 + r, epochs=3, watch=[part])
        torch.testing.assert_close(flat(together[r]), flat(alone[r]), rtol=1e-4, atol=1e-6)
        assert histories[r].accuracy == history.accuracy


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_moments_go_on_from_task_to_task(digits, letters, optimizer):
    model, twin, stacked = net(digits), net(digits), net(digits)
    options = dict(epochs=2, lr=0.01, optimizer=optimizer, schedule=None)
    training.run(model, [digits, letters], keep_moments=True, **options)
    training.run([stacked], [digits, letters], seed=[0], keep_moments=True, **options)
    plain = {"sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=0.01)}
    opt = plain[optimizer](twin.parameters())
    for t, task in enumerate([digits, letters]):
        x, y = task.train.tensors
        order = torch.Generator().manual_seed(t)
        for _ in range(2):
            for batch in torch.randperm(len(x), generator=order).split(128):
                opt.zero_grad()
                cross_entropy(twin(x[batch]), y[batch]).backward()
                opt.step()
    for trained in (model, stacked):
        torch.testing.assert_close(flat(trained), flat(twin), rtol=1e-3, atol=1e-5)
    afresh = net(digits)
    training.run(afresh, [digits, letters], **options)
    assert (flat(afresh) - flat(twin)).abs().max() > 1e-3


def test_steps_end_the_training_within_an_epoch(digits):
    model, twin = net(digits), net(digits)
    history = training.fit(model, digits, steps=7, schedule=None, batch_size=100)  # three batches an epoch
    assert len(history.loss) == 3
    x, y = digits.train.tensors
    opt = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    batches = [b for _ in range(3) for b in torch.randperm(len(x), generator=order).split(100)][:7]
    for batch in batches:
        opt.zero_grad()
        loss = cross_entropy(twin(x[batch]), y[batch])
        loss.backward()
        opt.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)
    assert history.loss[-1] == pytest.approx(loss.item(), rel=1e-4)  # the third epoch was one batch long


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


def test_sweep_with_memories_of_other_weights(digits):
    start, memory = net(digits), EWC(strength=100.0)
    found = fisher.diagonal(start, digits.train)
    first = next(iter(found))
    memory.consolidate(start, fisher={first: found[first]})  # all else is free
    one, alone = copy.deepcopy(start), copy.deepcopy(start)
    training.sweep([one], digits, seeds=[0], memories=[memory], epochs=1)
    training.fit(alone, digits, memory=memory, seed=0, epochs=1)
    torch.testing.assert_close(flat(one), flat(alone), rtol=1e-4, atol=1e-6)
    for other in (nn.Linear(digits.features, 10), nn.Sequential(nn.Linear(digits.features, 7), nn.Linear(7, 10))):
        with pytest.raises(ValueError, match="use the models that were consolidated"):
            training.sweep([other], digits, seeds=[0], memories=[memory], epochs=1)


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
