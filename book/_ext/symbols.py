r"""Symbols that know what they are: `book/symbols.yml` joined with the formulas and the code of every page.

Formulas are standard LaTeX. While a page is read, each symbol that its `{symbols}` directive names is found in them
and wrapped in `\class{sym sym-NAME}{...}`, which looks the same; `symbols.js` does the rest in the browser. A letter
of any formula, displayed or in a sentence, that is neither a symbol of the page nor one of its `:indices:` fails the
build. An index is a letter that counts, or that means something for a sentence or an exercise only.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import parts
import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

FILE = "book/symbols.yml"
FIELDS = {"tex", "name", "meaning", "shape", "unit", "code"}

# TeX --------------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\\operatorname\*|\\[A-Za-z]+|\\.|%[^\n]*\n?|\s+|.", re.DOTALL)
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho "
    "sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell"
)
LETTERS = {"\\" + name for name in GREEK.split()}
# Commands whose argument is words or a name, to be left alone; whose argument is one symbol; whose arguments are TeX.
WORDS = "text textrm textit textbf mbox mathrm mathsf mathtt operatorname operatorname* label tag begin end hspace ref"
FONTS = "mathcal mathbb mathbf mathfrak mathscr boldsymbol bm"
ONE = (
    "sqrt hat bar tilde vec dot ddot check breve widehat widetilde overline underline overbrace underbrace boxed "
    "substack phantom mathop mathbin mathrel mathord mathstrut pmod cancel"
)
TWO = "frac tfrac dfrac cfrac binom tbinom dbinom overset underset stackrel"
ARGUMENTS = {"\\" + name: 1 for name in f"{WORDS} {FONTS} {ONE}".split()} | {
    "\\" + name: 2 for name in TWO.split()
}
WORDS = {"\\" + name for name in WORDS.split()}
FONTS = {"\\" + name for name in FONTS.split()}


# A token, or a phrase of words, whose spaces count.
WORDED = re.compile(r"\\(?:text\w*|mbox)\s*\{[^{}]*\}|" + TOKEN.pattern, TOKEN.flags)


def squeeze(tex):
    """The LaTeX without the spaces that do not matter, and with one form of the star."""
    out = ""
    for token in WORDED.findall(tex):
        if not token.isspace():
            out += " " * (token.isalpha() and bool(re.search(r"\\[A-Za-z]+$", out))) + token
    return re.sub(r"\\(ast|star)(?![A-Za-z])", "*", out)


@dataclass(frozen=True)
class Symbol:
    """One entry of symbols.yml; its LaTeX is a letter, perhaps accented or in a font, with or without scripts."""

    id: str
    tex: str
    name: str
    meaning: str
    shape: str
    unit: str
    code: tuple[str, ...]

    @cached_property
    def parts(self) -> tuple[str, str, str]:
        """Letter, subscript and superscript."""
        reader = Reader(self.tex)
        letter, _ = reader.atom()
        _, sub, sup = reader.scripts()
        if letter is None or reader.peek():
            raise ValueError(
                f"symbol {self.id}: {self.tex!r} is not one letter with optional accent, font and scripts"
            )
        return letter, sub, sup


class Reader:
    """Reads LaTeX from left to right, atom by atom: a letter, a command with its arguments, a group, a sign."""

    def __init__(self, tex, symbols=None, indices=frozenset()):
        self.tokens = TOKEN.findall(tex)
        self.at = 0
        self.indices = indices
        self.symbols = symbols
        self.found: set[str] = set()  # ids of symbols
        self.uncovered: list[str] = []

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def skip_space(self):
        while self.peek().isspace():
            self.at += 1

    def argument(self):
        """The next argument, without its braces."""
        self.skip_space()
        if self.peek() == "{":
            return self.until("}")
        start = self.at
        command = self.take()
        for _ in range(ARGUMENTS.get(command, 0)):
            self.argument()
        return "".join(self.tokens[start : self.at])

    def until(self, close):
        """What stands between the opening token here and its closing token."""
        start, depth = self.at + 1, 0
        while self.at < len(self.tokens):
            token = self.take()
            depth += (token == "{") - (token == "}")
            if token == close and depth == 0:
                break
        return "".join(self.tokens[start : self.at - 1])

    def atom(self):
        """The next atom as (what a symbol is compared with, or None; the rewritten LaTeX)."""
        token = self.peek()
        if token == "{":
            return None, "{" + self.rewrite(self.until("}")) + "}"
        self.take()
        if token in WORDS:
            name = self.argument()
            columns = (
                "{" + self.argument() + "}" if token == r"\begin" and name in ("array", "alignedat") else ""
            )
            return None, f"{token}{{{name}}}{columns}"
        if token in FONTS:
            letter = f"{token}{{{squeeze(self.argument())}}}"
            return letter, letter
        if token in ARGUMENTS:
            option = (
                "[" + self.rewrite(self.until("]")) + "]" if token == r"\sqrt" and self.peek() == "[" else ""
            )
            raw = [self.argument() for _ in range(ARGUMENTS[token])]
            letter = token + "".join(f"{{{squeeze(a)}}}" for a in raw)
            if self.symbols is None or any(symbol.parts[0] == letter for symbol in self.symbols):
                return letter, letter
            return None, token + option + "".join(f"{{{self.rewrite(a)}}}" for a in raw)
        if token == "\\\\" and self.peek() == "[":  # \\[4pt]
            return None, token + "[" + self.until("]") + "]"
        return (token if token in LETTERS or token.isalpha() else None), token

    def scripts(self):
        """The scripts that follow: as [(sign, LaTeX)], and the subscript and the superscript without spaces."""
        found = []
        while True:
            start = self.at
            self.skip_space()
            if self.peek() not in ("_", "^", "'"):
                self.at = start
                break
            sign = self.take()
            found.append((sign, "" if sign == "'" else squeeze(self.argument())))
        sub = "".join(raw for sign, raw in found if sign == "_")
        sup = "".join(raw or sign for sign, raw in found if sign != "_")
        return found, sub, sup

    def match(self, letter, sub, sup):
        """The symbol with this letter that says most about its scripts."""
        fitting = []
        for symbol in self.symbols:
            want_letter, want_sub, want_sup = symbol.parts
            own_sub = not want_sub or sub == want_sub or sub.startswith(want_sub + ",")
            if letter == want_letter and own_sub and sup.startswith(want_sup):
                fitting.append((len(want_sub) + len(want_sup), symbol.id, symbol))
        return max(fitting)[2] if fitting else None

    def names_something(self, letter, sup):
        """Whether a letter that is no symbol must be one: not an index, not Euler's e, not a bold 1."""
        return (
            letter not in self.indices and not (letter == "e" and sup) and not re.search(r"\{\d+\}$", letter)
        )

    def rewrite(self, tex=None):
        """The LaTeX with its symbols wrapped."""
        if tex is not None:
            inner = Reader(tex, self.symbols, self.indices)
            out = inner.rewrite()
            self.found |= inner.found
            self.uncovered += inner.uncovered
            return out
        out = []
        while token := self.peek():
            if token.isspace() or token.startswith("%"):
                out.append(self.take())
                continue
            letter, text = self.atom()
            scripts, sub, sup = self.scripts()
            symbol = self.match(letter, sub, sup) if letter else None
            own = {"_": "", "^": ""}  # the part of the scripts that is the symbol's, not to be read again
            if symbol:
                self.found.add(symbol.id)
                own = {"_": symbol.parts[1], "^": symbol.parts[2]}
            elif letter and self.names_something(letter, sup):
                self.uncovered.append(letter)
            for sign, raw in scripts:
                rest = raw.removeprefix(own.get(sign, ""))
                text += (
                    sign if sign == "'" else f"{sign}{{{raw[: len(raw) - len(rest)]}{self.rewrite(rest)}}}"
                )
            out.append(rf"\class{{sym sym-{symbol.id}}}{{{text}}}" if symbol else text)
        return "".join(out)


# Pages ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Symbol]:
    """The symbols of the file, in its order."""
    out = {}
    for id, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if entry.keys() != FIELDS:
            odd = ", ".join(sorted(entry.keys() ^ FIELDS))
            raise ExtensionError(
                f"{path.name}: {id} must have exactly {', '.join(sorted(FIELDS))}; look at {odd}"
            )
        out[id] = Symbol(
            id, **{key: str(value) for key, value in entry.items() if key != "code"}, code=entry["code"]
        )
        try:
            _ = out[id].parts
        except ValueError as error:
            raise ExtensionError(f"{path.name}: {error}") from None
    return out


class first_page(nodes.Inline, nodes.Element):
    """Where `{notation}` links to the first page that has a symbol, once all pages are read."""


def alphabetical(symbol):
    """Where a reader looks for a letter: Latin ones first, then Greek ones, then signs; small ones before capitals."""
    letter = symbol.parts[0].replace(r"\ell", "l")
    greek = next((name for name in re.findall(r"\\([A-Za-z]+)", letter) if "\\" + name in LETTERS), "")
    latin = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", letter))
    if greek:
        return 1, GREEK.split().index(greek.lower()), greek[0].isupper()
    return (0, latin[0].lower(), latin[0].isupper()) if latin else (2,)


class Notation(SphinxDirective):
    """A table of all symbols, in alphabetical order."""

    def run(self):
        self.env.note_dependency(str(Path(self.env.srcdir, FILE)))
        ordered = sorted(self.env.app.symbols.values(), key=alphabetical)
        rows = [[*describe(symbol), [first_page(symbol=symbol.id)]] for symbol in ordered]
        return [parts.table([*HEAD, "First on"], rows, "symbols")]


class Symbols(SphinxDirective):
    """The page's symbols: a folded table, and the data for the browser."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar = {"indices": directives.unchanged}

    def run(self):
        known, page = self.env.app.symbols, self.env.metadata[self.env.docname]
        self.env.note_dependency(str(Path(self.env.srcdir, FILE)))
        ids = self.arguments[0].split()
        if unknown := [id for id in ids if id not in known]:
            raise self.error(f"not in {FILE}: {', '.join(unknown)}. Known: {', '.join(known)}.")
        if "symbols" in page:
            raise self.error("The page has two {symbols} directives; join them in one.")
        page["symbols"] = ids
        page["indices"] = [squeeze(index) for index in self.options.get("indices", "").split()]
        chosen = [known[id] for id in ids]
        data = {
            s.id: {"name": s.name, "meaning": s.meaning, "shape": s.shape, "unit": s.unit} for s in chosen
        }
        codes = {}
        for symbol in chosen:
            for code in symbol.code:
                codes.setdefault(code, symbol.id)
        text = json.dumps({"symbols": data, "codes": codes}, ensure_ascii=False).replace("</", "<\\/")
        script = nodes.raw(
            "", f'<script type="application/json" id="symbols-data">{text}</script>', format="html"
        )
        summary = [nodes.Text("Symbols on this page")]
        table = parts.table(HEAD, [describe(symbol, button=True) for symbol in chosen], "symbols")
        help = "Point at a symbol in a formula or at its name in the code, or choose one here, to see it everywhere. "
        help += (
            "In a formula that has the focus, the arrow keys go from symbol to symbol; Escape puts it out."
        )
        return [script, parts.folded(summary, nodes.paragraph("", help), table, classes=["symbols"])]


HEAD = ["Symbol", "Meaning", "Shape; unit", "In the code"]


def describe(symbol, button=False):
    """The cells of a symbol's row."""
    formula = nodes.math("", rf"\class{{sym sym-{symbol.id}}}{{{symbol.tex}}}", symbol=symbol.id)
    if button:
        start = f'<button type="button" class="symbol" aria-label="{symbol.name}" data-sym="{symbol.id}">'
        formula = [nodes.raw("", start, format="html"), formula, nodes.raw("", "</button>", format="html")]
    else:
        formula = [formula]
    names = dict.fromkeys(code.removeprefix("for ") for code in symbol.code)
    codes = [node for name in names for node in (nodes.literal("", name), nodes.Text(" "))]
    meaning = [nodes.strong("", symbol.name), nodes.Text(f": {symbol.meaning}")]
    return [formula, meaning, [nodes.Text(f"{symbol.shape}; {symbol.unit}")], codes]


def line(formula):
    """Where the formula is: one in a sentence has no line of its own."""
    while formula is not None and not formula.line:
        formula = formula.parent
    return formula and formula.line


def wrap(app, doctree):
    """Wrap the page's symbols in all of its formulas, and note which it uses and which letters are unaccounted for."""
    page = app.env.metadata[app.env.docname]
    ids, found, problems = page.get("symbols", []), set(), []
    chosen, indices = [app.symbols[id] for id in ids], frozenset(page.get("indices", []))
    for one in chosen:
        for other in chosen:
            if one.id < other.id and one.parts == other.parts:
                problems.append(
                    (None, f"symbols {one.id} and {other.id} look the same; a page can have only one")
                )
    for node in doctree.findall(lambda n: isinstance(n, (nodes.math, nodes.math_block))):
        if "symbol" in node:
            continue
        reader = Reader(node.astext(), chosen, indices)
        wrapped = reader.rewrite()
        found |= reader.found
        if node.get("label") or not parts.secondary(node):
            shown = "a display equation" if isinstance(node, nodes.math_block) else f"${node.astext()}$"
            for letter in dict.fromkeys(reader.uncovered):
                message = f"{node.get('label') or shown}: {letter} is not a symbol of this page. Name it in {{symbols}} "
                message += f"(add it to {FILE} if it is new), or in its :indices: if it only counts or is used in passing"
                problems.append((line(node), message))
        if reader.found:
            node.children = [nodes.Text(wrapped)]
    problems += [
        (None, f"symbol {id} is declared but no formula of the page has it") for id in ids if id not in found
    ]
    page["symbol_problems"] = problems


def problems(app):
    """Everything that is wrong with the book's symbols, as (page, line, message)."""
    metadata = app.env.metadata
    out = [
        (page, *item)
        for page in sorted(app.env.found_docs)
        for item in metadata[page].get("symbol_problems", [])
    ]
    used = {id for page in app.env.found_docs for id in metadata[page].get("symbols", [])}
    if app.config.symbols_require_use:
        unused = [id for id in app.symbols if id not in used]
        out += [(app.config.root_doc, None, f"symbol {id} of {FILE} is used on no page") for id in unused]
    return out


def read_symbols(app):
    app.symbols = load(Path(app.srcdir, FILE))


def finish(app, exception):
    if not exception:
        parts.refuse("the symbols have", problems(app))


class WriteNotation(SphinxPostTransform):
    default_priority = 6  # before Sphinx resolves the references

    def run(self, **kwargs):
        reading_order = parts.pages(self.env)
        for node in list(self.document.findall(first_page)):
            having = (
                page for page in reading_order if node["symbol"] in self.env.metadata[page].get("symbols", [])
            )
            page = next(having, None)
            node.replace_self([parts.page_link(self.env, page)] if page else [])


def setup(app):
    app.setup_extension("parts")
    # Turned on once every chapter is written: until then a symbol may wait for its chapter.
    app.add_config_value("symbols_require_use", False, "env")
    app.add_directive("symbols", Symbols)
    app.add_directive("notation", Notation)
    app.connect("builder-inited", read_symbols)
    app.connect("doctree-read", wrap)
    app.connect("build-finished", finish)
    app.add_post_transform(WriteNotation)
    app.add_css_file("symbols.css")
    app.add_js_file("symbols.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
