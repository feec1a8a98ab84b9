"""Charts are SVG whose colours and fonts are those of the page around it."""

import re
import xml.etree.ElementTree as ElementTree

from dpo.figures import MAX_POINTS, Line, line_chart, scatter_chart


def test_a_chart_is_one_labelled_element_in_the_colours_of_the_page():
    svg = line_chart("Loss & more", [Line("train", [0, 8], [1.0, 0.5]), Line("evaluation", [0, 8], [1.0, 0.7])])
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", "Loss & more")
    assert "width" not in root.attrib and root.attrib["viewBox"].startswith("0 0 ")
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert {"var(--series-1)", "var(--series-2)", "currentColor"} <= colors <= {*colors, "none"}
    assert not re.findall(r"#[0-9a-f]{6}", svg) and "font-family" not in svg
    assert re.findall(r">(train|evaluation|Loss &amp; more|examples)<", svg)


def test_lines_of_one_label_share_a_colour_and_an_entry():
    svg = line_chart("x", [Line("a", [0, 1], [0, 1]), Line("a", [0, 1], [1, 2]), Line("b", [0, 1], [2, 3])])
    assert len(re.findall(">a<", svg)) == 1 and "var(--series-3)" not in svg


def test_a_band_and_a_diagonal_are_drawn_where_they_are_asked_for():
    plain = line_chart("x", [Line("a", [0, 1], [0.2, 0.3])])
    assert "FillBetween" not in plain
    assert "FillBetween" in line_chart("x", [Line("a", [0, 1], [0.2, 0.3], ([0.1, 0.2], [0.3, 0.4]))])
    points = ([0.0, 1.0], [1.0, 0.0], "x", "y")
    assert "stroke-dasharray" in scatter_chart("x", *points, diagonal=True)
    assert "stroke-dasharray" not in scatter_chart("x", *points)


def test_a_share_keeps_its_axis_and_a_long_line_is_thinned():
    assert ">0.0<" in line_chart("x", [Line("a", [0, 1], [0.99, 1.0])], share=True)
    n = 10 * MAX_POINTS
    svg = line_chart("x", [Line("a", range(n), [i % 7 for i in range(n)])])
    assert len(svg) < 60_000
