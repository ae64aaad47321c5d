"""The built book, which the tests of the site and of the notebooks share.

It takes minutes, and so do the tests that need no book: both happen at the same time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "_build/test"  # apart from the reader's own build, which may be of other data
torch.set_num_threads(1)  # the tests' tensors are small, and the other cores build the book


class Book:
    """The strict build on the embedded data at quick scale, as a process of its own; nothing is built that is fresh."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.record = Path(self.folder.name, "executed.json")
        self.output = Path(self.folder.name, "output")
        program = [sys.executable, str(ROOT / "tests/build_book.py"), str(self.record)]
        arguments = ["build", ".", "--path-output", str(BUILD), "-W", "-n", "--keep-going"]
        settings = os.environ | {"EWC_DATASET": "embedded", "EWC_SCALE": "quick"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*program, *arguments], cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # as at a keyboard: the kernels end, too
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.folder.cleanup()


BOOK = pytest.StashKey[Book]()


def needs_site(item: pytest.Item) -> bool:
    return "site" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=needs_site)  # they come last, in the order in which they were


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if any(map(needs_site, session.items)) and not session.config.option.collectonly:
        session.config.stash[BOOK] = Book()


def pytest_unconfigure(config: pytest.Config) -> None:
    if BOOK in config.stash:
        config.stash[BOOK].stop()


@pytest.fixture(scope="session")
def site(pytestconfig) -> Path:
    """The folder of the built site."""
    book = pytestconfig.stash[BOOK]
    if book.process.wait():
        lines = book.output.read_text().splitlines()
        problems = [line for line in lines if "WARNING" in line or "rror" in line] + lines[-30:]
        pytest.fail("the book does not build:\n" + "\n".join(problems), pytrace=False)
    return BUILD / "_build/html"


@pytest.fixture(scope="session")
def executed(site, pytestconfig) -> dict[str, list[str]]:
    """The code of the chapters that this build has executed, and the files that each left; see `build_book`."""
    record = pytestconfig.stash[BOOK].record
    return json.loads(record.read_text()) if record.exists() else {}
