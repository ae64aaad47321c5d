"""A cold build executes chapters side by side, and those that measure time alone."""

import pytest
import together
from tiny_book import build

EXTRA = 'extensions.append("together")\nnb_execution_cache_path = "{}/cache"'
MEET = """
from pathlib import Path
import time
folder = Path("{folder}")
(folder / "{me}").touch()
end = time.monotonic() + 60
while not (folder / "{other}").exists():
    assert time.monotonic() < end, "the other page is not executed at the same time"
    time.sleep(0.01)
print("{me} met {other}")
"""


def page(folder, me, other):
    return [("cell", MEET.format(folder=folder, me=me, other=other))]


def test_two_pages_run_at_the_same_time_and_are_read_from_the_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "AT_ONCE", 2)
    book = build(tmp_path, capsys, execute="cache", extra=EXTRA.format(tmp_path),
                 one=page(tmp_path, "one", "two"), two=page(tmp_path, "two", "one"))
    assert book.status == 0, book.messages
    assert "one met two" in book.html("one") and "two met one" in book.html("two")


def test_an_executed_page_is_not_executed_again(tmp_path, capsys):
    count = tmp_path / "count"
    cell = ("cell", f"open('{count}', 'a').write('x'); print('done')")
    for _ in range(2):
        assert build(tmp_path, capsys, execute="cache", extra=EXTRA.format(tmp_path), one=[cell]).status == 0
    assert count.read_text() == "x"


def test_a_page_that_measures_time_runs_alone_and_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "AT_ONCE", 2)
    slow = f"import time; time.sleep(0.5); open('{tmp_path}/slow', 'w')"
    first = f"from pathlib import Path; print('alone:', Path('{tmp_path}/slow').exists())"
    files = {"timed.md": "---\nalone: true\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n# Timed\n\n"
                         f"```{{code-cell}}\n{first}\n```\n"}
    book = build(tmp_path, capsys, execute="cache", files=files, slow=[("cell", slow)],
                 extra=EXTRA.format(tmp_path) + "\nsuppress_warnings = ['toc.not_included']")
    assert book.status == 0, book.messages
    assert "alone: True" in book.html("timed")


def test_a_failing_page_fails_the_build_with_the_chapter_the_cell_and_the_traceback(tmp_path, capsys):
    cells = [("cell", "zero = 0"), ("cell", "# the culprit\nprint(1 / zero)"), ("cell", "# never reached\nzero + 1")]
    book = build(tmp_path, capsys, execute="cache", extra=EXTRA.format(tmp_path), options=["-W"], one=cells)
    assert book.status != 0
    assert "one.ipynb:Executing notebook failed" in book.messages
    assert "# the culprit\nprint(1 / zero)" in book.messages and "# never reached" not in book.messages
    assert "ZeroDivisionError" in book.messages


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, (8, 1000)),  # no container
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, (8, 1000)),
        ({"cpu.max": "250000 100000\n", "memory.max": "600\n"}, (2, 600)),
        ({"cpu.max": "50000 100000\n"}, (1, 1000)),
        ({"cpu.max": "6400000 100000\n", "memory.max": "9000\n"}, (8, 1000)),
    ],
)
def test_a_container_has_no_more_than_it_is_granted(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert together.granted(8, 1000, tmp_path) == expected
