"""The built site in a real browser: every page, light, dark and narrow, with no host but its own."""

import contextlib
import functools
import gzip
import http.server
import os
import queue
import shutil
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from bs4 import BeautifulSoup
from sphinx.cmd.build import main

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ROOT = Path(__file__).parent.parent
PREFIX = "/ewc-book/"  # where GitHub Pages serves it; the page for what is not found links by this path
AXE = ROOT / "node_modules/axe-core/axe.min.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SERIOUS = """async only => {
  const found = await axe.run(document, {resultTypes: ["violations"], ...only && {runOnly: only}});
  return found.violations.filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => `${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160) + " " + n.failureSummary.slice(0, 200)).join(" | ")}`);
}"""
TYPESET = """async () => {
  if (!window.MathJax?.startup?.promise) return 0;
  await MathJax.startup.promise;
  await MathJax.startup.document.lazyTypesetAll?.();
  return document.querySelectorAll("mjx-merror").length;
}"""
WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
SMALL = """() => [...document.querySelectorAll("svg.ewc-figure")].filter(svg => svg.checkVisibility())
  .map(svg => 9 * svg.clientWidth / svg.viewBox.baseVal.width).filter(height => height < 9.5)"""  # their letters have 9 pt
STILL = "*, ::before, ::after { transition: none !important; animation: none !important; }"
UNREACHABLE = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [role=button]")]
  .filter(e => e.tabIndex < 0 && !e.disabled && e.checkVisibility({visibilityProperty: true}) && !e.closest("[inert], [aria-hidden=true]"))
  .map(e => e.outerHTML.slice(0, 160))"""
NO_ICON = """() => [...document.querySelectorAll("[class*='fa-']")].filter(e => getComputedStyle(e).maskImage === "none")
  .map(e => e.className)"""


def missing(what: str) -> None:
    """No reason to fail on a reader's machine; every reason to fail where the project is checked."""
    if os.environ.get("CI"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


class Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.removeprefix(PREFIX) if path.startswith(PREFIX) else "/absent")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def server(site):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}{PREFIX}"
        running.shutdown()


@contextlib.contextmanager
def chromium():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("no Chromium on the path: the site's tests need one (on Debian and Ubuntu: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")  # while it lives, its event loop lets no other run in this thread
def browser():
    with chromium() as running:
        yield running


@dataclass
class Visit:
    """What was seen on one page."""

    foreign: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    formula_errors: int = 0
    wider: dict[str, int] = field(default_factory=dict)
    axe: dict[str, list[str]] = field(default_factory=dict)
    small: list[float] = field(default_factory=list)  # height of the letters in figures that are too small on a phone
    no_icon: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)  # the address of every file that came


def open_page(browser, server: str, page: str = "", visit: Visit | None = None, **options):
    """A new tab that may talk to the server alone, and notes everything that is wrong."""
    visit = visit or Visit()
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    tab = context.new_page()

    def guard(route) -> None:
        if route.request.url.startswith(server):
            route.continue_()
        else:
            visit.foreign.append(route.request.url)
            route.abort()

    tab.route(lambda url: not url.startswith("data:"), guard)
    tab.on("console", lambda message: message.type in ("error", "warning") and visit.console.append(message.text))
    tab.on("pageerror", lambda error: visit.console.append(str(error)))
    tab.on("response", lambda response: (visit.failed if response.status >= 400 else visit.answered).append(response.url))
    tab.goto(server + page)
    tab.wait_for_load_state("networkidle")
    return tab


def pages_of(site: Path) -> list[str]:
    return sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html"))


def chapters_of(site: Path) -> list[str]:
    return [page for page in pages_of(site) if page.startswith("book/")]


def look(browser, server: str, page: str) -> Visit:
    """The page typeset in full, checked in light and dark, then made as narrow as a phone."""
    visit = Visit()
    tab = open_page(browser, server, page, visit)
    visit.no_icon = tab.evaluate(NO_ICON)
    visit.formula_errors = tab.evaluate(TYPESET)
    tab.wait_for_load_state("networkidle")
    visit.unreachable = tab.evaluate(UNREACHABLE)
    tab.add_style_tag(content=STILL)
    tab.add_script_tag(path=AXE)
    for theme, only in (("light", None), ("dark", ["color-contrast", "link-in-text-block"])):  # all else is the same
        tab.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        visit.axe[theme] = tab.evaluate(SERIOUS, only)
        visit.wider[theme] = tab.evaluate(WIDER)
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_timeout(450)  # the theme waits 300 ms before it looks what has to be scrolled now
    visit.wider["390 px"] = tab.evaluate(WIDER)
    visit.axe["390 px"] = tab.evaluate(SERIOUS, ["scrollable-region-focusable"])
    visit.small = tab.evaluate(SMALL)
    tab.context.close()
    return visit


@pytest.fixture(scope="module")
def visits(site, server):
    """Every page, once, the largest first; a browser for each core takes the next page as soon as it is free."""
    if not AXE.exists():
        missing("axe-core is not installed: run `npm install --no-save --no-package-lock axe-core@4.14.1`")
    found, todo = {}, queue.SimpleQueue()
    for page in sorted(pages_of(site), key=lambda page: (site / page).stat().st_size, reverse=True):
        todo.put(page)

    def walk(_) -> None:
        with chromium() as browser, contextlib.suppress(queue.Empty):
            while True:
                page = todo.get_nowait()
                found[page] = look(browser, server, page)

    with ThreadPoolExecutor() as threads:
        list(threads.map(walk, range(os.cpu_count() or 1)))
    assert found.keys() == set(pages_of(site))
    return found


def wrong(visits: dict[str, Visit], name: str) -> dict:
    return {page: getattr(visit, name) for page, visit in visits.items() if getattr(visit, name)}


def test_no_page_asks_another_host_for_anything(visits):
    assert not wrong(visits, "foreign")


def test_everything_that_pages_ask_for_is_there(visits):
    assert not wrong(visits, "failed")


def test_no_page_logs_an_error(visits):
    assert not wrong(visits, "console")


def test_every_formula_is_typeset(visits):
    assert not wrong(visits, "formula_errors")


@pytest.mark.parametrize("view", ["light", "dark", "390 px"])
def test_axe_finds_nothing_serious(visits, view):
    assert not {page: visit.axe[view] for page, visit in visits.items() if visit.axe[view]}


@pytest.mark.parametrize("view", ["light", "dark", "390 px"])
def test_no_page_scrolls_sideways(visits, view):
    assert not {page: visit.wider[view] for page, visit in visits.items() if visit.wider[view] > 0}


def test_figures_can_be_read_on_a_phone(visits):
    assert not wrong(visits, "small")


def test_whatever_can_be_clicked_is_a_stop_of_the_tab_key(visits):
    assert not wrong(visits, "unreachable")


def test_every_icon_is_drawn(visits):
    assert not wrong(visits, "no_icon")


@pytest.fixture(scope="module")
def soups(site):
    """Every page as a tree: they are large, and read once."""
    return {page: BeautifulSoup((site / page).read_text(encoding="utf-8"), "html.parser") for page in pages_of(site)}


def test_no_link_or_anchor_is_broken(site, soups):
    anchors, links = {}, defaultdict(set)
    for page, soup in soups.items():
        anchors[page] = {tag["id"] for tag in soup.find_all(id=True)} | {tag["name"] for tag in soup.find_all("a", attrs={"name": True})}
        for tag, name in (("a", "href"), ("link", "href"), ("script", "src"), ("img", "src")):
            for element in soup.find_all(tag, attrs={name: True}):
                links[page].add(element[name])
    broken = []
    for page, targets in links.items():
        for link in targets:
            place, anchor = urldefrag(urljoin(f"http://site{PREFIX}{page}", link))
            url = urlparse(place)
            if url.scheme not in ("http", "https") or url.netloc != "site" or "rel=canonical" in link:
                continue
            target = unquote(url.path).removeprefix(PREFIX) or "index.html"
            if not (site / target).is_file():
                broken.append(f"{page}: {link}")
            elif anchor and target.endswith(".html") and unquote(anchor) not in anchors.get(target, ()):
                broken.append(f"{page}: {link}")
    assert not broken, "\n".join(broken)


def test_the_first_view_of_a_chapter_is_light(site, visits):
    def sent(url: str) -> int:
        body = (site / unquote(urlparse(url).path).removeprefix(PREFIX)).read_bytes()
        return len(body) if url.endswith((".woff2", ".woff", ".png")) else len(gzip.compress(body))

    weights = {page: sum(map(sent, visits[page].answered)) for page in chapters_of(site)}
    assert min(weights.values()) > 100_000, "the page itself and its style sheets were counted"
    assert not {page: weight for page, weight in weights.items() if weight > 1_500_000}


def with_element(site: Path, marker: str, what: str) -> str:
    """The first chapter whose HTML holds the marker."""
    page = next((page for page in chapters_of(site) if marker in (site / page).read_text(encoding="utf-8")), None)
    if page is None:
        pytest.fail(f"no page of the book has {what}")
    return page


def test_figures_follow_the_theme(site, server, browser):
    tab = open_page(browser, server, with_element(site, "ewc-figure", "a figure"))
    color = "() => [...document.querySelectorAll('svg.ewc-figure [style*=\"--ewc-c0\"]')].map(e => getComputedStyle(e).stroke)[0]"
    seen = set()
    for _ in range(3):
        tab.locator(".theme-switch-button").first.click()
        tab.wait_for_timeout(300)
        seen.add(tab.evaluate(color))
    assert len(seen) == 2


def test_symbols_light_up_both_ways(site, server, browser):
    both = """() => [...document.querySelectorAll(".highlight [data-sym]")].map(e => e.dataset.sym)
        .find(n => document.querySelector(`mjx-container .sym-${n}`))"""
    lit = """selector => [...document.querySelectorAll(selector)].some(e => {
        const s = getComputedStyle(e); return s.outlineStyle !== "none" || s.boxShadow !== "none"; })"""
    for page in chapters_of(site):
        if r"\class{sym" not in (site / page).read_text(encoding="utf-8"):
            continue
        tab = open_page(browser, server, page)
        tab.evaluate(TYPESET)
        if name := tab.evaluate(both):
            break
    else:
        pytest.fail("no page of the book has a symbol in a formula and in its code")
    formula, code = f"mjx-container .sym-{name}", f'.highlight [data-sym="{name}"]'
    for here, there in ((code, formula), (formula, code)):
        tab.mouse.move(1, 1)
        tab.keyboard.press("Escape")
        assert not tab.evaluate(lit, there)
        place = tab.locator(here).locator("visible=true").first  # not in what is folded
        place.scroll_into_view_if_needed()
        place.hover()
        assert tab.evaluate(lit, there)


def test_the_explorable_answers_to_keys(site, server, browser):
    tab = open_page(browser, server, with_element(site, 'class="explorable valleys"', "the two valleys"))
    words, slider, handle = (tab.locator(f".valleys {part}") for part in ("[aria-live]", "input", ".handle"))
    before = words.inner_text()
    slider.focus()
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    assert words.inner_text() != before
    place, track = handle.get_attribute("cx"), tab.locator(".valleys path[stroke-width='2.5']").first
    way = track.get_attribute("d")
    handle.focus()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Shift+ArrowRight")
    assert float(handle.get_attribute("cx")) == pytest.approx(float(place) + 40)
    assert track.get_attribute("d") != way
    tab.locator(".valleys button").press("Enter")
    assert handle.get_attribute("cx") == place and track.get_attribute("d") == way


def test_the_explorable_can_be_dragged_by_touch(site, server, browser):
    page = with_element(site, 'class="explorable valleys"', "the two valleys")
    tab = open_page(browser, server, page, viewport={"width": 390, "height": 800}, has_touch=True)
    handle = tab.locator(".valleys .handle")
    handle.scroll_into_view_if_needed()
    box, place = handle.bounding_box(), handle.get_attribute("cx")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = tab.context.new_cdp_session(tab)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x + 30, "y": y - 20}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert float(handle.get_attribute("cx")) > float(place) + 20


def test_a_page_is_read_with_the_keyboard_alone(site, server, browser):
    tab = open_page(browser, server, chapters_of(site)[0])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent.trim()") == "Skip to main content"
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#main-content")
    tab.goto(server + chapters_of(site)[0])
    reached = set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.className"))
    assert any("theme-switch-button" in name for name in reached)
    assert any("search-button" in name for name in reached)
    assert any("primary-toggle" in name for name in reached)


def test_formulas_that_were_never_in_view_can_be_printed(server, browser):
    """Paper does not wait for a font; and from the dark theme, too, it stays white."""
    tab = open_page(browser, server, "book/limits.html")
    tab.wait_for_function("[...document.fonts].some(f => /MJXTEX-I\\b/.test(f.family) && f.status === 'loaded')")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_search_finds_a_page(server, browser):
    seen = Visit()
    tab = open_page(browser, server, "search.html?q=fisher", seen)
    tab.locator("#search-results li").first.wait_for()
    assert tab.locator("#search-results li a").count() > 0
    tab.locator("#search-results .context").first.wait_for()
    tab.wait_for_load_state("networkidle")
    shown = tab.locator("#search-results").inner_text()
    assert "Fisher" in shown and "\\class{" not in shown and "Contents" not in shown
    assert "Suggest edit" not in shown and not seen.console


def test_the_title_of_a_solution_opens_it(site, server, browser):
    page, seen = with_element(site, "Solution to", "solutions"), Visit()
    tab = open_page(browser, server, page, seen)
    for box in tab.locator(".admonition.solution").all()[:2]:
        title = box.locator(".admonition-title")
        assert "toggle-hidden" in box.get_attribute("class")
        title.click()  # in its middle
        assert "toggle-hidden" not in box.get_attribute("class")
    assert not seen.console and tab.url.endswith(page)


def test_the_site_s_own_address_leads_to_the_first_page_and_can_be_shared(site, server, browser):
    tab = open_page(browser, server)
    tab.wait_for_url("**/book/intro.html")
    door = BeautifulSoup((site / "index.html").read_text(), "html.parser")
    first = BeautifulSoup((site / "book/intro.html").read_text(), "html.parser")
    assert door.title.string == first.title.string
    for what in ("og:title", "og:image", "og:description"):
        assert door.find("meta", property=what)["content"] == first.find("meta", property=what)["content"]


def test_search_finds_a_name_without_its_accent(server, browser):
    found = {}
    for name in ("Huszár", "Huszar"):
        tab = open_page(browser, server, f"search.html?q={name}")
        tab.locator("#search-results li").first.wait_for()
        found[name] = tab.locator("#search-results li").count()
    assert found["Huszar"] >= found["Huszár"] > 0


def test_what_is_not_found_says_so_and_leads_back(site, server, browser):
    visit = Visit()
    tab = open_page(browser, server, "404.html", visit)
    assert tab.locator(".bd-article h1").inner_text() == "Page not found" and not visit.failed
    assert tab.locator(f"a[href^='{PREFIX}book/']").count() > 0


def test_pages_read_from_the_disk(site, browser):
    tab = browser.new_page()
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto((site / with_element(site, "math notranslate", "a formula")).as_uri())
    tab.locator("mjx-container").first.wait_for(state="attached")
    assert tab.evaluate(TYPESET) == 0
    assert not problems
    tab.close()


def test_every_chapter_can_be_shared_edited_and_taken_away(site, soups):
    for page in chapters_of(site):
        soup = soups[page]
        assert soup.find("meta", property="og:title"), page
        assert soup.find("meta", property="og:site_name")["content"] == "Elastic weight consolidation", page
        assert "\\" not in soup.find("meta", property="og:description")["content"], f"{page}: a formula in its first sentence"
        assert (site / urlparse(soup.find("meta", property="og:image")["content"]).path.removeprefix(PREFIX)).is_file(), page
        assert soup.find("a", href=lambda link: link and "/edit/main/book/" in link), page
        if (site / "_sources" / page).with_suffix(".ipynb").exists():
            name = page.removesuffix(".html") + ".ipynb"
            colab, binder = (soup.find("a", href=lambda link, host=host: link and host in link)["href"]
                             for host in ("colab.research.google.com", "mybinder.org"))
            assert colab.endswith(f"/blob/gh-pages/_sources/{name}") and binder.endswith(f"gh-pages?labpath=_sources/{name}")
            assert soup.find(class_="reproducibility"), page
    assert "book/intro.html" in (site / "sitemap.xml").read_text()


# What a build leaves when something has changed -------------------------------------------------------------------

CONFIG = """
from pathlib import Path
extensions = ["myst_nb", "fresh"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "cache"
numfig = math_numfig = True
html_theme = "basic"
exclude_patterns = ["out"]

def stop(app, page, *_):
    if page == "book/two" and Path(app.srcdir, "stop").exists():
        raise KeyboardInterrupt

def setup(app):
    app.connect("html-page-context", stop)
"""
CELL = """
```{code-cell} ipython3
from pathlib import Path
with open("count", "a") as count:
    count.write("{page} ")
print("value", Path("../ewc/value.py").read_text())
```
"""
INDEX = "# Book\n\n```{toctree}\n:numbered:\nbook/one\nbook/two\n```\n"
HEAD = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"


@pytest.fixture
def small_book(tmp_path, monkeypatch):
    """Writes files into a book of two pages and builds it as the book itself is built: what its pages say."""
    for name, value in {"EWC_DATASET": "embedded", "EWC_SCALE": "quick", "IPYTHONDIR": "", "PYTHONPATH": ""}.items():
        monkeypatch.setenv(name, value)  # the build writes to them
    monkeypatch.setattr(sys, "path", [*sys.path])

    def build(files: dict[str, str]) -> list[str]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        main(["-q", "-N", "-b", "html", str(tmp_path), str(tmp_path / "out/html")])
        written = [BeautifulSoup((tmp_path / f"out/html/book/{page}.html").read_text(), "html.parser") for page in ("one", "two")]
        return [page.find(class_="body").get_text() for page in written]

    build({"conf.py": CONFIG, "requirements.txt": "", "index.md": INDEX, "book/one.md": "# One\n", "book/two.md": "# Two\n"})
    return build


def test_a_page_is_written_again_when_another_page_s_numbers_change(small_book):
    equation = "$$\n{0}\n$$ (eq-{0})\n\n"
    first = equation.format("b")
    assert "(1.1)" in small_book({"book/one.md": "# One\n\n" + first, "book/two.md": "# Two\n\n{eq}`eq-b`\n"})[1]
    assert "(1.2)" in small_book({"book/one.md": "# One\n\n" + equation.format("a") + first})[1]


def test_a_build_that_was_stopped_leaves_no_mixture_behind(small_book, tmp_path):
    pages = {f"book/{name}.md": HEAD + f"# {name}\n" + CELL.replace("{page}", name) for name in ("one", "two")}
    old, new = {"ewc/value.py": "old"}, {"ewc/value.py": "new"}
    assert all("value old" in text for text in small_book(pages | old))
    one, two = small_book(new | {"stop": ""})
    assert "value new" in one and "value old" in two, "the build was stopped between the pages"
    (tmp_path / "stop").unlink()
    assert all("value new" in text for text in small_book({}))
    assert (tmp_path / "book/count").read_text() == "one two one two ", "each page was executed once for each state of the package"
    assert all("value old" in text for text in small_book(old))
    assert (tmp_path / "book/count").read_text() == "one two one two ", "and going back costs nothing"
