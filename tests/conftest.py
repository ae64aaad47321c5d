"""The built book, which the tests of the site and of the notebooks share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "_build/test"  # apart from the reader's own build, which may be of other data


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the strictly built site, on the embedded data at quick scale; nothing is built that is fresh."""
    jupyter_book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    build = [*jupyter_book, "build", ".", "--path-output", str(BUILD), "-W", "-n", "--keep-going"]
    settings = os.environ | {"EWC_DATASET": "embedded", "EWC_SCALE": "quick"}
    run = subprocess.run(build, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    if run.returncode:
        problems = [line for line in (run.stdout + run.stderr).splitlines() if "WARNING" in line or "rror" in line]
        pytest.fail("the book does not build:\n" + "\n".join(problems or run.stderr.splitlines()[-30:]), pytrace=False)
    return BUILD / "_build/html"
