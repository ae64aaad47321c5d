"""Symbols are found in standard LaTeX, every letter is accounted for, and formulas and code light up together."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import symbols
import tiny_book
import website
from sphinx.errors import ExtensionError

ROOT = Path(__file__).parents[1]
TEX = {
    "theta": r"\theta",
    "theta-star": r"\theta^*",
    "fisher": "F",
    "fisher-bar": r"\bar{F}",
    "loss": r"\mathcal{L}",
    "loss-a": r"\mathcal{L}_A",
    "p": "p",
    "estimate": r"\hat\theta",
}


def symbol(id, tex):
    return symbols.Symbol(id, tex, id, "", "", "", ())


def read(tex, indices="i n A"):
    reader = symbols.Reader(tex, [symbol(*item) for item in TEX.items()], frozenset(indices.split()))
    return reader.rewrite().replace(r"\class{sym sym-", "<"), reader


@pytest.mark.parametrize(
    ("tex", "wrapped"),
    [
        (r"\theta", r"<theta}{\theta}"),
        (r"\theta_i", r"<theta}{\theta_{i}}"),
        (r"\theta^*_{A,i}", r"<theta-star}{\theta^{*}_{A,i}}"),
        (r"\theta_i^\ast", r"<theta-star}{\theta_{i}^{*}}"),
        (r"\theta^{*\top}", r"<theta-star}{\theta^{*\top}}"),
        (r"\theta^2", r"<theta}{\theta^{2}}"),
        (r"\theta'", r"<theta}{\theta'}"),
        (r"(\theta - \theta^*)^2", r"(<theta}{\theta} - <theta-star}{\theta^{*}})^{2}"),
        (r"\mathcal L_A + \mathcal{L}_{A,n} + \mathcal L_n", None),
        (r"\bar F F", r"<fisher-bar}{\bar{F}} <fisher}{F}"),
        (r"\hat\theta", r"<estimate}{\hat{\theta}}"),
        (r"\tilde F", r"\tilde{<fisher}{F}}"),
        (r"\frac12 \frac F\theta", r"\frac{1}{2} \frac{<fisher}{F}}{<theta}{\theta}}"),
        (r"\sqrt[n]F", r"\sqrt[n]{<fisher}{F}}"),
        (r"\sum_{i=1}^n F_i", r"\sum_{i=1}^{n} <fisher}{F_{i}}"),
        (r"p_\theta", r"<p}{p_{<theta}{\theta}}}"),
        (r"\nabla_\theta p", r"\nabla_{<theta}{\theta}} <p}{p}"),
        (r"\left[ F \right]^\top", r"\left[ <fisher}{F} \right]^{\top}"),
        (r"\begin{aligned} F &= 0 \\[4pt] p &= 1 \end{aligned}", None),
        (r"\begin{array}{cc} F & 0 \end{array}", r"\begin{array}{cc} <fisher}{F} & 0 \end{array}"),
        (r"F_{\theta F}", r"<fisher}{F_{<theta}{\theta} <fisher}{F}}}"),
    ],
)
def test_symbols_are_found_longest_first_with_their_scripts(tex, wrapped):
    result, reader = read(tex)
    if wrapped is not None:
        assert result == wrapped
    assert reader.uncovered == []


def test_a_subscript_chooses_between_symbols():
    result, _ = read(r"\mathcal L_A + \mathcal{L}_{A,n} + \mathcal L_n")
    assert result == (r"<loss-a}{\mathcal{L}_{A}} + <loss-a}{\mathcal{L}_{A,n}} + <loss}{\mathcal{L}_{n}}")


@pytest.mark.parametrize(
    "tex",
    [
        r"\text{if F or p}",
        r"\operatorname{Fp}",
        r"\mathrm{F}",
        r"\operatorname*{p}",
        r"\label{F}",
        "1 + 2",
        "",
    ],
)
def test_words_are_left_alone(tex):
    result, reader = read(tex)
    assert (result, reader.uncovered, reader.found) == (tex, [], set())


@pytest.mark.parametrize(
    ("tex", "letters"),
    [
        ("x + F", ["x"]),
        (r"F_k", ["k"]),
        (r"\sum_{j} \alpha_j", ["j", r"\alpha", "j"]),
        (r"\mathcal{D}", [r"\mathcal{D}"]),
        (r"\mathbb E[p]", [r"\mathbb{E}"]),
        (r"e^{-\theta}", []),
        ("e + 1", ["e"]),
        (r"\mathbf{1}", []),
        (r"\frac{x}{\hat y}", ["x", "y"]),
        (r"\log p \, \mathrm{d}\theta \infty \partial", []),
        (r"\theta^{*\,k}", ["k"]),
    ],
)
def test_letters_that_are_no_symbol_are_reported(tex, letters):
    assert read(tex)[1].uncovered == letters


def test_a_symbol_is_one_letter():
    for tex in (r"\theta", r"\theta^*_A", r"\mathcal{L}", r"\hat{\mathbf{x}}", "F_{ii}"):
        assert symbol("good", tex).parts[0]
    for tex in (r"\Delta\theta", "p(x)", r"\operatorname{tr}", "2"):
        with pytest.raises(ValueError, match="not one letter"):
            _ = symbol("bad", tex).parts


def test_the_book_s_symbols_are_complete():
    for one in symbols.load(ROOT / "book/symbols.yml").values():
        assert all([one.tex, one.name, one.meaning, one.shape, one.unit, one.code]), one.id


def test_an_incomplete_symbol_is_an_error(tmp_path):
    (tmp_path / "symbols.yml").write_text("theta: {tex: x, name: y}")
    with pytest.raises(ExtensionError, match="theta must have exactly code, meaning, name, shape, tex, unit"):
        symbols.load(tmp_path / "symbols.yml")


# Pages ------------------------------------------------------------------------------------------------------------

GOOD = r"""
```{symbols} theta theta-star fisher
:indices: i
```

Near $\theta^*$ the penalty is

$$
\sum_i F_i (\theta_i - \theta^*_i)^2
$$ (eq-penalty)

{definition}`eq-penalty`

```python
fisher * (theta - theta_star) ** 2
```
"""


@pytest.fixture
def build(tmp_path, capsys):
    return lambda *page, **options: tiny_book.build(tmp_path, capsys, one=list(page), **options)


def test_a_page_with_symbols(build):
    book = build(GOOD, two=["```{notation}\n```"], options=["-W"])
    assert book.status == 0, book.messages
    assert r"\class{sym sym-theta-star}{\theta^{*}_{i}}" in book.html()
    assert r"\(\class{sym sym-theta-star}{\theta^{*}}\)" in book.html(), "in-line formulas too"
    assert '"codes": {"theta": "theta", "theta_star": "theta-star", "fisher": "fisher"}' in book.html()
    rows = book.html("two").split("<tr")[2:]
    assert ["one.html" in row for row in rows] == [True, True, True], "the page that has it first"
    assert "shape" not in rows[1] and "what is learned" in rows[1], "in alphabetical order, Latin letters first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("theta theta-star fisher", "theta theta-star"),
            "eq-penalty: F is not a symbol of this page",
        ),
        (GOOD.replace(":indices: i", ":indices: n"), "eq-penalty: i is not a symbol of this page"),
        (GOOD.replace("F_i", "F_i + x"), "eq-penalty: x is not a symbol of this page"),
        (GOOD.replace("the penalty", "the penalty of $x$"), "$x$: x is not a symbol of this page"),
        (GOOD + "\n\nWhy is $F_j > 0$?", "$F_j > 0$: j is not a symbol of this page"),
        (
            GOOD.replace("F_i", "1").replace("$$ (eq", "+ 1 $$ (eq"),
            "symbol fisher is declared but no formula",
        ),
        (GOOD.partition("Near")[2], "eq-penalty: F is not a symbol of this page"),
        (
            GOOD.replace("theta theta-star fisher", "theta theta-star fisher twin"),
            "fisher and twin look the same",
        ),
    ],
)
def test_a_symbol_that_is_not_accounted_for_fails_the_build(build, text, message):
    twin = tiny_book.SYMBOLS + "twin: {tex: F, name: t, meaning: t, shape: t, unit: t, code: [t]}\n"
    book = build("Near" + text if text.startswith(" $") else text, files={"book/symbols.yml": twin})
    assert book.status != 0
    problems = book.messages[book.messages.index("the symbols have") :]
    assert message in problems and "  one" in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("theta theta-star fisher", "theta theta-star fischer"),
            "not in book/symbols.yml: fischer",
        ),
        (GOOD + GOOD.partition("Near")[0], "two {symbols} directives"),
    ],
)
def test_a_wrong_directive_fails_the_strict_build(build, text, message):
    book = build(text, options=["-W", "--keep-going"])
    assert book.status != 0 and message in book.messages


def test_a_symbol_that_no_page_uses_fails_the_build_when_required(build):
    more = tiny_book.SYMBOLS + "x: {tex: x, name: input, meaning: m, shape: s, unit: u, code: [x]}\n"
    assert build(GOOD, files={"book/symbols.yml": more}, options=["-W"]).status == 0
    book = build(GOOD, files={"book/symbols.yml": more}, options=["-D", "symbols_require_use=1"])
    assert book.status != 0
    assert "symbol x of book/symbols.yml is used on no page" in book.messages


def test_what_a_cell_prints_and_what_a_docstring_says_declare_nothing(build):
    docstring = ".. autofunction:: ewc.curvature.gauss_newton"  # its formulas are full of letters
    printed = ("cell", "from IPython.display import Markdown\nMarkdown('so $z = 1$')")
    book = build(
        GOOD,
        printed,
        f"```{{eval-rst}}\n{docstring}\n```",
        execute="force",
        extra="extensions += ['sphinx.ext.autodoc', 'sphinx.ext.napoleon']",
    )
    assert book.status == 0, book.messages
    assert r"\(z = 1\)" in book.html() and r"J_n^\top" in book.html()


# In a browser -----------------------------------------------------------------------------------------------------

MATHJAX = """
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"loader": {"load": ["[tex]/html"]},
                   "options": {"menuOptions": {"settings": {"inTabOrder": False}}},
                   "tex": {"packages": {"[+]": ["html"], "[-]": ["noundefined"]}}}
"""


CELL = """
from ewc import (
    EWC,
    fisher,  # the module: here no `fisher` is the quantity
)

fisher.diagonal(net).fisher + net.theta
theta = net.curvature - theta_star
memory = EWC(theta=1, stiffness=theta)
fisher == F
"""
LOOP = """
def total(theta, F):
    return sum(F * t for t, F in theta) + sum(F for theta in net) + (theta == F)
"""


@pytest.fixture
def page(build):
    """A page with symbols in a browser; foreign requests and errors of the console fail the test."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on the path")
    from playwright import sync_api

    forms = tiny_book.SYMBOLS.replace("code: [fisher]", "code: [fisher, .curvature, F, for F, stiffness=]")
    book = build(GOOD, ("cell", CELL), ("cell", LOOP), files={"book/symbols.yml": forms}, extra=MATHJAX)
    website.copy_mathjax(book.folder / "_build/_static")
    (book.folder / "_build/favicon.ico").touch()
    handler = functools.partial(Quiet, directory=str(book.folder / "_build"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, bad = f"http://127.0.0.1:{server.server_port}/", []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser,
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = chromium.new_page(viewport={"width": 390, "height": 800}, has_touch=True)
        page.on("console", lambda message: bad.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: bad.append(request.url) if address not in request.url else None)
        page.goto(address + "one.html")
        page.wait_for_selector("div.math mjx-container .sym")
        yield page
        chromium.close()
    server.shutdown()
    server.server_close()
    assert bad == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def lit(page):
    """Which names in the code, and which symbols of the formulas, are outlined."""
    return page.evaluate(
        """() => [".highlight [data-sym]", "div.math .sym"].map(where => [...new Set(
            [...document.querySelectorAll(where)].filter(e => getComputedStyle(e).outlineStyle === "solid")
            .map(e => e.dataset.sym ?? [...e.classList].find(c => c.startsWith("sym-")).slice(4)))].sort())"""
    )


@pytest.mark.browser
def test_symbols_light_up_both_ways_by_mouse_keyboard_and_touch(page):
    tip = page.locator("#symbol-tip")
    assert lit(page) == [[], []] and tip.is_hidden()

    page.hover("div.math .sym-theta-star")
    assert lit(page) == [["theta-star"], ["theta-star"]]
    assert tip.inner_text().split("\n")[0] == "anchor: the old optimum"
    page.keyboard.press("Escape")
    assert lit(page) == [[], []] and tip.is_hidden()

    page.hover(".highlight [data-sym=fisher]")
    assert lit(page) == [["fisher"], ["fisher"]]
    assert "shape: (P,); unit: nats" in tip.inner_text()
    page.hover("h1")
    assert lit(page) == [[], []] and tip.is_hidden()

    page.click("details.symbols summary")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.sym") == "theta"
    assert lit(page) == [["theta"], ["theta"]]
    page.keyboard.press("Escape")
    assert tip.is_hidden()

    page.tap(".highlight [data-sym=theta-star]")
    assert lit(page) == [["theta-star"], ["theta-star"]]
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.browser
def test_only_the_quantity_itself_lights_up_in_the_code(page):
    """A module, an attribute, an argument's name: only in the forms that symbols.yml lists."""
    named = "e => [...e.querySelectorAll('.n')].map(n => n.textContent + (n.dataset.sym ? ' ' + n.dataset.sym : ''))"
    first, second = (cell.evaluate(named) for cell in page.locator(".cell_input").all())
    assert first[first.index("diagonal") - 1 :] == [
        *("fisher", "diagonal", "net", "fisher", "net", "theta"),
        *("theta theta", "net", "curvature fisher", "theta_star theta-star"),
        *("memory", "EWC", "theta", "stiffness fisher", "theta theta"),
        *("fisher", "F fisher"),
    ]
    assert second[second.index("theta theta") :] == [
        *("theta theta", "F fisher"),
        *("F fisher", "t", "t", "F fisher", "theta theta"),
        *("F fisher", "theta theta", "net", "theta theta", "F fisher"),
    ]
    assert page.locator(".highlight-python [data-sym=fisher]").count() == 1, "it stands alone, outside of the cells"


@pytest.mark.browser
def test_the_arrow_keys_walk_through_a_formula(page):
    page.focus("div.math mjx-container")
    walk = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        walk += lit(page)[1]
    assert walk == ["fisher", "theta", "theta-star", "fisher"]
    page.keyboard.press("ArrowLeft")
    assert lit(page)[0] == ["theta-star"]
    stops = "main [tabindex='0'], .body [tabindex='0']"
    assert page.locator(stops).count() == 1, "the display formula, and no formula in the text or in a button"


@pytest.mark.browser
def test_a_wrapped_formula_looks_the_same(page):
    """The same glyphs at the same places, to a hundredth of a pixel."""
    plain = r"\frac\lambda2 \sum_i F_i (\theta_i - \theta^*_i)^2 \quad \hat\theta'' \mathcal L_A"
    names = {
        "theta": r"\theta",
        "star": r"\theta^*",
        "f": "F",
        "l": r"\mathcal{L}",
        "h": r"\hat\theta",
        "s": r"\lambda",
    }
    wrapped = symbols.Reader(plain, [symbol(*item) for item in names.items()], frozenset("iA")).rewrite()
    assert wrapped.count(r"\class") == 6
    glyphs = [
        page.evaluate(
            """tex => {
                const formula = MathJax.tex2chtml(tex, { display: true });
                document.body.append(formula);
                const start = formula.querySelector("mjx-math").getBoundingClientRect();
                return [...formula.querySelectorAll("mjx-c")].map(glyph => {
                    const box = glyph.getBoundingClientRect();
                    return [box.left - start.left, box.top - start.top].map(x => x.toFixed(2));
                });
            }""",
            tex,
        )
        for tex in (plain, wrapped)
    ]
    assert len(glyphs[0]) >= 12
    assert glyphs[0] == glyphs[1]


def test_words_in_a_formula_keep_their_spaces():
    assert symbols.squeeze(r"a _ { \text{which task?} } b") == r"a_{\text{which task?}}b"


@pytest.mark.parametrize(
    ("body", "mended"),
    [
        ('<span class="pasted-text">-0.08</span> to', '<span class="pasted-text">−0.08</span> to'),
        ('<span class="pasted-text">3.6e+07</span>', '<span class="pasted-text">3.6 × 10<sup>7</sup></span>'),
        ('<span class="pasted-text">1e-04</span> %', '<span class="pasted-text">1 × 10<sup>−4</sup></span>\u00a0%'),
        ('<span class="pasted-text">2-5</span>', '<span class="pasted-text">2-5</span>'),
        ('<span class="pasted-text">five words are a sentence</span>', '<span class="pasted-text words">five words are a sentence</span>'),
        ("<p>92 %, 5 %d</p>", "<p>92\u00a0%, 5 %d</p>"),
        ("<pre>5 % -1 1e-04</pre>", "<pre>5 % -1 1e-04</pre>"),
        (
            '<span class="math notranslate nohighlight">\\(x\\)</span>, so',
            '<span class="unbroken"><span class="math notranslate nohighlight">\\(x\\)</span>,</span> so',
        ),
    ],
)
def test_what_cells_put_into_sentences_is_set_like_them(body, mended):
    assert website.typeset(body) == mended
