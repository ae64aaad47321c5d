"""The checks that equations cite: each accepts what is true and refuses what is not, and says why."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
import torch

from ewc import verify
from ewc.verify import VerificationError

X, Y = sp.symbols("x y", real=True)
P = sp.symbols("p", positive=True)
N = sp.symbols("n", integer=True, positive=True)
LOGITS = sp.symbols("f0:3", real=True)
SOFTMAX = [sp.exp(f) / sum(map(sp.exp, LOGITS)) for f in LOGITS]
ONE = sp.Sum(N**-N, (N, 1, sp.oo)) - sp.Sum(N**-N, (N, 2, sp.oo))  # which SymPy does not find


@pytest.mark.parametrize(
    "lines",
    [
        ((X + 1) ** 2, X**2 + 2 * X + 1),
        (sp.Eq(sp.sin(X) ** 2, 1 - sp.cos(X) ** 2),),
        (sp.Matrix(sp.MatrixSymbol("A", 2, 2)).T, sp.MatrixSymbol("A", 2, 2).T),
        (sp.Piecewise((X, X > 0), (-X, X <= 0)) + sp.Piecewise((-X, X > 0), (X, True)), 0),
        (sp.tanh(X), (sp.exp(2 * X) - 1) / (sp.exp(2 * X) + 1), 1 - 2 / (sp.exp(2 * X) + 1)),
        (sp.log(P * (1 + P)), sp.log(P) + sp.log(1 + P)),
        (sp.gamma(P + 1), P * sp.gamma(P)),
        (sp.Sum(X, (X, 1, N)), N * (N + 1) / 2),
        (sp.Integral(sp.exp(-(X**2) / (2 * P**2)), (X, -sp.oo, sp.oo)), sp.sqrt(2 * sp.pi) * P),
        (sp.Derivative(sp.log(P), P), 1 / P),
        (sp.Matrix([[X, 1]]) * sp.Matrix([1, Y]), sp.Matrix([X + Y])),
        (sp.Matrix(SOFTMAX).jacobian(LOGITS), sp.diag(*SOFTMAX) - sp.Matrix(SOFTMAX) * sp.Matrix(SOFTMAX).T),
        (0, X - X, sp.Integer(0)),
    ],
)
def test_exact_proves_what_is_equal(lines, capsys):
    verify.exact("eq-true", *lines)
    assert capsys.readouterr().out.startswith("✓ eq-true: ")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (((X + 1) ** 2, X**2 - 2 * X + 1), r"the sides differ(.|\n)*residual: 4\*x\n.*At x = 1/5 it is 4/5"),
        ((X, X, -X), "line 2 and line 3 differ"),
        ((sp.Matrix([[X, 1]]), sp.Matrix([[X, 2]])), r"residual: Matrix\(\[\[0, -1\]\]\)"),
        ((sp.sqrt(X**2), X), "residual"),  # true for positive x only
        (
            (sp.Abs(sp.Symbol("z")) ** 2, sp.Symbol("z") ** 2),
            "vanishes at z = 1/5, so it may be 0: give the symbols",
        ),
        ((sp.Function("g")(X), X), "assumptions"),
        # SymPy goes round in circles.
        ((sp.Function("g")(X).diff(X).subs(X, 0), 0), "assumptions"),
        ((ONE, 1), "vanishes at every point, so it may be 0"),
        ((sp.Matrix([ONE, X]), sp.Matrix([1, X])), "vanishes at every point, so it may be 0"),
        ((sp.Matrix([ONE, X]), sp.Matrix([2, X])), "so the equation is wrong"),
    ],
)
def test_exact_refuses_what_it_cannot_prove(lines, message):
    with pytest.raises(VerificationError, match=message):
        verify.exact("eq-false", *lines)


def test_a_number_without_a_certain_digit_is_no_refutation():
    """Such as SymPy has for some integrals: 9e-6, of which it knows that all digits may be wrong."""
    for size, message in ((sp.Float("9e-6", precision=1), "may be 0"), (sp.Float("9e-6"), "is wrong")):
        assert message in verify._spot_check(size) and message in verify._spot_check(sp.Matrix([0, size]))


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ((X,), ValueError, "one line is nothing to compare"),
        ((X == Y,), TypeError, "not the result of comparing them with =="),
        ((sp.Matrix([X]), X), TypeError, "one side is a matrix and the other is not"),
        ((sp.Matrix([X]), sp.Matrix([X, X])), ValueError, r"shapes \(1, 1\) and \(2, 1\)"),
        # What SymPy has decided is True, whichever relation it was.
        *(((line,), TypeError, "got True, which is no") for line in (sp.Eq(X, X), sp.Ne(1, 2), sp.Gt(2, 1), P > -1)),
        ((sp.Eq(sp.Integer(1), sp.Integer(2)),), TypeError, "got False, which is no"),
        ((X > Y, X > Y), TypeError, "got x > y, which is no expression or matrix"),
        (([X], [X]), TypeError, r"got \[x\], which is no expression or matrix"),
        ((np.array([1, 2]), np.array([1, 2])), TypeError, r"got \[1, 2\], which is no expression or matrix"),
        ((sp.Piecewise((1, X > 0)), 1), ValueError, "undefined where no condition holds"),
        ((X, X + 0 * Y, sp.Piecewise((X, X > 0))), ValueError, "undefined where no condition holds"),
        ((sp.Matrix([sp.Piecewise((X, X > 0))]), sp.Matrix([X])), ValueError, "undefined where no condition holds"),
        ((sp.MatrixSymbol("A", N, N), sp.MatrixSymbol("A", N, N)), ValueError, r"symbolic shape \(n, n\)"),
    ],
)
def test_exact_refuses_what_makes_no_sense(lines, error, message):
    with pytest.raises(error, match=message):
        verify.exact("eq-odd", *lines)


def test_close_accepts_numbers_arrays_tensors_and_dictionaries(capsys):
    ones = np.ones((2, 3))
    verify.close("eq-a", 0.1 + 0.2, 0.3, rtol=1e-12)
    verify.close("eq-a", ones, ones * (1 + 5e-13), rtol=1e-12)
    verify.close("eq-a", torch.ones(2, 3, dtype=torch.float64, requires_grad=True), ones, rtol=1e-12)
    verify.close("eq-a", {"w": ones, "b": 2}, {"b": 2.0, "w": torch.from_numpy(ones).to_sparse()}, rtol=1e-12)
    verify.close("eq-a", np.array([1e-15, 1.0]), np.array([0.0, 1.0]), rtol=1e-12, atol=1e-14)
    verify.close("eq-a", 100.004, 100.0, rtol=0, atol=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✓ eq-a: equal to brute force in float64, relative error below 1e-15 (tolerance 1e-12)"
    assert lines[1] == "✓ eq-a: equal to brute force in float64, relative error below 1e-12 (tolerance 1e-12)"
    assert lines[2] == "✓ eq-a: equal to brute force in float64, relative error 0 (tolerance 1e-12)"
    assert lines[4].endswith("(tolerance 1e-12, or 1e-14 absolute)")
    assert lines[5].endswith("absolute error below 1e-2 (tolerance 0.01)")


@pytest.mark.parametrize(
    ("actual", "expected", "error", "message"),
    [
        (1.0, -1.0, VerificationError, "the value is 1, expected -1; residual 2, allowed 1e-06"),
        (
            {"w": np.ones((2, 2))},
            {"w": np.array([[1, 1], [1.1, 1]])},
            VerificationError,
            r"w\[1, 0\] is 1, expected 1.1",
        ),
        (np.array([0.0, 1e-9]), np.zeros(2), VerificationError, "residual 1e-09, allowed 0"),
        (np.nan, np.nan, VerificationError, "NaN or infinite"),
        (np.inf, np.inf, VerificationError, "NaN or infinite"),
        (np.float32(1), 1.0, TypeError, "actual is float32; compare in float64"),
        (1.0, torch.ones(()), TypeError, "expected is float32"),
        ({"w": torch.ones(2)}, {"w": np.ones(2)}, TypeError, r"actual\['w'\] is float32"),
        (True, 1.0, TypeError, "actual is bool"),
        (
            np.ones(3),
            np.ones((3, 1)),
            ValueError,
            r"shape \(3,\) but expected has \(3, 1\); nothing is broadcast",
        ),
        ({"w": 1.0}, {"v": 1.0}, ValueError, "only in one: ['v', 'w']"),
        (torch.ones(2, dtype=torch.bfloat16), np.ones(2), TypeError, "actual is bfloat16; compare in float64"),
        (2**53 + 1, 2**53, ValueError, "actual holds a whole number beyond 2⁵³"),
        (1.0, torch.tensor([-(2**63)]), ValueError, "expected holds a whole number beyond 2⁵³"),
    ],
)
def test_close_refuses(actual, expected, error, message):
    with pytest.raises(error) as caught:
        verify.close("eq-b", actual, expected, rtol=1e-6)
    assert message.replace("\\", "") in str(caught.value)


def test_sampled_allows_the_given_number_of_standard_errors(capsys):
    verify.sampled("eq-c", 1.03, 1.0, standard_error=0.01)
    verify.sampled(
        "eq-c", {"w": torch.tensor([1.0, 0.0])}, {"w": [1.01, 0.0]}, standard_error={"w": [0.01, 0.0]}
    )
    verify.sampled("eq-c", torch.ones(3).bfloat16(), np.ones(3), standard_error=0.5)
    assert capsys.readouterr().out.splitlines()[0] == (
        "✓ eq-c: within 3.0 standard errors (allowed 4) of 0.01, which is 1 % of the value"
    )
    with pytest.raises(VerificationError, match=r"5\.0 standard errors of 0.01, allowed 4"):
        verify.sampled("eq-c", 1.05, 1.0, standard_error=0.01)
    with pytest.raises(VerificationError, match="allowed 2"):
        verify.sampled("eq-c", 1.03, 1.0, standard_error=0.01, sigmas=2)


@pytest.mark.parametrize(
    ("estimate", "expected", "standard_error", "error", "message"),
    [
        ([1.0, 0.1], [1.0, 0.0], [0.1, 0.0], VerificationError, "inf standard errors"),
        (1.0, 1.0, 0.0, ValueError, "0 everywhere, so sampling proves nothing"),
        (1.0, 1.0, -0.1, ValueError, "negative"),
        (1.0, 1.0, np.nan, VerificationError, "NaN"),
        ([1.0, 1.0], [1.0, 1.0], [0.1], ValueError, "shape"),
        ([1.0], 1.0, 0.1, ValueError, "shape"),
        (torch.tensor(1 + 5j), torch.tensor(1 + 0j), 0.1, TypeError, "estimate is complex64; compare in float64"),
        (1.0, np.complex128(1), 0.1, TypeError, "expected is complex128"),
        (2**53 + 2, 2**53, 1.0, ValueError, "beyond 2⁵³"),
    ],
)
def test_sampled_refuses(estimate, expected, standard_error, error, message):
    with pytest.raises(error, match=message):
        verify.sampled("eq-d", estimate, expected, standard_error=standard_error)


def test_show_prints_the_equation_it_proves(capsys):
    integral = sp.Integral(2 * X, (X, 0, P))
    verify.show("eq-e", integral, P**2, name="A(p)")
    assert capsys.readouterr().out.splitlines() == [
        r"A(p) = \int\limits_{0}^{p} 2 x\, \mathrm{d}x = p^{2}",
        "✓ eq-e: both sides proved equal by SymPy",
    ]
    with pytest.raises(VerificationError):
        verify.show("eq-e", integral, -(P**2))


def test_show_puts_a_chain_on_lines_of_its_own(capsys):
    verify.show("eq-e", (X + 1) * X, X**2 + X, X * (1 + X), name="q")
    assert capsys.readouterr().out.count(r"\\") == 2


@pytest.mark.parametrize("label", ["ewc-penalty", "eq-Penalty", "eq_penalty", "eq-", 3])
def test_a_label_has_one_form(label):
    with pytest.raises(ValueError, match="not an equation's label"):
        verify.exact(label, X, X)


def test_in_a_notebook_the_check_is_recorded_in_the_output(monkeypatch):
    import IPython

    shown = []
    kernel = type("Shell", (), {"kernel": object()})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: kernel)
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append(bundle))
    verify.close("eq-f", 1.0, 1.0, rtol=1e-12)
    verify.show("eq-g", X + X, 2 * X)
    assert [list(bundle) for bundle in shown] == [
        ["text/html", "text/plain"],
        ["text/markdown", "text/plain"],
        ["text/html", "text/plain"],
    ]
    assert shown[0]["text/html"].startswith('<p class="check" data-label="eq-f" data-kind="numeric">✓ ')
    assert shown[1]["text/markdown"] == "$$\n2 x = 2 x\n$$ (eq-g)"


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_a_limit_that_lets_everything_pass_is_refused(limit):
    with pytest.raises(ValueError, match="rtol is .*; it must be a finite number"):
        verify.close("eq-a", 1.0, 2.0, rtol=limit)
    with pytest.raises(ValueError, match="atol is .*; it must be a finite number"):
        verify.close("eq-a", 1.0, 2.0, rtol=0.0, atol=limit)
    with pytest.raises(ValueError, match="sigmas is .*; it must be a finite number"):
        verify.sampled("eq-a", 1.0, 2.0, standard_error=0.1, sigmas=limit)


@pytest.mark.parametrize("nothing", [np.zeros(0), {}, {"w": np.zeros((0, 3))}])
def test_nothing_proves_nothing(nothing):
    with pytest.raises(ValueError, match="nothing to compare"):
        verify.close("eq-a", nothing, nothing, rtol=1e-9)
    with pytest.raises(ValueError, match="nothing to compare"):
        verify.exact("eq-a", sp.zeros(0, 0), sp.zeros(0, 0))


def test_decimal_numbers_are_no_proof():
    with pytest.raises(TypeError, match="decimal number"):
        verify.exact("eq-a", 1e16 + 1, 10**16)
    with pytest.raises(TypeError, match="decimal number"):
        verify.exact("eq-a", sp.Float(1e16) + 1, sp.Float(1e16))
