"""Every chapter's download is a notebook of standard Markdown that runs on its own."""

import asyncio
import os
import re
import sys
from pathlib import Path

import nbformat
import notebooks
import pytest
import yaml
from build_book import code
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
EXECUTED = [page for page in PAGES if (ROOT / f"{page}.md").read_text().startswith("---\njupytext:")]
MYST = re.compile(r"^\s*(?:`{3,}|:{3,})\{|\{[a-z:]+\}`|\]\([\w-]+\.md\)|^\([\w-]+\)=$|\\class\{", flags=re.MULTILINE)


def download(site: Path, page: str) -> nbformat.NotebookNode:
    return nbformat.read(site / "_sources" / f"{page}.ipynb", as_version=4)


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        (r"x", "x"),
        (r"\class{sym sym-theta}{\theta}_i", r"\theta_i"),
        (r"a\class{sym sym-theta}{\theta}b", r"a\theta b"),
        (r"\frac{\class{sym sym-x}{x}}{2}", r"\frac{x}{2}"),
        (r"\class{sym sym-bar}{\bar{L}}(\class{s}{x})", r"\bar{L}(x)"),
        (r"\class{sym a}{F_{\class{sym b}{i}}}", r"F_{i}"),
    ],
)
def test_marks_of_symbols_leave_the_formulas(marked, plain):
    assert notebooks.plain_latex(marked) == plain


def test_a_figure_goes_out_as_png():
    output = nbformat.v4.new_output("display_data", data={"text/html": "<svg/>", "image/png": "AAAA", "text/plain": "x"})
    assert set(notebooks.portable(output)["data"]) == {"image/png", "text/plain"}


def test_glue_is_not_needed_outside_the_book(monkeypatch):
    monkeypatch.setitem(sys.modules, "myst_nb", None)  # as if it were not installed
    exec(notebooks.GLUE, {})
    from myst_nb import glue

    assert glue("name", 1.0, display=False) is None


def visible(text):
    """The cells whose code a reader sees without a click."""
    cells = re.findall(r"^`{3}\{code-cell\} ipython3\n(.*?)^`{3}", text, re.DOTALL | re.MULTILINE)
    return [cell for cell in cells if not re.search("hide-input|hide-cell|remove-cell|remove-input", cell)]


@pytest.mark.parametrize("page", EXECUTED)
def test_visible_code_fits_the_column(page):
    """At 1280 pixels it has room for 82 letters, in a solution for 78. A line that is longer would hide its end."""
    text = (ROOT / f"{page}.md").read_text()
    solutions = "".join(re.findall(r"\{solution-start\}.*?\{solution-end\}", text, re.DOTALL))
    for part, room in ((text, 82), (solutions, 78)):
        seen = visible(part)
        assert seen or part is solutions
        lines = [line for cell in seen for line in cell.splitlines() if len(line) > room and "alt=" not in line]
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("page", EXECUTED)
def test_visible_code_comes_in_pieces(page):
    """Twenty lines at most: a thought, and not a page. Plumbing is folded; a solution may be longer."""
    text = (ROOT / f"{page}.md").read_text()
    text = re.sub(r"\{solution-start\}.*?\{solution-end\}", "", text, flags=re.DOTALL)
    for cell in visible(text):
        assert cell.count("\n") <= 20, cell


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_the_text_is_standard_markdown(site, page):
    notebook = download(site, page)
    nbformat.validate(notebook)
    first, *rest = notebook.cells
    assert "pip install" in first.source and "import ewc" in first.source
    texts = [cell.source for cell in rest if cell.cell_type == "markdown"]
    assert texts[0].startswith("# ")
    for text in texts:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        left = MYST.search(re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))  # code may look like a role
        assert not left, left
        assert prose.count("$$") % 2 == 0
        assert len(re.findall(r"\\tag\{", prose)) <= prose.count("$$") // 2


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_every_cell_and_output_of_the_chapter_is_there(site, page):
    source = (ROOT / f"{page}.md").read_text()
    cells = [cell for cell in download(site, page).cells if cell.cell_type == "code"][1:]
    assert len(cells) == len(re.findall(r"^`{3,}\{code-cell\}", source, flags=re.MULTILINE))
    assert any(cell.outputs for cell in cells)
    figures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert all("text/html" not in figure["data"] for figure in figures)


@pytest.fixture(scope="module")
def runs(site, executed, request, tmp_path_factory) -> dict[str, tuple[Exception | None, list[str]]]:
    """Each page's error, if any, and the files that it left; the notebooks run side by side, as many as there are cores.

    Where the build has just executed exactly this code, from the set-up cell on and in an empty folder, that counts.
    """
    pages = [item.callspec.params["page"] for item in request.session.items
             if getattr(item, "originalname", "") == "test_the_notebook_runs_on_its_own"]
    settings = {"EWC_DATASET": "embedded", "EWC_SCALE": "quick", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT)}  # stands in for the set-up cell's installation
    places = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(page: str) -> tuple[Exception | None, list[str]]:
        notebook = download(site, page)
        if code(notebook) in executed:
            return None, executed[code(notebook)]
        folder, ipython = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("ipython")
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
        async with places:
            try:
                await client.async_execute(env=os.environ | settings | {"IPYTHONDIR": str(ipython)})
            except (CellExecutionError, CellTimeoutError) as error:
                return error, []
        return None, os.listdir(folder)

    async def everything():
        return await asyncio.gather(*map(run, pages))

    return dict(zip(pages, asyncio.run(everything())))


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_the_notebook_runs_on_its_own(runs, page):
    error, left = runs[page]
    if error is not None:
        pytest.fail(str(error), pytrace=False)
    assert not left, "a chapter leaves files behind"
