"""Charts are SVG, alone and in a page."""

import math
import re
import xml.etree.ElementTree as ElementTree

from dpo.reporting.figures import COLORS, INK, MAX_POINTS, Line, line_chart, scatter_chart


def contrast(one, other):
    """Return the contrast of two colours, which WCAG wants to be 3 or more for graphics."""
    luminances = []
    for color in (one, other):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_chart_is_one_labelled_element_in_colours_for_light_and_dark():
    svg = line_chart("Loss & more", [Line("train", [0, 8], [1.0, 0.5]), Line("evaluation", [0, 8], [1.0, 0.7])])
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", "Loss & more")
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) == {INK, COLORS[0], COLORS[1], "none"}
    assert min(contrast(color, paper) for color in (INK, *COLORS) for paper in ("#ffffff", "#14171a")) > 3
    assert re.findall(r">(train|evaluation|Loss &amp; more|examples)<", svg)


def test_lines_of_one_label_share_a_colour_and_an_entry():
    svg = line_chart("x", [Line("a", [0, 1], [0, 1]), Line("a", [0, 1], [1, 2]), Line("b", [0, 1], [2, 3])])
    assert len(re.findall(">a<", svg)) == 1 and COLORS[2] not in svg


def test_a_band_and_a_diagonal_are_drawn_where_they_are_asked_for():
    plain = line_chart("x", [Line("a", [0, 1], [0.2, 0.3])])
    assert "FillBetween" not in plain
    assert "FillBetween" in line_chart("x", [Line("a", [0, 1], [0.2, 0.3], ([0.1, 0.2], [0.3, 0.4]))])
    points = ([(0.0, 1.0), (1.0, 0.0)], "x", "y")
    assert "stroke-dasharray" in scatter_chart("x", *points, diagonal=True)
    assert "stroke-dasharray" not in scatter_chart("x", *points)


def test_a_single_point_is_a_marker_also_of_a_faint_line_with_its_interval_as_a_bar():
    def markers(line):
        return len(re.findall(f"<use [^>]*{COLORS[0]}", line_chart("x", [line])))

    assert markers(Line("", range(40), range(40))) == 0  # so many points have none
    assert markers(Line("", [3, 4], [0.5, 0.6])) == 2
    assert markers(Line("", [3, 4], [0.5, 0.6], faint=True)) == 0
    assert markers(Line("", [3], [0.5], faint=True)) == 1
    svg = line_chart("x", [Line("", [3], [0.5], ([0.4], [0.6]))])
    assert "FillBetween" not in svg and svg.count('id="LineCollection_') == 1


def test_points_with_names_have_bars_instead_of_a_band():
    svg = line_chart("x", [Line("a", [3, 4], [0.5, 0.6], ([0.4, 0.5], [0.6, 0.7]), names=["first", "last & best"])])
    assert "FillBetween" not in svg and svg.count('id="LineCollection_') == 1
    assert ">first<" in svg and ">last &amp; best<" in svg


def test_points_with_intervals_of_both_axes_have_bars_of_both():
    svg = line_chart("x", [Line("a", [3, 4], [0.5, 0.6], ([0.4, 0.5], [0.6, 0.7]), x_band=([2, 3], [4, 5]))])
    assert "FillBetween" not in svg and svg.count('id="LineCollection_') == 2


def test_a_level_has_its_name_and_a_dashed_line_its_dashes():
    plain = line_chart("x", [Line("a", [0, 1], [0.2, 0.3])])
    assert "stroke-dasharray" not in plain and "log 2" not in plain
    level = line_chart("x", [Line("a", [0, 1], [0.2, 0.3])], level=(0.6931, "log 2"))
    assert "log 2" in texts(level) and level.count("stroke-dasharray") == 1
    assert line_chart("x", [Line("a", [0, 1], [0.2, 0.3], dashed=True)]).count("stroke-dasharray") == 2  # in the legend


def test_no_tick_is_cut_at_the_left_edge():
    """A digit of 8 points is about 5.1 wide; the label of the last tick ends 7 left of the axes."""
    for values in ([0, 1.5e-8], [9.6e-5, 1.04e-4], [0, 3_000_000], [0.08, 0.0801]):
        svg = line_chart("Learning rate", [Line("", [0, 16], values)])
        ends = re.findall(r'<text style="[^"]*text-anchor: end[^"]*" x="([^"]*)"[^>]*>([^<]*)<', svg)
        assert ends and all(float(x) - 5.1 * len(label) > 0 for x, label in ends), values


def test_points_of_one_x_or_of_one_y_and_points_that_are_not_finite_make_no_chart():
    for points in ([], [(1, 2)], [(1, 2), (1, 3)], [(1, 2), (3, 2)], [(1, 2), (math.inf, 3), (4, math.nan)]):
        assert scatter_chart("x", points, "x", "y") is None
    assert scatter_chart("x", [(1, 2), (3, 4), (5, math.inf)], "x", "y").count("<use") > 0


def texts(svg):
    """Return the texts of a chart."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_each_tick_is_written_in_full_and_no_factor_pushes_the_title_out():
    """matplotlib would write 5 and, above the axis, 1e-7 for the default learning rate, and halves of examples."""
    small, level, large = (
        line_chart("title", [Line("", [0, x], [low, high])])
        for x, low, high in ((2, 0, 5e-7), (40_000, 2.5, 2.50005), (1_600_000, 0, 3_000_000))
    )
    assert texts(small)[:4] == ["0", "1", "2", "examples"] and "5e\N{MINUS SIGN}07" in texts(small)
    assert "2.50001" in texts(level) and "40,000" in texts(level)
    assert "1,500,000" in texts(large) and "3000000" in texts(large)
    for svg in (small, level, large):
        title = re.search(r'<text [^>]*y="([^"]*)"[^>]*>title<', svg)
        assert float(title[1]) > 8  # its lower edge: it is 10 high, and ends 6 above the axes


def test_only_values_that_span_two_orders_of_magnitude_have_a_logarithmic_axis():
    for values, logarithmic in (([0.01, 9.0], True), ([19.0, 21.0], False), ([0.0, 9.0], False), ([0.0, 0.0], False)):
        svg = line_chart("x", [Line("", [0, 1], values)], scale="log")
        assert ("<tspan" in svg) == logarithmic, values  # a power of ten has its exponent in one


def test_a_share_keeps_its_axis_and_a_long_line_is_thinned():
    assert ">0.0<" in line_chart("x", [Line("a", [0, 1], [0.99, 1.0])], scale="share")
    n = 10 * MAX_POINTS
    svg = line_chart("x", [Line("a", range(n), [i % 7 for i in range(n)])])
    assert len(svg) < 60_000
