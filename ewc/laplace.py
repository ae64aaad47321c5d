r"""The Laplace approximation: a Gaussian at the mode of a density, as wide as the curvature there allows.

:func:`fit` takes any small log density, normalised or not, written with torch operations. :func:`network`
does the same for the weights of a small softmax network (or of its last layer: freeze the rest), and
:func:`predict` asks what the resulting uncertainty means for the classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from ewc import curvature
from ewc._layers import entrance
from ewc.fisher import _untouched, unwrap

__all__ = ["Laplace", "fit", "network", "predict"]

MAX_STEPS = 100
ADVICE = (
    "the peak may lie on the edge of the support or at infinity (separable data, a flat direction), "
    "where there is no Laplace approximation; a proper prior mends the latter."
)


@dataclass(frozen=True)
class Laplace:
    r"""A Gaussian approximation of a density,
    :math:`q(\theta) = \mathcal N(\theta \mid \theta^*, \Lambda^{-1})`.

    A density of one number keeps everything a number (shape ``()``); one of d numbers has vectors (d,).

    Attributes:
        mode: θ*, where the log density is largest.
        precision: Λ, minus the second derivative of the log density at the mode; () or (d, d).
        log_density: the log density at the mode, as it was given, normalised or not.

    Implements: eq-laplace
    """

    mode: Tensor
    precision: Tensor
    log_density: Tensor

    @property
    def covariance(self) -> Tensor:
        r""":math:`\Lambda^{-1}`, of the precision's shape."""
        return torch.cholesky_inverse(self._cholesky()).reshape(self.precision.shape)

    @property
    def log_evidence(self) -> Tensor:
        r"""The log of the density's integral, if the density were the Gaussian that fits its peak.

        :math:`\log Z \approx \log p(\theta^*) + \tfrac d2 \log 2\pi - \tfrac12 \log|\Lambda|`

        References:
            MacKay, *Information Theory, Inference, and Learning Algorithms* (2003), chapter 27.

        Implements: eq-laplace-evidence
        """
        return (
            self.log_density
            + self.mode.numel() / 2 * math.log(2 * math.pi)
            - self._cholesky().diagonal().log().sum()
        )

    def log_prob(self, theta: Tensor) -> Tensor:
        """The Gaussian's own log density at each of the given points: shape (...) for θ of shape (..., d).

        Raises:
            ValueError: points of another number of dimensions d.
        """
        if theta.shape[theta.ndim - self.mode.ndim :] != self.mode.shape:
            raise ValueError(f"The points have shape {tuple(theta.shape)}: (..., {self.mode.numel()}) is needed.")
        lower = self._cholesky()
        scaled = (theta - self.mode).reshape(-1, len(lower)) @ lower
        log_prob = (
            lower.diagonal().log().sum() - len(lower) / 2 * math.log(2 * math.pi) - scaled.square().sum(1) / 2
        )
        return log_prob.reshape(theta.shape[: theta.ndim - self.mode.ndim])

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws from the Gaussian: shape (count, d), or (count,) for a density of one number.

        The numbers are drawn on the generator's device, or the mode's if there is no generator.
        """
        lower = self._cholesky()
        place = generator.device if generator is not None else lower.device
        noise = torch.randn(len(lower), count, dtype=lower.dtype, device=place, generator=generator).to(lower.device)
        deviation = torch.linalg.solve_triangular(lower.T, noise, upper=True).T  # covariance (L Lᵀ)⁻¹
        return self.mode + deviation.reshape(count, *self.mode.shape)

    def _cholesky(self) -> Tensor:
        try:
            return torch.linalg.cholesky(self.precision.reshape(self.mode.numel(), -1))
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"The precision, in {self.precision.dtype}, is not positive definite (by rounding?): "
                "use model.double() or a larger prior precision."
            ) from error


@torch.inference_mode(False)  # autograd records nothing there
def fit(log_density: Callable[[Tensor], Tensor], start: Tensor | float) -> Laplace:
    r"""Finds the mode of a log density and the curvature there.

    Newton's method with backtracking, in float64; directions of negative curvature are turned uphill. It
    stops when a step would move θ by less than a hundred-millionth of the Gaussian's own width.

    Args:
        log_density: maps a float64 tensor of start's shape to a scalar, twice differentiable near the mode,
            with value -inf or NaN outside its support. Constants may be left out, at the price of the
            evidence.
        start: where to begin, inside the support: a number, or a tensor of shape () or (d,).

    Returns:
        The :class:`Laplace` approximation.

    Raises:
        ValueError: the start is not (d,) or lies outside the support, or the function does not return a
            scalar.
        RuntimeError: no mode was reached, or the precision there is not positive definite (names the
            eigenvalue), or still falls or rises with the last step: a flat peak, such as that of -θ⁴.

    References:
        Laplace (1774); MacKay, *A practical Bayesian framework for backpropagation networks* (1992).

    Implements: eq-laplace
    """
    theta = torch.as_tensor(start).detach().to(torch.float64, copy=True)
    if theta.ndim > 1 or theta.numel() == 0:
        raise ValueError(f"The start has shape {tuple(theta.shape)}: give a number or a vector.")
    value = log_density(theta)
    if not isinstance(value, Tensor) or value.ndim != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"The log density returned {shape}: it must return a tensor of shape ().")
    if not value.isfinite():
        raise ValueError(f"The log density is {value.item()} at the start: begin inside its support.")

    for step in range(MAX_STEPS):
        slope, precision = _derivatives(log_density, theta, step)
        direction, gain = _newton(slope, precision)
        small = direction.norm() <= 1e-6 * (1 + theta.norm())
        if gain <= 1e-16 and small:
            theta, last = theta + direction, precision
            _, precision = _derivatives(log_density, theta, step)
            return Laplace(theta, _positive_definite(precision, last, theta), log_density(theta))
        # So close to the mode the density is flat to rounding: there, Newton's own step is the best judge.
        theta = (
            theta + direction if gain <= 1e-8 and small else _climb(log_density, theta, direction, gain, step)
        )
    raise RuntimeError(f"No mode after {MAX_STEPS} steps, now at {theta.tolist()}: {ADVICE}")


def _derivatives(log_density, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
    slope, precision = jacobian(log_density, theta), -hessian(log_density, theta)
    if not (slope.isfinite().all() and precision.isfinite().all()):
        raise RuntimeError(f"The log density has no finite derivatives at {theta.tolist()} (step {step}).")
    return slope, precision


def _newton(slope: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step, uphill even where the curvature is negative, and slope · step."""
    eigenvalues, vectors = torch.linalg.eigh(precision.reshape(slope.numel(), -1))
    size = eigenvalues.abs()
    size = size.clamp(min=1e-12 * size.max().item() + 1e-300)
    direction = (vectors @ (vectors.T @ slope.reshape(-1) / size)).reshape(slope.shape)
    return direction, (slope * direction).sum()


def _climb(log_density, theta: Tensor, direction: Tensor, gain: Tensor, step: int) -> Tensor:
    """The first of θ + d, θ + d/2, θ + d/4, … that rises by at least a little of what the slope promises."""
    value, fraction = log_density(theta), 1.0
    while fraction > 1e-12:
        candidate = theta + fraction * direction
        if log_density(candidate) >= value + 1e-4 * fraction * gain:  # False for NaN and -inf
            return candidate
        fraction /= 2
    raise RuntimeError(
        f"Stuck after {step} steps at {theta.tolist()}, where the density still rises: {ADVICE}"
    )


def _positive_definite(precision: Tensor, last: Tensor, theta: Tensor) -> Tensor:
    """The precision, if it is one, and was the same before the last small step."""
    now, before = (torch.linalg.eigvalsh(matrix.reshape(theta.numel(), -1)) for matrix in (precision, last))
    if now[0] <= 1e-12 * now.abs().max():
        raise RuntimeError(
            f"The precision at {theta.tolist()} is not positive definite: its smallest eigenvalue is "
            f"{now[0]:.3g}, so this is no peak. Start elsewhere, or add a prior to a flat direction."
        )
    moved = (now - before).abs() > 0.01 * now
    if moved.any():
        raise RuntimeError(
            f"The peak at {theta.tolist()} is no parabola (flat, like that of -θ⁴?): with the last small step an "
            f"eigenvalue of the precision went from {before[moved][0]:.3g} to {now[moved][0]:.3g}, so there is no "
            "Gaussian. Add a prior to a flat direction."
        )
    return precision


@torch.inference_mode(False)  # what is made in that mode serves nobody outside it
def network(
    model: nn.Module, data: Dataset | DataLoader | tuple[Tensor, Tensor], prior_precision: float = 1.0
) -> Laplace:
    r"""The Laplace approximation of the posterior over a small softmax network's trainable weights.

    Prior :math:`\mathcal N(0, \tau^{-1} I)`, likelihood :math:`\prod_n p(y_n \mid x_n, \theta)`. The model's
    present weights are taken as the mode, so train it first, with weight decay :math:`\tau / N` on the mean
    loss. The precision is :math:`\Lambda = N \cdot \mathrm{GGN} + \tau I`, where the Gauss-Newton matrix,
    equal to the Fisher matrix, stands in for the Hessian so that Λ is positive definite. Freeze all but the
    last layer for a last-layer approximation, for which the Gauss-Newton matrix *is* the Hessian.

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        data: a dataset, a loader or a pair of tensors (inputs, labels).
        prior_precision: τ, one over the prior variance of each weight.

    Raises:
        ValueError: τ is not positive and finite, weights of half precision, or what
            :func:`ewc.curvature.gauss_newton` raises.

    References:
        Daxberger et al., *Laplace Redux* (NeurIPS 2021).

    Implements: eq-laplace
    """
    if not 0 < prior_precision < math.inf:
        raise ValueError(f"The prior precision is {prior_precision}: it must be a positive number.")
    model = unwrap(model)
    for name, p in model.named_parameters():
        if p.is_floating_point() and torch.finfo(p.dtype).bits < 32:
            raise ValueError(f"Parameter {name!r} is {p.dtype}: a Gaussian needs more digits; use model.float().")
    ggn = curvature.gauss_newton(model, data)
    mode = curvature.vector(model, dict(model.named_parameters())).detach()
    with _untouched(model), torch.no_grad():
        x, y = curvature.collect(data, model)
        log_likelihood = -cross_entropy(model(x.clone()), y, reduction="sum")
    log_prior = (
        math.log(prior_precision / (2 * math.pi)) * len(mode) - prior_precision * mode.square().sum()
    ) / 2
    precision = len(x) * ggn + prior_precision * torch.eye(len(mode)).to(ggn)
    return Laplace(mode, precision, log_likelihood + log_prior)


def predict(
    model: nn.Module,
    posterior: Laplace,
    inputs: Tensor,
    method: str = "probit",
    *,
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Class probabilities averaged over the posterior, with the network linearised at the mode.

    Under a Gaussian over weights the linearised logits are Gaussian,
    :math:`f \sim \mathcal N(f^*, J \Lambda^{-1} J^\top)`.

    Args:
        model: the network, with the weights at which the posterior was taken.
        posterior: the result of :func:`network`.
        inputs: (N, ...).
        method: ``"probit"``, a closed form that replaces each pair of classes by MacKay's binary formula and
            normalises, :math:`p_k \propto 1 / \sum_j \exp((f_j - f_k) / \sqrt{1 + \pi v_{kj} / 8})`, with
            :math:`v_{kj}` the variance of :math:`f_k - f_j`; or ``"sampled"``, the mean softmax of the
            linearised logits under drawn weights, right as samples grow.
        samples: number of draws for ``"sampled"``.
        generator: the source of randomness for ``"sampled"``.

    Returns:
        (N, C), rows that sum to 1.

    Raises:
        ValueError: an unknown method, no samples, or the model's weights are not the posterior's mode.

    References:
        MacKay, *The evidence framework applied to classification networks* (1992); Lu, Ie and Sha,
        *Mean-field approximation to Gaussian-softmax integral with application to uncertainty estimation*
        (2020); Immer, Korzepa and Bauer, *Improving predictions of Bayesian neural nets via local
        linearization* (AISTATS 2021).

    Implements: eq-logistic-predictive, eq-logistic-predictive-probit
    """
    model = unwrap(model)
    weights = curvature.vector(model, dict(model.named_parameters())).detach()
    if not torch.equal(weights, posterior.mode):
        raise ValueError(
            "The model's trainable weights are not the posterior's mode: load or train them first."
        )
    with _untouched(model), torch.no_grad():  # the products, too, in full precision
        J = curvature.jacobian(model, inputs)
        logits = model(entrance(model)(inputs).clone())
        if method == "probit":
            covariance = J @ posterior.covariance @ J.mT
            variance = covariance.diagonal(dim1=1, dim2=2)
            between = variance.unsqueeze(2) + variance.unsqueeze(1) - 2 * covariance
            gaps = (logits.unsqueeze(1) - logits.unsqueeze(2)) / (1 + math.pi / 8 * between).sqrt()
            return (-gaps.logsumexp(2)).softmax(-1)
        if method == "sampled":
            if samples < 1:
                raise ValueError(f"The mean needs at least one sample; got samples={samples!r}.")
            deviation = posterior.sample(samples, generator=generator) - posterior.mode
            return (logits + torch.einsum("ncp,sp->snc", J, deviation)).softmax(-1).mean(0)
    raise ValueError(f"Unknown method {method!r}: use 'probit' or 'sampled'.")
