"""Charts as SVG, in colours that are readable on white and on black."""

import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7d8590"  # of texts and axes
COLORS = ("#3f86d6", "#d9702c", "#2f9e6e", "#8f5fbf", "#d0488a", "#94870f")  # of runs, and of lines and bars by order
MEANINGS = {  # the colour of each label in the charts of one run; the page uses them for texts too
    "train": INK,
    "evaluation": COLORS[3],
    "chosen": COLORS[0],
    "desirable": COLORS[0],
    "rejected": COLORS[1],
    "undesirable": COLORS[1],
    "samples": COLORS[2],
    "reference": COLORS[4],
}
MAX_POINTS = 600  # per line; more would not be visible


@dataclass(frozen=True)
class Line:
    """Points connected in order.

    band    the lower and the upper edge of an area around them; of bars if the points have names or an x_band
    x_band  the ends of horizontal bars
    color   by default the next of COLORS
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    faint: bool = False
    names: Sequence[str] = ()
    x_band: tuple[Sequence[float], Sequence[float]] | None = None
    color: str = ""
    dashed: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    scale: str = "linear",
    x_label: str = "examples",
    level: tuple[float, str] | None = None,
) -> str:
    """Draw lines; those with the same label share a colour and an entry in the legend.

    scale is that of y: "share" is from 0 to 1; "log" is logarithmic if the values span two orders of magnitude. level
    is the height of a horizontal line, and its name.
    """
    figure = new_figure()
    axes = add_axes(figure, title, x_label)
    colors: dict[str, str] = {}
    for line in lines:
        is_new = line.label not in colors
        color = colors.setdefault(line.label, line.color or COLORS[len(colors) % len(COLORS)])
        step = max(1, len(line.x) // MAX_POINTS)
        axes.plot(
            line.x[::step],
            line.y[::step],
            color=color,
            linewidth=1.0 if line.faint else 1.8,
            linestyle="--" if line.dashed else "-",
            alpha=0.8 if line.faint else 1.0,
            marker="o" if len(line.x) == 1 or (len(line.x) <= 30 and not line.faint) else "",
            markersize=3,
            label=line.label if is_new else None,
        )
        if line.band is not None and len(line.x) > 1 and not line.names and line.x_band is None:
            axes.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)
        elif line.band is not None:
            axes.vlines(line.x, *line.band, color=color, alpha=0.5, linewidth=1.6)
        if line.x_band is not None:
            axes.hlines(line.y, *line.x_band, color=color, alpha=0.5, linewidth=1.6)
        for name, x, y in zip(line.names, line.x, line.y, strict=False):
            axes.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=8, color=INK)
    if level is not None:
        axes.axhline(level[0], color=INK, linewidth=1, linestyle=(0, (1, 2)))
        corner = axes.get_yaxis_transform()  # x from 0 to 1, y in the unit of the data
        axes.annotate(level[1], (1, level[0]), (0, 2), corner, "offset points", ha="right", fontsize=8, color=INK)
    all_x = [x for line in lines for x in line.x]
    all_y = [y for line in lines for y in line.y]
    axes.set_xlim(left=min((0.0, *all_x)))
    write_ticks_in_full(axes, all_x)
    if scale == "log" and 0 < min(all_y) * 100 < max(all_y):
        axes.set_yscale("log")
    if scale == "share":
        axes.set_ylim(-0.03, 1.03)
    if any(colors):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    make_room_for_ticks(figure, axes)
    return to_svg(figure, title)


def scatter_chart(
    title: str, points: Iterable[tuple[float, float]], x_label: str, y_label: str, diagonal: bool = False
) -> str | None:
    """Draw the finite points, with lines at 0 and, with diagonal, where x equals y.

    None if all have the same x or the same y: the chart would show no relation.
    """
    finite = [point for point in points if all(map(math.isfinite, point))]
    x = [x for x, _ in finite]
    y = [y for _, y in finite]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    figure = new_figure()
    axes = add_axes(figure, title, x_label, y_label)
    axes.axhline(0, color=INK, linewidth=0.5)
    axes.axvline(0, color=INK, linewidth=0.5)
    if diagonal:
        axes.axline((0, 0), slope=1, color=INK, linewidth=0.5, linestyle="--")
    axes.scatter(x, y, s=9, color=MEANINGS["evaluation"], alpha=0.6, linewidths=0)
    write_ticks_in_full(axes, x)
    make_room_for_ticks(figure, axes)
    return to_svg(figure, title)


def new_figure(width: float = 4.2, height: float = 2.5) -> "Figure":
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height))


def add_axes(
    figure: "Figure",
    title: str,
    x_label: str = "",
    y_label: str = "",
    place: tuple[float, float, float, float] | None = None,
) -> "Axes":
    """Add axes at place, (left, bottom, width, height) from 0 to 1; by default they fill the figure."""
    axes = figure.add_axes(place or (0.14, 0.2, 0.82, 0.67))
    if place is None:
        figure.suptitle(title, x=0.01, y=0.98, ha="left", fontsize=10, color=INK)
    else:
        axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(which="both", labelsize=8, color=INK, labelcolor=INK)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return axes


def write_ticks_in_full(axes: "Axes", x: Iterable[float]) -> None:
    """Write ticks in full, since a common factor would overlap the title. Whole numbers get whole ticks."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        is_small = max(map(abs, axis.get_view_interval())) < 1e-3
        axis.set_major_formatter(StrMethodFormatter("{x:.3g}") if is_small else plain)
    if all(float(value).is_integer() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def make_room_for_ticks(figure: "Figure", axes: "Axes") -> None:
    """Move the left edge of axes that fill a figure so that the ticks' labels are not cut.

    matplotlib's own layouts draw each figure twice, which is slow.
    """
    if axes.get_yscale() == "log":  # powers of ten are short
        return
    labels = axes.yaxis.get_major_formatter().format_ticks(list(axes.get_yticks()))
    points = 5.1 * max(map(len, labels)) + 10 + 15 * bool(axes.get_ylabel())  # a digit of 8 points is 5.1 wide
    left = points / (72 * figure.get_figwidth())
    _, bottom, _, height = axes.get_position().bounds
    axes.set_position((left, bottom, 0.96 - left, height))


def to_svg(figure: "Figure", label: str) -> str:
    """A figure as an <svg> element, also valid as a file. Texts stay texts; label is for screen readers."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "svg.hashsalt": label}):
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
