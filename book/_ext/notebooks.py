"""Every chapter as a notebook that runs anywhere: standard Markdown and LaTeX, outputs kept, a set-up cell first.

The text is written from the resolved page (numbers, references, glued values, included code and all), not from its
source, so that whatever a directive or a role of the book renders to arrives in the notebook too.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin

import card
import nbformat
from docutils import nodes
from jupyter_cache import get_cache
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number

SETUP = """\
# Runs this chapter anywhere: installs the book's package where it is missing (Colab, Binder, your own machine).
try:
    import ewc
except ModuleNotFoundError:
    %pip install -q "git+{repository}"
"""
GLUE = """\
try:
    import myst_nb
except ModuleNotFoundError:  # `glue` carries numbers into the book's text; a notebook does without
    import sys, types
    sys.modules["myst_nb"] = types.SimpleNamespace(glue=lambda *args, **kwargs: None)
"""
NUMBERED = ("theorem", "lemma", "corollary", "proposition", "definition", "example", "exercise")
SILENT = (nodes.comment, nodes.target, nodes.substitution_definition, nodes.system_message, addnodes.index, addnodes.toctree)


def plain_latex(latex: str) -> str:
    r"""Undo `\class{name}{...}`, which marks the symbols for the page and which only MathJax knows."""
    while (start := latex.find(r"\class{")) >= 0:
        body = latex.index("}", start) + 1
        depth, end = 1, body + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(latex[end], 0) if latex[end - 1] != "\\" else 0
            end += 1
        inner = latex[body + 1 : end - 1]
        gap = " " if re.search(r"\\[A-Za-z]+$", inner) and latex[end : end + 1].isalpha() else ""  # \theta x, not \thetax
        latex = latex[:start] + inner + gap + latex[end:]
    return latex


class Writer(nodes.NodeVisitor):
    """Docutils nodes to the cells of a notebook."""

    def __init__(self, document: nodes.document, cells: list, app: Sphinx, page: str):
        super().__init__(document)
        self.code, self.app = cells, app
        self.page_url = urljoin(app.config.html_baseurl, app.builder.get_target_uri(page))
        self.numbers = app.env.toc_fignumbers.get(page, {})  # kind -> id -> number of the chapter and within it
        self.cells, self.text, self.done = [], "", 0

    def flush(self) -> None:
        text = re.sub(r"\n{3,}", "\n\n", self.text).strip()
        if text:
            self.cells.append(nbformat.v4.new_markdown_cell(text))
        self.text = ""

    def code_up_to(self, index: int) -> None:
        """Every code cell before `index`: hidden cells leave no trace in the page but their names are needed."""
        self.flush()
        self.cells += [cell for cell in self.code[self.done : index] if cell.cell_type == "code"]
        self.done = index

    def finish(self) -> list:
        self.code_up_to(len(self.code))
        return self.cells

    def number(self, kind: str, node: nodes.Element) -> str:
        """The number that the page gives to a figure, a theorem, an exercise; empty if it has none."""
        return next((".".join(map(str, self.numbers[kind][i])) for i in node["ids"] if i in self.numbers.get(kind, {})), "")

    # Blocks
    def block(self, text: str) -> None:
        self.text = self.text.rstrip() + f"\n\n{text}\n\n"

    def inside(self, node: nodes.Node) -> str:
        """The Markdown of a node's children; code cells among them end the current text cell."""
        before, self.text = self.text, ""
        mark = len(self.cells)
        for child in node.children:
            child.walkabout(self)
        if len(self.cells) > mark:  # code came out: the text before it belongs before it
            if before.strip():
                self.cells.insert(mark, nbformat.v4.new_markdown_cell(before.strip()))
            before = ""
        text, self.text = self.text, before
        return text

    def unknown_visit(self, node: nodes.Node) -> None:
        if isinstance(node, SILENT):
            raise nodes.SkipNode

    def unknown_departure(self, node: nodes.Node) -> None:
        pass

    def visit_Text(self, node: nodes.Text) -> None:
        self.text += re.sub(r"\s+", " ", node.astext()).replace("$", r"\$")

    def visit_container(self, node: nodes.container) -> None:
        if node.get("nb_element") == "cell_code":
            self.code_up_to(node["cell_index"] + 1)
            for figure in node.findall(nodes.figure):
                for caption in figure.findall(nodes.caption):
                    self.block(f"*Fig. {self.number('figure', figure)}*: {self.inside(caption).strip()}")
            raise nodes.SkipNode
        if "reproducibility" in node["classes"]:
            self.block("---")

    def visit_inline(self, node: nodes.inline) -> None:
        if "known" in node["classes"]:
            raise nodes.SkipNode  # the mark beside an equation: its check is a cell of the notebook

    def visit_fold(self, node: nodes.Element) -> None:
        if "symbols" in node["classes"]:  # the table of symbols, without the way to use it in the page
            for table in node.findall(nodes.table):
                table.walkabout(self)
            raise nodes.SkipNode

    def visit_fold_summary(self, node: nodes.Element) -> None:
        self.block(f"**{self.inside(node).strip()}**")
        raise nodes.SkipNode

    def visit_raw(self, node: nodes.raw) -> None:
        raise nodes.SkipNode  # marks, scripts and drawings of the page

    def visit_title(self, node: nodes.title) -> None:
        if isinstance(node.parent, nodes.section):
            level, parent = 0, node.parent
            while isinstance(parent, nodes.section):
                level, parent = level + 1, parent.parent
            self.block("#" * level + " " + self.inside(node).strip())
        else:
            kind = next((c for c in node.parent["classes"] if c in NUMBERED), "")
            kind = f"{kind.capitalize()} {self.number(kind, node.parent)}".strip()
            self.block(f"**{kind} {self.inside(node).strip()}**".replace("** ", "**").replace(" **", "**"))
        raise nodes.SkipNode

    def visit_paragraph(self, node: nodes.paragraph) -> None:
        self.block(self.inside(node).strip())
        raise nodes.SkipNode

    visit_attribution = visit_rubric = visit_paragraph

    def visit_caption(self, node: nodes.caption) -> None:
        self.block(f"*{self.inside(node).strip()}*")
        raise nodes.SkipNode

    def visit_footnote(self, node: nodes.footnote) -> None:
        label, *body = node.children
        self.block(f"[{label.astext()}] " + " ".join(" ".join(map(self.inside, body)).split()))
        raise nodes.SkipNode

    def visit_math_block(self, node: nodes.math_block) -> None:
        latex = plain_latex(node.astext()).strip()
        number = node.get("number") and get_node_equation_number(SimpleNamespace(builder=self.app.builder), node)
        if number and r"\tag" not in latex:
            lines = r"\\" in re.sub(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", latex, flags=re.DOTALL)
            latex = rf"\begin{{split}}{latex}\end{{split}}" if lines else latex
            latex += rf" \tag{{{number}}}"
        self.block(f"$$\n{latex}\n$$")
        raise nodes.SkipNode

    def visit_literal_block(self, node: nodes.literal_block) -> None:
        language = node.get("language", "") if node.get("language") not in ("default", "ipython3") else "python"
        self.block(f"```{language}\n{node.astext().rstrip()}\n```")
        raise nodes.SkipNode

    def visit_admonition(self, node: nodes.Element) -> None:
        title = node.next_node(nodes.title) if node.children and isinstance(node[0], nodes.title) else None
        text = self.inside(node).strip()
        if title is None and not isinstance(node, nodes.admonition):
            text = f"**{node.tagname.capitalize()}**\n\n{text}"
        self.block(re.sub("^", "> ", text, flags=re.MULTILINE) if text.strip("*") else "")
        raise nodes.SkipNode

    visit_note = visit_warning = visit_tip = visit_important = visit_hint = visit_caution = visit_attention = visit_admonition
    visit_danger = visit_error = visit_seealso = visit_admonition

    def visit_block_quote(self, node: nodes.Element) -> None:
        self.block(re.sub("^", "> ", self.inside(node).strip(), flags=re.MULTILINE))
        raise nodes.SkipNode

    def visit_bullet_list(self, node: nodes.Element) -> None:
        items = []
        for k, item in enumerate(node.children):
            mark = f"{k + node.get('start', 1)}. " if isinstance(node, nodes.enumerated_list) else "- "
            items.append(mark + self.inside(item).strip().replace("\n", "\n" + " " * len(mark)))
        self.block(("\n" if all("\n\n" not in item for item in items) else "\n\n").join(items))
        raise nodes.SkipNode

    visit_enumerated_list = visit_bullet_list

    def visit_definition_list_item(self, node: nodes.Element) -> None:
        terms = [self.inside(child).strip() for child in node.children if isinstance(child, nodes.term)]
        body = [self.inside(child).strip() for child in node.children if isinstance(child, nodes.definition)]
        self.block(f"**{', '.join(terms)}**: " + " ".join(body))
        raise nodes.SkipNode

    def visit_table(self, node: nodes.table) -> None:
        rows = [
            [re.sub(r"\s*\n\s*", " ", self.inside(entry).strip()).replace("|", r"\|") for entry in row.children]
            for row in node.findall(nodes.row)
        ]
        title = next((child for child in node.children if isinstance(child, nodes.title)), None)
        if title is not None:
            self.block(f"*{self.inside(title).strip()}*")
        rows.insert(1, ["---"] * len(rows[0]))
        self.block("\n".join("| " + " | ".join(row) + " |" for row in rows))
        raise nodes.SkipNode

    def visit_transition(self, node: nodes.Node) -> None:
        self.block("---")

    # Inline
    def wrap(self, node: nodes.Node, mark: str) -> None:
        text = self.inside(node)
        self.text += f"{mark}{text.strip()}{mark}" if text.strip() else ""
        raise nodes.SkipNode

    def visit_emphasis(self, node: nodes.Node) -> None:
        self.wrap(node, "*")

    def visit_strong(self, node: nodes.Node) -> None:
        self.wrap(node, "**")

    def visit_literal(self, node: nodes.literal) -> None:
        self.text += f"`{node.astext()}`"
        raise nodes.SkipNode

    def visit_math(self, node: nodes.math) -> None:
        self.text += f"${plain_latex(node.astext()).strip()}$"
        raise nodes.SkipNode

    def visit_reference(self, node: nodes.reference) -> None:
        text = self.inside(node)
        uri = node.get("refuri", "")
        inside_page = not uri or uri.startswith("#")
        self.text += text if inside_page else f"[{text}]({urljoin(self.page_url, uri)})"
        raise nodes.SkipNode

    def visit_image(self, node: nodes.image) -> None:
        if "://" in node["uri"]:
            self.text += f"![{node.get('alt', '')}]({node['uri']})"
        raise nodes.SkipNode

    def visit_footnote_reference(self, node: nodes.Node) -> None:
        self.text += f"[{node.astext()}]"
        raise nodes.SkipNode


def executed_notebook(app: Sphinx, page: str) -> nbformat.NotebookNode | None:
    """The page's notebook with its outputs (the one that MyST-NB writes lacks them when they come from the cache)."""
    notebook = card.executed(app, page)
    if notebook is not None:
        _, notebook = get_cache(app.config.nb_execution_cache_path).merge_match_into_notebook(notebook)
    return notebook


def portable(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A figure as PNG: hosts that show notebooks remove inline SVG."""
    if "image/png" in output.get("data", {}):
        output["data"].pop("text/html", None)
    return output


def convert(app: Sphinx, page: str, doctree: nodes.document) -> nbformat.NotebookNode | None:
    source = executed_notebook(app, page)
    if source is None:
        return None
    for number, cell in enumerate(source.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        if cell.cell_type == "code":
            hidden = "remove-cell" in cell["metadata"].get("tags", [])
            cell["outputs"] = [] if hidden else [portable(output) for output in cell["outputs"]]
    writer = Writer(doctree, source.cells, app, page)
    doctree.walkabout(writer)
    cells = writer.finish()
    setup_code = SETUP.format(repository=app.config.html_theme_options["repository_url"])
    if any("myst_nb" in cell.source for cell in cells):
        setup_code += GLUE
    cells.insert(0, nbformat.v4.new_code_cell(setup_code))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same file from the same page
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "ewc": card.facts(app, page, source)}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write_download(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Put the notebook where the download button looks for it, and point Colab and Binder at the published one."""
    if app.builder.name != "html" or doctree is None or "header_buttons" not in context:
        return  # not a chapter of the site
    notebook = convert(app, page, doctree)
    if notebook is None:
        return
    file = Path(app.outdir) / "_sources" / f"{page}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)
    name = app.config.html_theme_options["repository_url"].split("github.com/")[1].strip("/")
    links = {
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{app.config.ewc_published}/_sources/{page}.ipynb",
        "Binder": f"https://mybinder.org/v2/gh/{name}/{app.config.ewc_published}?labpath=_sources/{page}.ipynb",
    }
    for group in context["header_buttons"]:
        for button in group.get("buttons", []):
            if button.get("text") in links:
                button["url"] = links[button["text"]]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("ewc_published", "gh-pages", "html")  # the branch that holds the built site
    app.connect("html-page-context", write_download, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
