"""Metrics against sums written out by hand and loops over single images."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ewc import metrics, models, tasks


@pytest.fixture(scope="module")
def task():
    return tasks.load("digits", "cpu").take(100, 83)


@pytest.mark.parametrize("batch_size", [1, 10, 83, 1000])
def test_accuracy_is_the_share_of_right_answers(task, batch_size):
    model = models.mlp(64, [20], 10, seed=1).double()
    task_x, task_y = task.test.tensors
    x = task_x.double()
    hits = sum(int(model(x[n : n + 1]).argmax()) == int(task_y[n]) for n in range(83))
    assert 0 < hits < 83
    assert metrics.accuracy(model, TensorDataset(x, task_y), batch_size=batch_size) == hits / 83


def test_accuracy_of_a_task_uses_its_test_set(task):
    model = models.mlp(64, [20], 10, seed=1)
    assert metrics.accuracy(model, task) == metrics.accuracy(model, task.test)
    assert metrics.accuracy(model, task) != metrics.accuracy(model, task.train)


def test_accuracy_among_chosen_classes():
    logits = torch.tensor([[9.0, 1, 2, 3], [0, 5, 9, 4], [0, 1, 3, 2], [9, 8, 7, 6]])
    data = TensorDataset(logits, torch.tensor([3, 1, 3, 1]))
    assert metrics.accuracy(nn.Identity(), data) == 0.0
    assert metrics.accuracy(nn.Identity(), data, classes=(3, 1)) == 1.0
    assert metrics.accuracy(nn.Identity(), data, classes=[2, 3]) == 0.25
    with pytest.raises(ValueError, match="at least one class"):
        metrics.accuracy(nn.Identity(), data, classes=[])


def test_accuracy_within_the_head_of_a_task(task):
    model = models.mlp(64, [20], 10, seed=1)
    told = tasks.split(task, scenario="task")
    for part in told:
        inside = metrics.accuracy(model, part.test, classes=part.head)
        assert metrics.accuracy(model, part) == inside >= metrics.accuracy(model, part.test)
    each = [len(part.test) * metrics.accuracy(model, part) for part in told]
    together = metrics.accuracy(model, tasks.joint(*told))
    assert together == pytest.approx(sum(each) / len(task.test)) and together > metrics.accuracy(model, task)


def test_accuracy_leaves_the_model_as_it_was(task):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.9), nn.Linear(64, 10))
    model[1].eval()  # a frozen layer inside a model in training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert metrics.accuracy(model, task) == metrics.accuracy(model, task)  # eval mode: no dropout
    assert [module.training for module in model] == [True, False, True, True] and model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_accuracy_restores_the_mode_after_an_error(task):
    model = models.mlp(5, [], 10, seed=0)
    with pytest.raises(RuntimeError):
        metrics.accuracy(model, task)
    assert model.training


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no images"):
        metrics.accuracy(nn.Identity(), TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("classes", [None, [0, 2]])
@pytest.mark.parametrize("positions", [(3,), (4,), (2, 3), (1,)])
def test_accuracy_at_several_positions_counts_the_labels(task, positions, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, *positions, generator=generator)
    labels = torch.randint(0, 4, (7, *positions), generator=generator)
    labels.view(-1)[:2] = -100  # padding
    hits = count = 0
    for z, y in zip(logits.movedim(1, -1).reshape(-1, 4).tolist(), labels.view(-1).tolist()):
        count += y != -100
        hits += max(classes or range(4), key=z.__getitem__) == y
    for batch_size in (1, 3, 1000):
        data = TensorDataset(logits, labels)
        assert metrics.accuracy(nn.Identity(), data, classes=classes, batch_size=batch_size) == hits / count
    labels.clamp_(min=0)
    heads = dataclasses.replace(task, test=data, classes=4, heads=((0, 2), (1, 3)))
    within = sum(z[y] >= z[(y + 2) % 4] for z, y in zip(logits.movedim(1, -1).reshape(-1, 4), labels.view(-1)))
    assert metrics.accuracy(nn.Identity(), heads) == int(within) / labels.numel()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.int64])
def test_labels_are_whole_numbers_of_any_type(kind):
    labels = torch.tensor([1, 0, 0], dtype=kind)
    assert metrics.accuracy(nn.Identity(), TensorDataset(torch.eye(3, 2), labels)) == 1 / 3
    if kind == torch.uint8:  # where -100 is 156
        assert metrics.accuracy(nn.Identity(), TensorDataset(torch.eye(157)[156:], 155 + labels[:1])) == 1
    with pytest.raises(ValueError, match="must be whole numbers"):
        metrics.accuracy(nn.Identity(), TensorDataset(torch.eye(3, 2), labels.float()))


@pytest.mark.parametrize(
    ("logits", "labels"), [((6, 3), (6, 1)), ((6, 3), (6, 3)), ((6, 3, 2), (6,)), ((6, 3, 2), (6, 3)), ((6,), (6,))]
)
def test_labels_of_another_shape_than_the_logits_are_refused(logits, labels):
    data = TensorDataset(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
    for classes in (None, [0, 1]):
        with pytest.raises(ValueError, match="do not fit logits"):
            metrics.accuracy(nn.Identity(), data, classes=classes)


def test_a_network_that_diverged_is_right_nowhere():
    logits = torch.eye(4)
    data = TensorDataset(logits, torch.tensor([0, 1, 0, 0]))
    assert metrics.accuracy(nn.Identity(), data) == 0.5
    logits[0, 3], logits[1, 1] = torch.nan, torch.inf
    assert metrics.accuracy(nn.Identity(), data) == metrics.accuracy(nn.Identity(), data, classes=[3, 2, 1, 0]) == 0


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one_image(batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        metrics.accuracy(nn.Identity(), TensorDataset(torch.eye(3), torch.arange(3)), batch_size=batch_size)


MATRIX = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 0.95]], dtype=torch.float64)


def test_averages_by_hand():
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.7 + 0.5 + 0.95) / 3)
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)


def test_forgetting_counts_from_the_best_accuracy_not_the_first():
    matrix = MATRIX.clone()
    matrix[1, 0] = 0.99  # task 1 improved while task 2 was learnt
    assert metrics.forgetting(matrix) == pytest.approx(((0.99 - 0.7) + (0.8 - 0.5)) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(-0.25)


def test_one_task_and_wrong_shapes():
    one = torch.tensor([[0.5]])
    assert metrics.average_accuracy(one) == 0.5
    for measure in (metrics.backward_transfer, metrics.forgetting):
        with pytest.raises(ValueError, match="at least 2 task"):
            measure(one)
    for wrong in (torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3, 3)):
        with pytest.raises(ValueError, match=r"shape \(T, T\)"):
            metrics.average_accuracy(wrong)


def test_odd_data_and_classes_are_named():
    data = TensorDataset(torch.eye(3), torch.arange(3))
    for wrong in (data.tensors, [data]):
        with pytest.raises(TypeError, match="a Task or a TensorDataset"):
            metrics.accuracy(nn.Identity(), wrong)
    for classes in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="between 0 and 2"):
            metrics.accuracy(nn.Identity(), data, classes=classes)
    assert metrics.accuracy(nn.Identity(), data, classes=[1]) == 1 / 3


def test_a_matrix_may_be_a_list():
    rows = [[1, 0], [0, 1]]  # whole numbers, too
    assert metrics.average_accuracy(rows) == 0.5
    assert metrics.backward_transfer(rows) == -1 and metrics.forgetting(rows) == 1


class Merged(nn.Linear):
    """A low-rank adapter that merges into the weight in `eval`, as adapter libraries write it."""

    def __init__(self):
        super().__init__(64, 10)
        self.low, self.merged = nn.Parameter(torch.ones(10, 64)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.low.data if not mode else -self.low.data
            self.merged = not mode
        return self

    def forward(self, x):
        x = x.flatten(1)
        return super().forward(x) if self.merged else super().forward(x) + x @ self.low.T


def test_accuracy_leaves_adapters_as_they_were(task):
    model = Merged()
    before = copy.deepcopy(model.state_dict())
    found = metrics.accuracy(model, task)
    assert model.training and not model.merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert metrics.accuracy(model.eval(), task) == found and model.merged


def test_accuracy_is_that_of_eval_mode_also_where_train_is_the_models_own(task):
    class Noisy(nn.Linear):
        sampling = True

        def train(self, mode=True):
            self.sampling = mode
            return super().train(mode)

        def forward(self, x):
            assert not self.sampling
            return super().forward(x.flatten(1))

    model = Noisy(64, 10)
    metrics.accuracy(model, task)
    assert model.sampling and model.training
