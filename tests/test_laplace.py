"""Laplace approximations against closed forms, dense grids and autograd."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from ewc import curvature, laplace

F64 = torch.float64


def close(actual, expected, rtol=1e-10, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=rtol, atol=atol
    )


@pytest.fixture
def gaussian():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, dtype=F64, generator=generator)
    root = torch.randn(3, 3, dtype=F64, generator=generator)
    return mean, root @ root.T + torch.eye(3, dtype=F64)


def test_a_gaussian_is_its_own_approximation(gaussian):
    mean, covariance = gaussian
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    q = laplace.fit(lambda t: normal.log_prob(t) + 2.5, torch.zeros(3))
    close(q.mode, mean)
    close(q.precision, torch.linalg.inv(covariance))
    close(q.covariance, covariance)
    close(q.log_evidence, 2.5)
    points = torch.randn(4, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    close(q.log_prob(points), normal.log_prob(points))
    close(q.log_prob(points[0, 0]), normal.log_prob(points[0, 0]))


def test_samples_have_the_mean_and_covariance(gaussian):
    mean, covariance = gaussian
    q = laplace.Laplace(mean, torch.linalg.inv(covariance), torch.tensor(0.0, dtype=F64))
    draws = q.sample(100_000, generator=torch.Generator().manual_seed(2))
    assert draws.shape == (100_000, 3)
    error = covariance.diagonal().sqrt() / 100_000**0.5
    assert ((draws.mean(0) - mean).abs() < 4 * error).all()
    assert ((draws.T.cov() - covariance).norm() < 0.02 * covariance.norm()).all()
    assert torch.equal(draws[:0], q.sample(0))


@pytest.mark.parametrize("a, b", [(2.0, 2.0), (8.0, 4.0), (30.0, 3.5)])
def test_beta_depends_on_the_coordinate(a, b):

    def log_density(t):
        return (a - 1) * t.log() + (b - 1) * (1 - t).log()

    q = laplace.fit(log_density, 0.5)
    close(q.mode, (a - 1) / (a + b - 2))
    close(q.precision, (a + b - 2) ** 3 / ((a - 1) * (b - 1)))
    assert q.mode.shape == q.precision.shape == q.covariance.shape == q.log_evidence.shape == ()
    assert q.sample(7).shape == (7,) and q.log_prob(q.sample(7)).shape == (7,)
    close(q.log_prob(q.mode), 0.5 * (q.precision / (2 * math.pi)).log())
    # in the logit, the density gains the Jacobian θ(1 - θ)
    logit = laplace.fit(lambda u: a * logsigmoid(u) + b * logsigmoid(-u), 0.0)
    close(logit.mode, math.log(a / b), atol=1e-12)
    close(logit.precision, a * b / (a + b))


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (5.0, 2.0), (100.0, 0.1)])
def test_gamma_evidence_in_the_log_rate_is_stirlings_formula(alpha, beta):
    q = laplace.fit(lambda u: alpha * u - beta * u.exp(), 0.0)
    close(q.mode, math.log(alpha / beta), atol=1e-12)
    close(q.precision, alpha)
    stirling = 0.5 * math.log(2 * math.pi / alpha) + alpha * math.log(alpha) - alpha  # log Γ(α)
    close(q.log_evidence, stirling - alpha * math.log(beta), atol=1e-12)
    # the next order: log Γ(α) exceeds Stirling by 1 / (12 α)
    excess = math.lgamma(alpha) - alpha * math.log(beta) - q.log_evidence.item()
    assert abs(excess - 1 / (12 * alpha)) < 1 / (300 * alpha**3)


def test_logistic_regression_against_a_grid():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 2, dtype=F64, generator=generator)
    y = (
        torch.rand(200, dtype=F64, generator=generator) < (x @ torch.tensor([1.0, -0.5], dtype=F64)).sigmoid()
    ).to(F64)

    def log_density(theta):
        logits = x @ theta
        return -binary_cross_entropy_with_logits(logits, y, reduction="sum") - theta.square().sum() / 2

    q = laplace.fit(log_density, torch.zeros(2))
    axis = torch.linspace(-1.5, 1.5, 301, dtype=F64)
    grid = torch.cartesian_prod(q.mode[0] + axis, q.mode[1] + axis)
    logits = grid @ x.T
    log_p = (y * logits - nn.functional.softplus(logits)).sum(1) - grid.square().sum(1) / 2
    log_z = log_p.logsumexp(0) + 2 * math.log(0.01)
    p = (log_p - log_p.logsumexp(0)).exp()
    mean = p @ grid
    covariance = (p[:, None] * (grid - mean)).T @ (grid - mean)
    assert abs(q.log_evidence - log_z) < 0.01
    assert (q.mode - mean).norm() < 0.03
    assert (q.covariance - covariance).norm() < 0.05 * covariance.norm()
    best = grid[log_p.argmax()]
    close(q.mode, best, rtol=0, atol=1e-10)  # the grid is centred on the mode
    s = (x @ q.mode).sigmoid()
    close(q.precision, x.T @ (x * (s * (1 - s))[:, None]) + torch.eye(2, dtype=F64))  # whatever the labels


def test_newton_gets_there_from_afar_and_from_negative_curvature():

    def student(t):  # convex beyond √3 from its centre
        return -2 * (1 + (t - 3).square() / 3).log()

    for start in (-40.0, 0.0, 2.9, 500.0):
        q = laplace.fit(student, start)
        close(q.mode, 3.0)
        close(q.precision, 4 / 3)

    def banana(t):
        return -((1 - t[0]) ** 2) - 100 * (t[1] - t[0] ** 2) ** 2

    close(laplace.fit(banana, torch.tensor([-1.2, 1.0])).mode, [1.0, 1.0])

    def narrow(t):
        return -0.5e16 * (t - 1e-3).square()

    close(laplace.fit(narrow, 0.0).mode, 1e-3)

    def wide(t):
        return -0.5e-12 * (t - 7e5).square()

    close(laplace.fit(wide, 0.0).mode, 7e5)


def test_failures_say_what_happened():
    with pytest.raises(RuntimeError, match="smallest eigenvalue is -2.*no peak"):
        laplace.fit(lambda t: t[0] ** 2 - t[1] ** 2, torch.zeros(2))
    with pytest.raises(RuntimeError, match="smallest eigenvalue is 0.*flat direction"):
        laplace.fit(lambda t: -(t.sum() ** 2), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="No mode after 100 steps.*at infinity"):
        laplace.fit(lambda t: -(-t).exp(), 0.0)
    with pytest.raises(RuntimeError, match="at infinity .separable data"):
        laplace.fit(lambda t: logsigmoid(t) + logsigmoid(2 * t), 0.0)
    with pytest.raises(RuntimeError, match="edge of the support"):
        laplace.fit(lambda t: torch.where(t > 0, -t - t**2, -math.inf), 0.7)
    with pytest.raises(RuntimeError, match=r"no finite derivatives at 0.0 \(step 0\)"):
        laplace.fit(lambda t: -t.abs().sqrt(), 0.0)
    with pytest.raises(ValueError, match="-inf at the start"):
        laplace.fit(lambda t: t.log() - t, 0.0)
    with pytest.raises(ValueError, match=r"returned \(2,\)"):
        laplace.fit(lambda t: -t.square(), torch.zeros(2))
    with pytest.raises(ValueError, match="returned float"):
        laplace.fit(lambda t: 0.0, 1.0)
    for start in (torch.zeros(2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match="a number or a vector"):
            laplace.fit(lambda t: -t.square().sum(), start)


@pytest.mark.parametrize(
    "log_density, start",
    [
        (lambda t: -(t**4), 1.0),
        (lambda t: -1e6 * (t - 2) ** 6, 0.0),
        (lambda t: -(t.abs() ** 2.5), 1.0),
        (lambda t: -(t[0] ** 4) - (t[1] - t[0]) ** 2, torch.tensor([1.0, 2.0])),
    ],
)
def test_a_flat_peak_is_no_gaussian(log_density, start):
    with pytest.raises(RuntimeError, match="is no parabola .flat"):
        laplace.fit(log_density, start)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("quartic", [0.25, 1e4])
def test_a_peak_with_a_little_curvature_is_one(scale, quartic):
    q = laplace.fit(lambda t: -0.5 * (t / scale - 3) ** 2 - quartic * (t / scale - 3) ** 4, 0.0)
    close(q.mode / scale, 3.0)
    close(q.precision * scale**2, 1.0)


def test_fit_works_in_inference_mode():
    with torch.inference_mode():
        q = laplace.fit(lambda t: -((t - 1.0) ** 2).sum(), torch.zeros(2, dtype=F64))
    close(q.mode, torch.ones(2))
    close(q.precision, 2 * torch.eye(2))


@pytest.fixture
def trained():
    """Three clusters and a softmax regression trained to its penalised optimum."""
    generator = torch.Generator().manual_seed(4)
    y = torch.arange(60) % 3
    x = torch.randn(60, 2, dtype=F64, generator=generator) + 1.5 * torch.eye(3, 2, dtype=F64)[y]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3)).double()

    def log_density(theta):
        logits = x @ theta[:6].reshape(3, 2).T + theta[6:]
        return -cross_entropy(logits, y, reduction="sum") - 0.5 * 0.4 * theta.square().sum()

    q = laplace.fit(log_density, torch.zeros(9))
    with torch.no_grad():
        model[0].weight.copy_(q.mode[:6].reshape(3, 2))
        model[0].bias.copy_(q.mode[6:])
    return model, x, y, q


def test_a_networks_posterior_is_fits(trained):
    model, x, y, q = trained
    model.train()
    n = laplace.network(model, (x, y), prior_precision=0.4)
    assert model.training
    close(n.mode, q.mode)
    close(n.precision, q.precision)  # the logits are linear in the weights
    close(
        n.log_evidence, q.log_evidence + 4.5 * math.log(0.4 / (2 * math.pi))
    )  # fit was given no prior's constant


def test_last_layer_by_freezing(trained):
    _, x, y, _ = trained
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    q = laplace.network(model, (x, y), prior_precision=2.0)
    close(q.precision, 60 * curvature.hessian(model, (x, y)) + 2 * torch.eye(18, dtype=F64), atol=1e-10)
    assert laplace.predict(model, q, x).shape == (60, 3)


def test_predictive_against_integration(trained):
    model, x, y, q = trained
    posterior = laplace.network(model, (x, y), prior_precision=0.4)
    inputs = torch.tensor([[0.0, 0.0], [4.0, -3.0], [0.75, 0.75]], dtype=F64)
    draws = q.sample(200_000, generator=torch.Generator().manual_seed(5))
    logits = torch.einsum("nd,scd->snc", inputs, draws[:, :6].reshape(-1, 3, 2)) + draws[:, None, 6:]
    expected = logits.softmax(-1).mean(0)  # softmax regression is linear: nothing to linearise
    sampled = laplace.predict(
        model, posterior, inputs, "sampled", samples=100_000, generator=torch.Generator().manual_seed(6)
    )
    close(sampled, expected, rtol=0, atol=0.005)
    probit = laplace.predict(model, posterior, inputs)
    close(probit.sum(1), torch.ones(3))
    plug_in = model(inputs).softmax(-1)
    assert (probit.max(1).values < plug_in.max(1).values).all()  # averaging can only make it less sure
    assert ((probit - expected).norm(dim=1) < (plug_in - expected).norm(dim=1)).all()
    close(laplace.predict(model, posterior, inputs.float()), probit)


def test_probit_of_two_classes_is_mackays_formula():
    torch.manual_seed(0)
    model, x = nn.Linear(2, 2).double(), torch.randn(9, 2, dtype=F64)
    q = laplace.network(model, (x, torch.zeros(9, dtype=torch.long)))
    J = curvature.jacobian(model, x)
    difference = J[:, 1] - J[:, 0]
    variance = torch.einsum("np,pq,nq->n", difference, q.covariance, difference)
    f = model(x).detach()
    expected = ((f[:, 1] - f[:, 0]) / (1 + math.pi * variance / 8).sqrt()).sigmoid()
    close(laplace.predict(model, q, x)[:, 1], expected)


def test_network_errors(trained):
    model, x, y, _ = trained
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="prior precision is"):
            laplace.network(model, (x, y), tau)
    q = laplace.network(model, (x, y))
    with pytest.raises(ValueError, match="'probit' or 'sampled'"):
        laplace.predict(model, q, x, "exact")
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(ValueError, match="not the posterior's mode"):
        laplace.predict(model, q, x)


def test_a_generator_on_the_cpu_serves_a_mode_elsewhere(monkeypatch):
    """The meta device stands for a second one wherever there is none; it would take a generator of any, CUDA not."""
    randn = torch.randn

    def strict(*size, generator, device, **options):
        assert generator.device == torch.device(device)
        return randn(*size, generator=generator, device=device, **options)

    monkeypatch.setattr(torch, "randn", strict)
    q = laplace.Laplace(torch.zeros(3), torch.eye(3), torch.zeros(()))
    far = laplace.Laplace(*(t.to("meta") for t in (q.mode, q.precision, q.log_density)))
    drawn = far.sample(5, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 3) and drawn.device.type == "meta"
    noise = randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(q.sample(5, generator=torch.Generator().manual_seed(0)), noise.T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_draws_on_a_gpu():
    q = laplace.Laplace(torch.zeros(3), torch.eye(3), torch.zeros(()))
    far = laplace.Laplace(*(t.cuda() for t in (q.mode, q.precision, q.log_density)))
    here, there = (p.sample(5, generator=torch.Generator().manual_seed(0)) for p in (q, far))
    assert there.is_cuda and torch.allclose(here, there.cpu())


def test_points_of_another_dimension_and_no_samples_are_refused(gaussian, trained):
    mean, covariance = gaussian
    q = laplace.Laplace(mean, torch.linalg.inv(covariance), torch.zeros((), dtype=F64))
    for points in (torch.zeros(4, 1, dtype=F64), torch.zeros(2, dtype=F64), torch.zeros((), dtype=F64)):
        with pytest.raises(ValueError, match=r"\(\.\.\., 3\) is needed"):
            q.log_prob(points)
    model, x, _, posterior = trained
    with pytest.raises(ValueError, match="at least one sample"):
        laplace.predict(model, posterior, x, "sampled", samples=0)


def test_the_evidence_of_a_network_that_is_nearly_certain():
    """In float32 as in float64."""
    model, x = nn.Linear(2, 2), torch.tensor([[1.0, 0.3], [1.0, -0.2], [1.1, 0.5]]).repeat(300, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.02, 0.0], [0.0, 0.0]])), model.bias.zero_()
    data = 1e3 * x, torch.zeros(900, dtype=torch.long)
    single, coarse = laplace.network(model, data, 1e-3), laplace.network(model, (1e4 * x / 30, data[1]), 1e-9)
    double = laplace.network(model.double(), data, 1e-3)
    assert abs(single.log_evidence - double.log_evidence) < 1e-3
    with pytest.raises(RuntimeError, match="in torch.float32, is not positive definite"):
        coarse.log_evidence  # noqa: B018


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_refused(kind):
    with pytest.raises(ValueError, match=r"use model.float\(\)"):
        laplace.network(nn.Linear(3, 2).to(kind), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))


def test_a_wrapped_network_is_the_same_network(trained):
    model, x, y, _ = trained
    q = laplace.network(nn.DataParallel(model), (x, y))
    assert torch.equal(q.precision, laplace.network(model, (x, y)).precision)
    assert torch.equal(laplace.predict(nn.DataParallel(model), q, x), laplace.predict(model, q, x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_outside_does_not_matter(mode, trained):
    model, data = nn.Sequential(nn.Linear(2, 3)), (trained[1].float(), trained[2])

    def results(x, y):
        q = laplace.network(model, (x, y))
        seeded = {"samples": 5, "generator": torch.Generator().manual_seed(0)}
        predicted = laplace.predict(model, q, x), laplace.predict(model, q, x, "sampled", **seeded)
        return q.mode, q.precision, q.log_density, *predicted

    expected = results(*data)
    with mode():
        found = results(*(part.clone() for part in data))
    for one, other in zip(found, expected):
        assert torch.equal(one, other) and not one.is_inference()


def test_a_network_that_writes_into_its_input(trained):
    class Centred(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    layer, x, y, _ = trained
    model, before = Centred(layer), x.clone()
    q, expected = laplace.network(model, (x, y)), laplace.network(layer, (x - 0.5, y))
    assert q.log_density == expected.log_density and torch.equal(q.precision, expected.precision)
    assert torch.equal(laplace.predict(model, q, x), laplace.predict(layer, expected, x - 0.5))
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="The model has one output"):
        laplace.network(nn.Linear(2, 1).double(), (x, torch.zeros_like(y)))
