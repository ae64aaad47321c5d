"""A site that needs nobody else's server, and loads no more than it uses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import unicodedata
from pathlib import Path
from urllib.parse import quote

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.util import logging
from sphinx_codeautolink.extension.block import CodeBlockAnalyser

LOG = logging.getLogger(__name__)

MATHJAX = ("tex-chtml.js", "ui/lazy.js", "input/tex/extensions/html.js", "output/chtml/fonts/woff-v2")

# Every icon of the theme's buttons, by Font Awesome's class.
ICONS = [
    "angle-left", "angle-right", "arrow-up", "bars", "chevron-down", "circle-half-stroke", "code", "download",
    "expand", "file", "file-lines", "file-pdf", "github", "home", "lightbulb", "list", "magnifying-glass", "moon",
    "outdent", "pencil-alt", "play", "rocket", "sun", "xmark",
]
UNUSED = (
    "scripts/fontawesome.js", "scripts/fontawesome.js.LICENSE.txt", "vendor/fontawesome", "locales",
    "webpack-macros.html", "sbt-webpack-macros.html",
)


def copy_mathjax(static: Path) -> None:
    """Copy the part of MathJax that the pages load from the installed package into the site."""
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for part in MATHJAX:
        target = static / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source / part, target)


def icon_rules() -> str:
    """CSS that draws the icons in `ICONS` as masks, with the outlines taken from the theme's Font Awesome script."""
    theme = Path(importlib.util.find_spec("pydata_sphinx_theme").origin).parent
    script = (theme / "theme/pydata_sphinx_theme/static/scripts/fontawesome.js").read_text(encoding="utf-8")
    found = {}
    for name, width, height, aliases, path in re.findall(
        r'"?([\w-]+)"?:\[(\d+),(\d+),\[([^\]]*)\],"\w+",\s*"([^"]+)"\]', script
    ):
        for icon in (name, *re.findall(r'"([\w-]+)"', aliases)):
            found.setdefault(icon, []).append((width, height, path))
    rules = ["/* Outlines: Font Awesome Free, https://fontawesome.com, CC BY 4.0. */"]
    for icon in ICONS:
        width, height, path = found[icon][-1]  # the solid outline stands after the regular one
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'><path d='{path}'/></svg>"
        rules.append(f'.fa-{icon} {{ --icon: url("data:image/svg+xml,{quote(svg, safe="")}"); }}')
    return "\n".join(rules) + "\n"


def open_door(out: Path, first: str) -> None:
    """The page at the site's own address leads to the first one, and is shared with the same title and picture."""
    page = out / f"{first}.html"
    if not page.is_file():
        return
    text = page.read_text(encoding="utf-8")
    head = re.findall(r'<title>.*?</title>|<meta [^>]*property="og:[^>]*>', text, flags=re.DOTALL)
    head += [f'<link rel="canonical" href="{first}.html"/>', f'<meta http-equiv="refresh" content="0; url={first}.html"/>']
    lines = ['<!doctype html>', '<html lang="en">', '<meta charset="utf-8"/>', *head, f'<a href="{first}.html">Read</a>', "</html>"]
    (out / "index.html").write_text("\n".join(lines) + "\n", encoding="utf-8")


def finish(app: Sphinx, exception: Exception | None) -> None:
    if exception or app.builder.format != "html":
        return
    open_door(Path(app.outdir), app.config.root_doc)
    static = Path(app.outdir) / "_static"
    copy_mathjax(static)
    (static / "icons.css").write_text(icon_rules(), encoding="utf-8")
    for path in (*(static / name for name in UNUSED), *static.rglob("*.map")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for sheet in (static / "styles").glob("*.css"):  # no rule can load a font that is not declared
        rules = sheet.read_text(encoding="utf-8")
        sheet.write_text(re.sub(r"@font-face\s*\{[^}]*webfonts[^}]*\}", "", rules), encoding="utf-8")


def check_alternatives(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Every picture says in words what it shows."""
    for node in doctree.findall(lambda n: isinstance(n, (nodes.image, nodes.raw))):
        if isinstance(node, nodes.image):
            silent = not node.get("alt") or node["alt"].endswith((".png", ".svg", ".jpg"))
        else:
            drawings = re.findall(r"<(?:svg|img)\b[^>]*>", node.astext())
            silent = any(not re.search(r'(aria-label|alt)="[^"]|aria-hidden="true"', tag) for tag in drawings)
        if silent:
            LOG.warning(
                "a figure has no alternative text: end its cell with plotting.show(fig, alt='...')", location=page
            )


def pasted(found: re.Match) -> str:
    """A glued value as the book sets it: a minus is no hyphen, a power of ten no e, and a sentence is not bold."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", found[1])
    text = re.sub(r"(\d)e([+-])0*(\d+)", lambda e: f"{e[1]} × 10<sup>{'−' * (e[2] == '-')}{e[3]}</sup>", text)
    return f'<span class="pasted-text{" words" * (len(text.split()) > 4)}">{text}</span>'


def typeset(body: str) -> str:
    """Glued values in the book's typography, and no line that begins with a % or a comma; code and drawings as they are."""
    parts = re.split(r"(<pre.*?</pre>|<svg.*?</svg>|<script.*?</script>)", body, flags=re.DOTALL)
    formula = r'(<span class="math notranslate nohighlight">[^<]*</span>)([,.;:!?)\]”’]+)'
    for k in range(0, len(parts), 2):
        text = re.sub(r'<span class="pasted-text">(.*?)</span>', pasted, parts[k])
        text = re.sub(r"(\d|\d</span>|</sup></span>) %(?!\w)", "\\1\u00a0%", text)
        parts[k] = re.sub(formula, r'<span class="unbroken">\1\2</span>', text)
    return "".join(parts)


def accessible(body: str) -> str:
    """Mend labels that hide the visible words, formulas that only a mouse can scroll, and links in what unfolds a step."""
    body = body.replace(' aria-label="Toggle hidden content"', "")
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')  # its entries are no list items
    # The whole title opens the box.
    body = re.sub(r'(<p class="admonition-title">Solution to)<a\b[^>]*>(.*?)</a>', r"\1\2", body)
    body = re.sub(r"<summary>.*?</summary>", lambda found: re.sub(r"</?a\b[^>]*>", "", found[0]), body, flags=re.DOTALL)
    return body.replace('<div class="output text_latex', '<div tabindex="0" class="output text_latex')


def finish_page(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Mend the page's HTML and load the script of an interactive figure, or of the search page, where it belongs."""
    if page == "search":
        app.add_js_file("results.js", loading_method="defer")
    context["body"] = body = typeset(accessible(context.get("body", "")))
    for kind in sorted(set(re.findall(r'<div class="explorable (\w+)">', body))):
        app.add_js_file(f"{kind}.js", loading_method="defer")


def leave_section(self: CodeBlockAnalyser, node: nodes.section) -> None:
    """sphinx-codeautolink forgets the title of the section it leaves; exercises and proofs are sections without one."""
    if node.children and isinstance(node[0], nodes.title):
        self.title_stack.pop()


def share_handlers(app: Sphinx) -> None:
    """Let the one-page builder write every node that the site's builder can, not only those that name it."""
    handlers = app.registry.translation_handlers
    if "singlehtml" in handlers:
        handlers["singlehtml"] = handlers["html"] | handlers["singlehtml"]


class English(SearchEnglish):
    """Finds a name with its accents and without: Huszár and Huszar."""

    def split(self, input: str) -> list[str]:
        words = super().split(input)
        plain = (unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode() for word in words)
        return words + [p for p, word in zip(plain, words) if p != word and len(p) == len(word)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_search_language(English)
    app.add_css_file("icons.css", priority=890)
    app.add_css_file("book.css", priority=900)
    app.add_js_file("print.js", loading_method="defer")
    app.connect("builder-inited", share_handlers)
    CodeBlockAnalyser.depart_section = leave_section
    app.connect("doctree-resolved", check_alternatives)
    app.connect("html-page-context", finish_page)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
