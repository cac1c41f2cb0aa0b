"""Figures hold the numbers of their charts: read back from what matplotlib draws."""

from __future__ import annotations

import re
import subprocess
import sys
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import peers
import pytest

from loratools.charts.numbers import aligned
from loratools.charts.plot_file import figure, picture_bytes
from loratools.charts.values import BarGroup, Bars, Chart, HeatMap, Lines, Mark, Series
from loratools.errors import InputError

pytestmark = peers.needs("matplotlib")

MAP = HeatMap(
    "Cosine",
    "cosine",
    rows=("layers.0", "layers.1", "layers.2"),
    columns=("q_proj", "v_proj"),
    values=((0.5, -0.25), (None, 0.75), (-1.0, 0.125)),
    diverging=True,
    limits=(-1.0, 1.0),
)
LINES = Lines(
    "Spectrum",
    "number",
    "singular value",
    (
        Series("all", (1.0, 2.0, 4.0), (1.0, 0.5, 0.25), low=(0.9, 0.4, 0.2), high=(1.0, 0.6, 0.3)),
        Series("q_proj", (1.0, 2.0, 4.0), (1.0, None, 0.125), points=True),
    ),
    log_x=True,
    log_y=True,
    marks=(Mark("knee", x=2.0), Mark("noise", y=0.2)),
)
BARS = Bars("Gain", "share", ("style", "facts"), (BarGroup("gain", (0.5, None)), BarGroup("interference", (1.5, 2.0))))


def axes_of(chart: Chart, **options: Any) -> list[Any]:
    drawn = figure([chart], **options)
    drawn.canvas.draw()
    return drawn.axes


def test_map_has_layers_across_modules_down_and_an_empty_place_for_no_value() -> None:
    axes, scale = axes_of(MAP)

    (mesh,) = [each for each in axes.collections if type(each).__name__ == "QuadMesh"]
    numbers = mesh.get_array().reshape(2, 3)
    assert numbers.tolist() == [[0.5, None, -1.0], [-0.25, 0.75, 0.125]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "v_proj"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "module")
    assert scale.get_ylabel() == "cosine"
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-1.0, 1.0)
    assert axes.get_title(loc="left") == "Cosine"
    # The first place of a column stands at the top.
    assert axes.get_ylim() == (2, 0)


def test_wide_places_hold_their_numbers() -> None:
    axes, _ = axes_of(MAP)

    written = [text.get_text() for text in axes.texts if re.fullmatch(r"-?[0-9.]+", text.get_text())]
    assert written == ["0.50", "-1.00", "-0.25", "0.75", "0.12"]


def test_narrow_places_below_the_neutral_value_are_hatched() -> None:
    layers = tuple(f"layers.{i}" for i in range(80))
    values = tuple((0.5 if i % 2 else -0.5,) for i in range(80))
    axes, _ = axes_of(HeatMap("t", "cosine", layers, ("q",), values, diverging=True, limits=(-1.0, 1.0)))

    (hatched,) = [each for each in axes.collections if each.get_hatch()]
    assert sorted(path.vertices[:, 0].min() for path in hatched.get_paths()) == list(range(0, 80, 2))
    assert any("Hatched: below 0." in text.get_text() for text in axes.texts)


def test_sections_of_a_unet_are_named_below_and_separated() -> None:
    rows = ("down_blocks.1.attentions.0", "down_blocks.1.attentions.1", "mid_block.attentions.0", "up_blocks.0.a.0")
    axes, _ = axes_of(HeatMap("t", "norm", rows, ("q", "k"), ((1.0, 2.0),) * 4, limits=(0.0, 2.0)))

    assert [label.get_text() for label in axes.get_xticklabels()] == ["down_blocks.1 (2)", "mid_block", "up_blocks.0"]
    assert [line.get_xdata()[0] for line in axes.lines] == [2, 3]


def test_rows_that_are_no_layers_stay_rows_and_numbers_stand_for_names_across() -> None:
    names = ("style-v1.5", "facts")
    axes, _ = axes_of(HeatMap("t", "cosine", names, names, ((None, 0.5), (0.5, None)), row_label="adapter"))

    assert [label.get_text() for label in axes.get_yticklabels()] == ["style-v1.5  1", "facts  2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_lines_have_their_points_bands_marks_and_logarithmic_axes() -> None:
    (axes,) = axes_of(LINES)

    every, kind, knee, noise = axes.lines
    assert list(every.get_xdata()) == [1, 2, 4]
    assert list(every.get_ydata()) == [1.0, 0.5, 0.25]
    assert [str(float(y)) for y in kind.get_ydata()] == ["1.0", "nan", "0.125"]
    assert (kind.get_marker(), every.get_marker()) != ("None", "None")
    assert list(knee.get_xdata()) == [2.0, 2.0]
    assert list(noise.get_ydata()) == [0.2, 0.2]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["all", "q_proj", "knee", "noise"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("number", "singular value")
    assert {label.get_text() for label in axes.get_xticklabels()} == {"1", "2", "4"}
    # In grey they differ by their dashes.
    assert every.get_linestyle() != kind.get_linestyle()


def test_shares_are_percentages_from_zero() -> None:
    (axes,) = axes_of(Lines("t", "rank", "energy", (Series("s", (1.0, 2.0), (0.5, 1.0)),), percent=True))

    assert axes.get_ylim()[0] == 0
    assert "100%" in {label.get_text() for label in axes.get_yticklabels()}


def test_bars_have_their_lengths_hatches_and_say_where_there_is_no_value() -> None:
    (axes,) = axes_of(BARS)

    assert [[bar.get_width() for bar in group] for group in axes.containers] == [[0.5, 0.0], [1.5, 2.0]]
    assert len({group[0].get_hatch() for group in axes.containers}) == 2
    assert [text.get_text() for text in axes.texts] == ["0.5", "no value", "1.5", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["style", "facts"]
    assert axes.get_xlabel() == "share"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["gain", "interference"]


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_bytes_do_not_depend_on_the_run_or_on_settings_of_a_person(suffix: str) -> None:
    import matplotlib

    first, _ = picture_bytes(figure([MAP, LINES, BARS], title="title"), suffix)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "image.cmap": "jet", "svg.fonttype": "path"}):
        second, _ = picture_bytes(figure([MAP, LINES, BARS], title="title"), suffix)

    assert first == second


def test_a_notebook_gets_a_picture_without_pyplot_at_the_size_of_the_page() -> None:
    from PIL import Image

    drawn = figure([MAP, LINES], title="title")

    data, shown = drawn._repr_png_()  # type: ignore[attr-defined]

    with Image.open(BytesIO(data)) as picture:
        width, height = picture.size
    inches = drawn.get_size_inches()
    assert (width, height) == pytest.approx(inches * 150, abs=1)
    assert (shown["width"], shown["height"]) == pytest.approx(inches * 110, abs=1)


def test_svg_of_another_process_has_the_same_bytes() -> None:
    probe = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from charts.test_figure import BARS, LINES, MAP\n"
        "from loratools.charts.plot_file import figure, picture_bytes\n"
        "sys.stdout.buffer.write(picture_bytes(figure([MAP, LINES, BARS]), '.svg')[0])\n"
    )
    here, _ = picture_bytes(figure([MAP, LINES, BARS]), ".svg")

    there = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, timeout=120)

    assert there.stdout == here


def test_names_are_text_in_svg_and_begin_no_markup_formula_or_control() -> None:
    hostile = "$a^2$ <b>&\x1b[31m\u202e"
    names = (hostile, "b")
    matrix = HeatMap("t <i>", "u", names, names, ((None, 0.5), (0.5, None)), row_label="adapter")

    data, _ = picture_bytes(figure([matrix], title=hostile), ".svg")

    nodes = [node for node in ElementTree.fromstring(data).iter() if node.tag.endswith("}text")]
    texts = ["".join(node.itertext()).strip() for node in nodes]
    assert any(text.startswith("$a^2$ <b>&\\x1b[31m\\u202e") for text in texts)
    assert "t <i>" in texts


def test_signs_that_the_font_lacks_are_told_where_text_is_drawn_and_kept_in_svg() -> None:
    chart = Bars("画風", "share", ("絵",), (BarGroup("gain", (1.0,)),))

    _, notes = picture_bytes(figure([chart]), ".png")
    data, none = picture_bytes(figure([chart]), ".svg")

    assert notes == ("matplotlib's font has no sign for 3 characters of the names: .svg keeps them as text",)
    assert none == ()
    assert "画風" in data.decode()


def test_no_chart_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        figure([])


def test_numbers_of_one_map_are_spelled_with_the_same_decimals() -> None:
    assert aligned([[1.0, 12.0, None]], (0.0, 12.0)) == [["1", "12", ""]]
    assert aligned([[0.5, -0.001]], (-1.0, 1.0)) == [["0.50", "0.00"]]
    assert aligned([[12.34]], (0.0, 50.0)) == [["12.3"]]
    assert aligned([[0.00123, 0.0]], (0.0, 0.005)) == [["1e-03", "0"]]
