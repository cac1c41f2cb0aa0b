"""Pictures in a terminal: numbers as shades or characters, names unbroken, and nothing where nobody looks."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from loratools.charts.values import HeatMap, Lines, Series
from loratools.report.pictures.heat_map import AdapterMatrix, LayerMap
from loratools.report.pictures.on_terminal import OnTerminal
from loratools.report.pictures.sparklines import Sparklines
from loratools.report.text import ascii_only


def printed(
    picture: RenderableType | HeatMap, *, width: int = 80, colours: str | None = None, terminal: bool = True
) -> str:
    out = StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=terminal,
        color_system=colours,  # type: ignore[arg-type]
        no_color=colours is None,
        markup=False,
        highlight=False,
    )
    console.print(LayerMap(picture) if isinstance(picture, HeatMap) else picture)
    # Without colours there is still the bold of a title.
    return out.getvalue().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")


def layer_map(layers: int, **options: object) -> HeatMap:
    values = tuple((float(i), None, float(layers - 1 - i)) for i in range(layers))
    rows = tuple(f"layers.{i}" for i in range(layers))
    return HeatMap("Norm", "norm of dW", rows, ("q_proj", "k_proj", "v"), values, limits=(0.0, layers - 1.0), **options)  # type: ignore[arg-type]


def test_map_without_colours_is_characters_from_little_to_much_and_blanks_for_no_value() -> None:
    lines = [line.rstrip() for line in printed(layer_map(9)).splitlines()]

    assert lines == [
        "Norm",
        "q_proj .. :: -- == ++ ** ## %% @@",
        "k_proj",
        "v      @@ %% ## ** ++ == -- :: ..",
        "layer  0  1  2  3  4  5  6  7  8",
        "0 .:-=+*#%@ 8  norm of dW; blank: no value",
    ]


def test_signed_map_without_colours_counts_down_in_letters_and_up_in_digits() -> None:
    rows = tuple(f"h.{i}" for i in range(5))
    values = ((-1.0,), (-0.5,), (0.0,), (0.34,), (1.0,))

    text = printed(HeatMap("Cosine", "cosine", rows, ("q",), values, diverging=True, limits=(-1.0, 1.0)))

    assert "q     ii dd .. 33 99" in text
    assert "-1 ihgfedcba.123456789 1  cosine" in text


def test_map_in_colour_has_a_background_for_each_number() -> None:
    text = printed(layer_map(3), colours="truecolor")

    # The two ends of the scale.
    assert "48;2;0;34;78m" in text
    assert "48;2;254;232;56m" in text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("layers", [2, 32, 81, 126])
def test_lines_fit_the_terminal_and_every_layer_has_its_place(layers: int, width: int) -> None:
    lines = printed(layer_map(layers), width=width).splitlines()

    assert max(map(len, lines)) <= width
    axes = [line.split()[1:] for line in lines if line.startswith("layer")]
    assert axes[0][0] == "0"
    assert [int(number) for axis in axes for number in axis] == sorted(int(n) for axis in axes for n in axis)
    # Every layer has its place: all but the lowest value stand in two rows of the map.
    shown = "".join(line.split(" ", 1)[1] for line in lines if line.startswith(("q_proj", "v ")))
    assert sum(character != " " for character in shown) % (2 * layers) == 0


def test_a_map_of_more_lines_than_a_screen_is_not_drawn() -> None:
    columns = tuple(f"kind.{i}" for i in range(40))

    assert printed(HeatMap("t", "u", ("layers.0",), columns, ((1.0,) * 40,), limits=(0.0, 1.0))) == ""


def test_sections_have_letters_where_their_names_have_no_room() -> None:
    rows = ("down_blocks.1.attentions.0", "down_blocks.1.attentions.1", "mid_block.attentions.0")

    lines = printed(HeatMap("t", "u", rows, ("q",), ((1.0,), (2.0,), (3.0,)), limits=(0.0, 3.0))).splitlines()

    assert lines[1].rstrip() == "q     == ## |@@"
    assert lines[2].rstrip() == "layer A      B"
    assert lines[-1] == "A down_blocks.1, B mid_block"


def test_matrix_in_colour_has_its_numbers_and_without_colours_is_the_table() -> None:
    names = ("a", "b")
    matrix = HeatMap("Cosine", "cosine", names, names, ((None, -0.5), (-0.5, None)), diverging=True, limits=(-1.0, 1.0))

    coloured = printed(AdapterMatrix(matrix, "the table"), colours="truecolor")

    assert coloured.count("-0.50") == 2
    assert coloured.count("48;2;") == 2
    assert printed(AdapterMatrix(matrix, "the table")) == "the table\n"
    assert printed(AdapterMatrix(matrix, "the table"), colours="truecolor", width=12) == "the table\n"


def test_sparklines_fall_as_their_numbers_and_have_a_spelling_in_ascii() -> None:
    series = Series("q_proj", (1.0, 2.0, 3.0, 4.0), (1.0, 0.5, 0.25, 0.0625))

    text = printed(Sparklines(Lines("t", "x", "y", (series,)), title="Singular values"))

    assert text == "Singular values\nq_proj █▅▃▁ 0.0625\n"
    assert ascii_only(text) == "Singular values\nq_proj #+-_ 0.0625\n"


def test_long_sparklines_are_sampled_to_the_room_there_is() -> None:
    ys = tuple(1 - i / 200 for i in range(200))

    text = printed(
        Sparklines(Lines("t", "x", "y", (Series("q", tuple(map(float, range(200))), ys),)), title="t"), width=30
    )

    assert all(len(line) <= 30 for line in text.splitlines())


def test_nothing_is_made_or_shown_where_nobody_looks_at_a_terminal() -> None:
    def blocks() -> list[RenderableType]:
        raise AssertionError("made for nobody")

    assert printed(OnTerminal(blocks), terminal=False) == ""
    assert printed(OnTerminal(blocks, ["as before"]), terminal=False) == "as before\n"


def test_names_of_files_do_not_reach_the_terminal_as_control_characters() -> None:
    text = printed(HeatMap("t", "u", ("layers.0", "layers.1"), ("q\x1b[31m",), ((1.0,), (2.0,)), limits=(0.0, 2.0)))

    assert "\x1b[31m" not in text
