"""Builds books of a page or two with the book's own extensions, in a temporary folder."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import nbformat
from sphinx.cmd.build import main

from ewc import verify

CONFIG = """
extensions = ["myst_nb", "ledger", "symbols"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
nb_execution_mode = "{execute}"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
root_doc = "index"
numfig = True
html_theme = "basic"
html_static_path = ["{static}"]
{extra}
"""
SYMBOLS = r"""
theta: {tex: '\theta', name: parameters, meaning: what is learned, shape: '(P,)', unit: none, code: [theta]}
theta-star: {tex: '\theta^*', name: anchor, meaning: the old optimum, shape: '(P,)', unit: none, code: [theta_star]}
fisher: {tex: F, name: Fisher, meaning: curvature, shape: '(P,)', unit: nats, code: [fisher]}
"""


@dataclass
class Book:
    """What a build left behind."""

    status: int
    messages: str
    folder: Path

    @property
    def ledger(self) -> list[dict]:
        return json.loads((self.folder / "_build/ledger.json").read_text())

    def html(self, page: str = "one") -> str:
        return (self.folder / f"_build/{page}.html").read_text(encoding="utf-8")


def outputs(check) -> list[dict]:
    """What a notebook's cell displays when it makes this check."""
    bundles = []
    original, verify._display = verify._display, bundles.append
    try:
        check()
    finally:
        verify._display = original
    return [nbformat.v4.new_output("display_data", data=bundle) for bundle in bundles]


def build(folder: Path, capsys, *, execute="off", extra="", options=(), files=None, **pages) -> Book:
    """Build the pages: each a list of Markdown strings, of checks to call, and of ('cell', code) to execute."""
    root = Path(__file__).parents[1]
    folder = Path(tempfile.mkdtemp(dir=folder))
    config = CONFIG.format(execute=execute, extra=extra, static=root / "book/_static")
    texts = {"conf.py": config, "book/symbols.yml": SYMBOLS} | (files or {})
    toc = "\n".join(pages)
    texts["index.md"] = f"# Book\n\n```{{toctree}}\n:numbered:\n{toc}\n```\n"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, parts in pages.items():
        cells = [nbformat.v4.new_markdown_cell(f"# Chapter {name}")]
        for part in parts:
            if isinstance(part, str):
                cells.append(nbformat.v4.new_markdown_cell(part))
            elif isinstance(part, tuple):
                cells.append(nbformat.v4.new_code_cell(part[1]))
            else:
                cells.append(nbformat.v4.new_code_cell("verify...", outputs=outputs(part)))
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's libraries
        status = main(["-q", "-N", "-b", "html", *options, str(folder), str(folder / "_build")])
    return Book(status, capsys.readouterr().err, folder)
