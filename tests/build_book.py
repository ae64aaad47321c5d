"""Builds the book for the tests: `python tests/build_book.py RECORD ARGUMENTS...` is `jupyter-book ARGUMENTS...`.

With one difference: a chapter that is due is executed as a reader executes its download, the set-up cell first and in
an empty folder. The file RECORD then tells which code ran through, and what it left in the folder.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def code(notebook: nbformat.NotebookNode) -> str:
    """All that its execution depends on: the kernel, the cells of code, and their tags."""
    cells = [[cell.source, cell.metadata.get("tags", [])] for cell in notebook.cells if cell.cell_type == "code"]
    return json.dumps([notebook.metadata.kernelspec.name, cells])


def main(record: Path, arguments: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "book/_ext"))
    import notebooks
    import together
    from jupyter_book.cli.main import main as jupyter_book

    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    executed: dict[str, list[str]] = {}

    class AsDownloaded(NotebookClient):
        async def async_execute(self, *args, **kwargs):
            setup = notebooks.SETUP.format(repository=repository)
            if any("myst_nb" in cell.source for cell in self.nb.cells):
                setup += notebooks.GLUE
            self.nb.cells.insert(0, nbformat.v4.new_code_cell(setup))
            with TemporaryDirectory() as folder:
                self.resources["metadata"]["path"] = folder
                await super().async_execute(*args, **kwargs)
                executed[code(self.nb)] = os.listdir(folder)
            record.write_text(json.dumps(executed))
            del self.nb.cells[0]
            return self.nb

    together.NotebookClient = AsDownloaded
    jupyter_book(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
