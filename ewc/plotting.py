"""One plotting style for the whole book: figures that follow the page's theme and that every reader can tell apart.

Colours come from one palette that stays distinguishable with the common colour deficiencies, and they are never the
only signal: each line also has its own marker and dashes. On a page a figure is inline SVG whose colours are CSS
variables, so that it follows the light and the dark theme; elsewhere it is the same picture with its own colours.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0a66ad", "#c4510c", "#00785a", "#a03a8c", "#866700", "#5b6470")
"""Blue, vermilion, green, purple, ochre, grey; `book/_static/book.css` holds their counterparts on dark ground."""

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)), (0, (8, 3)), (0, (3, 1.5)))
SPACING = 0.1  # markers are this part of the axes apart...
FEW = 15  # ...but on a line of so few points every point has its own: a single one would have none
INK, GRID = "#0b0c0d", "#d5d9e0"  # replaced by CSS in the page; INK is its text colour


def style(k: int) -> dict[str, Any]:
    """Colour, marker and dashes of the k-th line, for `ax.plot(x, y, **style(k))` when the order is not the cycle's."""
    k %= len(COLORS)
    return {"color": COLORS[k], "marker": MARKERS[k], "linestyle": LINES[k]}


def figure(rows: int = 1, columns: int = 1, *, width: float = 6.6, height: float = 3.6, **subplots: Any) -> tuple:
    """A figure in the book's style and its axes, as `matplotlib.pyplot.subplots` returns them.

    Sets Matplotlib's defaults (`rcParams`) to the book's style, so that lines, legends and texts that are added later
    have it too. The figure belongs to no window: nothing is shown until `show`.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        width: width in inches; the text column of the book holds about 6.6.
        height: height in inches.
        **subplots: passed to `matplotlib.figure.Figure.subplots` (`sharex`, `width_ratios`, ...).

    Returns:
        The figure, and one axes or an array of axes.
    """
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    cycle = {name: [style(k)[name] for k in range(len(COLORS))] for name in style(0)}
    mpl.rcParams.update({
        "axes.prop_cycle": cycler(**cycle, markevery=[SPACING] * len(COLORS)),
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 10,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
        "lines.linewidth": 1.7, "lines.markersize": 4.8, "errorbar.capsize": 2.5,
        "font.family": "DejaVu Sans", "image.cmap": "cividis",
    })
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **subplots)


class Picture:
    """What a cell displays, in several formats of which the page or the notebook takes the best it can show."""

    def __init__(self, **formats: str):
        self.formats = {name.replace("_", "/", 1): content for name, content in formats.items()}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.formats


def show(fig: Figure, *, alt: str) -> Picture:
    """The figure for display; make it the last expression of the cell.

    Args:
        fig: a figure made by `figure`.
        alt: what the figure shows, in a sentence or two, for readers who do not see it.

    Returns:
        An object that notebooks and the book know how to display.

    Raises:
        ValueError: if `alt` is empty.
    """
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    alt = _described(alt)
    for line in fig.findobj(Line2D):
        every = line.get_markevery()  # or a list, or an array
        if isinstance(every, float) and every == SPACING and len(line.get_xdata()) <= FEW:
            line.set_markevery(None)
    png, svg = io.BytesIO(), io.StringIO()
    fig.savefig(png, format="png", dpi=110, facecolor="white")
    with mpl.rc_context({"svg.hashsalt": alt, "svg.fonttype": "path"}):  # the salt makes the file reproducible
        fig.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    pixels = base64.b64encode(png.getvalue()).decode()
    return Picture(text_html=_themed(svg.getvalue(), alt), image_png=pixels, text_plain=alt)


def explorable(kind: str, data: dict[str, Any], *, alt: str) -> Picture:
    """Data for one of the book's interactive figures; make it the last expression of the cell.

    Args:
        kind: name of the script in `book/_static` that draws it, whose first lines document the data.
        data: numbers, lists and strings.
        alt: what it shows, for readers without the script.

    Raises:
        ValueError: if `alt` is empty or a number is not finite.
    """
    alt = _described(alt)
    numbers = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    content = f'<script type="application/json">{numbers}</script><p>{html.escape(alt)}</p>'
    return Picture(text_html=f'<div class="explorable {kind}">{content}</div>', text_plain=alt)


def _described(alt: str) -> str:
    alt = " ".join(alt.split())
    if len(alt) < 10:
        raise ValueError(f"A figure needs an alternative text: say what it shows in a sentence, not alt={alt!r}.")
    return alt


def _themed(svg: str, alt: str) -> str:
    """Replace the palette by CSS variables and make the ids unique within a page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    for k, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--ewc-c{k}, {color})")
    svg = svg.replace(GRID, f"var(--ewc-grid, {GRID})").replace("#ffffff", "var(--ewc-paper, #fff)")
    svg = svg.replace(INK, "currentColor").replace("#000000", "currentColor")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # its rule `*` would reach every other drawing of the page
    prefix = f"f{zlib.crc32(svg.encode()):08x}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    label = html.escape(alt, quote=True)
    root = f'<svg class="ewc-figure" role="img" aria-label="{label}" fill="currentColor" stroke-linejoin="round" '
    return svg.replace("<svg ", root, 1)
