"""The ledger of equations: every display equation is labelled, and defined, assumed or verified; else the build fails.

* `{definition}` and `{assumption}` declare an equation; the checks of `ewc.verify` are read from the cells' outputs.
* Each equation gets a mark beside its number that leads to its check, and the code that implements it, folded.
* `{derivation}` shows steps to unfold; `{ledger}` lists all equations; `_build/html/ledger.json` holds the same.
* `Implements: eq-...` in a docstring joins code and equation; the API page links back.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import parts
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

# kind: (mark beside the number, what it says in full, counted as)
KINDS = {
    "definition": ("definition", "Definition", "by definition"),
    "assumption": ("assumption", "Assumption", "assumed"),
    "exact": ("✓ exact", "Verified exactly", "verified exactly"),
    "numeric": ("✓ numeric", "Verified numerically", "verified numerically"),
    "sampled": ("✓ sampled", "Verified by sampling", "verified by sampling"),
}
CHECK = re.compile(r'<p class="check" data-label="([\w-]+)" data-kind="(\w+)">.*?</code>: (.*)</p>')
IMPLEMENTS = re.compile(r"^(\s*)Implements:\s*(.+?)\.?\s*$", re.MULTILINE)


class declaration(nodes.Inline, nodes.Element):
    """What a `{definition}` or `{assumption}` role leaves until the page is collected."""


class equation_link(nodes.Inline, nodes.Element):
    """A link to an equation that may be on a page not yet read: its number, or its label if there is no such."""


class ledger_table(nodes.General, nodes.Element):
    """Where `{ledger}` puts the table, once all pages are read."""


class Declare(SphinxRole):
    def run(self):
        return [declaration(label=self.text, kind=self.name, line=self.lineno)], []


class Implements(SphinxRole):
    def run(self):
        return [equation_link(label=self.text)], []


class Ledger(SphinxDirective):
    def run(self):
        return [ledger_table()]


class Derivation(SphinxDirective):
    """Steps of a derivation: a definition list of the rule used and the line it gives, unfolded one at a time."""

    required_arguments = 1
    has_content = True

    def run(self):
        body = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, body)
        steps = nodes.enumerated_list(classes=["derivation"], enumtype="arabic", prefix="", suffix=".")
        for i, item in enumerate(body.findall(nodes.definition_list_item)):
            rule, line = item.children[0].children, item.children[-1].children
            first = nodes.paragraph("", "", *rule, classes=["rule"])  # where it starts is never folded
            step = [parts.folded(rule, *line)] if i else [first, *line]
            steps += nodes.list_item("", *step)
        if len(steps) < 2 or any(not isinstance(child, nodes.definition_list) for child in body):
            raise self.error(
                "A derivation is a list of at least two steps, each the rule's name on one line and "
                "': $$ ... $$' on the next."
            )
        label = self.arguments[0]
        title = nodes.paragraph(
            "", "Derivation of ", equation_link(label=label), classes=["derivation-title"]
        )
        out = nodes.container("", title, steps, derivation=label)
        self.set_source_info(out)
        return [out]


# Collecting, page by page -----------------------------------------------------------------------------------------


def collect(app, doctree):
    """Note the page's equations, declarations and checks, and give each check's cell an anchor."""
    page = {"equations": {}, "declared": [], "checks": [], "derivations": [], "problems": []}
    app.env.metadata[app.env.docname]["ledger"] = page
    for node in list(doctree.findall(declaration)):
        page["declared"].append({k: node[k] for k in ("label", "kind", "line")})
        paragraph = node.parent
        paragraph.remove(node)
        if not paragraph.astext().strip():
            paragraph.parent.remove(paragraph)
    for node in list(doctree.findall(nodes.raw)):
        if match := CHECK.search(node.astext()):
            page["checks"].append(_anchor_check(node, page["checks"], *match.groups()))
    for node in doctree.findall(nodes.math_block):
        label = node.get("label")
        if label and label.startswith("eq-"):
            if label in page["equations"]:
                page["problems"].append((node.line, f"equation {label} appears twice on this page"))
            page["equations"][label] = node.line
        elif label:
            page["problems"].append((node.line, f"equation's label {label!r} must begin with eq-"))
        elif not (parts.secondary(node) or _in_derivation(node)):
            start = " ".join(node.astext().split())[:60]
            message = f"display equation without a label: {start!r}. Write $$ ... $$ (eq-some-name)"
            page["problems"].append((node.line, message))
    for node in doctree.findall(nodes.container):
        if "derivation" in node:
            page["derivations"].append({"label": node["derivation"], "line": node.line})


def _anchor_check(raw, earlier, label, kind, text):
    """Put a plain paragraph in place of the check's HTML, and an anchor on its cell."""
    again = sum(check["label"] == label for check in earlier)
    anchor = f"check-{label}" + (f"-{again + 1}" if again else "")
    text = html.unescape(text)
    line = nodes.paragraph("", "✓ ", equation_link(label=label), nodes.Text(f" {text}"), classes=["check"])
    (parts.ancestor(raw, "mime_bundle") or raw).replace_self(line)
    (parts.ancestor(line, "cell_code") or line)["ids"].append(anchor)
    return {"label": label, "kind": kind, "text": text, "anchor": anchor}


def _in_derivation(node):
    while node := node.parent:
        if "derivation" in getattr(node, "attributes", {}):
            return True
    return False


# The whole book ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A function, class or module whose docstring says `Implements: eq-...`."""

    name: str  # ewc.fisher.diagonal
    file: str  # ewc/fisher.py
    first: int
    last: int
    source: str

    @property
    def test(self) -> str:
        return f"tests/test_{Path(self.file).stem}.py"


def implementations(root: Path) -> dict[str, list[Code]]:
    """Equation's label -> the code in the package `ewc` under `root` that implements it; nothing is imported."""
    found: dict[str, list[Code]] = {}
    for path in sorted(root.glob("ewc/**/*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        names = path.relative_to(root).with_suffix("").parts
        module = ".".join(name for name in names if name != "__init__")
        todo = [(module, ast.parse(text))]
        while todo:
            name, node = todo.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                    todo.append((f"{name}.{child.name}", child))
            for label in labels(ast.get_docstring(node) or ""):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) if name != module else 1
                last = node.end_lineno if name != module else len(lines)
                source = dedent("\n".join(lines[first - 1 : last]))
                code = Code(name, path.relative_to(root).as_posix(), first, last, source)
                found.setdefault(label, []).append(code)
    for label, codes in found.items():  # a method says more than the class around it
        found[label] = [c for c in codes if not any(o.name.startswith(f"{c.name}.") for o in codes)]
    return found


def labels(docstring: str) -> list[str]:
    """The labels in a docstring's line `Implements: eq-one, eq-two`."""
    return [label.strip(" `") for match in IMPLEMENTS.finditer(docstring) for label in match[2].split(",")]


def number(env, page, label):
    """The equation's number as printed, such as 3.2."""
    numbers = (
        env.toc_fignumbers.get(page, {}).get("displaymath", {}).get(nodes.make_id(f"equation-{label}"), ())
    )
    return ".".join(map(str, numbers))


def rows(app):
    """One dictionary per labelled equation, in reading order."""
    env, out = app.env, []
    noted = {page: env.metadata[page].get("ledger") for page in parts.pages(env)}
    noted = {page: notes for page, notes in noted.items() if notes}
    for page, notes in noted.items():
        for label, line in notes["equations"].items():
            declared = [
                d["kind"] for other in noted.values() for d in other["declared"] if d["label"] == label
            ]
            checks = [(p, c) for p, other in noted.items() for c in other["checks"] if c["label"] == label]
            kinds = declared or sorted((c["kind"] for _, c in checks), key=list(KINDS).index)
            row = {"label": label, "page": page, "number": number(env, page, label), "line": line}
            row |= {"kind": kinds[0] if kinds else None, "declared": declared, "checks": checks}
            out.append(row | {"code": app.ledger_code.get(label, [])})
    return out


def problems(app):
    """Everything that is wrong with the book's equations, as (page, line, message)."""
    env, equations, out = app.env, rows(app), []
    known = {row["label"]: row for row in equations}
    for label, times in Counter(row["label"] for row in equations).items():
        if times > 1:
            where = ", ".join(row["page"] for row in equations if row["label"] == label)
            out.append(
                (known[label]["page"], known[label]["line"], f"{label} labels {times} equations: {where}")
            )
    for row in equations:
        kinds = {*row["declared"], *(check["kind"] for _, check in row["checks"])}
        if not kinds:
            message = (
                "is neither checked by a cell (verify.exact, close or sampled) nor declared a definition or "
            )
            message += f"an assumption (write {{definition}}`{row['label']}` under it)"
        elif {"definition", "assumption"} <= kinds:
            message = "is declared both a definition and an assumption; keep one"
        elif "assumption" in kinds and row["checks"]:
            message = "is declared an assumption and also checked; what is verified need not be assumed"
        else:
            continue
        out.append((row["page"], row["line"], f"{row['label']} {message}"))
    for page in parts.pages(env):
        notes = env.metadata[page].get("ledger") or {}
        out += [(page, line, message) for line, message in notes.get("problems", [])]
        for item in notes.get("declared", []) + notes.get("checks", []):
            if item["label"] not in known:
                how = "check of" if "anchor" in item else f"{item['kind']} declared for"
                out.append((page, item.get("line"), f"{how} {item['label']}, but no equation has that label"))
        for item in notes.get("derivations", []):
            checks = known.get(item["label"], {}).get("checks", [])
            if not any(check["kind"] == "exact" for _, check in checks):
                message = f"the derivation of {item['label']} is not proved: pass its lines to verify.exact"
                out.append((page, item["line"], message))
    if app.config.ledger_require_code_targets:
        for label, codes in app.ledger_code.items():
            if label not in known:
                message = f"{codes[0].name} implements {label}, but no equation has that label"
                out.append((app.config.root_doc, None, message))
    return out


def configure(app, config):
    config.nb_render_markdown_format = "myst"  # equations that verify.show prints have labels


def read_code(app):
    app.ledger_code = implementations(Path(app.srcdir))


def finish(app, exception):
    """Fail, strict or not, if any equation is unaccounted for; the pages are there to be looked at."""
    if exception or app.builder.format != "html":
        return
    parts.refuse("the ledger of equations has", problems(app))
    book = []
    for row in rows(app):
        check = [f"{app.builder.get_target_uri(page)}#{check['anchor']}" for page, check in row["checks"]]
        names = [code.name for code in row["code"]]
        keep = {key: row[key] for key in ("label", "page", "number", "kind")}
        book.append(keep | {"check": check[0] if check else None, "code": names})
    Path(app.outdir, "ledger.json").write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")


# Writing ----------------------------------------------------------------------------------------------------------


class Write(SphinxPostTransform):
    """Put marks and code beside the equations, links and the table; before Sphinx resolves the references."""

    default_priority = 6

    def run(self, **kwargs):
        self.rows = {row["label"]: row for row in rows(self.app)}
        for node in list(self.document.findall(ledger_table)):
            node.replace_self(self.table())
        for node in list(self.document.findall(nodes.math_block)):
            if row := self.rows.get(node.get("label")):
                box = nodes.container(classes=["equation"])
                node.replace_self(box)
                box += [node, self.mark(row), *map(self.code, row["code"])]
        for node in list(self.document.findall(equation_link)):
            node.replace_self(self.link(node["label"]))

    def link(self, label):
        if label not in self.rows:
            return nodes.literal("", label)
        link = addnodes.pending_xref(
            "", refdomain="math", reftype="eq", reftarget=label, refdoc=self.env.docname, refwarn=True
        )
        link += nodes.literal("", label)
        return link

    def mark(self, row):
        """How the equation is known, in a word that leads to the check."""
        kind = row["kind"]
        if kind is None:
            return nodes.inline("", "unverified", classes=["known"])
        word, title, _ = KINDS[kind]
        if not row["checks"]:
            return nodes.inline("", word, classes=["known", f"mark-{kind}"])
        page, check = row["checks"][0]
        title += (
            f": {check['text']}" if kind == check["kind"] else f", with a check of the code: {check['text']}"
        )
        here = self.env.docname
        uri = "" if page == here else self.app.builder.get_relative_uri(here, page)
        uri += f"#{check['anchor']}"
        return nodes.inline(
            "",
            "",
            nodes.reference("", word, refuri=uri, internal=True, reftitle=title),
            classes=["known", f"mark-{kind}"],
        )

    def code(self, code):
        """The code that implements an equation, folded, with links to the API page and the repository."""
        file = self.repository_link(code.file, code.first, code.last)
        links = nodes.paragraph("", "", *self.object_link(code), nodes.Text(" in "), file)
        listing = nodes.literal_block(code.source, code.source, language="python", linenos=True)
        listing["highlight_args"] = {"linenostart": code.first}
        summary = [nodes.Text("code: "), nodes.literal("", code.name)]
        return parts.folded(summary, links, listing, classes=["equation-code"])

    def object_link(self, code):
        name = nodes.literal()
        for part in re.split(r"(?<=[._])", code.name):  # a narrow column breaks it there
            name += [nodes.Text(part), nodes.raw("", "<wbr>", format="html")]
        if code.name not in self.env.get_domain("py").objects:
            return [name]
        return [
            addnodes.pending_xref(
                "", name, refdomain="py", reftype="obj", reftarget=code.name, refdoc=self.env.docname
            )
        ]

    def repository_link(self, file, first=None, last=None):
        """The file in the repository, at these lines if they are given."""
        options = self.config.html_theme_options
        uri = f"{options.get('repository_url', '')}/blob/{options.get('repository_branch', 'main')}/{file}"
        if first is None:
            return nodes.reference("", "", nodes.literal("", file), refuri=uri)
        return nodes.reference("", f"{file}, lines {first}–{last}", refuri=f"{uri}#L{first}-L{last}")

    def table(self):
        """The whole ledger, and how many of each kind."""
        equations = list(self.rows.values())
        counts = Counter(row["kind"] for row in equations)
        text = ", ".join(f"{counts[kind]} {KINDS[kind][2]}" for kind in KINDS if counts[kind])
        out = [
            nodes.paragraph(
                "",
                f"{len(equations)} equation{'s' * (len(equations) != 1)}: {text}.",
                classes=["ledger-count"],
            )
        ]
        body = []
        for row in equations:
            code = [n for code in row["code"] for n in (*self.object_link(code), nodes.Text(" "))]
            tests = sorted({code.test for code in row["code"] if Path(self.app.srcdir, code.test).exists()})
            body.append(
                [
                    [self.link(row["label"]), nodes.Text(" "), nodes.literal("", row["label"])],
                    [parts.page_link(self.env, row["page"])],
                    [self.mark(row)],
                    [*code, *(n for test in tests for n in (self.repository_link(test), nodes.Text(" ")))],
                ]
            )
        return [*out, parts.table(["Equation", "Page", "How it is known", "Code and test"], body, "ledger")]


def link_docstrings(app, what, name, obj, options, lines):
    """In an API page: `Implements: eq-...` as a paragraph of links to the equations."""
    for i, line in reversed(list(enumerate(lines))):
        if match := IMPLEMENTS.match(line):
            roles = ", ".join(f":implements:`{label}`" for label in labels(line))
            lines[i : i + 1] = ["", f"{match[1]}**Implements:** {roles}", ""]


def setup(app):
    for extension in ("parts", "sphinx.ext.autodoc"):
        app.setup_extension(extension)
    # Required once every chapter is written: until then code may name equations of chapters to come.
    app.add_config_value("ledger_require_code_targets", False, "env")
    for kind in ("definition", "assumption"):
        app.add_role(kind, Declare())
    app.add_role("implements", Implements())
    app.add_directive("ledger", Ledger)
    app.add_directive("derivation", Derivation)
    app.connect("config-inited", configure)
    app.connect("builder-inited", read_code)
    app.connect("doctree-read", collect)
    app.connect("build-finished", finish)
    app.connect("autodoc-process-docstring", link_docstrings, priority=100)
    app.add_post_transform(Write)
    app.add_css_file("ledger.css")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
