"""The reproducibility card at the foot of every executed page: what its numbers were computed with.

A page that comes out of the execution cache shows what was true when it was executed, so the facts that can change
without a new execution (the commit) are written down beside the cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx

DATA = {"mnist": "MNIST → Fashion-MNIST", "embedded": "digits → letters"}
SHOWN = ("python", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "sympy", "matplotlib")
SEED = re.compile(r"(?:manual_seed|default_rng|\bseeds?)\s*(?:=|\()\s*(range\(\d+\)|\[[\d, ]*\]|\d+)")


def seeds(code: str) -> list[str]:
    """Every seed that the code sets, once, lists taken apart; what is not written as a number is not told."""
    found = {n for seed in SEED.findall(code) for n in ([seed] if seed[0] == "r" else re.findall(r"\d+", seed))}
    return sorted(found, key=lambda seed: (seed[0] == "r", len(seed), seed))


def git(root: Path, *words: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(root), *words], check=False, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def commit(root: Path) -> str:
    """The commit that is checked out, and whether the files that pages depend on differ from it."""
    name = git(root, "rev-parse", "--short=10", "HEAD")
    changed = git(root, "status", "--porcelain", "--", "ewc", "book", "benchmarks", "requirements.txt")
    return (name + (" with local changes" if changed else "")) if name else "not a git checkout"


def executed(app: Sphinx, page: str) -> nbformat.NotebookNode | None:
    """The page's notebook as MyST-NB read it, or nothing if the page has no cells."""
    file = Path(app.outdir).parent / "jupyter_execute" / f"{page}.ipynb"
    if NbMetadataCollector.get_exec_data(app.env, page) is None or not file.exists():
        return None
    return nbformat.read(file, as_version=4)


def facts(app: Sphinx, page: str, notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The lines of the card, in order."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    record = Path(app.config.nb_execution_cache_path) / "cards" / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.json"
    if not record.exists():
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"commit": commit(Path(app.srcdir))}))
    runtime = NbMetadataCollector.get_exec_data(app.env, page)["runtime"]
    return {
        "Data": DATA[app.ewc_settings["data"]],
        "Scale": app.ewc_settings["scale"],
        "Device": app.ewc_settings["device"],
        "Seeds": ", ".join(seeds(code)) or "none set on this page",
        "Versions": ", ".join(f"{name} {app.ewc_versions[name]}" for name in SHOWN if name in app.ewc_versions),
        "Wall time": f"{runtime:.1f} s",
        "Commit": json.loads(record.read_text())["commit"],
    }


def add_card(app: Sphinx, doctree: nodes.document, page: str) -> None:
    notebook = executed(app, page)
    if notebook is None or not any(cell.cell_type == "code" for cell in notebook.cells):
        return
    rows = [
        nodes.definition_list_item("", nodes.term(text=name), nodes.definition("", nodes.paragraph(text=value)))
        for name, value in facts(app, page, notebook).items()
    ]
    title = nodes.paragraph("", "", nodes.strong(text="How this page was computed"))
    card = nodes.container("", title, nodes.definition_list("", *rows), classes=["reproducibility"])
    (next(doctree.findall(nodes.section), doctree)).append(card)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", add_card)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
