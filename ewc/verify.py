r"""Checks that the book's equations cite: ``exact``, ``close`` and ``sampled``.

Each check names the equation that it verifies. A failed check raises and shows the residual; a passed one prints one
line, which the book records as the equation's proof. Outside the book the same functions work in plain Python.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy as sp

__all__ = ["VerificationError", "close", "exact", "sampled", "show"]


class VerificationError(AssertionError):
    """An equation that does not hold, or could not be shown to hold."""


def exact(label: str, *lines: Any) -> None:
    r"""Prove with SymPy that all lines are equal: :math:`\ell_1 = \ell_2 = \dots`.

    Two lines are an equation's two sides; more are the steps of a derivation, and each is proved equal to the next.
    A proof is a residual that SymPy reduces to 0; numbers are only tried to explain a failure, never as a proof.

    Args:
        label: the equation's label, ``eq-...``.
        lines: SymPy expressions or matrices of one shape; an ``Eq`` stands for its two sides, unless SymPy decides
            at once that it is true or false. Unevaluated sums, integrals and derivatives are evaluated.

    Raises:
        VerificationError: with the first pair of lines that differ and their residual.
        TypeError: a line that is no expression or matrix, or holds a decimal number.
        ValueError: a single line, a ``Piecewise`` that is not defined everywhere, matrices of symbolic, different or
            empty shapes.
    """
    lines = _expand(label, lines)
    for number, (left, right) in enumerate(itertools.pairwise(lines), start=1):
        residual = _residual(label, left, right)
        if residual is not None:
            step = f"line {number} and line {number + 1} differ" if len(lines) > 2 else "the sides differ"
            raise VerificationError(
                f"{label}: {step}.\n  left:     {left}\n  right:    {right}\n  residual: {residual}\n"
                f"  {_spot_check(residual)}"
            )
    count = (
        f"{len(lines)} lines, each proved equal to the next" if len(lines) > 2 else "both sides proved equal"
    )
    _passed(label, "exact", f"{count} by SymPy")


def close(label: str, actual: Any, expected: Any, *, rtol: float, atol: float = 0.0) -> None:
    r"""Verify numerically, in float64, that :math:`|a - e| \le \mathrm{atol} + \mathrm{rtol}\,|e|` for every element.

    Args:
        label: the equation's label, ``eq-...``.
        actual: number, NumPy array, torch tensor, or a dictionary of these (such as a Fisher by parameter name).
        expected: the same from the brute-force computation, of the same shape.
        rtol: relative tolerance, element by element.
        atol: absolute tolerance, for elements whose expected value is 0.

    Raises:
        VerificationError: with the worst element and its residual.
        TypeError: for anything in another precision than float64, complex numbers included.
        ValueError: for different shapes or keys, nothing to compare, whole numbers beyond 2⁵³ (which float64 rounds), or
            a tolerance that is negative or not finite.
    """
    _limited(label, rtol=rtol, atol=atol)
    actual, expected = _float64(label, actual, "actual"), _float64(label, expected, "expected")
    _same_shape(label, actual, expected, "actual", "expected")
    worst = 0.0
    for key, a in actual.items():
        e = expected[key]
        _finite(label, key, a, e)
        difference = np.abs(a - e)
        excess = difference - (atol + rtol * np.abs(e))
        if a.size and excess.max() > 0:
            at = np.unravel_index(excess.argmax(), a.shape)
            raise VerificationError(
                f"{label}: {_element(key, at)} is {a[at]:.17g}, expected {e[at]:.17g}; residual "
                f"{a[at] - e[at]:.3g}, allowed {atol + rtol * abs(e[at]):.3g} (rtol={rtol:g}, atol={atol:g})."
            )
        if rtol:
            size = np.abs(e)
            relative = np.divide(difference, size, out=np.where(difference > 0, np.inf, 0.0), where=size > 0)
            difference = np.minimum(relative, difference / atol * rtol if atol else np.inf)
        worst = max(worst, difference.max(initial=0.0))
    # A power of ten, because the digits of a rounding error differ from machine to machine.
    error = f"below 1e{math.ceil(math.log10(worst))}" if worst > 0 else "0"
    if rtol:
        error = f"relative error {error} (tolerance {rtol:g}" + (f", or {atol:g} absolute)" if atol else ")")
    else:
        error = f"absolute error {error} (tolerance {atol:g})"
    _passed(label, "numeric", f"equal to brute force in float64, {error}")


def sampled(label: str, estimate: Any, expected: Any, *, standard_error: Any, sigmas: float = 4.0) -> None:
    r"""Verify by Monte Carlo that :math:`|\hat e - e| \le k\,\mathrm{SE}` for every element.

    Args:
        label: the equation's label, ``eq-...``.
        estimate: number, array, tensor, or dictionary of these: the mean over the samples.
        expected: the exact value, of the same shape.
        standard_error: the estimate's standard error, of the same shape or one number for all.
        sigmas: how many standard errors, :math:`k`, are allowed.

    Raises:
        VerificationError: with the worst element, in standard errors.
        TypeError: for complex numbers.
        ValueError: for different shapes or keys, nothing to compare, whole numbers beyond 2⁵³, a standard error that is
            negative or 0 everywhere, or a number of sigmas that is negative or not finite.
    """
    _limited(label, sigmas=sigmas)
    estimate = _float64(label, estimate, "estimate", any_precision=True)
    expected = _float64(label, expected, "expected", any_precision=True)
    error = _float64(label, standard_error, "standard_error", any_precision=True)
    if list(error) == [""] and error[""].ndim == 0:
        error = {key: np.broadcast_to(error[""], value.shape) for key, value in estimate.items()}
    _same_shape(label, estimate, expected, "estimate", "expected")
    _same_shape(label, estimate, error, "estimate", "standard_error")
    worst, total_error, total = 0.0, 0.0, 0.0
    for key, a in estimate.items():
        e, se = expected[key], error[key]
        _finite(label, key, a, e, se)
        if (se < 0).any():
            raise ValueError(
                f"{label}: a standard error is negative; pass the standard deviation over sqrt(n)."
            )
        difference = np.abs(a - e)
        z = np.divide(difference, se, out=np.where(difference > 0, np.inf, 0.0), where=se > 0)
        if a.size and z.max() > sigmas:
            at = np.unravel_index(z.argmax(), z.shape)
            raise VerificationError(
                f"{label}: {_element(key, at)} is estimated as {a[at]:.6g}, expected {e[at]:.6g}; residual "
                f"{a[at] - e[at]:.3g} = {z[at]:.1f} standard errors of {se[at]:.3g}, allowed {sigmas:g}."
            )
        worst = max(worst, z.max(initial=0.0))
        total_error, total = total_error + float((se**2).sum()), total + float((e**2).sum())
    if total_error == 0:
        raise ValueError(
            f"{label}: the standard error is 0 everywhere, so sampling proves nothing; use close."
        )
    relative = f", which is {100 * math.sqrt(total_error / total):.2g} % of the value" if total > 0 else ""
    _passed(
        label,
        "sampled",
        f"within {worst:.1f} standard errors (allowed {sigmas:g}) of {_size(error)}{relative}",
    )


def show(label: str, *lines: Any, name: str | None = None) -> None:
    r"""Print the equation ``lines[0] = lines[1] = ...`` *from* the SymPy objects, and prove it with :func:`exact`.

    In the book the output is a numbered display equation with this label, so that text and check cannot drift apart.

    Args:
        label: the equation's label, ``eq-...``.
        lines: as for :func:`exact`; leave sums, integrals and derivatives unevaluated on the left to print them so.
        name: LaTeX of what is computed, printed before the first line, such as ``r"F(\theta)"``.
    """
    parts = [name] * bool(name)
    parts += [sp.latex(line, diff_operator="rd") for line in _expand(label, lines)]
    if len(parts) > 3:
        body = parts[0] + " &= " + " \\\\\n&= ".join(parts[1:])
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    else:
        body = " = ".join(parts)
    _display({"text/markdown": f"$$\n{body}\n$$ ({label})", "text/plain": body})
    exact(label, *lines)


# Proving ----------------------------------------------------------------------------------------------------------


def _expand(label: str, lines: tuple[Any, ...]) -> list[Any]:
    """The lines as SymPy objects, an equation replaced by its two sides."""
    _check_label(label)
    out: list[Any] = []
    for line in lines:
        line = sp.sympify(line)
        for side in [line.lhs, line.rhs] if isinstance(line, sp.Eq) else [line]:
            if not isinstance(side, (sp.Expr, sp.MatrixBase)):  # True could be an Eq, Ne or Gt that SymPy has decided
                raise TypeError(
                    f"{label}: got {side!r}, which is no expression or matrix; pass both sides, not the result of "
                    "comparing them with == or an Eq that SymPy decides at once."
                )
            if side.has(sp.Float):
                raise TypeError(
                    f"{label}: {side} holds a decimal number, which SymPy rounds; write sp.Rational, or use close."
                )
            if any(piece.args[-1].cond != sp.true for piece in side.atoms(sp.Piecewise)):
                raise ValueError(
                    f"{label}: {side} is undefined where no condition holds; end the Piecewise with (..., True)."
                )
            if not all(sp.sympify(n).is_Integer for n in getattr(side, "shape", ())):
                raise ValueError(f"{label}: {side} has the symbolic shape {side.shape}; give it numbers of rows and columns.")
            out.append(side)
    if len(out) < 2:
        raise ValueError(f"{label}: one line is nothing to compare; pass at least two, or an Eq.")
    return out


def _residual(label: str, left: Any, right: Any) -> Any:
    """None if the two sides are proved equal, else what is left of their difference."""
    if getattr(left, "is_Matrix", False) != getattr(right, "is_Matrix", False):
        raise TypeError(f"{label}: one side is a matrix and the other is not: {left} and {right}.")
    if not getattr(left, "is_Matrix", False):
        return _nonzero(left - right)
    left, right = sp.Matrix(left.doit()), sp.Matrix(right.doit())
    if left.shape != right.shape:
        raise ValueError(
            f"{label}: the matrices have shapes {left.shape} and {right.shape}; make them equal."
        )
    if 0 in left.shape:
        raise ValueError(f"{label}: the matrices have no entry, so there is nothing to compare.")
    residual = (left - right).applyfunc(lambda entry: _nonzero(entry) or sp.Integer(0))
    return None if residual.is_zero_matrix else residual


def _nonzero(difference: sp.Expr) -> sp.Expr | None:
    """None if SymPy reduces the difference to 0 by any of its methods, cheapest first; else its simplest form."""
    difference = difference.doit()
    for reduce in (
        sp.expand,
        lambda e: sp.cancel(sp.together(e)),
        sp.simplify,
        sp.trigsimp,
        lambda e: sp.simplify(sp.expand_log(e)),
        lambda e: sp.simplify(sp.expand(e.rewrite(sp.exp), power_exp=True)),
        lambda e: sp.simplify(sp.expand_func(e)),
        lambda e: sp.simplify(sp.piecewise_fold(e)),
    ):
        try:
            if reduce(difference) == 0:
                return None
        except (sp.PolynomialError, NotImplementedError, AttributeError, TypeError):
            continue  # this method does not apply to such an expression
    return sp.simplify(difference)


def _spot_check(residual: Any) -> str:
    """Says whether the residual is wrong at a rational point, or only too hard to reduce."""
    symbols = sorted(residual.free_symbols, key=str)
    point = {}
    for i, symbol in enumerate(symbols):
        value = sp.Integer(i + 2) if symbol.is_integer else sp.Rational(2 * i + 1, 2 * i + 5)
        point[symbol] = -value if symbol.is_negative else value
    try:
        value = sp.simplify(residual.subs(point))
        sizes = [abs(entry) for entry in (value if getattr(value, "is_Matrix", False) else [value])]
        # Not comparable: a number, such as an integral, of which no digit is certain.
        vanishes = all(sp.N(size) < 1e-12 or not size.is_comparable for size in sizes)
    except (TypeError, ValueError, RecursionError):
        return "Give the symbols assumptions (positive=True, integer=True) and try again."
    where = ", ".join(f"{s} = {v}" for s, v in point.items()) or "every point"
    if vanishes:
        return (
            f"It vanishes at {where}, so it may be 0: give the symbols assumptions or add a line in between."
        )
    return f"At {where} it is {value}, so the equation is wrong."


# Arrays -----------------------------------------------------------------------------------------------------------


def _float64(label: str, value: Any, what: str, any_precision: bool = False) -> dict[str, np.ndarray]:
    """A dictionary of float64 arrays; one array has the key ''."""
    _check_label(label)
    items = dict(value) if isinstance(value, Mapping) else {"": value}
    for key, item in items.items():
        name = f"{what}{f'[{key!r}]' if key else ''}"
        dtype = str(getattr(item, "dtype", "")).removeprefix("torch.")
        if hasattr(item, "detach"):  # a torch tensor, without importing torch
            item = item.detach().cpu().to_dense().resolve_conj().resolve_neg()
            item = (item.double() if item.is_floating_point() else item).numpy()  # NumPy has no bfloat16
        array = np.asarray(item)
        dtype = dtype or str(array.dtype)
        if array.dtype.kind in "iu":
            if array.max(initial=0) > 2**53 or array.min(initial=0) < -(2**53):
                raise ValueError(f"{label}: {name} holds a whole number beyond 2⁵³, which float64 rounds; use exact.")
        elif array.dtype.kind != "f" or not (any_precision or dtype == "float64"):
            raise TypeError(
                f"{label}: {name} is {dtype}; compare in float64 "
                "(compute the whole check in double precision, not only its result, and complex numbers part by part)."
            )
        items[key] = array.astype(np.float64, copy=False)
    if not any(array.size for array in items.values()):
        raise ValueError(f"{label}: {what} holds no number, so there is nothing to compare.")
    return items


def _limited(label: str, **limits: float) -> None:
    for name, limit in limits.items():
        if not 0 <= limit < math.inf:
            raise ValueError(f"{label}: {name} is {limit!r}; it must be a finite number, at least 0.")


def _same_shape(label: str, one: dict, other: dict, one_name: str, other_name: str) -> None:
    if one.keys() != other.keys():
        odd = sorted(map(str, one.keys() ^ other.keys()))
        raise ValueError(
            f"{label}: {one_name} and {other_name} do not have the same keys; only in one: {odd}."
        )
    for key, array in one.items():
        if array.shape != other[key].shape:
            raise ValueError(
                f"{label}: {one_name}{f'[{key!r}]' if key else ''} has shape {array.shape} but {other_name} "
                f"has {other[key].shape}; nothing is broadcast, so make them equal."
            )


def _finite(label: str, key: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise VerificationError(f"{label}: {key or 'a value'} is NaN or infinite.")


def _element(key: str, at: tuple[int, ...]) -> str:
    index = f"[{', '.join(map(str, at))}]" if at else ""
    return f"{key}{index}" or "the value"


def _size(error: dict[str, np.ndarray]) -> str:
    largest = max(array.max(initial=0.0) for array in error.values())
    return f"{'at most ' if sum(a.size for a in error.values()) > 1 else ''}{largest:.2g}"


# Reporting --------------------------------------------------------------------------------------------------------


def _check_label(label: str) -> None:
    if not isinstance(label, str) or not re.fullmatch(r"eq-[a-z0-9-]+", label):
        raise ValueError(
            f"{label!r} is not an equation's label; write eq- and lower-case words, as in eq-online."
        )


def _passed(label: str, kind: str, text: str) -> None:
    """One line for the reader; the book's ledger finds it again by its data attributes."""
    page = f'<p class="check" data-label="{label}" data-kind="{kind}">✓ <code>{label}</code>: {html.escape(text)}</p>'
    _display({"text/html": page, "text/plain": f"✓ {label}: {text}"})


def _display(bundle: dict[str, str]) -> None:
    """Show the bundle in a notebook, or print its plain text elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        ipython.display.display(bundle, raw=True)
    else:
        print(bundle["text/plain"])
