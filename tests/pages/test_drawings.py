"""Charts as SVG: every number on hover, at its place, and nothing drawn where there is none."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from loratools.charts.values import BarGroup, Bars, Chart, HeatMap, Lines, Mark, Series
from loratools.pages.drawings.axes import axis
from loratools.pages.drawings.chart import drawn

MAP = HeatMap(
    title="Cosine",
    unit="cosine",
    rows=("layers.0", "layers.1"),
    columns=("q_proj", "v_proj", "o_proj"),
    values=((0.25, None, -1.0), (0.5, 1.0, 0.0)),
    diverging=True,
    limits=(-1.0, 1.0),
    note="one",
)
LINES = Lines(
    title="Spectrum",
    x_label="rank",
    y_label="energy",
    series=(
        Series("all", (1.0, 10.0, 100.0), (0.001, 0.1, 10.0), low=(0.0005, 0.05, 5.0), high=(0.002, 0.2, 20.0)),
        Series("broken", (1.0, 2.0, 4.0, 8.0), (1.0, None, 3.0, 2.0), points=True),
    ),
    log_x=True,
    log_y=True,
    marks=(Mark("knee", x=10.0), Mark("noise", y=0.1)),
)
BARS = Bars(
    title="Gain",
    unit="share",
    labels=("first", "second"),
    groups=(BarGroup("gain", (0.5, 1.0)), BarGroup("loss", (-0.25, None))),
)


def figure(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawn(chart)))


def hovers(chart: Chart) -> list[str]:
    return [element.text or "" for element in figure(chart).iter("title")]


def numbers(element: ElementTree.Element, *names: str) -> tuple[float, ...]:
    return tuple(float(element.get(name, "nan")) for name in names)


def test_cell_of_a_heat_map_has_its_number_on_hover() -> None:
    assert hovers(MAP) == [
        "layers.0 q_proj: 0.25",
        "layers.0 v_proj: none",
        "layers.0 o_proj: -1",
        "layers.1 q_proj: 0.5",
        "layers.1 v_proj: 1",
        "layers.1 o_proj: 0",
    ]


def test_opacity_of_a_cell_is_the_distance_from_the_middle_of_a_diverging_scale() -> None:
    cells = [e for e in figure(MAP).iter("rect") if e.get("class") in ("high", "low")][:5]

    # (value - middle) / half of the range: 0.25, -1, 0.5, 1, 0
    assert [(e.get("class"), float(e.get("fill-opacity", "nan"))) for e in cells] == [
        ("high", 0.25),
        ("low", 1.0),
        ("high", 0.5),
        ("high", 1.0),
        ("high", 0.0),
    ]


def test_points_of_a_line_lie_at_their_logarithms() -> None:
    # 0.0005 to 20 upward, 1 to 100 across: 10 is half way between 1 and 100.
    (line, *_) = list(figure(LINES).iter("polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]

    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.2)
    # Equal ratios of 100 are equal distances.
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert points[0][1] > points[1][1]


def test_line_is_interrupted_where_there_is_no_number() -> None:
    lines = [e.get("points", "").split() for e in figure(LINES).iter("polyline") if "series-1" in e.get("class", "")]

    assert [len(points) for points in lines] == [1, 2]
    assert [hover for hover in hovers(LINES) if hover.startswith("broken")] == [
        "broken, rank 1: 1",
        "broken, rank 4: 3",
        "broken, rank 8: 2",
    ]


def test_marks_and_bands_are_drawn() -> None:
    classes = [e.get("class") for e in figure(LINES).iter()]
    texts = [e.text for e in figure(LINES).iter("text")]

    assert classes.count("mark") == 2
    assert classes.count("band series-0") == 1
    assert {"knee", "noise", "all", "broken", "rank"} <= set(texts)


def test_length_of_a_bar_is_its_number_and_a_missing_one_has_no_bar() -> None:
    groups = [g for g in figure(BARS).iter("g") if g.find("title") is not None]
    lengths = [numbers(g.findall("rect")[0], "x", "width") for g in groups]

    assert [g.find("title").text for g in groups] == [  # type: ignore[union-attr]
        "first, gain: 0.5",
        "second, gain: 1",
        "first, loss: -0.25",
    ]
    assert lengths[1][1] == pytest.approx(2 * lengths[0][1], abs=0.02)
    # To the left of zero, where the others begin.
    assert lengths[2][0] + lengths[2][1] == pytest.approx(lengths[0][0], abs=0.02)
    assert lengths[2][1] == pytest.approx(lengths[0][1] / 2, abs=0.02)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ((0.0, 1.0), False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ((0.13, 0.91), False, [0.2, 0.4, 0.6, 0.8]),
        ((1.0, 1000.0), True, [1.0, 10.0, 100.0, 1000.0]),
        ((1.0, 16.0), True, [1.0, 2.0, 5.0, 10.0]),
        ((1e-12, 1.0), True, [1e-12, 1e-9, 1e-6, 1e-3, 1.0]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(values: tuple[float, float], log: bool, ticks: list[float]) -> None:
    assert axis(values, 0, 100, log=log).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    "chart",
    [
        HeatMap("t", "u", (), (), ()),
        Lines("t", "x", "y", ()),
        Lines("t", "x", "y", (Series("one", (1.0,), (2.0,)),), log_x=True, log_y=True),
        Lines("t", "x", "y", (Series("none", (1.0, 2.0), (None, float("nan"))),), log_y=True),
        Lines("t", "x", "y", (Series("zero", (0.0, 1.0), (0.0, -1.0)),), log_x=True, log_y=True),
        Bars("t", "u", (), ()),
        Bars("t", "u", ("a",), (BarGroup("g", (0.0,)),)),
    ],
)
def test_chart_with_next_to_nothing_in_it_is_drawn(chart: Chart) -> None:
    assert not re.search("nan|inf", ElementTree.tostring(figure(chart), encoding="unicode"))


def test_labels_are_text() -> None:
    name = "<script>\"'&\u202e"
    for chart in (
        HeatMap(name, name, (name,), (name,), ((1.0,),), note=name),
        Lines(name, name, name, (Series(name, (1.0,), (1.0,)),), marks=(Mark(name, x=1.0),), note=name),
        Bars(name, name, (name,), (BarGroup(name, (1.0,)),), note=name),
    ):
        drawing = str(drawn(chart))

        assert "<script" not in drawing
        assert "\u202e" not in drawing
        assert ElementTree.fromstring(drawing).find("figcaption").text == "<script>\"'&\\u202e"  # type: ignore[union-attr]
        assert " style=" not in drawing
