"""The diagonal Fisher against its definition: plain autograd in float64, one example and one label at a time."""

import copy
import itertools
import math
import os
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
import tqdm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from ewc import _layers, fisher

DETERMINISTIC = ("exact", "empirical", "argmax")


def brute_force(model, x, y=None, estimator="exact", classes=None):
    """Mean over examples of the expected squared score; several labels per example are summed before the square."""
    model.eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}

    def score(log_p):
        grads = torch.autograd.grad(log_p, list(parameters.values()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads)]

    for n in range(len(x)):
        z = model(x[n : n + 1])[0].flatten(1) if model(x[n : n + 1]).dim() > 2 else model(x[n : n + 1])[0][:, None]
        chosen = range(len(z)) if classes is None else classes
        log_p = z[list(chosen)].log_softmax(0)
        labels = None if y is None else y[n].flatten()
        used = [t for t in range(z.shape[1]) if labels is None or labels[t] != -100]
        if estimator == "exact":
            # Labels at different positions are independent with mean score zero: variances add up.
            for t, c in itertools.product(used, range(len(log_p))):
                for name, g in zip(total, score(log_p[c, t])):
                    total[name] += log_p[c, t].detach().exp() * g.square() / len(x)
        else:
            pick = [
                int(log_p[:, t].argmax()) if estimator == "argmax" else list(chosen).index(int(labels[t])) for t in used
            ]
            for name, g in zip(total, score(sum(log_p[c, t] for c, t in zip(pick, used)))):
                total[name] += g.square() / len(x)
    return total


def distance(a, b):
    """Largest relative error over the parameters; a gradient that is zero in theory counts against the largest."""
    assert a.keys() == b.keys()
    largest = max(float(v.norm()) for v in b.values())
    return max(float((a[n] - b[n]).norm()) / max(float(b[n].norm()), 1e-12 * largest) for n in b)


# ---- models -------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """A model from its layers and a function of them and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class Slope(nn.PReLU):
    """A layer without a closed form, for which torch.func gives a wrong gradient per example."""


class Gate(torch.autograd.Function):
    """An operation that torch.func cannot do, for lack of a vmap rule."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


def tied():
    model = Lambda(
        lambda m, x: m.out(m.table(x).tanh().mean(1)), table=nn.Embedding(7, 5, padding_idx=0), out=nn.Linear(5, 7)
    )
    model.out.weight = model.table.weight
    return model


def parameter_outside():
    model = Lambda(lambda m, x: m.out((m.inner(x) * m.scale + m.shift).tanh()), inner=nn.Linear(4, 5), out=nn.Linear(5, 3))
    model.scale, model.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    return model


def frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def normalised():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4)
    )
    model(torch.randn(20, 2, 4, 4))  # running statistics that are not 0 and 1
    return model


def in_place_on_view():
    def forward(m, x):
        h = m.inner(x)
        h.mul_(3)  # the output of a linear layer on sequences is a view
        h[:, 0].neg_()
        return m.out(h.tanh().sum(1))

    return Lambda(forward, inner=nn.Linear(4, 5), out=nn.Linear(5, 3))


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (4,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)),
    "two sequence axes": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)), (3, 2, 4)),
    "positions folded into the batch": (
        lambda: Lambda(
            lambda m, x: m.out(m.inner(x.flatten(0, 1)).tanh()).unflatten(0, (len(x), -1)).mean(1),
            inner=nn.Linear(4, 5), out=nn.Linear(5, 3),
        ),
        (3, 4),
    ),
    "positions before the batch": (
        lambda: Lambda(
            lambda m, x: m.out(m.inner(x.transpose(0, 1)).tanh()).mean(0), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)
        ),
        (3, 4),
    ),
    "as many positions as rehearsed examples, before the batch": (
        lambda: Lambda(
            lambda m, x: m.out(m.inner(x.transpose(0, 1).flatten(0, 1)).tanh()).unflatten(0, (2, -1)).prod(0),
            inner=nn.Linear(4, 5), out=nn.Linear(5, 3),
        ),
        (2, 4),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(),
            nn.Conv1d(6, 2, 2, padding="same", padding_mode="reflect"), nn.Flatten(), nn.Linear(8, 3),
        ),
        (4, 8),
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 2, dilation=(1, 2), padding="same", padding_mode="circular"), nn.Tanh(),
            nn.Conv2d(3, 2, 2, padding="valid"), nn.Flatten(), nn.Linear(6, 3),
        ),
        (2, 7, 5),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (2, 2, 3, 3),
    ),
    "one position left": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)), (2, 3, 3)
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(),
            nn.ConvTranspose2d(6, 1, 2, dilation=2), nn.Flatten(), nn.Linear(36, 3),
        ),
        (4, 2, 2),
    ),
    "transposed convolutions, 1d and 3d": (
        lambda: Lambda(
            lambda m, x: m.out(torch.cat([m.one(x).flatten(1), m.three(x[..., None, None]).flatten(1)], 1)),
            one=nn.ConvTranspose1d(2, 2, 3, stride=3, output_padding=2, dilation=4), out=nn.Linear(60, 3),
            three=nn.ConvTranspose3d(2, 1, 2),
        ),
        (2, 4),
    ),
    "a convolution and its transpose share their weight": (
        lambda: Lambda(
            lambda m, x: F.adaptive_avg_pool1d(m.up(m.down(x).tanh()), 1).squeeze(2),
            down=(c := nn.Conv1d(3, 3, 1, bias=False)), up=_sharing(nn.ConvTranspose1d(3, 3, 1, bias=False), c),
        ),
        (3, 4),
    ),
    "layer and root-mean-square norm": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.LayerNorm(5), nn.PReLU(), nn.RMSNorm((3, 5)), nn.Flatten(), nn.Linear(15, 4),
            nn.PReLU(4), nn.LayerNorm(4),
        ),
        (3, 4),
    ),
    "group and instance norm": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.PReLU(4), nn.InstanceNorm1d(4, affine=True), nn.Tanh(),
            nn.Flatten(), nn.Linear(12, 4), nn.GroupNorm(2, 4),
        ),
        (3, 4),
    ),
    "batch norm": (normalised, (2, 4, 4)),
    "called twice": (
        lambda: Lambda(lambda m, x: m.out(m.inner(m.inner(x).tanh()).relu_()), inner=nn.Linear(4, 4), out=nn.Linear(4, 3)),
        (4,),
    ),
    "convolution called twice": (
        lambda: Lambda(
            lambda m, x: m.out(m.norm(m.inner(m.norm(m.inner(x)).tanh())).flatten(1)),
            inner=nn.Conv1d(2, 2, 3, padding=1), norm=nn.GroupNorm(1, 2), out=nn.Linear(8, 3),
        ),
        (2, 4),
    ),
    "called with different numbers of positions": (
        lambda: Lambda(
            lambda m, x: m.out(m.inner(x).tanh().sum(1) * m.inner(x[:, 0])), inner=nn.Linear(4, 4), out=nn.Linear(4, 3)
        ),
        (3, 4),
    ),
    "weight also used by itself": (
        lambda: Lambda(
            lambda m, x: m.out(m.inner(x).tanh()) + F.linear(x, m.inner.weight)[:, :3],
            inner=nn.Linear(4, 4), out=nn.Linear(4, 3),
        ),
        (4,),
    ),
    "called in vain, weight used by itself": (
        lambda: Lambda(
            lambda m, x: (m.inner(x), m.out(F.linear(x, m.inner.weight).tanh()))[1],
            inner=nn.Linear(4, 4), out=nn.Linear(4, 3),
        ),
        (4,),
    ),
    "in place on the output": (in_place_on_view, (3, 4)),
    "input given by name": (
        lambda: Lambda(lambda m, x: m.out(input=m.inner(input=x).tanh()), inner=nn.Linear(4, 4), out=nn.Linear(4, 3)),
        (4,),
    ),
    "unused layer": (
        lambda: Lambda(lambda m, x: m.out(x), spare=nn.Linear(4, 4), out=nn.Linear(4, 3)), (4,)
    ),
    "dead layer": (
        lambda: Lambda(
            lambda m, x: m.out(x) + 0 * m.spare(x)[:, :3], spare=nn.Linear(4, 4), out=nn.Linear(4, 3)
        ),
        (4,),
    ),
    "parameters outside modules": (parameter_outside, (4,)),
    "frozen parameters": (frozen, (4,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, 3)), (4,)),
    "attention": (
        lambda: Lambda(
            lambda m, x: m.out(m.block(x).mean(1)),
            block=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), out=nn.Linear(4, 3),
        ),
        (3, 4),
    ),
    "attention, positions first": (
        lambda: Lambda(
            lambda m, x: m.out(m.block(x.transpose(0, 1)).mean(0)),
            block=nn.TransformerEncoderLayer(4, 2, 6), out=nn.Linear(4, 3),
        ),
        (3, 4),
    ),
    "torch.func is wrong": (lambda: nn.Sequential(nn.Linear(4, 5), Slope(), nn.Linear(5, 3)), (4,)),
    "torch.func fails": (
        lambda: _with(Lambda(lambda m, x: m.out(Gate.apply(x, m.gate)), out=nn.Linear(4, 3)), gate=torch.randn(4)), (4,)
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), (4,)
    ),
    "single unit of work per call": (
        lambda: Lambda(
            lambda m, x: torch.stack([m.out(row.tanh()) for row in m.inner(x)]),
            inner=nn.Linear(4, 4), out=nn.Linear(4, 3),
        ),
        (4,),
    ),
} | {
    name: (
        lambda cell=cell: Lambda(
            lambda m, x: m.out(m.cell(x)[0][:, -1]), cell=cell(4, 3, batch_first=True, bidirectional=True),
            out=nn.Linear(6, 3),
        ),
        (3, 4),
    )
    for name, cell in {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}.items()
}


def _sharing(layer, other):
    layer.weight = other.weight
    return layer


def _with(model, **parameters):
    for name, value in parameters.items():
        setattr(model, name, nn.Parameter(value))
    return model


def make(name, n=5, seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model = build().double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    classes = model(x).shape[1]
    return model, x, torch.randint(classes, (n,))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_agrees_with_its_definition(name):
    model, x, y = make(name)
    for estimator in DETERMINISTIC:
        expected = brute_force(model, x, y, estimator)
        assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=3), expected) < 1e-10, estimator


@pytest.mark.parametrize("name", ["perceptron", "conv2d", "attention", "torch.func is wrong"])
@pytest.mark.parametrize("estimator", ["sampled", "probe"])
def test_random_estimators_square_the_gradient_of_one_vector(name, estimator):
    model, x, y = make(name)
    model.eval()
    actual = fisher.diagonal(model, (x, y), estimator, generator=torch.Generator().manual_seed(3))
    softmax = fisher._Softmax(model(x).detach(), y, None)
    v = softmax.vector(estimator, torch.Generator().manual_seed(3))
    p = model(x).softmax(1).detach()
    if estimator == "sampled":  # a unit vector minus p
        assert torch.allclose((v + p).max(1).values, torch.ones(len(x), dtype=x.dtype))
        assert torch.allclose((v + p).abs().sum(1), torch.ones(len(x), dtype=x.dtype))
    else:  # a signed sum of the columns of a square root of diag(p) - p p^T
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=p.shape[1])), dtype=x.dtype)
        candidates = signs * p.sqrt()[:, None] - p[:, None] * (signs * p.sqrt()[:, None]).sum(2, keepdim=True)
        assert ((candidates - v[:, None]).norm(dim=2).min(1).values < 1e-12).all()
    expected = {k: torch.zeros_like(q) for k, q in model.named_parameters()}
    for n in range(len(x)):
        grads = torch.autograd.grad(model(x[n : n + 1]), list(model.parameters()), v[n : n + 1])
        for k, g in zip(expected, grads):
            expected[k] += g.square() / len(x)
    assert distance(actual, expected) < 1e-10


@pytest.mark.parametrize("estimator", ["sampled", "probe"])
def test_random_estimators_approach_the_exact_fisher(estimator):
    """The error falls as one over the square root of the number of draws."""
    model, x, y = make("perceptron")
    exact = fisher.diagonal(model, (x, y))
    generator = torch.Generator().manual_seed(1)

    def error(draws):
        many = x.repeat(draws, 1), y.repeat(draws)
        errors = [distance(fisher.diagonal(model, many, estimator, generator=generator), exact) for _ in range(12)]
        return sum(errors) / len(errors)

    few, many = error(50), error(50 * 64)
    assert few < 0.5
    assert 1 / 16 < many / few < 1 / 4  # 1 / 8 expected


def test_probe_has_at_most_twice_the_squared_mean_as_variance():
    torch.manual_seed(0)
    z = 3 * torch.randn(6, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    softmax = fisher._Softmax(z, torch.zeros(6, dtype=torch.long), None)
    g = torch.randn(4, dtype=torch.float64)
    draws = torch.stack([softmax.vector("probe", generator) @ g for _ in range(2000)]).square()
    p = z.softmax(1)
    mean = (p * g**2).sum(1) - (p @ g) ** 2
    assert torch.allclose(draws.mean(0), mean, rtol=0.15)
    assert (draws.var(0) < 2.3 * mean**2).all()


def test_householder_columns_are_a_square_root():
    torch.manual_seed(0)
    z = torch.cat([4 * torch.randn(5, 6, dtype=torch.float64), torch.tensor([[80.0, 0, 0, 0, 0, 1]]).double()])
    columns = fisher._Columns(fisher._Softmax(z, torch.zeros(6, dtype=torch.long), None))
    assert len(columns) == 5
    root = torch.stack(list(columns), 2)
    p = z.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(root @ root.mT, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(columns.weights().sum(1), expected.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-9)
    with pytest.raises(IndexError):
        columns[5]


# ---- inputs that are not vectors of floats --------------------------------------------------------


@pytest.mark.parametrize("estimator", DETERMINISTIC)
@pytest.mark.parametrize("kind", ["tied", "one token", "many tokens", "twice", "counted by frequency"])
def test_embeddings(kind, estimator):
    torch.manual_seed(0)
    if kind == "tied":
        model, classes = tied(), 7
    elif kind == "one token":
        model, classes = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)), 3
    elif kind == "twice":
        model = Lambda(
            lambda m, x: m.out(m.table(x).tanh().sum(1) * m.table(x[:, 0])), table=nn.Embedding(7, 4), out=nn.Linear(4, 3)
        )
        classes = 3
    else:
        table = nn.Embedding(7, 4, padding_idx=2, scale_grad_by_freq=kind == "counted by frequency")
        model, classes = nn.Sequential(table, nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), 3
    model = model.double()
    x = torch.randint(7, (6,) if kind == "one token" else (6, 5))
    if kind == "many tokens":  # no padding where the closed form is rehearsed, and some later
        x[:2], x[2:, 0] = x[:2].clamp(min=3), 2
    y = torch.randint(classes, (6,))
    expected = brute_force(model, x, y, estimator)
    assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=4), expected) < 1e-10


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_several_labels_per_example(estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1)).double()
    x, y = torch.randn(4, 2, 5).double(), torch.randint(3, (4, 5))
    y[1, 3:] = -100  # padding
    y[:, 4] = -100
    expected = brute_force(model, x, y, estimator)
    assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=3), expected) < 1e-10
    if estimator == "exact":
        assert distance(fisher.diagonal(model, (x, y), tolerance=1e-12), expected) < 1e-10
        probe = fisher.diagonal(model, (x.repeat(4000, 1, 1), y.repeat(4000, 1)), "probe")
        assert distance(probe, expected) < 0.1


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_head_chosen_by_task(estimator):
    model, x, y = make("perceptron", n=7)
    model = nn.Sequential(model, nn.Linear(3, 6)).double()
    classes = [4, 1, 5]
    y = torch.tensor(classes)[y]
    expected = brute_force(model, x, y, estimator, classes)
    assert distance(fisher.diagonal(model, (x, y), estimator, classes=classes), expected) < 1e-10
    mask = torch.tensor([False, True, False, False, True, True])
    assert distance(fisher.diagonal(model, (x, y), estimator, classes=mask), expected) < 1e-10


# ---- random architectures --------------------------------------------------------------------------


@st.composite
def architectures(draw):
    """A few layers of the supported kinds on (channels, length), then a linear head."""
    channels, length = draw(st.integers(1, 4)), draw(st.integers(3, 7))
    shape = (channels, length)
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "up", "linear", "layer", "group", "batch", "act", "prelu"]))
        if kind in ("conv", "up"):
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            out = groups * draw(st.integers(1, 2))
            kernel, stride = draw(st.integers(1, min(3, length))), draw(st.integers(1, 2))
            padding = draw(st.integers(0, kernel // 2))
            cls = nn.Conv1d if kind == "conv" else nn.ConvTranspose1d
            layer = cls(channels, out, kernel, stride, padding, groups=groups, bias=draw(st.booleans()))
        elif kind == "linear":
            layer = nn.Linear(length, draw(st.integers(2, 5)), bias=draw(st.booleans()))
        elif kind == "layer":
            layer = nn.LayerNorm(length)
        elif kind == "group":
            layer = nn.GroupNorm(1, channels)
        elif kind == "batch":
            layer = nn.BatchNorm1d(channels)
        elif kind == "prelu":
            layer = nn.PReLU(channels)
        else:
            layer = draw(st.sampled_from([nn.Tanh(), nn.ReLU(inplace=True), nn.GELU()]))
        layers.append(layer)
        channels, length = layer(torch.randn(2, channels, length)).shape[1:]
    classes = draw(st.integers(2, 4))
    return shape, nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * length, classes)), classes


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(architectures(), st.integers(1, 6), st.sampled_from(DETERMINISTIC), st.integers(0, 10**6))
def test_random_architectures(architecture, n, estimator, seed):
    shape, model, classes = architecture
    torch.manual_seed(seed)
    model = model.double()
    x, y = torch.randn(n, *shape).double(), torch.randint(classes, (n,))
    expected = brute_force(model, x, y, estimator)
    actual = fisher.diagonal(model, (x, y), estimator, batch_size=4)
    largest = max(float(v.norm()) for v in expected.values())
    for name in expected:  # a bias before a normalisation has a gradient of rounding errors
        assert float((actual[name] - expected[name]).norm()) <= 1e-10 * float(expected[name].norm()) + 1e-20 * largest


# ---- the model is left as it was ----------------------------------------------------------------


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "hooks": [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()],
        "objects": [id(t) for t in itertools.chain(model.parameters(), model.buffers())],
    }


def assert_same(a, b):
    for part in ("state", "grads"):
        assert a[part].keys() == b[part].keys()
        for k, v in a[part].items():
            assert (v is None and b[part][k] is None) or torch.equal(v, b[part][k])
    for part in ("modes", "trained", "hooks", "objects"):
        assert a[part] == b[part]


class Counter(nn.Module):
    """Counts its calls in buffers, one changed in place and one replaced; may fail at a given call."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("copies", torch.zeros(()))
        self.fail_at = fail_at

    def forward(self, x):
        self.calls += 1
        self.copies = self.copies + 1
        if self.fail_at is not None and self.calls > self.fail_at:
            raise KeyError("boom")
        return x


def busy_model(fail_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), Counter(fail_at), nn.Linear(5, 3))
    model[2].eval()  # modes differ within the model
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones(3, 5)
    return model


@pytest.mark.parametrize("estimator", fisher.ESTIMATORS)
def test_model_comes_back_as_it_was(estimator):
    model = busy_model()
    before = snapshot(model)
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    with torch.no_grad():  # the caller's mode does not matter
        result = fisher.diagonal(model, (x, y), estimator)
    assert_same(before, snapshot(model))
    assert "0.bias" not in result and all(not f.requires_grad for f in result.values())
    if estimator in DETERMINISTIC:  # the hook that doubles an output counts as part of the model
        expected = brute_force(model, x, y, estimator)
        assert distance({k: v.double() for k, v in result.items()}, expected) < 1e-4


@pytest.mark.parametrize("fail_at", [0, 1, 4, 6])
def test_model_comes_back_after_an_exception(fail_at):
    model = busy_model(fail_at)
    before = snapshot(model)
    with pytest.raises((KeyError, ValueError), match="boom"):
        fisher.diagonal(model, (torch.randn(9, 4), torch.randint(3, (9,))), batch_size=2)
    assert_same(before, snapshot(model))


def test_global_hooks_are_part_of_the_model():
    model, x, y = make("perceptron")
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else output
    )
    try:
        expected = brute_force(model, x, y)
        assert distance(fisher.diagonal(model, (x, y)), expected) < 1e-10
    finally:
        handle.remove()


def test_random_numbers_come_from_the_generator():
    model, x, y = make("perceptron", n=50)

    def draw(seed):
        return fisher.diagonal(model, (x, y), "sampled", generator=torch.Generator().manual_seed(seed))

    assert distance(draw(0), draw(0)) == 0
    assert distance(draw(0), draw(1)) > 0
    state = torch.get_rng_state()
    draw(0)
    fisher.diagonal(model, (x, y))
    assert torch.equal(state, torch.get_rng_state())


# ---- precision, tolerance and memory ----------------------------------------------------------------


@pytest.fixture(scope="module")
def well_trained():
    """A network near interpolation: most examples have a probability of nearly one for their label."""
    torch.manual_seed(0)
    means = 3 * torch.randn(5, 12)
    y = torch.randint(5, (300,))
    x = means[y] + torch.randn(300, 12)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
    assert loss < 1e-3
    return model, x, y


@pytest.mark.parametrize("estimator", DETERMINISTIC)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_float32_is_accurate_near_interpolation(well_trained, estimator, scale):
    model, x, y = well_trained
    x = scale * x  # larger inputs: still more certain
    single = fisher.diagonal(model, (x, y), estimator)
    double = fisher.diagonal(copy.deepcopy(model).double(), (x.double(), y), estimator)
    assert all(f.dtype == torch.float32 and torch.isfinite(f).all() for f in single.values())
    if scale == 1.0:
        assert distance({k: v.double() for k, v in single.items()}, double) < 1e-5


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_tolerance_bounds_the_error(well_trained, tolerance):
    model, x, y = well_trained
    exact = fisher.diagonal(model, (x, y))
    short = fisher.diagonal(model, (x, y), tolerance=tolerance)
    trace = sum(float(f.sum()) for f in exact.values())
    missing = 1 - sum(float(f.sum()) for f in short.values()) / trace
    assert 0 < missing < 2 * tolerance
    assert all((short[k] <= exact[k] * (1 + 1e-4) + 1e-12).all() for k in exact)  # what is left out is never negative


def test_tolerance_leaves_out_work(well_trained, monkeypatch):
    model, x, y = well_trained
    rows = []
    add = _layers.Engine.backward
    monkeypatch.setattr(
        _layers.Engine, "backward", lambda self, v: (rows.append(len(self.x) * len(v)), add(self, v))
    )
    fisher.diagonal(model, (x, y), tolerance=1e-2)
    assert sum(rows) < 0.1 * len(x) * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(40, 6), torch.randint(4, (40,))
    expected = fisher.diagonal(model, (x, y))
    actual = fisher.diagonal(copy.deepcopy(model).to(dtype), (x, y))
    assert all(f.dtype == torch.float32 for f in actual.values())
    assert distance(actual, expected) < 0.03


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().size() // t.element_size())
        return out


@pytest.mark.parametrize("kind", ["linear", "sequence", "convolution", "parameter"])
def test_memory_does_not_grow_with_parameters_times_batch(kind, monkeypatch):
    monkeypatch.setattr(_layers, "BUDGET", 2**14)
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3)), torch.randn(64, 300)
    elif kind == "sequence":
        model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Flatten(), nn.Linear(600, 3))
        x = torch.randn(64, 3, 100)
    elif kind == "convolution":
        model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3))
        x = torch.randn(64, 32, 4, 4)
    else:
        model = _with(Lambda(lambda m, x: m.out(x @ m.w), out=nn.Linear(9, 3)), w=torch.randn(2000, 9))
        x = torch.randn(64, 2000)
    y = torch.randint(3, (len(x),))
    largest = max(p.numel() for p in model.parameters())
    with Largest() as mode:
        fisher.diagonal(model, (x, y), batch_size=64)
    # One gradient of the largest parameter and one batch of activations fit; a gradient per example does not.
    assert mode.numbers < max(8 * largest, 2 * 64 * 32 * 4 * 9, 4 * _layers.BUDGET) < 64 * largest


# ---- data -------------------------------------------------------------------------------------------


class Listed(TorchDataset):
    def __init__(self, *pair):
        self.pair = pair

    def __len__(self):
        return len(self.pair[0])

    def __getitem__(self, i):
        return self.pair[0][i], int(self.pair[1][i])


def test_any_form_of_data_gives_the_same():
    model, x, y = make("perceptron", n=11)
    expected = fisher.diagonal(model, (x, y))
    for data in (
        [x, y], TensorDataset(x, y), Listed(x, y), DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        DataLoader(Listed(x, y), batch_size=3), (x, y.to(torch.int32)), (x, torch.zeros(11)),
    ):
        assert distance(fisher.diagonal(model, data), expected) < 1e-12
        assert distance(fisher.diagonal(model, data, tolerance=1e-13), expected) < 1e-9
    assert distance(fisher.diagonal(model, (x.float(), y)), expected) < 1e-5  # cast to the model's precision
    for size in (1, 2, 5, 11, 100):
        assert distance(fisher.diagonal(model, (x, y), batch_size=size), expected) < 1e-12


def test_one_example_suffices():
    model, x, y = make("perceptron", n=1)
    assert distance(fisher.diagonal(model, (x, y)), brute_force(model, x)) < 1e-10


def test_sequences_of_any_length():
    """A loader may pad every batch to a length of its own; each length is rehearsed anew."""
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.out(m.inner(x).tanh().mean(1)), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)).double()
    batches = [(torch.randn(3, length, 4).double(), torch.randint(3, (3,))) for length in (2, 5, 1)]
    loader = DataLoader(batches, batch_size=None)
    expected = [brute_force(model, x, y) for x, y in batches]
    mean = {k: sum(e[k] for e in expected) / 3 for k in expected[0]}
    assert distance(fisher.diagonal(model, loader), mean) < 1e-10


def test_layers_chosen_by_the_data():
    """Each expert sees the examples that are routed to it, a different number in every batch."""

    def forward(m, x):
        right = x[:, 0] > 0
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        h[right] = m.right(x[right])
        h[~right] = m.left(x[~right])
        return m.out(h.tanh())

    torch.manual_seed(0)
    model = Lambda(forward, left=nn.Linear(4, 4), right=nn.Linear(4, 4), out=nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    x[:3, 0] = x[:3, 0].abs()  # the first examples all go right
    x[8:, 0] = -x[8:, 0].abs()
    for estimator in DETERMINISTIC:
        expected = brute_force(model, x, y, estimator)
        for size in (1, 2, 3, 4, 12):
            assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=size), expected) < 1e-10


def test_wrapped_models_keep_plain_names():
    model, x, y = make("perceptron")
    expected = fisher.diagonal(model, (x, y))
    assert distance(fisher.diagonal(nn.DataParallel(model), (x, y)), expected) == 0
    assert distance(fisher.diagonal(torch.compile(model, backend="eager"), (x, y)), expected) == 0


def test_progress_bar_on_a_terminal_only(monkeypatch, capsys):
    model, x, y = make("perceptron")
    fisher.diagonal(model, (x, y))
    assert capsys.readouterr().err == ""


# ---- bad input --------------------------------------------------------------------------------------


def _linear(out=3):
    return nn.Linear(4, out)


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

BAD = {
    "estimator": (lambda: fisher.diagonal(_linear(), (X, Y), "true"), "'exact', 'sampled', 'probe'"),
    "tolerance": (lambda: fisher.diagonal(_linear(), (X, Y), tolerance=1.5), "share of the trace"),
    "tolerance of a probe": (lambda: fisher.diagonal(_linear(), (X, Y), "probe", tolerance=0.1), "exact estimator"),
    "batch size": (lambda: fisher.diagonal(_linear(), (X, Y), batch_size=0), "at least 1"),
    "empty": (lambda: fisher.diagonal(_linear(), (X[:0], Y[:0])), "no example"),
    "empty with tolerance": (lambda: fisher.diagonal(_linear(), (X[:0], Y[:0]), tolerance=0.1), "no example"),
    "lengths": (lambda: fisher.diagonal(_linear(), (X, Y[:4])), "share their first axis"),
    "label too large": (lambda: fisher.diagonal(_linear(), (X, Y + 1)), "between 0 and 2"),
    "label negative": (lambda: fisher.diagonal(_linear(), (X, Y - 1)), "between 0 and 2"),
    "padding without positions": (lambda: fisher.diagonal(_linear(), (X, Y.masked_fill(Y == 0, -100))), "-100 to 2"),
    "real labels": (lambda: fisher.diagonal(_linear(), (X, Y.float()), "empirical"), "integer labels"),
    "label shape": (lambda: fisher.diagonal(_linear(), (X, Y[:, None])), "do not fit logits"),
    "one class": (lambda: fisher.diagonal(_linear(1), (X, 0 * Y)), "at least two classes"),
    "not finite": (lambda: fisher.diagonal(_linear(), (X * math.inf, Y)), "not finite"),
    "no batch axis": (lambda: fisher.diagonal(nn.Sequential(_linear(), nn.Flatten(0)), (X, Y)), "must return logits"),
    "squeezed": (lambda: fisher.diagonal(Lambda(lambda m, x: m.f(x).squeeze(), f=_linear()), (X, Y)), "first axis"),
    "not a tensor": (lambda: fisher.diagonal(Lambda(lambda m, x: (m.f(x),), f=_linear()), (X, Y)), "tuple"),
    "all frozen": (lambda: fisher.diagonal(_linear().requires_grad_(False), (X, Y)), "nothing to measure"),
    "no graph": (
        lambda: fisher.diagonal(Lambda(lambda m, x: torch.no_grad()(m.f)(x), f=_linear()), (X, Y)), "do not depend"
    ),
    "classes repeated": (lambda: fisher.diagonal(_linear(), (X, Y), classes=[0, 0]), "two different indices"),
    "classes out of range": (lambda: fisher.diagonal(_linear(), (X, Y), classes=[0, 3]), "between 0 and 2"),
    "label outside classes": (
        lambda: fisher.diagonal(_linear(), (X, Y), "empirical", classes=[0, 1]), "outside the classes"
    ),
    "max_norm": (
        lambda: fisher.diagonal(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), _linear()), (Y, Y)), "max_norm"
    ),
    "batch statistics": (
        lambda: fisher.diagonal(nn.Sequential(_linear(), nn.BatchNorm1d(3, track_running_stats=False)), (X, Y)),
        "one example alone",
    ),
    "mixed examples": (lambda: fisher.diagonal(Lambda(lambda m, x: m.f(x - x.mean(0)), f=_linear()), (X, Y)), "mixes"),
    "random": (
        lambda: fisher.diagonal(Lambda(lambda m, x: m.f(F.dropout(x, 0.5)), f=_linear()), (X, Y)), "random in eval mode"
    ),
    "no gradient of its own": (
        lambda: fisher.diagonal(Lambda(lambda m, x: m.f(Broken.apply(x @ m.f.weight.T)), f=nn.Linear(4, 4)), (X, Y)),
        "'f.weight'",
    ),
    "overflow": (lambda: fisher.diagonal(_with(Lambda(lambda m, x: x[:, :3] * m.w, f=_linear()), w=torch.ones(3)),
                                         (X.sign() * 1e25, Y), "empirical"), "not finite"),
}


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


@pytest.mark.parametrize("data", [X, "mnist", [(X, Y)], (X, Y, Y), DataLoader(TensorDataset(X), batch_size=2)])
def test_data_of_the_wrong_kind(data):
    with pytest.raises(TypeError, match="data must"):
        fisher.diagonal(_linear(), data)


# ---- other devices, other processes ---------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["perceptron", "conv2d", "attention", "lstm", "group and instance norm"])
def test_cuda_agrees_with_the_cpu(name):
    model, x, y = make(name)
    for estimator in DETERMINISTIC:
        expected = fisher.diagonal(model, (x, y), estimator)
        actual = fisher.diagonal(copy.deepcopy(model).cuda(), (x, y), estimator)
        assert distance({k: v.cpu() for k, v in actual.items()}, expected) < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_convolutions_are_in_full_float32():
    model, x, y = make("conv2d")  # in float64
    expected = fisher.diagonal(model, (x, y))
    actual = fisher.diagonal(copy.deepcopy(model).float().cuda(), (x.float(), y))
    assert distance({k: v.double().cpu() for k, v in actual.items()}, expected) < 1e-5


@pytest.mark.parametrize("how", ["as it was", "TF32, by the new name", "TF32, by the old name"])
def test_precision_is_full_inside_and_comes_back(how):
    seen, kinds = [], (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append([kind.fp32_precision for kind in kinds])
            return super().forward(x)

    if how == "TF32, by the new name":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if how == "TF32, by the old name":
        torch.set_float32_matmul_precision("high")
    try:
        before = torch.backends.cudnn.enabled, [kind.fp32_precision for kind in kinds]
        model, data = Looks(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        fisher.diagonal(model, data)
        with pytest.raises(ValueError, match="not finite"):
            fisher.diagonal(model, (data[0] * torch.inf, data[1]))
        after = torch.backends.cudnn.enabled, [kind.fp32_precision for kind in kinds]
        if how == "TF32, by the old name":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert seen and all(precisions == ["ieee"] * 3 for precisions in seen)
    assert after == before


def test_precision_is_full_under_autocast():
    model, data = nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    expected = fisher.diagonal(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher.diagonal(model, data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_general_setting_of_precision_still_holds_afterwards():
    kind, before = torch.backends.cuda.matmul, torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        inherited = kind.fp32_precision
        fisher.diagonal(nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        assert kind.fp32_precision == inherited
        torch.backends.fp32_precision = "ieee"
        assert kind.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_with_tf32_allowed_is_in_full_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 10)).double()
    x, y = torch.randn(300, 200).double(), torch.randint(10, (300,))
    expected = fisher.diagonal(model, (x, y))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        actual = fisher.diagonal(copy.deepcopy(model).float().cuda(), (x.float(), y))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert distance({k: v.double().cpu() for k, v in actual.items()}, expected) < 1e-5


def _shard(rank, folder, x, y, cuts):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.Linear(4, 3).double()
    model.load_state_dict(torch.load(f"{folder}/model", weights_only=True))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for i, cut in enumerate(cuts):
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        torch.save(fisher.diagonal(wrapped, (x[part], y[part])), f"{folder}/{i}-{rank}")
    try:
        fisher.diagonal(model, (x[:0], y[:0]))
    except ValueError as error:
        assert "no example" in str(error)
        torch.save({}, f"{folder}/empty-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_two_processes_agree_with_one():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(11, 4).double(), torch.randint(3, (11,))
    expected = fisher.diagonal(model, (x, y))
    cuts = [5, 1, 0, 11]  # uneven shards, and empty ones
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), os.path.join(folder, "model"))
        torch.multiprocessing.spawn(_shard, (folder, x, y, cuts), nprocs=2)
        for i in range(len(cuts)):
            a, b = (torch.load(os.path.join(folder, f"{i}-{rank}"), weights_only=True) for rank in (0, 1))
            assert distance(a, expected) < 1e-12 and distance(a, b) == 0
        assert all(os.path.exists(os.path.join(folder, f"empty-{rank}")) for rank in (0, 1))


# ---- the small print --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pair", "dataset", "loader"])
def test_progress_bar_counts_the_examples(form, monkeypatch):
    made, counted = [], []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            made.append(options)
            super().__init__(**options | {"disable": True})

        def update(self, n=1):
            counted.append(n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    model, x, y = make("perceptron", n=11)
    data = {"pair": (x, y), "dataset": TensorDataset(x, y), "loader": DataLoader(TensorDataset(x, y), batch_size=4)}
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        fisher.diagonal(model, data[form], batch_size=3)
        assert made[-1]["disable"] is not terminal
    assert made[-1]["total"] == 11 and sum(counted) == 2 * 11
    assert made[-1]["delay"] >= 3 and made[-1]["leave"] is False  # silent where it would only flash up


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_several_labels_per_example_with_a_head_chosen_by_task(estimator):
    """The padding is no class, in the model's numbering or in that of the head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 5, 1)).double()
    classes = [3, 1]
    x, y = torch.randn(4, 2, 5).double(), torch.tensor(classes)[torch.randint(2, (4, 5))]
    y[1, 3:], y[:, 4] = -100, -100
    expected = brute_force(model, x, y, estimator, classes)
    assert distance(fisher.diagonal(model, (x, y), estimator, classes=classes, batch_size=3), expected) < 1e-10
    if estimator == "empirical":
        y[0, 0] = 2
        with pytest.raises(ValueError, match="outside the classes"):
            fisher.diagonal(model, (x, y), estimator, classes=classes)


def test_targets_that_are_no_labels_do_not_matter_to_the_models_own():
    model, x, y = make("perceptron")
    for estimator in ("exact", "argmax"):
        actual = fisher.diagonal(model, (x, torch.full((len(x),), 7.5)), estimator)
        assert distance(actual, fisher.diagonal(model, (x, y), estimator)) == 0


def test_a_graph_made_before_can_still_be_used():
    """Buffers that did not change are not written to: autograd would refuse them afterwards."""
    model, x, y = make("batch norm")
    model.eval()
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    fisher.diagonal(model, (x, y))
    for g, e in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
        assert torch.equal(g, e)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fisher.diagonal(_linear(), (X, Y), classes=[1]), "two different indices"),
        (lambda: fisher.diagonal(_linear(), (X, Y), classes=[-1, 1]), "between 0 and 2"),
        (lambda: fisher.diagonal(_linear(), (X, Y), classes=[[0, 1], [1, 2]]), "two different indices"),
        (lambda: fisher.diagonal(_linear(), (X, Y), classes=[True, True]), "two different indices"),  # of three
        (lambda: fisher.diagonal(_linear(), (X, Y), classes=[0.0, 1.0]), "two different indices"),
        (lambda: fisher.diagonal(_linear(), (X * math.inf, Y)), "logits are not finite"),
        (lambda: fisher.diagonal(_linear(), (X, torch.tensor(1))), "share their first axis"),
        (lambda: fisher.diagonal(Lambda(lambda m, x: m.f(x)[:, 0], f=_linear()), (X, Y)), "must return logits"),
        (lambda: fisher.diagonal(_linear(), (X, Y), tolerance=1.0), "below 1"),
        (lambda: fisher.diagonal(_linear(), (X, Y), tolerance=-0.1), "at least 0"),
    ],
)
def test_bad_input_at_the_edge_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_labels_on_two_axes(estimator):
    """One label for each pixel, and a border without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    x, y = torch.randn(4, 2, 3, 4).double(), torch.randint(3, (4, 3, 4))
    y[:, 0], y[1, :, 2] = -100, -100
    expected = brute_force(model, x, y, estimator)
    assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=3), expected) < 1e-10
    if estimator == "exact":
        assert distance(fisher.diagonal(model, (x, y), tolerance=1e-12), expected) < 1e-10
    y[y == 0] = 2
    expected = brute_force(model, x, y, estimator, [1, 2])
    mask = torch.tensor([False, True, True])
    assert distance(fisher.diagonal(model, (x, y), estimator, classes=mask), expected) < 1e-10


def test_a_head_of_all_classes_in_any_order_is_no_head():
    model, x, y = make("perceptron")
    for estimator in DETERMINISTIC:
        expected = fisher.diagonal(model, (x, y), estimator)
        for classes in ([0, 1, 2], [2, 0, 1], (1, 2, 0), torch.tensor([2, 1, 0]), torch.ones(3, dtype=torch.bool)):
            assert distance(fisher.diagonal(model, (x, y), estimator, classes=classes), expected) < 1e-12


@pytest.mark.parametrize("small", [1, 42, 84])  # less than one column, one, two
def test_columns_made_a_few_at_a_time_are_the_same(small, monkeypatch):
    model, x, y = make("perceptron", n=7)
    model = nn.Sequential(model, nn.Linear(3, 6)).double()
    expected = fisher.diagonal(model, (x, y))
    monkeypatch.setattr(_layers, "SMALL", small)
    assert distance(fisher.diagonal(model, (x, y)), expected) < 1e-12


def test_the_trace_does_not_count_the_padding():
    torch.manual_seed(0)
    z, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(4, (3, 5))
    y[:, 2:] = -100
    weights = fisher._Columns(fisher._Softmax(z, y, None)).weights()
    p = z.softmax(1)
    assert torch.allclose(weights.sum(1), (1 - p.square().sum(1))[:, :2].sum(1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_of_half_precision_logits_is_computed_in_single(dtype):
    torch.manual_seed(0)
    z = (5 * torch.randn(20, 4)).to(dtype)
    softmax = fisher._Softmax(z, torch.zeros(20, dtype=torch.long), None)
    assert torch.allclose(softmax.log_p.squeeze(2).double(), z.double().log_softmax(1), rtol=1e-5, atol=1e-6)


CLOSED = (
    "perceptron", "without bias", "sequence", "two sequence axes", "positions folded into the batch", "conv1d", "conv2d",
    "conv3d", "one position left", "transposed convolution", "transposed convolutions, 1d and 3d",
    "layer and root-mean-square norm", "group and instance norm", "batch norm", "called twice",
    "convolution called twice", "called with different numbers of positions", "input given by name", "frozen parameters",
    "dropout",
)
VECTORISED = ("attention, positions first", "parameters outside modules", "weight norm", "lstm", "gru", "rnn")


@pytest.mark.parametrize("name", [*CLOSED, *VECTORISED, "embedding"])
def test_the_fast_way_is_taken_where_there_is_one(name, monkeypatch):
    """A closed form that is wrong or refused gives no wrong number, as a slower way stands in: this tells them apart."""
    if name == "embedding":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()
        x, y = torch.randint(7, (5, 5)), torch.randint(3, (5,))
    else:
        model, x, y = make(name)
    slow, rehearsals = [], []

    def watched(method, note):
        original = getattr(_layers.Engine, method)

        def instead(self, names, *rest):
            note(names)
            result = original(self, names, *rest)
            rehearsals.pop() if note == rehearsals.append else None
            return result

        monkeypatch.setattr(_layers.Engine, method, instead)

    watched("_rehearse", rehearsals.append)
    watched("_rehearse_func", rehearsals.append)
    watched("_per_example", lambda names: slow.extend(names if name not in VECTORISED else ()))
    watched("_one_by_one", lambda names: slow.extend(() if rehearsals else names))
    for estimator in DETERMINISTIC:
        fisher.diagonal(model, (x, y), estimator, batch_size=3)
    assert slow == []


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_an_embedding_with_sparse_gradients(estimator):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()
    sparse = copy.deepcopy(dense)
    sparse[0].sparse = True
    x, y = torch.randint(7, (6, 5)), torch.randint(3, (6,))
    assert distance(fisher.diagonal(sparse, (x, y), estimator), brute_force(dense, x, y, estimator)) < 1e-10


@pytest.mark.parametrize("budget", [1, 2**7, 2**10])
@pytest.mark.parametrize("name", ["sequence", "conv2d", "transposed convolution", "called twice", "attention", "lstm"])
def test_the_memory_budget_does_not_change_the_result(name, budget, monkeypatch):
    """Sums that are broken off and taken up again, of examples and of output vectors."""
    monkeypatch.setattr(_layers, "BUDGET", budget)
    model, x, y = make(name)
    for estimator in DETERMINISTIC:
        expected = brute_force(model, x, y, estimator)
        assert distance(fisher.diagonal(model, (x, y), estimator), expected) < 1e-10
        assert distance(fisher.diagonal(model, (x, y), estimator, batch_size=5), expected) < 1e-10


@pytest.mark.parametrize("data", [(torch.tensor(1.0), torch.tensor(1)), DataLoader([])])
def test_data_without_a_length_are_refused_in_words_also_by_the_progress_bar(data):
    with pytest.raises(ValueError, match="share their first axis|hold no example"):
        fisher.diagonal(_linear(), data)


def test_parameters_of_different_precision():
    """What is compared and checked for all the parameters at once is of no common type."""
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.two(self.one(x).tanh().double())

    model, x, y = Mixed(), torch.randn(6, 4), torch.randint(3, (6,))
    diagonal = fisher.diagonal(model, (x, y), "empirical")
    truth = brute_force(copy.deepcopy(model).double(), x.double(), y, "empirical")
    for name, p in model.named_parameters():
        assert diagonal[name].dtype == p.dtype
        torch.testing.assert_close(diagonal[name].double(), truth[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("classes", [None, [0, 2], torch.tensor([0, 2], dtype=torch.uint8)])
def test_labels_and_classes_may_be_bytes(classes):
    """An index of bytes would be a mask to torch."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4).double(), torch.tensor([0, 2] * 4)
    expected = fisher.diagonal(model, (x, y), "empirical", classes=None if classes is None else [0, 2])
    assert distance(fisher.diagonal(model, (x, y.to(torch.uint8)), "empirical", classes=classes), expected) == 0


# ---- modules in two places, batches of one, half precision -------------------------------------------


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return (x @ self.w).tanh()


class TwoNames(nn.Module):
    """One parameter under two names, and both of them used."""

    def __init__(self):
        super().__init__()
        self.w = self.v = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return ((x @ self.w).tanh() @ self.v).tanh()


def small_model(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*[layer() for layer in layers], nn.Linear(4, 3)).double()


def small_data(n=9):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def test_a_module_in_two_places_stays_whole():
    torch.manual_seed(0)
    cell = Cell()
    model, (x, y) = nn.Sequential(cell, cell, nn.Linear(4, 3)).double(), small_data()
    for _ in range(2):
        found = fisher.diagonal(model, (x, y))
        assert type(cell.w) is nn.Parameter
        assert distance(found, brute_force(model, x)) < 1e-10
    F.cross_entropy(model(x), y).backward()
    assert cell.w.grad.norm() > 0


def test_a_parameter_with_two_names():
    model, (x, y) = small_model(TwoNames), small_data()
    assert distance(fisher.diagonal(model, (x, y)), brute_force(model, x)) < 1e-10


def test_a_batch_of_one_proves_nothing_about_the_next():
    """One example laid out position first looks like one laid out example first."""

    def forward(m, x):
        h = m.inner(x.transpose(0, 1).flatten(0, 1)).tanh()
        return m.out(h.unflatten(0, (x.shape[1], -1)).prod(0))

    torch.manual_seed(0)
    model = Lambda(forward, inner=nn.Linear(4, 5), out=nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 3, 4).double(), torch.randint(3, (9,))
    loader = DataLoader(TensorDataset(x, y), batch_sampler=[[0], [1, 2, 3, 4], [5, 6, 7, 8]])
    assert distance(fisher.diagonal(model, loader), brute_force(model, x)) < 1e-10


def test_a_batch_of_one_does_not_hide_that_examples_are_mixed():
    model = small_model()
    mixed = Lambda(lambda m, x: m.model(x + x.mean(0)), model=model)
    loader = DataLoader(TensorDataset(*small_data()), batch_sampler=[[0], [1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(ValueError, match="example"):
        fisher.diagonal(mixed, loader)


def test_half_precision_squares_in_single():
    """Gradients below 2e-4 have squares that half precision rounds to zero."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 4)
    half = nn.Sequential(*layers)
    with torch.no_grad():
        half[-1].bias.copy_(torch.tensor([8.0, 0, 0, 0]))
    half = half.half()
    x, y = torch.randn(8, 1, 4, 4).half(), torch.zeros(8, dtype=torch.int64)
    exact = fisher.diagonal(copy.deepcopy(half).double(), (x.double(), y), "empirical")
    for name, f in fisher.diagonal(half, (x, y), "empirical").items():
        torch.testing.assert_close(f.double().sum(), exact[name].sum(), rtol=0.02, atol=0)


def test_complex_parameters_are_refused():
    model = Lambda(lambda m, x: m.out((x.to(m.w.dtype) @ m.w).real), out=nn.Linear(4, 3))
    model.w = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'w' is complex"):
        fisher.diagonal(model, (torch.randn(5, 4), torch.randint(3, (5,))))


def test_a_batch_of_padding_adds_nothing():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x, y = torch.randn(4, 2, 5).double(), torch.randint(3, (4, 5))
    y[:2] = -100
    for estimator in DETERMINISTIC:
        found = fisher.diagonal(model, (x, y), estimator, batch_size=2)
        half = brute_force(model, x[2:], y[2:], estimator)  # of the examples that have labels
        assert distance(found, {name: f / 2 for name, f in half.items()}) < 1e-10


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_the_old_weight_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = small_data()
    assert distance(fisher.diagonal(model, (x, y)), brute_force(model, x)) < 1e-10


def test_an_empty_parameter_and_an_attribute_called_max_norm():
    model, (x, y) = small_model(Cell), small_data()
    model.nothing, model.max_norm = nn.Parameter(torch.empty(0, dtype=torch.float64)), 1.0
    found = fisher.diagonal(model, (x, y))
    assert found["nothing"].numel() == 0 and found["0.w"].sum() > 0


def test_with_a_tolerance_the_batches_keep_to_the_budget(monkeypatch):
    sizes, forward = [], _layers.Engine.forward
    monkeypatch.setattr(_layers, "BUDGET", 2**12)
    monkeypatch.setattr(_layers.Engine, "forward", lambda self, x: (sizes.append(len(x)), forward(self, x))[1])
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3)), torch.randn(200, 200)
    fisher.diagonal(model, (x, torch.randint(3, (200,))), tolerance=1e-2)
    assert max(sizes) <= 32


def test_a_buffer_made_in_inference_mode():
    def forward(m, x):
        m.seen = m.seen + len(x)
        return m.out(x)

    model, (x, y) = Lambda(forward, out=nn.Linear(4, 3).double()), small_data()
    model.register_buffer("seen", torch.zeros(()))
    with torch.inference_mode():
        model(x)
    before = model.seen
    fisher.diagonal(model, (x, y))
    assert model.seen is before and float(before) == len(x)


def test_data_made_in_inference_mode_are_data():
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = fisher.diagonal(model, (x.clone(), y.clone()))
    assert all(torch.equal(f, expected[name]) for name, f in fisher.diagonal(model, (x, y)).items())


def test_reading_a_dataset_leaves_torch_s_random_numbers_alone():
    class Pairs(TorchDataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.full((4,), float(i)), i % 3

    model, state = nn.Linear(4, 3), torch.get_rng_state()
    fisher.diagonal(model, Pairs())
    assert torch.equal(torch.get_rng_state(), state)


# ---- what hides from a rehearsal ----------------------------------------------------------------


def _unpadded(m, x):
    """Layers run on the tokens alone, as fast implementations of encoders do."""
    real, h = x != 0, m.table(x)
    tokens = h.new_zeros(*x.shape, 5)
    tokens[real] = m.inner(h[real]).tanh()
    return m.out(tokens.sum(1))


def _experts(m, x):
    """Each token goes to one of two experts, by its own first entry."""
    tokens = x.flatten(0, 1)
    chosen, h = (tokens[:, 0] > 0).long(), tokens.new_zeros(len(tokens), 5)
    for k, expert in enumerate((m.one, m.other)):
        h = h.index_add(0, (chosen == k).nonzero().flatten(), expert(tokens[chosen == k]).tanh())
    return m.out(h.unflatten(0, x.shape[:2]).sum(1))


def _pooled(m, x):
    """The tokens that count are packed, and a matrix made from the data sums them up by example."""
    example, place = (x[..., 0] > 0).nonzero(as_tuple=True)
    owner = F.one_hot(example, len(x)).T.to(x)
    return m.out(m.product(owner, m.inner(x[example, place]).tanh()))


def _sorted(m, x):
    """One layer sees the examples twice, once in the order of a key."""
    order = x[:, 1, 0].argsort()
    return m.out(m.inner(x[:, 0]).tanh() + m.inner(x[order, 1]).tanh()[order.argsort()])


def _rows(kind):
    torch.manual_seed(0)
    layers = {"out": nn.Linear(5, 3)}
    if kind == "experts":
        layers |= {"one": nn.Linear(4, 5), "other": nn.Linear(4, 5)}
    else:
        layers |= {"inner": nn.Linear(4, 5)}
    if kind == "unpadded":
        layers["table"] = nn.Embedding(20, 4, padding_idx=0)
        x = torch.zeros(6, 6, dtype=torch.long)
        for row, length in zip(x, (3, 3, 1, 5, 2, 4)):
            row[:length] = torch.randint(1, 20, (length,))
    else:
        x = torch.randn(24, 4, 4, dtype=torch.float64)
    if kind != "unpadded" and kind != "sorted":  # every example has two tokens of each kind, wherever they stand, but for the last
        sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
        x[..., 0] = x[..., 0].abs() * torch.stack([sign[torch.randperm(4)] for _ in x])
        x[2, :, 0], x[3, :, 0] = x[2, :, 0].abs(), -x[3, :, 0].abs()
    if kind == "sorted":
        x[:, 1, 0] = torch.tensor([0.0, 1.0, *torch.randn(22).add(9).tolist()])
    forward = {"unpadded": _unpadded, "experts": _experts, "sorted": _sorted}.get(kind, _pooled)
    model = Lambda(forward, **layers).double()
    model.product = torch.matmul if kind == "pooled" else lambda a, b: torch.einsum("nr,rd->nd", a, b)
    return model, x, torch.randint(3, (len(x),))


@pytest.mark.parametrize("batch_size", [None, 2, 4])
@pytest.mark.parametrize("kind", ["unpadded", "experts", "pooled", "pooled by einsum", "sorted"])
def test_rows_that_the_data_assign_to_the_examples(kind, batch_size):
    """What the shapes of two examples prove does not hold for others, whose rows lie elsewhere."""
    model, x, y = _rows(kind)
    for estimator in ("exact", "empirical"):
        found = fisher.diagonal(model, (x, y), estimator, batch_size=batch_size)
        assert distance(found, brute_force(model, x, y, estimator)) < 1e-10


def test_an_ordinary_network_is_not_tested_for_it(monkeypatch):
    monkeypatch.setattr(_layers.Engine, "_in_order", lambda *_: pytest.fail("not needed"))
    for name in ("perceptron", "conv3d", "attention, positions first", "lstm", "layer and root-mean-square norm"):
        model, x, y = make(name)
        fisher.diagonal(model, (x, y))


def test_prototypes_for_which_torch_func_is_right_with_a_single_vector():
    torch.manual_seed(0)
    model = Lambda(lambda m, x: -torch.cdist(m.body(x), m.prototypes), body=nn.Linear(4, 5))
    model = _with(model, prototypes=torch.randn(3, 5)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    assert distance(fisher.diagonal(model, (x, y)), brute_force(model, x, y)) < 1e-10


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_a_parameter_without_gradient_in_the_rehearsal_is_rehearsed_later(estimator):
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.b(F.prelu(m.a(x), m.slope)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    model = _with(model, slope=torch.rand(5)).double()
    with torch.no_grad():
        model.a.weight.abs_()
        model.a.bias.zero_()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    x[:2].abs_()  # nothing negative for the slope to act on
    found = fisher.diagonal(model, (x, y), estimator, batch_size=2)
    assert distance(found, brute_force(model, x, y, estimator)) < 1e-10


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1, 2)])
def test_a_closed_form_trusted_for_one_shape_leaves_others_to_a_rehearsal(lengths):
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.b(m.act(m.a(x.transpose(0, 1).flatten(0, 1))).unflatten(0, x.shape[1::-1]).mean(0)),
        a=nn.Linear(4, 5), act=nn.PReLU(5), b=nn.Linear(5, 3),
    ).double()
    parts = [(torch.randn(3, t, 4, dtype=torch.float64), torch.randint(3, (3,))) for t in lengths]
    expected = [brute_force(model, x, y, "empirical") for x, y in parts]
    class Parts(TorchDataset):
        def __len__(self):
            return len(parts)

        def __getitem__(self, i):
            return parts[i]

    found = fisher.diagonal(model, DataLoader(Parts(), batch_size=None), "empirical")
    assert distance(found, {n: sum(e[n] for e in expected) / len(parts) for n in found}) < 1e-10


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_a_closed_form_is_not_trusted_for_a_gradient_that_is_small_beside_the_others(dtype, tolerance):
    """The layer runs with the positions before the examples, which its closed form would take for one another."""
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.out(m.inner(x.transpose(0, 1).flatten(0, 1)).tanh().unflatten(0, x.shape[1::-1]).mean(0)),
        inner=nn.Linear(16, 32), out=nn.Linear(32, 10),
    )
    with torch.no_grad():
        model.out.weight *= 0.1 if dtype == torch.bfloat16 else 1e-6
    x, y = torch.randn(8, 8, 16) * 0.3 + torch.randn(8, 1, 16), torch.randint(10, (8,))
    model, x = model.to(dtype), x.to(dtype)
    found = fisher.diagonal(model, (x, y))
    truth = brute_force(model.double(), x.double(), y)
    for name, value in found.items():
        assert (value - truth[name]).norm() < tolerance * truth[name].norm(), name


def test_mixed_examples_are_noticed_though_the_first_two_are_the_same():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    x, y = torch.randn(6, 2, 4, dtype=torch.float64), torch.randint(3, (6,))
    x[1] = x[0]
    with pytest.raises(ValueError, match="mixes the examples"):
        fisher.diagonal(model, (x, y))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_first_layer_that_works_in_place_leaves_the_data_alone(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    x[:2].abs_()
    before, expected = x.clone(), brute_force(nn.Sequential(nn.LeakyReLU(0.5), *model[1:]), x, y)
    for options in ({}, {"tolerance": 1e-12}):
        found = fisher.diagonal(model, (x, y), batch_size=batch_size, **options)
        assert torch.equal(x, before) and distance(found, expected) < 1e-9


def test_unsigned_labels_are_no_padding():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 160, 1).double()
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.full((3, 4), 156)
    for estimator in ("exact", "empirical"):
        expected = fisher.diagonal(model, (x, y), estimator)
        found = fisher.diagonal(model, (x, y.to(torch.uint8)), estimator)
        assert all(torch.equal(found[name], f) and f.any() for name, f in expected.items())


def test_a_model_that_merges_weights_in_eval_mode_stays_unmerged():
    """As adapters of low rank do: their `train` adds the product to the weight, or takes it out again."""

    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
            self.merged = False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.weight.data += (self.B @ self.A).detach() * (-1.0 if mode else 1.0)
                self.merged = not mode
            return self

        def forward(self, x):
            return super().forward(x) + (0 if self.merged else x @ (self.B @ self.A).T)

    torch.manual_seed(0)
    model = Adapted().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    weight = model.weight.detach().clone()
    found = fisher.diagonal(model, (x, y))
    assert torch.equal(model.weight, weight) and model.training and not model.merged
    assert found["A"].any() and found["B"].any()


def test_tensors_that_a_forward_pass_leaves_in_the_model_are_as_before():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
            self.register_buffer("cache", None)
            self.seen = torch.zeros(1)

        def forward(self, x):
            z = self.inner(x) * self.scale
            self.cache, self.seen, self.new = x.sum(), z.detach(), z
            return z

    model, x, y = Remembers(), torch.randn(5, 4), torch.randint(3, (5,))
    seen = model.seen
    fisher.diagonal(model, (x, y))
    assert model.seen is seen and model.cache is None and not hasattr(model, "new")
    copy.deepcopy(model)


def test_autocast_inside_the_model():
    """A layer's input is then of another type than the gradient at its output."""

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.out = nn.Conv1d(2, 3, 2), nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                z = self.out(self.inner(self.conv(x).transpose(1, 2)).tanh().sum(1))
            return z.to(x.dtype)

    torch.manual_seed(0)
    model, x, y = Casts(), torch.randn(6, 2, 5), torch.randint(3, (6,))
    found = fisher.diagonal(model, (x, y))
    truth = brute_force(copy.deepcopy(model).double(), x.double(), y)
    for name, value in found.items():
        assert (value - truth[name]).norm() < 0.1 * truth[name].norm()


def _captured(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    scale = nn.Parameter(torch.rand(5) + 0.5)
    model.register_parameter("scale", scale)
    if kind == "hook":
        model[0].register_forward_hook(lambda module, inputs, output: output * scale)
    else:
        inner = model[0].forward
        model[0].forward = lambda x: inner(x) * scale
    return model.double()


@pytest.mark.parametrize("kind", ["hook", "closure"])
def test_a_parameter_that_is_not_reached_through_its_module(kind):
    """`functional_call` cannot swap it, so torch.func finds that nothing depends on it."""
    torch.manual_seed(0)
    model, x, y = _captured(kind), torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    scale = model.scale  # double() has replaced its contents, not the parameter
    assert distance(fisher.diagonal(model, (x, y)), brute_force(model, x, y)) < 1e-10 and scale is model.scale


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("kind", ["mean", "largest"])
def test_packed_tokens_that_a_mask_shares_out_again(kind, batch_size):
    """Every operation keeps its rows in place; the shapes alone say that rows are tokens."""
    torch.manual_seed(0)

    def forward(m, x):
        example, place = (x > 0).nonzero(as_tuple=True)
        owner = F.one_hot(example, len(x)).T.bool().unsqueeze(-1)
        h = m.inner(m.table(x[example, place])).tanh()
        pooled = (owner * h).sum(1) if kind == "mean" else h.masked_fill(~owner, -2.0).amax(1)
        return m.out(pooled)

    model = Lambda(forward, table=nn.Embedding(20, 4), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)).double()
    lengths = [3, 3, *[2, 4] * 5]
    x = torch.zeros(len(lengths), 6, dtype=torch.long)
    for row, length in zip(x, lengths):
        row[:length] = torch.randint(1, 20, (length,))
    y = torch.randint(3, (len(x),))
    assert distance(fisher.diagonal(model, (x, y), batch_size=batch_size), brute_force(model, x, y)) < 1e-10


@pytest.mark.parametrize("seed", range(20, 24))
def test_two_examples_out_of_order_are_always_told_apart(seed):
    """Also where a logit more or less shifts the random numbers."""
    torch.manual_seed(0)
    model = Lambda(_sorted, inner=nn.Linear(4, 5), out=nn.Linear(5, seed)).double()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    x[:, 1, 0] = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    y = torch.randint(seed, (6,))
    found = fisher.diagonal(model, (x, y), "empirical", batch_size=2)
    parts = [brute_force(model, x[i : i + 2], y[i : i + 2], "empirical") for i in (0, 2, 4)]
    assert distance(found, {n: sum(p[n] for p in parts) / 3 for n in found}) < 1e-10


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_models_and_what_models_hide_in_themselves():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    expected = fisher.diagonal(model, (x, y))
    scripted = torch.jit.script(copy.deepcopy(model)).train()
    assert distance(fisher.diagonal(scripted, (x, y)), expected) < 1e-5 and scripted.training

    object.__setattr__(model, "alias", model[0].weight)  # hidden from named_parameters
    keys = list(model.state_dict())
    for _ in range(2):
        assert list(fisher.diagonal(model, (x, y))) == list(expected)
    assert list(model.state_dict()) == keys


def test_a_cache_that_is_filled_in_the_pass_is_empty_again_with_its_flag():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.length, self.table = nn.Linear(4, 3), 0, None

        def forward(self, x):
            if self.length < x.shape[1]:
                self.length, self.table = x.shape[1], torch.arange(x.shape[1]).to(x).cos()
            return self.inner(x * self.table)

    model, x = Rotary(), torch.randn(6, 4)
    fisher.diagonal(model, (x, torch.randint(3, (6,))))
    assert model.length == 0 and model.table is None
    model(x)


def test_a_model_that_is_random_by_a_switch_of_its_own_is_not_in_eval_mode():
    class Noisy(nn.Linear):
        noise = True

        def train(self, mode=True):
            self.noise = mode
            return super().train(mode)

        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 3) * self.noise

    model, x, y = Noisy(4, 3).train(), torch.randn(6, 4), torch.randint(3, (6,))
    fisher.diagonal(model, (x, y))
    assert model.noise and model.training


def test_a_bias_of_rounding_is_no_reason_for_a_loop(monkeypatch):
    """The mean that a normalisation takes away; a model that keeps its features cannot be copied just so."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv1d(2, 8, 3), nn.GroupNorm(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.features = self.norm(self.conv(x)).tanh()
            return self.out(self.features.mean(2))

    torch.manual_seed(0)
    model, x, y = Keeps(), torch.randn(40, 2, 8), torch.randint(3, (40,))
    looped, one_by_one = [], _layers.Engine._one_by_one

    def counted(self, names, x, *rest):
        looped.append(len(x) if names else 0)
        return one_by_one(self, names, x, *rest)

    monkeypatch.setattr(_layers.Engine, "_one_by_one", counted)
    fisher.diagonal(model, (x, y))
    assert max(looped) <= _layers.REHEARSED


@pytest.mark.parametrize("estimator", DETERMINISTIC)
@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_parameters_change_no_fisher(estimator, fails):
    """Such as those that clip gradients in training: the Fisher information is not of clipped gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
    expected = brute_force(model, x, y, estimator)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    if fails:
        with pytest.raises(ValueError, match="not finite"):
            fisher.diagonal(model, (torch.full_like(x, torch.nan), y), estimator)
    for name, value in fisher.diagonal(model, (x, y), estimator).items():
        torch.testing.assert_close(value, expected[name])
    (100 * F.cross_entropy(model(x), y)).backward()
    assert all(p.grad.abs().max() <= 0.05 for p in model.parameters())


class Mixed(nn.Module):
    """A frozen tower in half precision under a head in single precision, in both orders of registration."""

    def __init__(self, head_first):
        super().__init__()
        if head_first:
            self.head = nn.Linear(5, 3)
        self.tower = nn.Linear(6, 5).bfloat16().requires_grad_(False)
        if not head_first:
            self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.tower(x)).float())


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_data_reach_a_tower_of_another_precision(head_first, dtype):
    torch.manual_seed(0)
    model, x, y = Mixed(head_first), torch.randn(20, 6), torch.randint(3, (20,))
    expected = fisher.diagonal(model.head, (torch.tanh(model.tower(x.bfloat16())).float(), y))
    for name, value in fisher.diagonal(model, (x.to(dtype), y)).items():
        torch.testing.assert_close(value, expected[name.removeprefix("head.")])


def test_data_that_a_model_takes_as_they_are_are_not_rounded():
    """A column of 5000 numbers of customers, in half precision, would name others."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.customer, self.head = nn.Embedding(5000, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.customer(x[:, 0].long()))

    torch.manual_seed(0)
    model, x = Table().bfloat16(), torch.randint(4000, 5000, (20, 1)).float()
    used = fisher.diagonal(model, (x, torch.randint(3, (20,))))["customer.weight"].any(1).nonzero().flatten()
    assert used.tolist() == x[:, 0].long().unique().tolist()


@pytest.mark.parametrize("x", [[0, 3, 7, 3, 1], [2, 2, 5, 2, 1], [4, 4, 4]])
def test_a_square_table_and_categories_without_a_second_axis(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 3)).double()
    x, y = torch.tensor(x), torch.randint(3, (len(x),))
    for name, value in fisher.diagonal(model, (x, y)).items():
        torch.testing.assert_close(value, brute_force(model, x, y)[name])


def test_examples_in_one_pass_follow_the_memory_down_to_two():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)), torch.randn(40, 1, 8, 8)
    found = []
    for budget in (10, 10_000, _layers.BUDGET):
        engine = _layers.Engine(model)
        engine.budget = budget
        found.append(engine.examples_at_once(x))
    assert found[0] == 2 < found[1] < found[2]  # with one alone no mixing of examples would show


def test_one_small_parameter_by_torch_func_keeps_to_the_budget(monkeypatch):
    """What counts is the numbers that an example fills in all the layers, not those of that parameter."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate = nn.Conv2d(1, 4, 3, padding=1), nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return self.gate * self.body(x)

    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.randn(6, 1, 5, 5).double(), torch.randint(4, (6, 5, 5))
    expected, sizes, plain = brute_force(model, x, y), [], _layers.vmap

    def watched(f, *args, **options):
        g = plain(f, *args, **options)

        def call(*inputs):
            if len(inputs) == 3:
                sizes.append(inputs[2].numel())
            return g(*inputs)

        return call

    monkeypatch.setattr(_layers, "BUDGET", 300)
    monkeypatch.setattr(_layers, "vmap", watched)
    for name, value in fisher.diagonal(model, (x, y), batch_size=6).items():
        torch.testing.assert_close(value, expected[name])
    rehearsal = 2 * 3 * 100  # two examples, three vectors
    assert len(sizes) > 20 and max(sizes[1:]) <= 4 * 300 < max(rehearsal, 6 * 75 * 100)


@pytest.mark.parametrize("estimator", fisher.ESTIMATORS)
def test_another_default_device_is_not_used(estimator):
    """The meta device computes nothing: whatever is made there fails here."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 3)), torch.randn(9, 5), torch.randint(3, (9,))
    options = {"generator": torch.Generator().manual_seed(0)}
    expected = fisher.diagonal(model, (x, y), estimator, **options)
    with torch.device("meta"):
        found = fisher.diagonal(model, (x, y), estimator, generator=torch.Generator("cpu").manual_seed(0))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_masked_logits_are_no_error_outside_the_classes():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    torch.manual_seed(0)
    model, x, y = Masked(5, 4).double(), torch.randn(9, 5).double(), torch.tensor([0, 2, 3] * 3)
    found, expected = fisher.diagonal(model, (x, y), classes=[0, 2, 3]), brute_force(model, x, y, classes=[0, 2, 3])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    with pytest.raises(ValueError, match="list the others as classes"):
        fisher.diagonal(model, (x, y))


def test_weights_that_a_layer_keeps_in_bounds_are_handed_back_as_they_were():
    class Bounded(nn.Linear):
        def forward(self, x):
            self.weight.data = self.weight.data.clamp(-0.1, 0.1)
            self.bias.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    torch.manual_seed(0)
    model, x, y = Bounded(5, 3).double(), torch.randn(9, 5).double(), torch.randint(3, (9,))
    before, version = copy.deepcopy(model.state_dict()), model.bias._version
    found = fisher.diagonal(model, (x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.bias._version == version
    for name, value in brute_force(model, x, y).items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("repeats", [30, 900])
def test_a_token_that_comes_very_often_in_half_precision(repeats):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.words(x).mean(1))

    torch.manual_seed(0)
    model, x, y = Pooled().bfloat16(), torch.randint(1, 20, (6, 1000)), torch.randint(4, (6,))
    x[:, :repeats] = 0
    expected = brute_force(copy.deepcopy(model).double(), x, y)["words.weight"][0]
    found = fisher.diagonal(model, (x, y))["words.weight"][0]
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=0.02)


def test_labels_of_dense_prediction_out_of_range_say_how_to_leave_positions_out():
    model, x = nn.Conv1d(2, 3, 1), torch.randn(4, 2, 5)
    with pytest.raises(ValueError, match="or be -100 at positions that do not count"):
        fisher.diagonal(model, (x, torch.full((4, 5), 255)))


def test_large_examples_are_not_mixed_unseen(monkeypatch):
    monkeypatch.setattr(_layers, "BUDGET", 10)
    model = Lambda(lambda self, x: self.layer(x - x.mean(0)), layer=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="mixes the examples"):
        fisher.diagonal(model, (torch.randn(6, 4), torch.randint(3, (6,))))


def test_mixing_shows_beside_masked_classes():
    class Centred(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return (z - z.mean(0)).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    with pytest.raises(ValueError, match="mixes the examples"):
        fisher.diagonal(Centred(4, 3), (torch.randn(6, 4), torch.tensor([0, 2] * 3)), classes=[0, 2])


def test_a_parameter_without_gradients_by_birth_is_refused():
    with torch.inference_mode():
        layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="'0.weight' was made in inference mode"):
        fisher.diagonal(nn.Sequential(layer, nn.Linear(3, 3)), (torch.randn(6, 4), torch.randint(3, (6,))))
