"""The whole book as one PDF, printed by Chromium: `python book/_ext/pdf.py` writes `_build/book.pdf`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TYPESET = """async () => {
  await MathJax.startup.promise;
  await MathJax.startup.document.lazyTypesetAll?.();
}"""


def main() -> None:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("The PDF is printed by Chromium, which is not on the path (on Debian and Ubuntu: apt install chromium).")
    from playwright.sync_api import sync_playwright

    cli = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    subprocess.run([*cli, "build", ".", "--builder", "singlehtml"], cwd=ROOT, check=True)
    folder = ROOT / "_build/singlehtml"
    pages = [file for file in folder.rglob("*.html") if "_static" not in file.parts]
    page = max(pages, key=lambda file: file.stat().st_size)  # one page holds the book; the rest lead to it
    whole = folder / "whole.html"
    if page != whole:
        shutil.copy2(page, whole)  # its style sheets are linked from the folder's root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.set_default_timeout(600_000)
        tab.goto(whole.as_uri())
        tab.evaluate(TYPESET)
        paper = {"format": "A4", "prefer_css_page_size": True, "print_background": True}
        tab.pdf(path=ROOT / "_build/book.pdf", tagged=True, outline=True, **paper)
        browser.close()
    print("The book is in _build/book.pdf.")


if __name__ == "__main__":
    main()
