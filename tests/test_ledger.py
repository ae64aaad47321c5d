"""The ledger of equations bites: nothing gets into the book that is neither declared nor verified."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import ledger
import pytest
import sympy as sp
import tiny_book

from ewc import verify

ROOT = Path(__file__).parents[1]
X = sp.symbols("x", real=True)
SYMBOLS = "```{symbols} theta\n:indices: x a b c\n```\n\nWith $\\theta$ we have\n\n"
SQUARE = SYMBOLS + "$$\n(x + 1)^2 = x^2 + 2x + 1\n$$ (eq-square)\n"
CODE = '''"""Sums, exactly."""

import functools


class Sum:
    """A sum.

    Implements: eq-square
    """

    @functools.cache
    def square(self, x):
        r"""The square of a sum.

        Implements: eq-square, eq-other.
        """
        return (x + 1) ** 2
'''


def check_square():
    verify.exact("eq-square", (X + 1) ** 2, X**2 + 2 * X + 1)


@pytest.fixture
def build(tmp_path, capsys):
    return lambda *page, **options: tiny_book.build(tmp_path, capsys, one=list(page), **options)


def test_a_verified_equation(build):
    book = build(SQUARE + "\nSee {eq}`eq-square`.", check_square, options=["-W"], two=["```{ledger}\n```"])
    assert book.status == 0, book.messages
    assert book.ledger == [
        {
            "label": "eq-square",
            "page": "one",
            "number": "1.1",
            "kind": "exact",
            "check": "one.html#check-eq-square",
            "code": [],
        }
    ]
    assert 'id="check-eq-square"' in book.html()
    assert (
        '<a class="reference internal" href="#check-eq-square" title="Verified exactly: both' in book.html()
    )
    assert "1 equation: 1 verified exactly." in book.html("two")
    assert 'href="one.html#equation-eq-square"' in book.html("two")
    assert 'href="one.html#check-eq-square"' in book.html("two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SQUARE, "eq-square is neither checked by a cell"),
        (SYMBOLS + "$$\nx = a\n$$\n", "display equation without a label: 'x = a'"),
        (SYMBOLS + "```{math}\nx = a\n```\n", "display equation without a label: 'x = a'"),
        (SYMBOLS + "$$\nx = a\n$$ (anything)\n", "label 'anything' must begin with eq-"),
        (
            SQUARE + "\n{definition}`eq-square`\n\n{assumption}`eq-square`",
            "both a definition and an assumption",
        ),
        (
            SQUARE + "\n{definition}`eq-square`\n\n{definition}`eq-none`",
            "declared for eq-none, but no equation",
        ),
        (SQUARE + "\n{definition}`eq-square`\n\n" + SQUARE.partition("have")[2], "eq-square appears twice"),
        (
            SQUARE + "\n{definition}`eq-square`\n\n:::{derivation} eq-square\nA\n: $$a$$\n\nB\n: $$b$$\n:::",
            "the derivation of eq-square is not proved",
        ),
    ],
)
def test_an_equation_that_is_not_accounted_for_fails_the_build(build, text, message):
    book = build(text)  # not strict: no -W
    assert book.status != 0
    problems = book.messages[book.messages.index("the ledger of equations has") :]
    assert message in " ".join(problems.split())
    assert "  one" in problems, "the page is named"


def test_a_check_of_an_unknown_label_fails_the_build(build):
    book = build(SQUARE, check_square, lambda: verify.exact("eq-sqare", X, X))
    assert book.status != 0
    assert "one: check of eq-sqare, but no equation has that label" in book.messages


def test_an_assumption_is_not_checked_but_a_definition_may_be(build):
    assert "need not be assumed" in build(SQUARE + "\n{assumption}`eq-square`", check_square).messages
    book = build(SQUARE + "\n{definition}`eq-square`", check_square, options=["-W"])
    assert book.status == 0, book.messages
    assert (book.ledger[0]["kind"], book.ledger[0]["check"]) == ("definition", "one.html#check-eq-square")


def test_the_strongest_check_gives_the_kind_and_each_has_its_anchor(build):
    book = build(
        SQUARE,
        lambda: verify.sampled("eq-square", 4.01, 4.0, standard_error=0.01),
        lambda: verify.close("eq-square", (1 + 1) ** 2, 4.0, rtol=1e-12),
        options=["-W"],
    )
    assert book.status == 0, book.messages
    assert book.ledger[0]["kind"] == "numeric"
    assert 'id="check-eq-square"' in book.html() and 'id="check-eq-square-2"' in book.html()


def test_the_same_label_on_two_pages(build):
    book = build(SQUARE, check_square, two=[SQUARE])
    assert book.status != 0
    assert "eq-square labels 2 equations: one, two" in book.messages


def test_a_check_on_another_page(build):
    book = build(SQUARE, two=[check_square], options=["-W"])
    assert book.status == 0, book.messages
    assert book.ledger[0]["check"] == "two.html#check-eq-square"
    assert 'href="two.html#check-eq-square"' in book.html()


def test_an_equation_printed_from_what_is_checked(build):
    def show():
        verify.show("eq-square", (X + 1) ** 2, X**2 + 2 * X + 1, name="a")

    book = build(SYMBOLS + "See {eq}`eq-square`.", show, options=["-W"])
    assert book.status == 0, book.messages
    assert [(row["number"], row["kind"]) for row in book.ledger] == [("1.1", "exact")]
    assert r"a = \left(x + 1\right)^{2} = x^{2} + 2 x + 1" in book.html()


def test_a_derivation_unfolds_step_by_step(build):
    steps = ":::{derivation} eq-square\nStart\n: $$(x+1)^2$$\n\nExpand\n: $$x^2+2x+1$$\n\nSort\n: $$1+2x+x^2$$\n:::"
    book = build(SQUARE + "\n" + steps, check_square, options=["-W"])
    assert book.status == 0, book.messages
    steps = re.search(r'<ol class="[^"]*derivation.*?</ol>', book.html(), re.DOTALL)[0]
    assert steps.count("<li>") == 3
    assert re.findall(r"<summary>(\w+)</summary>", steps) == ["Expand", "Sort"], "the start is not folded"


def test_a_flipped_sign_in_an_executed_cell_fails_the_build(build):
    cell = "import sys; sys.path.insert(0, {folder!r})\nimport sympy as sp, verify\nx = sp.symbols('x')\n"
    cell = cell.format(folder=str(ROOT / "ewc"))  # without the rest of the package, which imports torch
    line = "verify.exact('eq-square', (x + 1)**2, x**2 {sign} 2*x + 1)"
    good = build(SQUARE, ("cell", cell + line.format(sign="+")), execute="force", options=["-W"])
    assert good.status == 0, good.messages
    assert good.ledger[0]["kind"] == "exact"
    bad = build(SQUARE, ("cell", cell + line.format(sign="-")), execute="force", options=["-T"])
    assert bad.status != 0
    assert (
        "VerificationError" in bad.messages
        and "residual: 4*x" in bad.messages
        and "one.ipynb" in bad.messages
    )


# Equation and code ------------------------------------------------------------------------------------------------


def test_the_code_of_an_equation_is_found_without_importing_it(tmp_path):
    (tmp_path / "ewc").mkdir()
    (tmp_path / "ewc/sums.py").write_text(CODE)
    found = ledger.implementations(tmp_path)
    assert set(found) == {"eq-square", "eq-other"}
    (code,) = found["eq-square"]
    assert (code.name, code.file, code.first, code.last) == ("ewc.sums.Sum.square", "ewc/sums.py", 12, 18)
    assert code.source.startswith("@functools.cache\ndef square") and code.source.endswith("** 2")


def test_an_equation_unfolds_its_code(build):
    repository = {"repository_url": "https://github.com/a/b", "repository_branch": "main"}
    extra = f"html_theme = 'sphinx_book_theme'\nhtml_theme_options = {repository}"
    book = build(SQUARE, check_square, files={"ewc/sums.py": CODE}, extra=extra, options=["-W"])
    assert book.status == 0, book.messages
    assert book.ledger[0]["code"] == ["ewc.sums.Sum.square"]
    fold = book.html().partition('<details class="equation-code">')[2].partition("</details>")[0]
    assert 'href="https://github.com/a/b/blob/main/ewc/sums.py#L12-L18"' in fold
    assert '<span class="linenos">12</span>' in fold and "functools" in fold


def test_the_api_page_links_back_to_the_equation(build):
    book = build(
        SQUARE.replace("eq-square", "eq-fisher-exact") + "\n{definition}`eq-fisher-exact`",
        two=["```{eval-rst}\n.. autofunction:: ewc.fisher.diagonal\n```"],
        extra="extensions += ['sphinx.ext.napoleon']",
    )
    assert book.status == 0, book.messages
    line = re.search(r"<strong>Implements:</strong>.*?</p>", book.html("two"))[0]
    assert 'href="one.html#equation-eq-fisher-exact"' in line and ">(1.1)</a>" in line
    assert '<span class="pre">eq-fisher-probe</span>' in line, (
        "an equation of a chapter to come is not a link"
    )


def test_code_that_implements_no_equation_fails_the_build_when_required(build):
    files = {"ewc/sums.py": CODE}
    assert build(SQUARE, check_square, files=files, options=["-W"]).status == 0
    book = build(SQUARE, check_square, files=files, options=["-D", "ledger_require_code_targets=1"])
    assert book.status != 0
    assert "ewc.sums.Sum.square implements eq-other, but no equation has that label" in book.messages


def test_code_and_equations_name_each_other():
    text = "\n".join(path.read_text() for path in (ROOT / "book").glob("*.md"))
    written = {
        *re.findall(r"\$\$ \((eq-[\w-]+)\)", text),
        *re.findall(r'verify\.show\(\s*"(eq-[\w-]+)"', text),
    }
    implemented = ledger.implementations(ROOT)
    dangling = {label: code[0].name for label, code in implemented.items() if label not in written}
    assert not dangling, "docstrings name equations that the book does not have"


def test_every_estimator_and_every_penalty_has_an_equation():
    from ewc import fisher

    implemented = ledger.implementations(ROOT)
    assert {f"eq-fisher-{estimator}" for estimator in fisher.ESTIMATORS} <= implemented.keys()
    covered = {code.name for codes in implemented.values() for code in codes}
    modules = [importlib.import_module(f"ewc.{path.stem}") for path in (ROOT / "ewc").glob("[!_]*.py")]
    penalties = {
        f"{module.__name__}.{name}"
        for module in modules
        for name, thing in inspect.getmembers(module, inspect.isclass)
        if thing.__module__ == module.__name__ and hasattr(thing, "penalty") and not name.startswith("_")
    }
    inherited = {f"ewc.relatives.{name}" for name in ("L2", "SynapticIntelligence", "MemoryAwareSynapses")}
    assert {"ewc.elastic.EWC", "ewc.kfac.KFAC"} | inherited <= penalties
    for penalty in penalties:
        assert {penalty, f"{penalty}.penalty"} & covered, f"{penalty} names no equation"


def test_every_public_function_of_the_laplace_approximation_has_an_equation():
    from ewc import laplace

    covered = {code.name for codes in ledger.implementations(ROOT).values() for code in codes}
    public = {f"ewc.laplace.{name}" for name, thing in inspect.getmembers(laplace, inspect.isfunction)
              if thing.__module__ == "ewc.laplace" and not name.startswith("_")}
    assert "ewc.laplace.predict" in public
    assert public <= covered


def test_every_public_module_is_on_the_api_page():
    page = (ROOT / "book/api.md").read_text()
    public = {f"ewc.{path.stem}" for path in (ROOT / "ewc").glob("[!_]*.py")}
    assert public == set(re.findall(r"automodule:: (ewc\.\w+)", page))
