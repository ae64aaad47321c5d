"""Training: `fit` against a plain loop, `sweep` against `fit`, `run` against itself after a kill."""

import copy
import enum
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from benchmarks.training import epoch_by_hand
from ewc import EWC, fisher, kfac, metrics, models, relatives, tasks, training


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


def plain_loop(model, task, optimizer, after_step=lambda: None):
    """Two epochs as anybody would write them."""
    x, y = task.train.tensors
    order = torch.Generator().manual_seed(3)
    for _ in range(2):
        for batch in torch.randperm(len(x), generator=order).split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            after_step()


def test_fit_is_the_plain_loop(digits):
    model, twin = net(digits), net(digits)
    training.fit(model, digits, epochs=2, lr=0.05, schedule=None, seed=3)
    plain_loop(twin, digits, torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)


def test_labels_at_several_positions_add_up_as_one_log_probability(digits):
    """As in `fisher.diagonal`, and for one process as for several."""
    x, y = torch.randn(40, 6), torch.randint(3, (40, 2))
    task = replace(digits, train=TensorDataset(x, y), classes=3)
    model = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    expected = nn.functional.cross_entropy(model(x), y, reduction="sum") / 40
    history = training.fit(model, task, steps=1, batch_size=40, lr=0.0)
    assert history.loss == pytest.approx([expected.item()], rel=1e-6)


def test_the_epoch_that_the_benchmark_writes_by_hand_is_that_of_fit(digits):
    model, twin = net(digits), net(digits)
    epoch_by_hand(model, digits, lr=0.05)
    training.fit(twin, digits, epochs=1, lr=0.05, schedule=None)
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


@pytest.mark.parametrize("many", [False, True])
def test_non_finite_loss_leaves_the_statistics_of_batch_normalisation_as_sound_as_the_weights(digits, many):
    def normed(seed):
        torch.manual_seed(seed)
        body = nn.Linear(digits.features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, digits.classes)
        return nn.Sequential(nn.Flatten(), *body)

    models = [normed(0), normed(1)] if many else [normed(0)]
    x, y = digits.train.tensors
    spoilt = x.clone()
    spoilt[-1] = float("nan")  # one bad image: its batch's statistics are NaN, and all later running ones
    task = replace(digits, train=TensorDataset(spoilt, y))
    with pytest.raises(training.NonFiniteLoss):
        training.sweep(models, task, seeds=[0, 1]) if many else training.fit(models[0], task)
    for model in models:
        assert flat(model).isfinite().all()
        assert model[2].running_mean.isfinite().all() and model[2].running_var.isfinite().all()


def test_non_finite_loss_leaves_the_path_of_synaptic_intelligence_as_sound_as_the_weights(digits):
    """It is the path to these weights: that of a run that ends at them."""
    task = digits.take(128, 100)  # one batch
    spoilt = replace(task, train=TensorDataset(task.train.tensors[0] / 0, task.train.tensors[1]))
    model, memory = net(digits), relatives.SynapticIntelligence(1.0)
    twin, other = net(digits), relatives.SynapticIntelligence(1.0)
    for m, si in ((model, memory), (twin, other)):
        training.fit(m, task, memory=si, epochs=2)
        if si is memory:
            with pytest.raises(training.NonFiniteLoss):
                training.fit(m, spoilt, memory=si, epochs=3)
        training.fit(m, task, memory=si, epochs=1)
        si.consolidate(m)
    assert torch.equal(flat(model), flat(twin))
    assert all(torch.equal(memory.fisher[name], f) and f.isfinite().all() for name, f in other.fisher.items())


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


class Killed(Exception):
    pass


class Dying(EWC):
    """Ends the program at the end of the second task, before its checkpoint is written."""

    def consolidate(self, model, data, **options):
        super().consolidate(model, data, **options)
        if self.tasks == 2:
            raise Killed


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_run_resumes_where_dropout_and_drawn_labels_stopped(digits, letters, tmp_path, estimator):
    def start():
        torch.manual_seed(5)
        body = nn.Linear(digits.features, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, digits.classes)
        return nn.Sequential(nn.Flatten(), *body), EWC(50.0, estimator=estimator)

    three, file = sequence(digits, letters), tmp_path / "run.pt"
    model, memory = start()
    training.run(model, three, memory, epochs=1)
    resumed, again = start()
    with pytest.raises(Killed):
        training.run(resumed, three, Dying(50.0, estimator=estimator), checkpoint=file, epochs=1)
    resumed, again = start()
    torch.manual_seed(99)  # another process has other random numbers
    training.run(resumed, three, again, checkpoint=file, epochs=1)
    assert torch.equal(flat(resumed), flat(model))
    assert all(torch.equal(again.fisher[name], f) for name, f in memory.fisher.items())


@pytest.mark.parametrize("many", [False, True])
def test_run_resumes_after_a_kill_with_the_same_numbers(digits, letters, tmp_path, many):
    def start():
        if many:
            return [net(digits, 0), net(digits, 1)], [EWC(strength=50.0), EWC(strength=5.0)], [0, 1]
        return net(digits), EWC(strength=50.0), 0

    options = dict(epochs=2, lr=0.05, keep_moments=True)
    model, memory, seed = start()
    whole = training.run(model, sequence(digits, letters), memory, seed=seed, **options)
    assert whole.shape == ((2, 3, 3) if many else (3, 3)) and whole.dtype == torch.float64

    file = tmp_path / "run.pt"
    model, memory, seed = start()
    dying = [memory[0], Dying(memory[1].strength)] if many else Dying(memory.strength)
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


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_moments_stay_with_their_parameters_when_a_layer_thaws(digits, optimizer):
    """Three layers of one shape: by place, the last one's would go to the one before it."""
    task = replace(digits, classes=64)
    options = {"epochs": 1, "lr": 0.01, "optimizer": optimizer, "schedule": None}
    model, twin = (models.mlp(64, [64, 64], 64, seed=0) for _ in range(2))
    moments, (x, y) = {}, task.train.tensors
    opt = torch.optim.Adam(twin.parameters(), 0.01)
    if optimizer == "sgd":
        opt = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9)
    for seed, trained in enumerate([False, True]):
        for net in (model, twin):
            net[1].requires_grad_(trained)
        training.fit(model, task, moments=moments, seed=seed, **options)
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(128):
            opt.zero_grad()
            cross_entropy(twin(x[batch]), y[batch]).backward()
            opt.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)
    model[5].requires_grad_(False)
    with pytest.raises(ValueError, match="moments belong to other parameters"):
        training.fit(model, task, moments=moments, **options)


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


def relabelled(task):
    x, y = task.train.tensors
    return replace(task, train=TensorDataset(x, y.flip(0)))


def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference(digits, tmp_path):
    file, pair = tmp_path / "run.pt", [digits, tasks.permuted(digits, 1)]
    options = {"epochs": 1, "lr": 0.05}
    with pytest.raises(Killed):
        training.run(net(digits), pair, Dying(50.0), checkpoint=file, **options)
    shorter = [pair[0], pair[1].take(200, 200)]
    for change, words in [
        ({"seed": 1}, r"seed is \[0\] there and \[1\] here"),
        ({"lr": 0.1}, "lr is 0.05 there and 0.1 here"),
        ({"epochs": 2}, "epochs is 1 there and 2 here"),
        ({"optimizer": "adam"}, "optimizer is 'sgd' there"),
        ({"keep_moments": True}, "keep_moments is False there"),
        ({"tasks": shorter}, r"training examples is \[300, 300\] there and \[300, 200\] here"),
        ({"tasks": [pair[0], pair[1].take(300, 9)]}, "test examples"),
        ({"tasks": [replace(pair[0], heads=[tuple(range(10))]), pair[1]]}, "heads of task 0"),
        ({"tasks": [relabelled(pair[0]), pair[1]]}, "checksum of the training labels of task 0"),
        ({"memory": EWC(5.0)}, "strength of memory 0 is 50.0 there and 5.0 here"),
        ({"memory": EWC(50.0, estimator="sampled")}, "estimator of memory 0 is 'exact' there"),
        ({"memory": EWC(50.0, anchors="each")}, "anchors of memory 0"),
        ({"memory": EWC(50.0, decay=0.5)}, "decay of memory 0"),
    ]:
        model, given = net(digits), {"tasks": pair, "memory": EWC(50.0)} | options | change
        before = flat(model)
        with pytest.raises(ValueError, match="belongs to another run: " + words):
            training.run(model, checkpoint=file, **given)
        assert torch.equal(flat(model), before) and given["memory"].tasks == 0
    # The same run in other words: a default named, NumPy's numbers, a curve to watch.
    same = {"epochs": np.int64(1), "lr": np.float64(0.05), "momentum": 0.9, "watch": pair}
    training.run(net(digits), pair, EWC(50.0), checkpoint=file, seed=np.int64(0), **same)
    assert torch.load(file, weights_only=True)["done"] == 2


def test_a_finished_checkpoint_is_read_without_a_draw_or_a_write(digits, tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    written = training.run(net(digits), [digits], checkpoint=file, epochs=1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    monkeypatch.setattr(os, "access", lambda *_: False)  # archived
    assert torch.equal(training.run(net(digits), [digits], checkpoint=file, epochs=1), written)
    assert torch.equal(torch.get_rng_state(), state)


def test_where_no_checkpoint_can_be_written_no_task_is_trained(digits, tmp_path, monkeypatch):
    model = net(digits)
    before = flat(model)
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "nope" / "run.pt", tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"checkpoint '{file}' cannot be written"):
            training.run(model, [digits], checkpoint=file, epochs=1)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # as for a folder of another user
    with pytest.raises(ValueError, match="cannot be written"):
        training.run(model, [digits], checkpoint=tmp_path / "run.pt", epochs=1)
    assert torch.equal(flat(model), before)


def test_a_checkpoint_is_ones_own_whatever_the_images_last_digits(digits, tmp_path):
    """Their mean is summed in another order by other devices and numbers of threads."""
    x, y = digits.train.tensors
    other = replace(digits, train=TensorDataset(x * (1 + 1e-7), y.int()))
    for task in (digits, other):
        training.run(net(digits), [task], checkpoint=tmp_path / "run.pt", epochs=1)
    model = net(digits)
    with torch.device("meta"):
        training.run(model, [digits], checkpoint=tmp_path / "run.pt", epochs=1)


class Noted(nn.Sequential):
    """A network with something of its own in its state."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_run_resumes_a_network_with_an_extra_state(digits, tmp_path):
    options = {"checkpoint": tmp_path / "run.pt", "epochs": 1}
    pair = [digits, tasks.permuted(digits, 1)]
    with pytest.raises(Killed):
        training.run(Noted(*net(digits)), pair, Dying(50.0), **options)
    assert training.run(Noted(*net(digits)), pair, EWC(50.0), **options).isfinite().all()


def test_synaptic_intelligence_watches_the_way(digits, letters):
    model, memory = net(digits), relatives.SynapticIntelligence(strength=1.0)
    training.fit(model, digits, epochs=3, memory=memory)
    memory.consolidate(model, digits.train)
    assert sum(f.sum() for f in memory.fisher.values()) > 0
    assert memory.penalty(model) == 0
    training.fit(model, letters, epochs=1, memory=memory)
    assert memory.penalty(model) > 0


def test_sweep_refuses_what_it_cannot_stack(digits):
    memory = relatives.SynapticIntelligence(strength=1.0)
    with pytest.raises(ValueError, match="train this one with fit"):
        training.sweep([net(digits)], digits, seeds=[0], memories=[memory])


def test_sweep_says_that_it_cannot_stack_recurrent_layers(digits):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, x):
            return self.head(self.cell(x.flatten(1, 2))[0][:, -1])

    with pytest.raises(ValueError, match="cannot stack recurrent layers"):
        training.sweep([Reader(), Reader()], digits, seeds=[0, 1], epochs=1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_sweep_of_parametrised_layers_is_fit(digits):
    def normed(seed):
        model = net(digits, seed)
        nn.utils.parametrizations.weight_norm(model[1])  # which makes a class for each layer
        return model

    together = [normed(0), normed(1)]
    training.sweep(together, digits, seeds=[5, 6], epochs=1)
    for seed, model in enumerate(together):
        alone = normed(seed)
        training.fit(alone, digits, seed=5 + seed, epochs=1)
        torch.testing.assert_close(flat(model), flat(alone), rtol=1e-5, atol=1e-6)


def test_sweep_refuses_networks_that_differ_in_more_than_their_weights(digits):
    def small(width=8, activation=nn.ReLU, rate=0.0):
        body = nn.Linear(64, width), activation(), nn.Dropout(rate), nn.Linear(width, 10)
        return nn.Sequential(nn.Flatten(), *body)

    frozen, start = small(), small()
    frozen[1].requires_grad_(False)
    for other in (small(activation=nn.Tanh), small(rate=0.9), small(width=7), frozen):
        before = flat(other)
        with pytest.raises(ValueError, match=r"models\[2\] has other layers, settings or frozen"):
            training.sweep([start, small(), other], digits, seeds=[0, 0, 0], epochs=1)
        assert torch.equal(flat(other), before)
    sharing = small()
    sharing[1] = start[1]
    for other in (start, sharing):
        with pytest.raises(ValueError, match="weights of their own"):
            training.sweep([start, other], digits, seeds=[0, 1], epochs=1)


def test_sweep_refuses_a_memory_that_pulls_in_its_own_way(digits):
    class Stronger(EWC):
        def pull(self, model, step):
            super().pull(model, 100 * step)

    class Pushing(relatives.L2):
        def add_gradient(self, model):
            pass

    class Rising(EWC):
        strength = property(lambda self: 1.0, lambda self, value: None)

    class Stiff(kfac.KFAC):
        def pull(self, model, step):
            pass

    changed = EWC(1.0)
    changed.pull = lambda model, step: None
    for memory in (Stronger(1.0), Pushing(1.0), Rising(1.0), Stiff(1.0), changed):
        with pytest.raises(ValueError, match="of its own; train this one with fit"):
            training.sweep([net(digits)], digits, seeds=[0], memories=[memory], epochs=1)


@pytest.mark.parametrize("make", [relatives.L2, relatives.MemoryAwareSynapses, lambda s: Batched(s)])
def test_sweep_goes_on_with_memories_that_only_measure_in_their_own_way(digits, letters, make):
    alone = net(digits)
    together, memory = copy.deepcopy(alone), make(0.3)
    memory.consolidate(alone, digits.train)
    training.fit(alone, letters, memory=memory, epochs=1)
    training.sweep([together], letters, seeds=[0], memories=[memory], epochs=1)
    torch.testing.assert_close(flat(together), flat(alone), rtol=1e-4, atol=1e-6)


class Batched(EWC):
    """Importances of its own, as in the chapter on replication."""

    def consolidate(self, model, data, *, classes=None):
        EWC.consolidate(self, model, fisher={name: p.detach().abs() for name, p in model.named_parameters()})


@pytest.mark.parametrize("bias", [True, False])
def test_sweep_with_kronecker_factors_is_fit(digits, letters, bias):
    options = {"lr": 0.05, "epochs": 4, "batch_size": 64}
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10, bias=bias)) for _ in range(2)]
    memories = [kfac.KFAC(strength, keep="pooled") for strength in (3.0, 30.0)]
    together, held = copy.deepcopy(nets), copy.deepcopy(memories)
    for task in (digits, letters, digits):
        training.sweep(together, task, seeds=[5, 6], memories=held, **options)
        for seed, net, twin, memory, other in zip([5, 6], nets, together, memories, held):
            training.fit(net, task, seed=seed, memory=memory, **options)
            torch.testing.assert_close(flat(twin), flat(net), rtol=1e-3, atol=1e-4)
            memory.consolidate(net, task.train)
            other.consolidate(twin, task.train)


def test_sweep_says_which_kronecker_factors_it_cannot_stack(digits, letters):
    nets, each = [net(digits, s) for s in range(2)], [kfac.KFAC(1.0) for _ in range(2)]
    for task in (digits, letters):
        for model, memory in zip(nets, each):
            memory.consolidate(model, task.train)
    with pytest.raises(ValueError, match="one pair of factors"):
        training.sweep(nets, digits, seeds=[0, 1], memories=each)
    pooled = [kfac.KFAC(1.0, keep="pooled") for _ in nets]
    for model, memory in zip(nets, pooled):
        memory.consolidate(model, digits.train)
    for options in ({"optimizer": "adam"}, {"penalty": "gradient"}):
        with pytest.raises(ValueError, match="SGD and penalty='pull'"):
            training.sweep(nets, digits, seeds=[0, 1], memories=pooled, **options)
    with pytest.raises(ValueError, match="all have one pair"):
        training.sweep(nets, digits, seeds=[0, 1], memories=[pooled[0], None])
    for model in nets:
        model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is frozen"):
        training.sweep(nets, digits, seeds=[0, 1], memories=pooled)


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
    first = double(tasks.load("digits").take(301, 100))  # 301: no batch and no share comes out even
    model, memory = net(first).double(), EWC(strength=30.0)
    pair = [first, tasks.permuted(first, 1)]
    matrix = training.run(model, pair, memory, epochs=2, lr=0.05, checkpoint=f"{folder}/run-{world}.pt")
    heads = nn.ModuleList([TwoHeads(first).double(), net(first, 1).double(), Training(*net(first, 2)).double()])
    training.fit(heads[0], first, epochs=1)  # a head that is not in use
    training.fit(heads[2], first, epochs=1)
    given = heads[1] if world == 1 else nn.parallel.DistributedDataParallel(heads[1])
    training.fit(given, first, epochs=1)
    found = {"matrix": matrix, "weights": flat(model), **memory.fisher, **_shares_of_one_batch(first), "heads": flat(heads)}
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        _dropout_after_a_kill(rank, folder, [*pair, tasks.permuted(first, 2)])
        torch.distributed.destroy_process_group()


def _shares_of_one_batch(task):
    """The mean loss of all shares, and where training stops for a bad example in one of them."""
    odd = task.take(257, 100)  # the last batch is one example: one process has none
    loss = training.fit(net(odd).double(), odd, epochs=2).loss
    spoilt = odd.train.tensors[0].clone()
    spoilt[torch.randperm(257, generator=torch.Generator().manual_seed(0))[130]] = math.inf
    model = net(odd).double()
    with pytest.raises(training.NonFiniteLoss, match="at step 1 "):
        training.fit(model, replace(odd, train=TensorDataset(spoilt, odd.train.tensors[1])), epochs=2)
    return {"loss": torch.tensor(loss, dtype=torch.float64), "kept": flat(model)}


def _dropout_after_a_kill(rank, folder, parts):
    """Every process goes on with random numbers of its own, and so as if it had never stopped."""
    def start(seed):
        flatten, *layers = net(parts[0]).double()
        torch.manual_seed(seed)
        return nn.Sequential(flatten, nn.Dropout(), *layers)

    options = {"epochs": 1, "lr": 0.05}
    whole = start(rank)
    training.run(whole, parts, EWC(5.0), **options)
    with pytest.raises(Killed):
        training.run(start(rank), parts, Dying(5.0), checkpoint=f"{folder}/dropout.pt", **options)
    resumed = start(50)
    training.run(resumed, parts, EWC(5.0), checkpoint=f"{folder}/dropout.pt", **options)
    assert torch.equal(flat(resumed), flat(whole))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    _two_tasks(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(_two_tasks, (2, str(tmp_path)), nprocs=2)
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for other in two:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6 if name == "loss" else 1e-9, atol=1e-12)
    assert (tmp_path / "run-2.pt").exists()


def test_bad_options_say_what_is_allowed(digits):
    for options in ({"optimizer": "lbfgs"}, {"schedule": "linear"}, {"penalty": "push"}):
        with pytest.raises(ValueError, match="must be one of"):
            training.fit(net(digits), digits, **options)
    with pytest.raises(ValueError, match="one seed and one memory"):
        training.sweep([net(digits)], digits, seeds=[0, 1])


@pytest.mark.parametrize(("options", "words"), [
    ({"momentum": 1.0}, "momentum must be at least 0 and less than 1; got 1.0"),
    ({"lr": math.nan}, "lr must be a finite number, at least 0; got nan"),
    ({"batch_size": 64.0}, "batch_size must be a whole number, at least 1; got 64.0"),
    ({"epochs": 1.5}, "epochs must be a whole number, at least 0; got 1.5"),
    ({"steps": 3.0}, "steps must be a whole number"),
    ({"every": -3}, "every must be a whole number, at least 1"),
])
def test_numbers_outside_their_range_are_refused_by_name(digits, options, words):
    memory = EWC(10.0)
    memory.consolidate(net(digits), digits.train)
    with pytest.raises(ValueError, match=words):
        training.fit(net(digits), digits, **{"memory": memory, "epochs": 1} | options)


def test_training_works_where_gradients_are_switched_off(digits):
    for mode in (torch.no_grad, torch.inference_mode):
        model, stacked, plain = net(digits), net(digits), net(digits)
        training.fit(plain, digits, epochs=1)
        with mode():
            training.fit(model, digits, epochs=1)
            training.sweep([stacked], digits, seeds=[0], epochs=1)
        assert torch.equal(flat(model), flat(plain))
        torch.testing.assert_close(flat(stacked), flat(plain), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("many", [False, True])
def test_modes_are_handed_back_as_they_were(digits, many):
    def train(model, **options):
        if many:
            return training.sweep([model, copy.deepcopy(model)], digits, seeds=[0, 1], epochs=1, **options)
        return training.fit(model, digits, epochs=1, **options)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    model[2].eval()
    modes = [module.training for module in model.modules()]
    train(model, watch=[digits])
    assert [module.training for module in model.modules()] == modes
    assert model[2].num_batches_tracked == 3  # it has trained all the same
    with pytest.raises(training.NonFiniteLoss):
        train(model, lr=1e30)
    assert [module.training for module in model.modules()] == modes


def test_what_cannot_be_trained_on_is_said_in_words(digits):
    x, y = digits.train.tensors
    empty = replace(digits, train=TensorDataset(x[:0], y[:0]))
    wrong = replace(digits, train=TensorDataset(x, y + 5))
    for train in (training.fit, lambda m, t, **o: training.sweep([m], t, seeds=[0], **o)):
        with pytest.raises(ValueError, match="no training example"):
            train(net(digits), empty)
        with pytest.raises(ValueError, match="between 0 and 9"):
            train(net(digits), wrong)
        with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1"):
            train(net(digits), digits, batch_size=0)


@pytest.mark.parametrize("many", [False, True])
def test_what_network_task_and_watch_lack_is_said_in_words(digits, many):
    def train(model, task, **options):
        if many:
            return training.sweep([model], task, seeds=[0], **options)
        return training.fit(model, task, **options)

    x, y = digits.train.tensors
    told = tasks.split(digits, scenario="task")[0]
    for model, task, options, words in [
        (models.mlp(64, [8], 5), digits, {}, "5 outputs, but 'digits' has 10 classes.* each, or more"),
        (models.mlp(64, [8], 5), told, {}, "5 outputs"),
        (models.mlp(64, [8], 12), told, {}, "12 outputs, but 'digits 0-1' has 10 classes"),
        (net(digits), replace(digits, train=TensorDataset(x, y.float())), {}, "labels of torch.float32"),
        (net(digits), replace(digits, heads=((0, 1), (2, 3))), {}, r"labels \[4, 5, 6, 7, 8, 9\], but no head"),
        (nn.Sequential(net(digits), nn.Unflatten(1, (10, 1))), told, {}, r"shape \(2, 10, 1\) .* \(examples, classes\)\."),
        (nn.Sequential(net(digits), nn.Flatten(0)), digits, {}, r"shape \(20,\)"),
        (net(digits).requires_grad_(False), digits, {}, "nothing to train"),
        (net(digits), digits, {"watch": [digits, digits.take(50, 20)]}, "tasks of different names"),
    ]:
        before = flat(model)
        with pytest.raises(ValueError, match=words):
            train(model, task, epochs=1, **options)
        assert torch.equal(flat(model), before)
    train(models.mlp(64, [8], 12), digits, epochs=1)  # wider is as good


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_labels_of_any_whole_type_are_the_same_labels(digits, kind):
    """With heads a label is an index as well, and a uint8 would be a mask."""
    for task in (tasks.split(digits, [(0, 1)])[0], tasks.split(digits, scenario="task")[0]):
        parts = {name: getattr(task, name).tensors for name in ("train", "test")}
        other = replace(task, **{name: TensorDataset(x, y.to(kind)) for name, (x, y) in parts.items()})
        plain, twin, stacked = net(digits), net(digits), net(digits)
        expected = training.fit(plain, task, epochs=1, watch=[task]).accuracy
        assert training.fit(twin, other, epochs=1, watch=[other]).accuracy == expected
        assert training.sweep([stacked], other, seeds=[0], epochs=1, watch=[other])[0].accuracy == expected
        assert torch.equal(flat(twin), flat(plain))


def test_run_sees_before_the_first_step_what_a_later_task_lacks(digits, letters):
    x, y = letters.train.tensors
    empty = replace(letters, test=TensorDataset(x[:0], y[:0]))
    wrong = replace(letters, train=TensorDataset(x, y + 5))
    unseen = replace(letters, test=TensorDataset(x, y + 5))
    together = replace(letters, heads=((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)))
    for second, words in [
        (empty, "no test example"), (wrong, "labels from 5 to 14"), (unseen, "labels from 5 to 14"),
        (together, "one task at a time"),
        (replace(letters, classes=11), "10 outputs, but 'letters' has 11 classes"),
    ]:
        model = net(digits)
        before = flat(model)
        with pytest.raises(ValueError, match=words):
            training.run(model, [digits, second], EWC(1.0), epochs=1)
        assert torch.equal(flat(model), before)


class Training(nn.Sequential):
    """Has a gradient in training mode only, and asks for whole batches."""

    def forward(self, x):
        assert len(x) > 20
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class TwoHeads(nn.Module):
    """The second head has no part in the output, and so no gradient."""

    def __init__(self, task):
        super().__init__()
        self.body, self.other = net(task), nn.Linear(4, 2, bias=False)
        nn.init.ones_(self.other.weight)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_head_that_is_not_in_use(digits, letters, optimizer, penalty):
    options = {"epochs": 1, "optimizer": optimizer, "penalty": penalty, "lr": 0.01}
    start, memory = TwoHeads(digits), EWC(10.0)
    memory.consolidate(start, digits.train)
    one, many, head = copy.deepcopy(start), copy.deepcopy(start), start.other.weight.clone()
    training.fit(one, letters, memory=memory, **options)
    training.sweep([many], letters, seeds=[0], memories=[memory], **options)
    torch.testing.assert_close(flat(many), flat(one), rtol=1e-4, atol=1e-6)
    assert torch.equal(one.other.weight, head)


def test_a_layer_frozen_after_consolidating(digits, letters):
    model, memory = net(digits), EWC(10.0)
    memory.consolidate(model, digits.train)
    first = next(model.parameters()).requires_grad_(False)
    before = first.clone()
    training.fit(model, letters, memory=memory, epochs=1, optimizer="adam", lr=0.001)
    assert torch.equal(first, before)


def test_a_wrapped_model_trains_with_its_memory(digits, letters):
    model, memory = net(digits), EWC(10.0)
    memory.consolidate(model, digits.train)
    twin = copy.deepcopy(model)
    options = {"epochs": 1, "optimizer": "adam", "lr": 0.001}
    training.fit(nn.DataParallel(model), letters, memory=memory, **options)
    training.fit(twin, letters, memory=memory, **options)
    torch.testing.assert_close(flat(model), flat(twin))
    training.sweep([nn.DataParallel(model)], letters, seeds=[0], memories=[memory], **options)


def test_sweep_gives_back_the_statistics_of_batch_normalisation(digits):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(digits.features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    one, many = copy.deepcopy(start), copy.deepcopy(start)
    training.fit(one, digits, epochs=2, seed=1)
    history, = training.sweep([many], digits, seeds=[1], epochs=2, watch=[digits])
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(dict(many.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5)
    assert metrics.accuracy(many, digits) == history.accuracy["digits"][-1]


def test_run_of_many_models_says_what_it_needs(digits, letters):
    models_ = [net(digits), net(digits, 1)]
    for model in models_:
        model.eval()
    with pytest.raises(ValueError, match="2 models need a list of one seed each"):
        training.run(models_, [digits], epochs=1)
    with pytest.raises(ValueError, match="2 models need a list of one memory each"):
        training.run(models_, [digits], EWC(1.0), seed=[0, 1], epochs=1)
    one = EWC(1.0)
    with pytest.raises(ValueError, match="needs a memory of its own"):
        training.run(models_, [digits], [one, one], seed=[0, 1], epochs=1)
    assert one.tasks == 0
    models_[1].train()  # modes may differ
    assert training.run(models_, [digits, letters], seed=[0, 1], epochs=1).shape == (2, 2, 2)


def test_a_refused_checkpoint_changes_nothing(digits, tmp_path):
    file = tmp_path / "run.pt"
    training.run(net(digits), [digits], EWC(1.0), checkpoint=file, epochs=1)
    wide = models.mlp(digits.features, [16, 8], digits.classes)
    for model, memory, words in [
        (wide, EWC(1.0), "other parameters"),
        (net(digits), None, r"memory given is \[True\] there"),
        (net(digits), relatives.SynapticIntelligence(strength=1.0), "damping of memory 0 is 'absent' there"),
    ]:
        before = flat(model)
        with pytest.raises(ValueError, match=words):
            training.run(model, [digits], memory, checkpoint=file, epochs=1)
        assert torch.equal(flat(model), before)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="is not a checkpoint of .run."):
        training.run(net(digits), [digits], checkpoint=file, epochs=1)


def test_a_checkpoint_is_written_whole_or_not_at_all(digits, letters, tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    training.run(net(digits), [digits], checkpoint=file, epochs=1)
    whole = file.read_bytes()

    def half(state, target):
        target.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    file.rename(tmp_path / "other.pt")
    with pytest.raises(KeyboardInterrupt):
        training.run(net(digits), [digits], checkpoint=file, epochs=1)
    assert [f.name for f in tmp_path.iterdir()] == ["other.pt"] and whole == (tmp_path / "other.pt").read_bytes()


def test_progress_is_shown_on_a_terminal_only(digits, monkeypatch):
    made = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            made.append(options)
            super().__init__(**options | {"disable": True})

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        training.fit(net(digits), digits, epochs=2)
        assert made[-1]["disable"] is not terminal and made[-1]["total"] == 6 and made[-1]["delay"] >= 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_rate_falls_along_torchs_cosine(digits, optimizer):
    model, twin = net(digits), net(digits)
    training.fit(model, digits, epochs=2, lr=0.01, optimizer=optimizer, seed=3)
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}
    descent = make[optimizer](twin.parameters())
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(descent, T_max=2 * 3)
    plain_loop(twin, digits, descent, after_step=rate.step)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)


def test_sweep_goes_on_with_the_moments_of_one_network(digits, letters):
    """They come in another memory layout than that of the stacked weights."""
    start, moments = net(digits), {}
    options = {"optimizer": "adam", "lr": 0.01, "epochs": 3, "schedule": None}
    training.fit(start, digits, moments=moments, **options)
    twins = [copy.deepcopy(start) for _ in range(2)]
    spread = {k: {n: t.expand(2, *t.shape).clone() if t.dim() else t.clone() for n, t in own.items()}
              for k, own in moments.items()}
    training.sweep(twins, letters, seeds=[1, 2], moments=spread, **options)
    for seed, twin in zip([1, 2], twins):
        alone = copy.deepcopy(start)
        training.fit(alone, letters, seed=seed, moments=copy.deepcopy(moments), **options)
        torch.testing.assert_close(flat(twin), flat(alone), rtol=1e-4, atol=1e-5)


MEMORIES = {
    "none": lambda: None,
    "EWC": lambda: EWC(1.0),
    "each": lambda: EWC(1.0, anchors="each"),
    "L2": lambda: relatives.L2(0.1),
    "SI": lambda: relatives.SynapticIntelligence(0.1),
    "K-FAC": lambda: kfac.KFAC(1.0, keep="pooled"),
}


def three_lessons(model, memory, lessons, penalty, optimizer):
    """300 images: the fifth batch of an epoch is a short one."""
    options = {"lr": 0.02 if optimizer == "sgd" else 1e-3, "optimizer": optimizer, "penalty": penalty, "moments": {}}
    for task in lessons:
        training.fit(model, task, memory=memory, epochs=12, batch_size=64, **options)
        if memory is not None:
            memory.consolidate(model, task.train)
    return flat(model)


class Unplain(nn.Sequential):
    """To `fit` a network of unknown kind, of which no step is captured."""


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments: what a CUDA graph keeps of a step, Python's numbers baked in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out


class OnTape(training._Replayed):
    """Replays the tape into the memory that the captured step wrote to."""

    replays = 0

    def __call__(self, batch):
        if batch.shape[-1] != self.size or self.before:
            self.before = max(0, self.before - 1)
            return self.step(batch)
        if self.graph is None:
            self.batch, self.graph = batch.clone(), Tape()
            with self.graph:
                self.losses = self.step(self.batch)
            return self.losses.clone()
        self.batch.copy_(batch)
        type(self).replays += 1
        with torch.no_grad():
            for operation, args, kwargs, out in self.graph.calls:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)
        return self.losses.clone()


@pytest.fixture
def taped(monkeypatch):
    """As on a GPU, with the tape for the graph; counts the replays."""
    monkeypatch.setattr(training, "_has_graphs", lambda device: True)
    monkeypatch.setattr(training, "_Replayed", OnTape)
    monkeypatch.setattr(OnTape, "replays", 0)
    return OnTape


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_replayed_step_is_the_plain_one(digits, letters, request, name, penalty, optimizer):
    lessons = digits, letters, digits
    plain = three_lessons(net(digits), MEMORIES[name](), lessons, penalty, optimizer)
    taped = request.getfixturevalue("taped")
    other = three_lessons(net(digits), MEMORIES[name](), lessons, penalty, optimizer)
    captured = 0 if name == "K-FAC" and (optimizer, penalty) != ("sgd", "pull") else 3
    assert taped.replays == captured * (4 * 12 - 4)
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seeds", [[1, 2], [1, 1]])
@pytest.mark.parametrize("name", ["none", "EWC", "L2", "K-FAC"])
def test_a_replayed_sweep_is_the_plain_one(digits, letters, request, name, seeds):
    def lessons():
        nets, memories = [net(digits, s) for s in (3, 4)], [MEMORIES[name]() for _ in range(2)]
        for task in (digits, letters, digits):
            training.sweep(nets, task, seeds=seeds, memories=memories, lr=0.02, epochs=12, batch_size=64)
            for model, memory in zip(nets, memories):
                if memory is not None:
                    memory.consolidate(model, task.train)
        return torch.cat([flat(model) for model in nets])

    plain = lessons()
    taped = request.getfixturevalue("taped")
    torch.testing.assert_close(lessons(), plain, rtol=1e-3, atol=1e-4)
    assert taped.replays == 3 * (4 * 12 - 4)


class Twice(nn.Sequential):
    """One layer at two places."""

    def __init__(self):
        torch.manual_seed(0)
        hidden = nn.Linear(16, 16)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), hidden, nn.ReLU(), hidden, nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("name", ["none", "EWC", "SI"])
@pytest.mark.parametrize("penalty", ["pull", "gradient"])
def test_a_replayed_step_of_a_layer_at_two_places(digits, letters, request, monkeypatch, name, penalty):
    plain = three_lessons(Twice(), MEMORIES[name](), (digits, letters), penalty, "sgd")
    taped = request.getfixturevalue("taped")
    monkeypatch.setattr(training, "_PLAIN", (*training._PLAIN, Twice))
    model = Twice()
    torch.testing.assert_close(three_lessons(model, MEMORIES[name](), (digits, letters), penalty, "sgd"), plain, rtol=1e-3, atol=1e-4)
    assert taped.replays and all(isinstance(p, nn.Parameter) for p in model.parameters()) and model[2] is model[4]


@pytest.mark.parametrize("options", [{"lr": 1, "momentum": 0.0}, {"lr": 1e-3, "optimizer": "adam"}], ids=["sgd", "adam"])
def test_replays_of_runs_that_end_in_the_middle_of_an_epoch(digits, letters, request, options):
    """In double precision, a layer's bias frozen, Adam's moments carried on; a rate of 1 is a number like any other."""
    def lessons():
        model, moments = net(digits).double(), {}
        model[1].bias.requires_grad_(False)
        for task, steps in ((digits, 70), (letters, 20), (digits, 90)):  # twenty are too few for a graph
            x, y = task.train.tensors
            task = replace(task, train=TensorDataset(x.double(), y))
            training.fit(model, task, steps=steps, batch_size=64, schedule=None, moments=moments, **options)
        return flat(model)

    plain = lessons()
    taped = request.getfixturevalue("taped")
    torch.testing.assert_close(lessons(), plain, rtol=1e-6, atol=1e-7)
    assert taped.replays == 4 * 70 // 5 + 4 * 90 // 5 - 2 * 4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_replayed_sweep_of_convolutions_is_the_plain_one(digits, request, optimizer):
    """Whose gradients lie in memory in their own way, while a fused step goes through all its tensors in one order."""
    def lesson():
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 10)) for _ in range(2)]
        training.sweep(nets, digits, seeds=[1, 2], lr=1e-3, optimizer=optimizer, epochs=12, batch_size=64)
        return torch.cat([flat(model) for model in nets])

    plain = lesson()
    taped = request.getfixturevalue("taped")
    torch.testing.assert_close(lesson(), plain, rtol=1e-3, atol=1e-4)
    assert taped.replays


def test_after_replays_no_gradient_is_left_and_the_rate_was_in_single_precision(digits, taped, monkeypatch):
    rates, SGD = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: (rates.append(options["lr"]), SGD(*args, **options))[1])
    model = net(digits)
    training.fit(model, digits, lr=1, epochs=30)
    assert taped.replays and all(p.grad is None for p in model.parameters())
    assert rates[0].dtype == torch.float32  # which is what the fused kernels read, also for other weights


def test_a_bad_loss_among_replays_stops_with_sound_weights(digits, taped):
    model = net(digits)
    with pytest.raises(training.NonFiniteLoss):
        training.fit(model, digits, lr=1e12, epochs=60, batch_size=64, schedule=None)
    assert flat(model).isfinite().all()


def test_what_python_does_at_every_step_is_not_captured(digits):
    """Or it would be done once, and its numbers kept."""
    def can(model=None, task=digits, memory=None, penalty="pull", optimizer="sgd"):
        return training._replayable(model or net(digits), task, memory, penalty, optimizer)

    class Own(EWC):
        def pull(self, model, step):
            pass

    class Rising(EWC):
        strength = property(lambda self: 1.0, lambda self, value: None)

    class Batched(EWC):
        def consolidate(self, model, data=None, **options):
            pass

    class OtherTask(tasks.Task):
        pass

    assert can() and can(memory=EWC(1.0)) and can(memory=Batched(1.0)) and can(memory=kfac.KFAC(1.0))
    assert not can(memory=Own(1.0)) and not can(memory=Rising(1.0))
    assert not can(memory=kfac.KFAC(1.0), optimizer="adam") and not can(memory=kfac.KFAC(1.0), penalty="gradient")
    assert not can(task=OtherTask(**{f: getattr(digits, f) for f in digits.__dataclass_fields__}))
    changed = EWC(1.0)
    changed.pull = lambda model, step: None
    assert not can(memory=changed)
    for spoil in (
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: model[1].weight.register_hook(lambda grad: None),
        lambda model: model[1].weight.register_post_accumulate_grad_hook(lambda p: None),
        lambda model: setattr(model[2], "forward", lambda x: x),
    ):
        model = net(digits)
        spoil(model)
        assert not can(model)
    assert not can(Unplain(*net(digits)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sweep_with_kronecker_factors_in_another_precision(digits, letters, dtype):
    nets = [net(digits, s) for s in range(2)]
    memories = [kfac.KFAC(3.0) for _ in nets]
    for model, memory in zip(nets, memories):
        memory.consolidate(model, digits.train)
    x, y = letters.train.tensors
    task = replace(letters, train=TensorDataset(x.to(dtype), y))
    nets = [model.to(dtype) for model in nets]
    alone = copy.deepcopy(nets)
    training.sweep(nets, task, seeds=[0, 1], memories=memories, epochs=2, lr=0.02)
    for seed, (model, memory, twin) in enumerate(zip(alone, memories, nets)):
        training.fit(model, task, seed=seed, memory=memory, epochs=2, lr=0.02)
        loose = {"rtol": 0.1, "atol": 0.02} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(flat(twin), flat(model), **loose)


def test_moments_of_other_weights_are_refused(digits):
    small, moments = models.mlp(digits.features, [1, 1], digits.classes, seed=0), {}
    training.fit(small, digits, epochs=1, moments=moments)
    with pytest.raises(ValueError, match="moments belong to other parameters"):
        training.fit(net(digits), digits, epochs=1, moments=moments)
    with pytest.raises(ValueError, match="another optimiser's than 'adam'"):
        training.fit(small, digits, epochs=1, moments=moments, optimizer="adam")
    with pytest.raises(ValueError, match="moments belong to other parameters"):
        training.sweep([copy.deepcopy(small) for _ in range(2)], digits, seeds=[0, 1], epochs=1, moments=moments)


def test_run_of_many_says_early_that_factors_are_to_be_pooled(digits, letters):
    nets = [net(digits, s) for s in range(2)]
    before = torch.cat([flat(model) for model in nets])
    with pytest.raises(ValueError, match="keep='pooled'"):
        training.run(nets, [digits, letters, digits], [kfac.KFAC(1.0) for _ in nets], seed=[0, 1], epochs=1)
    with pytest.raises(ValueError, match="SGD and penalty='pull'"):
        training.run(nets, [digits, letters], [kfac.KFAC(1.0) for _ in nets], seed=[0, 1], epochs=1, optimizer="adam")
    assert torch.equal(torch.cat([flat(model) for model in nets]), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_parameters_with_gaps_in_memory(digits, taped, optimizer):
    """A fused step would go through the gaps as well."""
    gapped, plain = net(digits), net(digits)
    wide = torch.zeros(16, 128)
    wide[:, ::2] = gapped[1].weight.detach()
    gapped[1].weight = nn.Parameter(wide[:, ::2])
    for model in (gapped, plain):
        before = taped.replays
        training.fit(model, digits, epochs=20, lr=1e-3, optimizer=optimizer)
        assert (taped.replays > before) == (model is plain)
    torch.testing.assert_close(flat(gapped), flat(plain), rtol=1e-3, atol=1e-4)


def on_a_gpu(task):
    return replace(task, train=TensorDataset(*(t.cuda() for t in task.train.tensors)),
                   test=TensorDataset(*(t.cuda() for t in task.test.tensors)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_cuda_replays_the_step_that_it_captured(digits, letters, monkeypatch, name, penalty, optimizer):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    lessons = [on_a_gpu(task) for task in (digits, letters, digits)]
    replayed = three_lessons(net(digits).cuda(), MEMORIES[name](), lessons, penalty, optimizer)
    captured = 0 if name == "K-FAC" and (optimizer, penalty) != ("sgd", "pull") else 3
    assert len(replays) == captured * (4 * 12 - 3)
    plain = three_lessons(Unplain(*net(digits)).cuda(), MEMORIES[name](), lessons, penalty, optimizer)
    assert len(replays) == captured * (4 * 12 - 3)
    torch.testing.assert_close(replayed, plain, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("penalty", ["pull", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_cuda_sweep_is_fit(digits, letters, penalty, optimizer):
    a, b = on_a_gpu(digits), on_a_gpu(letters)
    options = {"lr": 0.05 if optimizer == "sgd" else 1e-3, "optimizer": optimizer, "epochs": 30, "penalty": penalty}
    alone, together = ([net(digits, s).cuda() for s in range(3)] for _ in range(2))
    histories = training.sweep(together, a, seeds=range(3), watch=[a], **options)
    for s, model in enumerate(alone):
        history = training.fit(model, a, seed=s, watch=[a], **options)
        torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(histories[s].loss), rtol=1e-3, atol=1e-4)
    memories = [EWC(strength) for strength in (0.1, 0.3, 1.0)]
    for memory, model in zip(memories, alone):
        memory.consolidate(model, a.train)
    together = [copy.deepcopy(model) for model in alone]
    training.sweep(together, b, seeds=range(3), memories=memories, **options)
    for s, (model, memory) in enumerate(zip(alone, memories)):
        training.fit(model, b, seed=s, memory=memory, **options)
        torch.testing.assert_close(flat(model), flat(together[s]), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_sweep_with_kronecker_factors_is_fit(digits, letters):
    a, b = on_a_gpu(digits), on_a_gpu(letters)
    alone, together = ([net(digits, s).cuda() for s in range(2)] for _ in range(2))
    memories = [kfac.KFAC(strength) for strength in (3.0, 30.0)]
    for memory, model in zip(memories, alone):
        memory.consolidate(model, a.train)
    training.sweep(together, b, seeds=[0, 1], memories=memories, epochs=30, lr=0.02)
    for seed, (model, memory, twin) in enumerate(zip(alone, memories, together)):
        training.fit(model, b, seed=seed, memory=memory, epochs=30, lr=0.02)
        torch.testing.assert_close(flat(twin), flat(model), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_a_new_dropout_at_every_replay(digits):
    a = on_a_gpu(digits)
    flat_images, *rest = net(digits)
    model = nn.Sequential(flat_images, nn.Dropout(0.5), *rest)
    twins = [copy.deepcopy(model) for _ in range(2)]
    losses = [training.fit(model, a, lr=0.0, epochs=80, batch_size=300).loss]
    losses += [h.loss for h in training.sweep(twins, a, lr=0.0, epochs=80, batch_size=300, seeds=[0, 0])]
    assert len({loss for row in losses for loss in row}) == 240


def test_what_a_sweep_may_share_and_what_it_may_differ_in(digits):
    """A frozen body, and what a layer of one's own says about itself."""

    class Named(nn.Linear):
        def extra_repr(self):
            return f"{super().extra_repr()}, at {id(self)}"

    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12).requires_grad_(False), nn.ReLU())
    models = [nn.Sequential(body, Named(12, 10)) for _ in range(2)]
    twins = copy.deepcopy(models)
    training.sweep(models, digits, seeds=[0, 1], epochs=1)
    for seed, (model, twin) in enumerate(zip(models, twins)):
        training.fit(twin, digits, seed=seed, epochs=1)
        assert torch.allclose(flat(model), flat(twin), atol=1e-6)


def test_a_memory_that_only_holds_springs_can_be_swept(digits):
    class Holder:
        strength = 5.0

    model, twin, memory, holder = net(digits), net(digits), EWC(5.0), Holder()
    memory.consolidate(model, digits.train[:50])
    holder.fisher, holder.theta_star = memory.fisher, memory.theta_star
    training.sweep([model], digits, seeds=[0], memories=[holder], epochs=1)
    training.sweep([twin], digits, seeds=[0], memories=[memory], epochs=1)
    assert torch.equal(flat(model), flat(twin))


def test_labels_that_do_not_count_and_lost_networks_are_judged_alike(digits):
    x, y = digits.test.tensors
    marked = replace(digits, test=TensorDataset(x, torch.where(torch.arange(len(y)) < 20, -100, y)))
    for task, break_it in ((marked, False), (digits, True)):
        found = []
        for train in (training.fit, lambda m, t, **o: training.sweep([m], t, seeds=[0], **o)[0]):
            model = net(digits)
            if break_it:
                nn.init.constant_(model[-1].bias, math.nan)
            found.append(train(model, task, steps=0, watch=[task]).accuracy)
        assert found[0] == found[1] and found[0]["digits"][0] == metrics.accuracy(model, task)
    training.run(net(digits), [marked], epochs=1)


def test_whole_numbers_of_any_make(digits):
    expected = net(digits)
    training.fit(expected, digits, steps=3, batch_size=7)
    for kind in (np.int64, torch.tensor):
        model = net(digits)
        training.fit(model, digits, steps=kind(3), batch_size=kind(7), every=kind(2), watch=[digits])
        assert torch.equal(flat(model), flat(expected))
    for number in (3.0, "3", -1):
        with pytest.raises(ValueError, match="steps must be a whole number, at least 0"):
            training.fit(net(digits), digits, steps=number)


def test_what_a_checkpoint_is_compared_by_is_read_back(digits, tmp_path):
    class Choice(str, enum.Enum):
        SGD = "sgd"

    model = net(digits)
    first = training.run(model, [digits], checkpoint=tmp_path / "run.pt", epochs=1, optimizer=Choice.SGD)
    again = training.run(net(digits), [digits], checkpoint=tmp_path / "run.pt", epochs=1, optimizer=Choice.SGD)
    assert torch.equal(first, again)
    # What changes no number: Adam has no momentum, and `steps` goes before `epochs`.
    for name, one, other in (("adam", {"momentum": 0.5}, {"momentum": 0.9}), ("steps", {"epochs": 2}, {"epochs": 3})):
        same = {"optimizer": "adam", "steps": 3, "checkpoint": tmp_path / f"{name}.pt"}
        assert torch.equal(training.run(net(digits), [digits], **same, **one), training.run(net(digits), [digits], **same, **other))


def test_a_model_that_asks_for_whole_batches_can_be_trained(digits):
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 10)

        def forward(self, x):
            return self.inner(x.view(20, 64))

    training.fit(Rigid(), digits.take(60, 20), batch_size=20, epochs=1)
    with pytest.raises(ValueError, match="returned a tuple"):
        training.fit(nn.Sequential(nn.Flatten(), nn.LSTM(64, 10)), digits)


def test_the_memories_can_be_imported_without_what_draws_the_data():
    code = "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None; from ewc import EWC"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
