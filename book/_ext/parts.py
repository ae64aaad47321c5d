"""What the extensions share: parts of a page, and the order of the pages."""

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util.nodes import get_node_source


class fold(nodes.General, nodes.Element):
    """`<details>`; its first child is a `fold_summary`. Works by mouse and keyboard, and without JavaScript."""


class fold_summary(nodes.General, nodes.TextElement):
    """`<summary>`: the line that is always visible."""


def folded(summary, *children, classes=()):
    """A fold whose summary is the given nodes."""
    return fold("", fold_summary("", "", *summary), *children, classes=list(classes))


def table(head, rows, name):
    """A table; each cell is a list of inline nodes."""

    def row(cells):
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row([nodes.Text(text)] for text in head))
    group += nodes.tbody("", *map(row, rows))
    return nodes.table("", group, classes=[name])


def ancestor(node, element):
    """The part of a notebook's cell, by MyST-NB's name for it, that the node is in."""
    while node := node.parent:
        if isinstance(node, nodes.container) and node.get("nb_element") == element:
            return node


def secondary(formula):
    """Whether a formula is not the book's own statement: printed by a cell, or part of a docstring."""
    return ancestor(formula, "cell_code_output") is not None or "docstring of" in (get_node_source(formula) or "")


def pages(env):
    """The documents in reading order."""
    todo, seen = [env.config.root_doc], []
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.append(page)
            todo += reversed(env.toctree_includes.get(page, []))
    return seen + sorted(env.found_docs - set(seen))


def page_link(env, page):
    """A link to a page by its number, if it has one, and its title; to be resolved by Sphinx."""
    number = "".join(f"{part}. " for part in env.toc_secnumbers.get(page, {}).get("") or ())
    title = nodes.inline("", number + env.titles[page].astext())
    return addnodes.pending_xref(
        "", title, refdomain="std", reftype="doc", reftarget=f"/{page}", refdoc=env.docname, refexplicit=True
    )


def refuse(what, problems):
    """Fails the build, strict or not, if there are problems (page, line, message)."""
    if problems:
        listed = "\n".join(f"  {page}{f':{line}' if line else ''}: {message}" for page, line, message in problems)
        raise ExtensionError(f"{what} {len(problems)} problem(s):\n{listed}")


def setup(app):
    for node, tag in ((fold, "details"), (fold_summary, "summary")):
        app.add_node(
            node,
            html=(
                lambda self, node, tag=tag: self.body.append(self.starttag(node, tag, "")),
                lambda self, node, tag=tag: self.body.append(f"</{tag}>\n"),
            ),
        )
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
