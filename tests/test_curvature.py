"""Dense curvature matrices against plain autograd loops, and the theorems that relate them."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ewc import curvature

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def network(activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3)
    ).double()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (7,), generator=generator)


def gradient(scalar, parameters, keep=False):
    return torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(
                scalar, parameters, create_graph=keep, retain_graph=True, materialize_grads=True
            )
        ]
    )


def brute_hessian(scalar, parameters):
    """One autograd call per row."""
    return torch.stack([gradient(g, parameters) for g in gradient(scalar, parameters, keep=True)])


def brute_fisher(model, x, labels_and_weights):
    """The double loop of the definition: examples, then labels with their weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for i, x_ in enumerate(x):
        log_p = model(x_[None])[0].log_softmax(-1)
        for label, weight in labels_and_weights(i, log_p.exp().detach()):
            score = gradient(log_p[label], parameters)
            total = total + weight * torch.outer(score, score)
    return total / len(x)


def close(actual, expected, rtol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hessian_is_autograds(activation, data):
    model = network(ACTIVATIONS[activation])
    expected = brute_hessian(cross_entropy(model(data[0]), data[1]), list(model.parameters()))
    close(curvature.hessian(model, data), expected)


def test_jacobian_is_a_loop_over_classes(data):
    model = network()
    J = curvature.jacobian(model, data[0])
    assert J.shape == (7, 3, 51)
    for n, logits in enumerate(model(data[0])):
        close(J[n], torch.stack([gradient(f, list(model.parameters())) for f in logits]))


@pytest.mark.parametrize(
    "estimator, labels",
    [
        ("exact", lambda y: lambda i, p: list(enumerate(p))),
        ("empirical", lambda y: lambda i, p: [(y[i], 1.0)]),
        ("argmax", lambda y: lambda i, p: [(p.argmax(), 1.0)]),
    ],
)
def test_full_fisher_is_the_double_loop(estimator, labels, data):
    model = network()
    close(curvature.full_fisher(model, data, estimator), brute_fisher(model, data[0], labels(data[1])))


@pytest.mark.parametrize("estimator", ["sampled", "probe"])
def test_random_estimators_are_unbiased(estimator, data):
    model = network()
    x, y = (part.repeat(2000, *[1] * (part.ndim - 1)) for part in data)  # 2,000 draws of each example at once
    generator = torch.Generator().manual_seed(3)
    estimate = curvature.full_fisher(model, (x, y), estimator, generator=generator)
    exact = curvature.full_fisher(model, data)
    assert not torch.equal(estimate, exact)
    assert (estimate - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("estimator", ["sampled", "probe"])
def test_one_draw_has_rank_one_per_example_and_follows_the_seed(estimator, data):
    model, one = network(), (data[0][:1], data[1][:1])

    def draw(seed):
        return curvature.full_fisher(model, one, estimator, generator=torch.Generator().manual_seed(seed))

    assert torch.linalg.matrix_rank(draw(0)) == 1
    assert torch.equal(draw(0), draw(0))
    assert any(not torch.equal(draw(0), draw(seed)) for seed in range(1, 20))


def test_softmax_fisher_is_the_hessian_in_the_logits(data):
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    F = curvature.softmax_fisher(logits)
    for row, f in zip(logits, F):
        for label in torch.eye(5, dtype=torch.float64):  # whatever the label
            z = row.clone().requires_grad_()
            close(brute_hessian(-(label * z.log_softmax(-1)).sum(), [z]), f)
    assert F.sum(-1).abs().max() < 1e-15


def test_columns_of_the_exact_estimator_square_to_the_softmax_fisher():
    logits = 3 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    columns = curvature.score_columns(logits, torch.zeros(6, dtype=torch.long))
    close(torch.einsum("knc,knd->ncd", columns, columns), curvature.softmax_fisher(logits))


def test_columns_keep_their_digits_near_interpolation():
    logits = torch.tensor([[20.0, 0.0, 1.0]])
    columns = curvature.score_columns(logits, torch.tensor([0]), "empirical")
    torch.testing.assert_close(
        columns[0, 0, 0].item(), 1.0 - logits.double().softmax(-1)[0, 0].item(), rtol=1e-5, atol=0
    )


def test_softmax_fisher_keeps_its_digits_near_interpolation():
    logits = torch.tensor([[20.0, 0.0, 0.0], [0.0, 3.0, 40.0], [60.0, 0.0, -5.0]])
    for found, p in zip(curvature.softmax_fisher(logits), logits.double().softmax(-1)):
        expected = sum(  # p_i p_j (e_i - e_j)(e_i - e_j)ᵀ over the pairs
            p[i] * p[j] * torch.outer(e := torch.eye(3, dtype=p.dtype)[i] - torch.eye(3, dtype=p.dtype)[j], e)
            for i, j in ((0, 1), (0, 2), (1, 2))
        )
        close(found.double(), expected, rtol=1e-6)
        assert torch.linalg.eigvalsh(found.double())[0] >= -1e-7 * expected.max()
    torch.manual_seed(0)
    model, y = nn.Linear(2, 3), torch.zeros(5, dtype=torch.long)
    x = 40 * torch.randn(5, 2)
    single = curvature.gauss_newton(model, (x, y)).double()
    close(single, curvature.gauss_newton(model.double(), (x.double(), y)), rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gauss_newton_is_the_fisher_of_a_softmax_network(activation, data):
    model = network(ACTIVATIONS[activation])
    ggn = curvature.gauss_newton(model, data)
    close(ggn, curvature.full_fisher(model, data))
    assert torch.linalg.eigvalsh(ggn).min() > -1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hessian_minus_gauss_newton_is_the_residual(activation, data):
    model = network(ACTIVATIONS[activation])
    difference = curvature.hessian(model, data) - curvature.gauss_newton(model, data)
    close(curvature.residual(model, data), difference, rtol=1e-11)
    x, y = data  # the double sum of the definition
    expected, parameters = 0, list(model.parameters())
    for x_, y_ in zip(x, y):
        f = model(x_[None])[0]
        error = f.softmax(-1).detach() - nn.functional.one_hot(y_, 3)
        expected = expected + sum(e * brute_hessian(f_k, parameters) for e, f_k in zip(error, f)) / len(x)
    close(difference, expected, rtol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_relu_hessian_and_fisher_agree_within_layers(seed, data):
    """At random weights and random labels, not only at an optimum; the full Hessian is indefinite."""
    model = network(nn.ReLU, seed)
    y = torch.randint(0, 3, (7,), generator=torch.Generator().manual_seed(seed))
    H, F = curvature.hessian(model, (data[0], y)), curvature.full_fisher(model, (data[0], y))
    close(H.diagonal(), F.diagonal())
    for block in curvature.blocks(model, by="layer").values():
        close(H[block, block], F[block, block])
    assert (H - F).abs().max() > 0.01 * F.abs().max()
    assert torch.linalg.eigvalsh(H)[0] < -1e-3


def test_tanh_breaks_the_relu_theorem(data):
    model = network(nn.Tanh)
    H, F = curvature.hessian(model, data), curvature.full_fisher(model, data)
    assert (H.diagonal() - F.diagonal()).abs().max() > 1e-3
    last = curvature.blocks(model, by="layer")["4"]  # logits are affine in the last layer, whatever is below
    close(H[last, last], F[last, last])


def test_weights_shared_across_depth_break_the_relu_theorem(data):
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(3, 3)).double()
    before = list(model.parameters())
    H, F = curvature.hessian(model, data), curvature.full_fisher(model, data)
    assert (H.diagonal() - F.diagonal()).abs().max() > 1e-3
    close(H, brute_hessian(cross_entropy(model(data[0]), data[1]), before))
    assert all(old is new for old, new in zip(before, model.parameters()))


def test_one_tensor_in_two_layers_is_one_block(data):
    model = network()
    model[2].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    model.insert(3, nn.Linear(4, 4).double())
    model[3].weight, model[3].bias = (
        model[2].weight,
        nn.Parameter(model[3].bias.detach(), requires_grad=False),
    )
    assert list(curvature.blocks(model)) == ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight", "5.bias"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    close(curvature.hessian(model, data), brute_hessian(cross_entropy(model(data[0]), data[1]), parameters))
    close(
        curvature.full_fisher(model, data, "empirical"),
        brute_fisher(model, data[0], lambda i, p: [(data[1][i], 1.0)]),
    )


def test_blocks_follow_the_parameters(data):
    model = network()
    model[0].bias.requires_grad_(False)
    names = curvature.blocks(model)
    assert list(names) == ["0.weight", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert (names["0.weight"], names["2.weight"]) == (slice(0, 12), slice(12, 28))
    assert curvature.blocks(model, by="layer") == {"0": slice(0, 12), "2": slice(12, 32), "4": slice(32, 47)}
    diagonal = curvature.full_fisher(model, data).diagonal()
    named = {name: diagonal[part].reshape(model.get_parameter(name).shape) for name, part in names.items()}
    assert torch.equal(curvature.vector(model, named), diagonal)
    with pytest.raises(ValueError, match="'parameter' or 'layer'"):
        curvature.blocks(model, by="row")
    with pytest.raises(KeyError, match="0.weight"):
        curvature.vector(model, {})


def test_frozen_parameters_are_absent_and_the_rest_is_unchanged(data):
    model = network()
    full = curvature.hessian(model, data)
    last = curvature.blocks(model, by="layer")["4"]
    for layer in model[:4]:
        layer.requires_grad_(False)
    close(curvature.hessian(model, data), full[last, last])


def test_data_may_be_a_pair_a_dataset_or_a_loader(data):
    model = network()
    expected = curvature.full_fisher(model, data)
    dataset = TensorDataset(*data)
    close(curvature.full_fisher(model, dataset), expected)
    close(curvature.full_fisher(model, DataLoader(dataset, batch_size=3)), expected)
    close(
        curvature.gauss_newton(model, (data[0].float(), data[1])), expected, rtol=1e-6
    )  # inputs follow the weights


def test_chunks_do_not_change_the_result(data, monkeypatch):
    model = network()
    x, y = (part.repeat(300, *[1] * (part.ndim - 1)) for part in data)
    sizes, whole = [], curvature.full_fisher(model, data)
    jacobian = curvature._jacobian
    monkeypatch.setattr(curvature, "_jacobian", lambda f, t, x_: sizes.append(len(x_)) or jacobian(f, t, x_))
    monkeypatch.setattr(curvature, "CHUNK_BYTES", 3 * 51 * 8 * 1000)
    close(curvature.full_fisher(model, (x, y)), whole)
    assert sizes == [1000, 1000, 100]


def test_the_model_comes_back_as_it_was(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).double()
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for function in (curvature.hessian, curvature.gauss_newton, curvature.full_fisher, curvature.residual):
        matrix = function(model, data)
        assert not matrix.requires_grad and torch.equal(matrix, function(model, data))  # no dropout
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (
        torch.equal(model[0].weight.grad, torch.ones(4, 3, dtype=torch.float64))
        and model[0].bias.grad is None
    )
    with pytest.raises(ValueError):
        curvature.hessian(model, (data[0], data[1] + 3))
    assert model.training and not model[1].training


def test_bad_input_is_named(data):
    x, y = data
    large = nn.Linear(1000, 100)
    with pytest.raises(ValueError, match=r"100,100 by 100,100 parameters would take 37.3 GiB"):
        curvature.hessian(large, (torch.zeros(1, 1000), torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match="Jacobian of 100 examples"):
        curvature.jacobian(large, torch.zeros(100, 1000))
    with pytest.raises(ValueError, match="Unknown estimator 'true'.*'exact', 'sampled', 'probe'"):
        curvature.full_fisher(network(), data, "true")
    with pytest.raises(ValueError, match="at least one is needed"):
        curvature.hessian(network(), (x[:0], y[:0]))
    with pytest.raises(ValueError, match="at least one is needed"):
        curvature.hessian(network(), TensorDataset(x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"Inputs \(7, 3\) and labels \(6,\) must share their first axis"):
        curvature.hessian(network(), (x, y[:6]))
    for label in (-1, 3):
        with pytest.raises(ValueError, match="integer from 0 to 2"):
            curvature.gauss_newton(network(), (x, torch.full_like(y, label)))
    with pytest.raises(ValueError, match=r"\(N, C\) needed"):
        curvature.hessian(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double(), data)
    with pytest.raises(ValueError, match="no trainable parameter"):
        curvature.hessian(network().requires_grad_(False), data)


@pytest.mark.parametrize("function", [curvature.hessian, curvature.gauss_newton, curvature.residual])
def test_data_of_another_kind_are_named(function, data):
    x, y = data
    for wrong in (None, [(x, y)], zip([x], [y]), (x.numpy(), y.numpy()), (x,), TensorDataset(x)):
        with pytest.raises(TypeError, match="data must"):
            function(network(), wrong)
    with pytest.raises(ValueError, match="floating-point"):
        function(network(), (x, y.double()))
    close(function(network(), (x, y.to(torch.uint8))), function(network(), data))


def test_models_without_sound_logits_are_named(data):
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="returned a tuple"):
        curvature.hessian(Two(3, 3).double(), data)
    model = network()
    model[0].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        curvature.gauss_newton(model, data)
    with pytest.raises(ValueError, match="not finite"):
        curvature.jacobian(model, data[0])


class TwoNames(nn.Module):
    """One parameter under two names, and both of them used."""

    def __init__(self):
        super().__init__()
        self.w = self.v = nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(((x @ self.w).tanh() @ self.v).tanh())


def test_a_parameter_with_two_names_counts_at_both():
    torch.manual_seed(0)
    model, x, y = TwoNames().double(), torch.randn(7, 4).double(), torch.randint(3, (7,))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(s, parameters, retain_graph=True)]) for s in slopes]
    torch.testing.assert_close(curvature.hessian(model, (x, y)), torch.stack(rows), rtol=1e-8, atol=1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    with sdpa_kernel(SDPBackend.MATH):
        expected = brute_hessian(cross_entropy(model(x), y), list(model.parameters()))
    H, data = curvature.hessian(model, (x, y)), (x, y)
    close(H, expected, rtol=1e-10)
    close(curvature.residual(model, data), H - curvature.gauss_newton(model, data), rtol=1e-10)


class Mixing(nn.Sequential):
    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0)


class Random(nn.Sequential):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


def normalised(layer):
    return nn.Sequential(layer, nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize("make", [Mixing, Random, normalised])
def test_models_without_curvature_per_example_are_refused(make, data):
    torch.manual_seed(0)
    model = make(nn.Linear(3, 3)).double()
    functions = curvature.hessian, curvature.gauss_newton, curvature.residual, curvature.full_fisher
    for function in (*functions, lambda model, data: curvature.jacobian(model, data[0])):
        with pytest.raises(ValueError, match="one example alone|when it is run alone"):
            function(model, data)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_have_plain_names(wrap, data):
    model = network()
    wrapped, F = wrap(model), curvature.full_fisher(model, data)
    assert curvature.blocks(wrapped) == curvature.blocks(model)
    assert torch.equal(curvature.vector(wrapped, dict(model.named_parameters())), curvature._flat(model)[0])
    assert torch.equal(curvature.full_fisher(wrapped, data), F)


@pytest.mark.parametrize("kind", ["prototypes", "slopes, as many examples as classes", "slopes"])
def test_layers_for_which_torch_func_is_wrong(kind):
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.prototypes = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return -torch.cdist(self.body(x), self.prototypes)

    torch.manual_seed(0)
    slopes = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3))
    model = (Prototypes() if kind == "prototypes" else slopes).double()
    n = 3 if "classes" in kind else 8
    x, y = torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3
    theta = list(model.parameters())

    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients])

    J = torch.stack([
        torch.stack([flat(torch.autograd.grad(z, theta, retain_graph=True)) for z in logits]) for logits in model(x)
    ])
    torch.testing.assert_close(curvature.jacobian(model, x), J)
    p = model(x).softmax(1).detach()
    F = torch.einsum("nci,ncd,ndj->ij", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J) / n
    torch.testing.assert_close(curvature.gauss_newton(model, (x, y)), F)
    torch.testing.assert_close(curvature.full_fisher(model, (x, y)), F)
    first = flat(torch.autograd.grad(nn.functional.cross_entropy(model(x), y), theta, create_graph=True))
    H = torch.stack([flat(torch.autograd.grad(g, theta, retain_graph=True)) for g in first])
    torch.testing.assert_close(curvature.hessian(model, (x, y)), H)


def test_an_operation_without_a_rule_for_torch_func():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad * ctx.saved_tensors[0] ** 2

    class Model(nn.Module):
        def __init__(self, cube):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.cube = nn.Linear(4, 5), nn.Linear(5, 3), cube

        def forward(self, x):
            return self.b(self.cube(self.a(x)))

    model, twin = Model(Cube.apply).double(), Model(lambda x: x**3).double()
    data = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    for quantity in (curvature.hessian, curvature.gauss_newton, curvature.full_fisher, curvature.residual):
        torch.testing.assert_close(quantity(model, data), quantity(twin, data))


def test_a_parameter_that_a_hook_holds_is_refused():
    model, scale = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.Parameter(torch.rand(5) + 0.5)
    model.register_parameter("scale", scale)
    model[0].register_forward_hook(lambda module, inputs, output: output * scale)
    data = torch.randn(6, 4), torch.arange(6) % 3
    for quantity in (curvature.hessian, curvature.gauss_newton, curvature.full_fisher, curvature.residual):
        with pytest.raises(ValueError, match="reached other than through their modules"):
            quantity(model, data)


FUNCTIONS = {
    "hessian": curvature.hessian,
    "gauss_newton": curvature.gauss_newton,
    "residual": curvature.residual,
    "full_fisher": curvature.full_fisher,
    "jacobian": lambda model, data: curvature.jacobian(model, data[0]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_outside_does_not_matter(mode, function, data):
    model, data = network().float(), (data[0].float(), data[1])
    expected = function(model, data)
    with mode():
        found = function(model, tuple(part.clone() for part in data))
    assert torch.equal(found, expected) and not found.is_inference()


class Backbone(nn.Module):
    """A frozen backbone in half precision and a head in single precision."""

    def __init__(self, kind, first):
        super().__init__()
        if first == "head":
            self.head = nn.Linear(5, 3)
        self.backbone = nn.Linear(3, 5).to(kind).requires_grad_(False)
        if first == "backbone":
            self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x)).float())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["backbone", "head"])
def test_a_frozen_backbone_in_half_precision(first, kind, function, data):
    torch.manual_seed(0)
    model, (x, y) = Backbone(kind, first), data
    found = function(model, (x.float(), y))
    assert found.dtype == torch.float32
    close(found, function(model.head, (torch.tanh(model.backbone(x.to(kind))).float(), y)), rtol=1e-2)


def test_the_rounding_of_half_precision_does_not_count_as_mixing():
    """Of a sum in another order, as a batch of another size has it."""
    for kind in (torch.float16, torch.bfloat16):
        curvature.run_alone(lambda x: torch.full((1, 3), 1.01), torch.zeros(1, 4, dtype=kind), torch.ones(1, 3))
    with pytest.raises(ValueError, match="when it is run alone"):
        curvature.run_alone(lambda x: torch.full((1, 3), 1.01), torch.zeros(1, 4), torch.ones(1, 3))


class Overwriting(nn.Sequential):
    """Leaves its mark on its input and on itself."""

    def forward(self, x):
        self.seen = x.sub_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_model_that_writes_into_its_input(function, data):
    layer, (x, y) = network(), data
    model, before = Overwriting(layer), x.clone()
    found = function(model, (x, y))
    assert torch.equal(x, before) and not hasattr(model, "seen")
    close(found, function(layer, (x - 0.5, y)))


class Ungraded(nn.Sequential):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_models_without_a_softmax_or_a_gradient_are_named(function, data):
    with pytest.raises(ValueError, match="The model has one output: a softmax needs at least two classes"):
        function(nn.Linear(3, 1).double(), (data[0], torch.zeros_like(data[1])))
    for model in (Ungraded(network()), nn.Sequential(Ungraded(network()), nn.Softplus())):
        with pytest.raises(ValueError, match=r"do not depend on any parameter .*\(is there a no_grad\?\)"):
            function(model, data)
