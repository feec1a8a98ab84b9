"""Charts as SVG text that takes its colours from the page around it, or as a file by itself."""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # what matplotlib draws in this colour takes the text colour of the page
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")  # become the page's --series-1 to -6
FIXED = ("#3f86d6", "#e07b39", "#2f9e6e", "#8f5fbf", "#d0488a", "#7d8590")  # of a file by itself; the last: its text
MAX_POINTS = 600  # of a line; more would not be seen
SIZE = (4.6, 2.6)  # inches, of which the SVG keeps the proportion alone


@dataclass(frozen=True)
class Line:
    """Points that a line connects in their order; band holds the lower and the upper edge of an area around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    faint: bool = False


def line_chart(
    title: str, lines: Sequence[Line], log_y: bool = False, share: bool = False, x_label: str = "examples"
) -> str:
    """Return a chart of lines as SVG; share: of values from 0 to 1.

    Lines of the same label have the same colour and one entry in the legend. log_y: by orders of magnitude, where the
    values span two of them or more.
    """
    figure = new_figure(title, x_label)
    colors: dict[str, str] = {}
    (axes,) = figure.axes
    for line in lines:
        known = line.label in colors
        color = colors.setdefault(line.label, SERIES[len(colors) % len(SERIES)])
        step = max(1, len(line.x) // MAX_POINTS)
        axes.plot(
            line.x[::step],
            line.y[::step],
            color=color,
            linewidth=0.8 if line.faint else 1.6,
            alpha=0.6 if line.faint else 1.0,
            marker="o" if len(line.x) == 1 or (len(line.x) <= 30 and not line.faint) else "",
            markersize=3,
            label=None if known else line.label,
        )
        if line.band is not None and len(line.x) > 1:
            axes.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)
        elif line.band is not None:
            axes.vlines(line.x, *line.band, color=color, alpha=0.5, linewidth=1.6)
    x, y = [x for line in lines for x in line.x], [y for line in lines for y in line.y]
    axes.set_xlim(left=min((0.0, *x)))
    write_ticks_in_full(axes, x)
    if log_y and 0 < min(y) * 100 < max(y):
        axes.set_yscale("log")
    if share:
        axes.set_ylim(-0.03, 1.03)
    if len(colors) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(figure, title)


def scatter_chart(
    title: str, points: Iterable[tuple[float, float]], x_label: str, y_label: str, diagonal: bool = False
) -> str | None:
    """Return a chart of the finite points as SVG, with lines at 0 and, if asked for, where x equals y.

    None if all have the same x or the same y: the chart would show no relation.
    """
    finite = [point for point in points if all(map(math.isfinite, point))]
    x, y = [x for x, _ in finite], [y for _, y in finite]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    figure = new_figure(title, x_label, y_label)
    (axes,) = figure.axes
    axes.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.5, alpha=0.5)
    if diagonal:
        axes.axline((0, 0), slope=1, color=INK, linewidth=0.5, alpha=0.5, linestyle="--")
    axes.scatter(x, y, s=9, color=SERIES[0], alpha=0.6, linewidths=0)
    write_ticks_in_full(axes, x)
    return to_svg(figure, title)


def new_figure(title: str, x_label: str, y_label: str = "") -> "Figure":
    """Return a figure with one pair of axes in the page's text colour."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=SIZE)  # matplotlib's layouts find margins by drawing each figure twice
    left = 0.16 if y_label else 0.125
    axes = figure.add_axes((left, 0.19, 0.98 - left, 0.7))
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(which="both", labelsize=8, color=INK, labelcolor=INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.5)
    return figure


def write_ticks_in_full(axes: "Axes", x: Iterable[float]) -> None:
    """Write each tick in full, since a common factor would stand where the title is; whole numbers get whole ticks."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        is_small = max(map(abs, axis.get_view_interval())) < 1e-3
        axis.set_major_formatter(StrMethodFormatter("{x:.3g}") if is_small else plain)
    if all(float(value).is_integer() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def to_svg(figure: "Figure", label: str) -> str:
    """Return a figure as an <svg> element with a label for screen readers; its texts stay texts."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 role="img" aria-label="{html.escape(label)}">',
        svg,
        count=1,
    )
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    for number, color in enumerate(SERIES, start=1):
        svg = svg.replace(color, f"var(--series-{number})")
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    """Return the <svg> of a page as a file by itself, in colours that can be read on white and on black."""
    for number, color in enumerate(FIXED, start=1):
        svg = svg.replace(f"var(--series-{number})", color)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = svg.replace("<svg ", f'<svg {names} font-family="system-ui, sans-serif" ', 1)
    return svg.replace("currentColor", FIXED[-1])
