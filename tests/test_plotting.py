"""Figures follow the theme, say in words what they show, and can be told apart by every reader."""

import base64
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from ewc import plotting

CSS = (Path(__file__).parent.parent / "book/_static/book.css").read_text()

# Machado, Oliveira and Fernandes (2009), severity 1.0, in linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def palette(theme: str) -> list[str]:
    """The figure colours that the style sheet sets in a theme."""
    block = re.search(rf'html\[data-theme="{theme}"\] \{{(.*?)\}}', CSS, flags=re.DOTALL).group(1)
    return [re.search(rf"--ewc-c{k}: (#\w+)", block).group(1) for k in range(len(plotting.COLORS))]


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio."""
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (one, other)), reverse=True)
    return light / dark


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a linear RGB colour, D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def drawn():
    fig, ax = plotting.figure()
    for k in range(3):
        ax.plot([0, 1], [k, k + 1], label=str(k))
    ax.legend()
    return fig


def formats(picture) -> dict[str, str]:
    return picture._repr_mimebundle_()


def test_the_style_sheet_has_the_palette_of_the_package():
    assert palette("light") == list(plotting.COLORS)


@pytest.mark.parametrize(("theme", "ground"), [("light", "#ffffff"), ("dark", "#14181e")])
def test_colors_stand_out_from_the_page(theme, ground):
    assert min(contrast(color, ground) for color in palette(theme)) >= 4.5


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_neighbouring_lines_differ_for_color_blind_readers(theme, deficiency):
    """Every two lines differ by colour as that reader sees it, or by marker and dashes; the first three by colour."""
    seen = [lab(np.array(DEFICIENCIES[deficiency]) @ linear(color)) for color in palette(theme)]
    for one, other in combinations(range(3), 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 9, (one, other)
    for one, other in combinations(range(len(seen)), 2):
        mine, theirs = plotting.style(one), plotting.style(other)
        assert mine["marker"] != theirs["marker"] and mine["linestyle"] != theirs["linestyle"]


def test_style_goes_round():
    assert plotting.style(len(plotting.COLORS) + 1) == plotting.style(1)


def test_lines_follow_the_cycle_without_being_told(drawn):
    lines = drawn.axes[0].lines
    assert [line.get_color() for line in lines] == list(plotting.COLORS[:3])
    assert [line.get_marker() for line in lines] == list(plotting.MARKERS[:3])


def test_figure_passes_the_grid_of_axes_on():
    _, axes = plotting.figure(1, 2, sharey=True)
    assert axes.shape == (2,)


def test_a_figure_is_svg_for_the_page_and_png_elsewhere(drawn):
    shown = formats(plotting.show(drawn, alt='Three "parallel" lines & nothing else.'))
    assert shown["text/html"].startswith("<svg ")
    assert 'aria-label="Three &quot;parallel&quot; lines &amp; nothing else."' in shown["text/html"]
    assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG")
    assert shown["text/plain"] == 'Three "parallel" lines & nothing else.'


def test_every_color_of_the_svg_follows_the_theme(drawn):
    svg = formats(plotting.show(drawn, alt="Three parallel lines."))["text/html"]
    assert set(re.findall(r"var\(--ewc-(c\d)", svg)) == {"c0", "c1", "c2"}
    bare = re.sub(r"var\([^)]*\)", "", svg)
    assert not re.findall(r"(?:fill|stroke): #\w{6}", bare)
    assert "<style" not in svg  # its rules would reach every other drawing of the page


def test_ids_are_unique_on_a_page_and_the_same_in_every_build():
    def draw(height):
        fig, ax = plotting.figure()
        ax.plot([0, 1], [0, height])
        return formats(plotting.show(fig, alt="One rising line."))["text/html"]

    one, same, other = draw(1), draw(1), draw(2)
    assert one == same
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one)) <= ids[0]


@pytest.mark.parametrize("alt", ["", "   ", "a plot"])
def test_a_figure_without_words_is_an_error(drawn, alt):
    with pytest.raises(ValueError, match="alternative text"):
        plotting.show(drawn, alt=alt)


def test_an_explorable_carries_its_data_and_its_words():
    shown = formats(plotting.explorable("valleys", {"x": [1.0, 2.0], "name": "</script>"}, alt="Two loss valleys."))
    assert shown["text/html"].startswith('<div class="explorable valleys"><script type="application/json">')
    assert shown["text/html"].count("</script>") == 1
    assert shown["text/plain"] == "Two loss valleys."


def test_an_explorable_takes_no_infinities():
    with pytest.raises(ValueError):
        plotting.explorable("valleys", {"x": float("inf")}, alt="Two loss valleys.")


def test_importing_the_module_leaves_matplotlib_alone():
    code = "import sys, ewc.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("points", "every"), [(1, None), (plotting.FEW, None), (plotting.FEW + 1, plotting.SPACING)])
def test_a_line_of_few_points_shows_each_of_them(points, every):
    fig, ax = plotting.figure()
    line, _, _ = ax.errorbar(range(points), range(points), 1)
    asked, = ax.plot(range(points), markevery=2)
    chosen, = ax.plot(range(points), markevery=np.array([0, -1]))
    plotting.show(fig, alt="A line with some points and their error bars.")
    assert line.get_markevery() == every
    assert asked.get_markevery() == 2 and chosen.get_markevery().tolist() == [0, -1]  # what a chapter asks for stays
