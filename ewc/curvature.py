r"""The curvature of a small model's loss, exactly: Hessian, Gauss-Newton matrix and full Fisher matrix.

Everything here is a dense matrix over *all* trainable parameters, computed from its definition with
``torch.func``. It is for looking at and for checking the fast methods; :mod:`ewc.fisher` is for real
networks.

Conventions: the loss is the *mean* cross-entropy of the softmax over the examples; the model runs in eval
mode, without autocast, and comes back as it was; parameters are flattened in the order of
``model.named_parameters()``, frozen ones left out, and :func:`blocks` says which rows and columns belong to which
of them. Shapes: N examples, C classes, P parameters.

Labels are integers, one for each example. What runs the model raises ValueError for a model without trainable
parameters, one that mixes the examples of a batch or is random in eval mode, and logits that are not finite, of a
single class or without a gradient, and TypeError for data of another kind.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from ewc._layers import TOLERANCE, check_differentiable, entrance, places, run_alone
from ewc.fisher import _blocks, _check_estimator, _length, _progress, _untouched, unwrap

__all__ = [
    "blocks",
    "full_fisher",
    "gauss_newton",
    "hessian",
    "jacobian",
    "residual",
    "score_columns",
    "softmax_fisher",
    "vector",
]

MAX_BYTES = 2**31  # the largest matrix that is built: 16,384 parameters in float64
CHUNK_BYTES = 2**28  # the Jacobians held at once


def blocks(model: nn.Module, by: str = "parameter") -> dict[str, slice]:
    r"""Which rows and columns of the matrices of this module belong to which parameter or layer.

    Args:
        model: the network.
        by: ``"parameter"`` (one block per trainable tensor) or ``"layer"`` (weight and bias together).

    Returns:
        name -> slice of ``range(P)``, in the order of the matrices.
    """
    if by not in ("parameter", "layer"):
        raise ValueError(f"Unknown grouping {by!r}: use 'parameter' or 'layer'.")
    found, start = {}, 0
    for name, parameter in _trainable(model).items():
        key = name if by == "parameter" else name.rpartition(".")[0]
        stop = start + parameter.numel()
        found[key] = slice(found[key].start if key in found else start, stop)
        start = stop
    return found


def vector(model: nn.Module, named: dict[str, Tensor]) -> Tensor:
    """A dict of name -> tensor, such as a Fisher diagonal, as one vector (P,) in the matrices' order."""
    missing = [name for name in _trainable(model) if name not in named]
    if missing:
        raise KeyError(f"No value for the parameter {missing[0]!r}: give one tensor per trainable parameter.")
    return torch.cat([named[name].reshape(-1) for name in _trainable(model)])


def softmax_fisher(logits: Tensor) -> Tensor:
    r"""The Fisher matrix of the softmax in its logits, which is also the Hessian of cross-entropy in them.

    :math:`F_f = \operatorname{diag}(p) - p p^\top, \qquad p = \operatorname{softmax}(f)`

    Args:
        logits: (..., C).

    Returns:
        (..., C, C), positive semi-definite, with rows that sum to 0.

    References:
        Martens, *New insights and perspectives on the natural gradient method* (JMLR 2020).

    Implements: eq-softmax-fisher
    """
    p = logits.softmax(-1)
    products = p.unsqueeze(-1) * p.unsqueeze(-2) * (1 - torch.eye(p.shape[-1]).to(p))
    return torch.diag_embed(products.sum(-1)) - products  # near interpolation p - p² would lose its digits


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    r"""The Jacobian of the logits, :math:`J_n = \partial f(x_n) / \partial\theta`: shape (N, C, P).

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        inputs: (N, ...).

    Raises:
        ValueError: the Jacobian would be larger than 2 GiB.
    """
    with _untouched(unwrap(model)):
        theta, logits_of = _flat(model)
        x = entrance(unwrap(model))(inputs)
        logits = _logits(logits_of, theta, x)
        _check_size(logits.numel() * len(theta), theta, f"The Jacobian of {len(x)} examples")
        return _jacobian(logits_of, theta, x)


def hessian(model: nn.Module, data: Dataset | DataLoader | tuple[Tensor, Tensor]) -> Tensor:
    r"""The Hessian of the mean loss, with the data's labels.

    :math:`H = \frac1N \sum_n \nabla^2_\theta\, \ell_n(\theta), \qquad \ell_n = -\log p(y_n \mid x_n, \theta)`

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        data: a dataset, a loader or a pair of tensors (inputs, labels).

    Returns:
        (P, P), symmetric, in general indefinite. At a ReLU's kinks autograd takes one side.

    Raises:
        ValueError: the matrix would be larger than 2 GiB, the data is empty or a label out of range.

    Implements: eq-hessian
    """
    with _untouched(unwrap(model)):
        theta, logits_of, x, y = _prepare(model, data)
        _logits(logits_of, theta, x, y)
        return _second_derivative(lambda t: cross_entropy(logits_of(t, x), y), theta)


def gauss_newton(model: nn.Module, data: Dataset | DataLoader | tuple[Tensor, Tensor]) -> Tensor:
    r"""The generalised Gauss-Newton matrix of the mean loss: the Hessian of a network linearised at θ.

    :math:`\mathrm{GGN} = \frac1N \sum_n J_n^\top \left( \operatorname{diag}(p_n) - p_n p_n^\top \right) J_n`

    The labels cancel: they are checked and not used. For the softmax it equals the Fisher matrix.

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        data: a dataset, a loader or a pair of tensors (inputs, labels).

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises:
        ValueError: the matrix would be larger than 2 GiB, the data is empty or a label out of range.

    References:
        Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent* (2002);
        Martens, *New insights and perspectives on the natural gradient method* (JMLR 2020).

    Implements: eq-ggn
    """
    with _untouched(unwrap(model)):
        theta, logits_of, x, y = _prepare(model, data)
        total = theta.new_zeros(len(theta), len(theta))
        for x_, y_ in _chunks(logits_of, theta, x, y):
            J = _jacobian(logits_of, theta, x_)  # (n, C, P)
            HJ = softmax_fisher(logits_of(theta, x_)) @ J
            total += J.flatten(0, 1).T @ HJ.flatten(0, 1)
        return total / len(x)


def residual(model: nn.Module, data: Dataset | DataLoader | tuple[Tensor, Tensor]) -> Tensor:
    r"""What the Gauss-Newton matrix leaves out of the Hessian: curvature weighed by errors.

    :math:`H - \mathrm{GGN} = \frac1N \sum_n \sum_k (p_{nk} - y_{nk})\, \nabla^2_\theta f_k(x_n)`

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        data: a dataset, a loader or a pair of tensors (inputs, labels).

    Returns:
        (P, P), symmetric. It vanishes where every p equals its label, and within a layer of a ReLU network.

    Raises:
        ValueError: the matrix would be larger than 2 GiB, the data is empty or a label out of range.

    Implements: eq-hessian-split
    """
    with _untouched(unwrap(model)):
        theta, logits_of, x, y = _prepare(model, data)
        p = _logits(logits_of, theta, x, y).softmax(-1)
        error = (p - nn.functional.one_hot(y, p.shape[1])) / len(x)  # held fixed while f is differentiated
        return _second_derivative(lambda t: (error * logits_of(t, x)).sum(), theta)


def full_fisher(
    model: nn.Module,
    data: Dataset | DataLoader | tuple[Tensor, Tensor],
    estimator: str = "exact",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The full Fisher matrix: the mean outer product of the score with itself.

    :math:`F = \frac1N \sum_n \sum_c p_{nc}\, s_{nc} s_{nc}^\top` with
    :math:`s_{nc} = \nabla_\theta \log p(c \mid x_n, \theta)`

    Args:
        model: a network that maps (N, ...) to logits (N, C).
        data: a dataset, a loader or a pair of tensors (inputs, labels).
        estimator: whose labels: ``"exact"`` the model's, all classes weighed by p; ``"sampled"`` one drawn
            from p; ``"probe"`` one random sign per class (unbiased for exact); ``"empirical"`` the data's;
            ``"argmax"`` the most likely class. The same names as in :func:`ewc.fisher.diagonal`.
        generator: the source of randomness of ``"sampled"`` and ``"probe"``.

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises:
        ValueError: an unknown estimator, a matrix larger than 2 GiB, empty data or a label out of range.

    References:
        Kunstner, Balles and Hennig, *Limitations of the empirical Fisher approximation for natural gradient
        descent* (NeurIPS 2019).

    Implements: eq-full-fisher
    """
    with _untouched(unwrap(model)):
        theta, logits_of, x, y = _prepare(model, data)
        total = theta.new_zeros(len(theta), len(theta))
        for x_, y_ in _chunks(logits_of, theta, x, y):
            columns = score_columns(logits_of(theta, x_), y_, estimator, generator=generator)  # (K, n, C)
            J = _jacobian(logits_of, theta, x_)
            for column in columns:
                scores = torch.einsum("nc,ncp->np", column, J)  # each example's √weight · score
                total += scores.T @ scores
        return total / len(x)


def score_columns(
    logits: Tensor, labels: Tensor, estimator: str = "exact", *, generator: torch.Generator | None = None
) -> Tensor:
    r"""The scores in the logits whose outer products make up each estimator's Fisher matrix.

    The score of label c in the logits is :math:`e_c - p`. Each estimator is a set of K columns v with
    :math:`F_f = \sum_k v_k v_k^\top`: :math:`\sqrt{p_c}(e_c - p)` for every class (exact, K = C);
    :math:`e_y - p` for one label y (sampled, empirical, argmax; K = 1);
    :math:`\sum_c \varepsilon_c \sqrt{p_c}(e_c - p)` with signs
    :math:`\varepsilon_c = \pm1` (probe, K = 1).

    Args:
        logits: (N, C).
        labels: (N,) class indices; looked at by ``"empirical"`` only.
        estimator: see :func:`full_fisher`.
        generator: the source of randomness of ``"sampled"`` and ``"probe"``.

    Returns:
        (K, N, C).

    Raises:
        ValueError: an unknown estimator.
    """
    _check_estimator(estimator)
    p = logits.detach().softmax(-1)
    n, classes = p.shape
    place = generator.device if generator is not None else p.device
    if estimator in ("exact", "probe"):
        each = torch.arange(classes, device=p.device).unsqueeze(1).expand(classes, n)
        every = p.T.sqrt().unsqueeze(2) * _label_minus_p(each, p.expand(classes, n, classes))
        if estimator == "exact":
            return every
        signs = torch.randint(0, 2, (classes, n, 1), generator=generator, device=place).to(p) * 2 - 1
        return (signs * every).sum(0, keepdim=True)
    if estimator == "sampled":
        labels = torch.multinomial(p.to(place), 1, generator=generator).squeeze(1).to(p.device)
    elif estimator == "argmax":
        labels = p.argmax(1)
    return _label_minus_p(labels, p).unsqueeze(0)


def _label_minus_p(labels: Tensor, p: Tensor) -> Tensor:
    """e_y - p, with 1 - p_y as the sum of the other p: near interpolation the difference loses its digits."""
    others = p.scatter(-1, labels.unsqueeze(-1), 0.0)
    return (-others).scatter(-1, labels.unsqueeze(-1), others.sum(-1, keepdim=True))


# --- the plumbing -------------------------------------------------------------------------------------------


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def _flat(model: nn.Module):
    """The flat parameter vector θ (P,) and the function (θ, x) -> logits."""
    model = unwrap(model)
    trainable = _trainable(model)
    if not trainable:
        raise ValueError("The model has no trainable parameter: there is nothing to differentiate.")
    theta = torch.cat([p.detach().reshape(-1) for p in trainable.values()])
    where = places(model)

    def logits_of(theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in trainable.values()])
        new = {name: part.reshape(p.shape) for part, (name, p) in zip(parts, trainable.items())}
        tensors = {place: new.get(name, held) for place, (name, held) in where.items()}
        # A copy: some models write into their input.
        return functional_call(model, tensors, (x.clone(),), tie_weights=False)

    def check_weights(x: Tensor) -> None:
        t = theta.clone().requires_grad_()
        logits = check_differentiable(logits_of(t, x))
        v = torch.linspace(1, 2, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
        (found,) = torch.autograd.grad(logits, t, v, allow_unused=True, materialize_grads=True)
        check_reached(found, (model(x.clone()) * v).sum(), list(trainable.values()))

    logits_of.check_weights = check_weights
    return theta, logits_of


def _prepare(model: nn.Module, data):
    """θ, the logits' function, inputs and labels; refuses a (P, P) matrix that is too large."""
    theta, logits_of = _flat(model)
    _check_size(len(theta) ** 2, theta, f"The matrix of {len(theta):,} by {len(theta):,} parameters")
    return theta, logits_of, *collect(data, model)


def _check_size(elements: int, theta: Tensor, what: str) -> None:
    size = elements * theta.element_size()
    if size > MAX_BYTES:
        raise ValueError(
            f"{what} would take {size / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:.1f} GiB allowed "
            "here: use a smaller model or fewer examples, freeze layers, or take ewc.fisher or ewc.kfac."
        )


def batches(data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of a pair of tensors, a dataset or a loader, part by part."""
    with _progress("Curvature", _length(data), "examples") as bar:
        for x, y in _blocks(data):
            for part in zip(x.split(batch_size), y.split(batch_size)):
                yield part
                bar.update(len(part[0]))


def collect(data, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All inputs and labels, as the model takes them."""
    pairs = list(batches(data, 1024))
    if not pairs:
        raise ValueError("The data holds no example: at least one is needed.")
    x, y = (torch.cat(parts) for parts in zip(*pairs))
    x = entrance(unwrap(model))(x)
    return x, whole(y, x)


def whole(y: Tensor, x: Tensor) -> Tensor:
    """Labels as torch's losses and indices want them, on the device of x."""
    if y.is_floating_point():
        raise ValueError("The labels are floating-point numbers: give one integer per example.")
    y = y.to(x.device, torch.int64)
    return y.clone() if y.is_inference() else y  # autograd could not keep it


def _logits(logits_of, theta: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    logits = check(logits_of(theta, x), len(x), y)
    run_alone(lambda one: logits_of(theta, one), x[:1], logits[:1])
    logits_of.check_weights(x[:1])
    return logits


def check(logits: Tensor, examples: int, y: Tensor | None = None) -> Tensor:
    """The logits, if they are finite, (N, C), and the labels, if given, each name one of the C classes."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"The model returned a {type(logits).__name__}: it must return the logits, one tensor.")
    if logits.ndim != 2 or len(logits) != examples:
        raise ValueError(
            f"The model returns shape {tuple(logits.shape)} for {examples} examples: logits (N, C) needed."
        )
    if logits.shape[1] < 2:
        raise ValueError("The model has one output: a softmax needs at least two classes (axis 1 of the logits).")
    if y is not None and (y.ndim != 1 or y.min() < 0 or y.max() >= logits.shape[1]):
        raise ValueError(
            f"Labels of shape {tuple(y.shape)} from {y.min()} to {y.max()} for {logits.shape[1]} classes: "
            f"give one integer from 0 to {logits.shape[1] - 1} per example."
        )
    if not logits.isfinite().all():
        raise ValueError("The model's logits are not finite: check its weights and the scale of the inputs.")
    return logits


def check_reached(found: Tensor, value: Tensor, parameters: list[nn.Parameter]) -> None:
    """Refuses parameters that a hook or closure holds: no other tensor can be put in their place.

    Then ``found``, the flat gradient of ``value`` by what was put there, is not that by the parameters themselves.
    """
    real = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    if not agree(found, torch.cat([g.reshape(-1) for g in real])):
        raise ValueError(
            "Some parameters are reached other than through their modules (does a hook or a closure hold them?), so their "
            "derivatives cannot be taken here; ewc.fisher and EWC can."
        )


def _jacobian(logits_of, theta: Tensor, x: Tensor) -> Tensor:
    """(N, C, P). For some layers torch.func is wrong: two examples are compared with plain autograd, which then stands in."""

    def plain(x_: Tensor) -> Tensor:
        t = theta.detach().requires_grad_()
        logits = logits_of(t, x_.unsqueeze(0)).squeeze(0)
        return torch.stack([torch.autograd.grad(logit, t, retain_graph=True)[0] for logit in logits])

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for fused attention
        try:
            rows = vmap(lambda x_: jacrev(lambda t: logits_of(t, x_.unsqueeze(0)).squeeze(0))(theta))(x)
            if all(agree(rows[n], plain(x[n])) for n in {0, len(x) - 1}):
                return rows
        except RuntimeError:  # what it cannot do, or what the model cannot: autograd says which
            pass
        return torch.stack([plain(x_) for x_ in x])


def agree(found: Tensor, truth: Tensor) -> bool:
    return bool(torch.dist(found, truth) <= TOLERANCE.get(truth.dtype, 0.2) * truth.norm())


def _chunks(logits_of, theta: Tensor, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the data whose Jacobians stay below CHUNK_BYTES."""
    logits = _logits(logits_of, theta, x, y)
    per_example = logits.shape[1] * len(theta) * theta.element_size()
    size = max(1, CHUNK_BYTES // per_example)
    return zip(x.split(size), y.split(size))


def _second_derivative(scalar, theta: Tensor) -> Tensor:
    """The Hessian of a function of θ: row i is the gradient of the i-th entry of its gradient.

    For some layers torch.func is wrong: along one direction it is compared with plain autograd, which then stands in.
    """
    unit = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        t = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(t), t, create_graph=True)

        def plain(v: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a linear function
                return torch.zeros_like(v)
            return torch.autograd.grad(gradient, t, v, retain_graph=True)[0]

        direction = torch.linspace(1, 2, len(theta), dtype=theta.dtype, device=theta.device)
        try:
            _, row = vjp(grad(scalar), theta)
            hessian = vmap(lambda e: row(e)[0], chunk_size=64)(unit)
            if agree(hessian.T @ direction, plain(direction)):
                return hessian
        except RuntimeError:  # what it cannot do
            pass
        return torch.stack([plain(e) for e in unit])
