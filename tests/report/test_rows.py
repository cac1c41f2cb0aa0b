"""Every verb's table at 80 and 120 columns: names are not broken in mid-word, numbers not cut, lines not too long."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import factories
import pytest
from rich.console import Console, RenderableType

import loratools
from loratools.report.combination import combine_plan
from loratools.report.comparison import comparison_tables
from loratools.report.extraction import extract_plan
from loratools.report.inspection import inspection_report
from loratools.report.pairs import pairs
from loratools.report.resizing import resize_plan
from loratools.report.rows import Column, Rows, wrapped
from loratools.report.spectrum import spectrum_report

# 58 letters: more than a table of seven numbers leaves of 80 columns, and one longer than 80.
LONG = "model.language_model.decoder.layers.0.self_attention.q_proj"
LONGER = "model.language_model.decoder.layers.1.cross_attention_to_the_vision_tower.output_projection.inner.v_proj"


def printed(blocks: Sequence[RenderableType], width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False, emoji=False, no_color=True)
    for block in blocks:
        console.print(block)
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def adapters(root: Path) -> list[Path]:
    modules = {LONG: (10, 6), LONGER: (7, 6)}
    deep = root / "a folder with a name" / "and one in it that is longer still, as downloads have it"
    return [factories.adapter_folder(deep / f"adapter-{i}", modules=modules, seed=i) for i in range(2)]


VERBS: dict[str, Callable[[list[Path]], Sequence[RenderableType]]] = {
    "inspect": lambda a: inspection_report(loratools.inspect(a[0]), modules=True),
    "inspect --values": lambda a: inspection_report(loratools.inspect(a[0], values=True), modules=True),
    "inspect of several": lambda a: inspection_report(loratools.inspect(*a), overview=True),
    "compare": lambda a: comparison_tables(loratools.compare(*a), every=True),
    "resize": lambda a: resize_plan(loratools.resize(a[0], rank=2, plan=True), a[0]),
    "combine": lambda a: combine_plan(loratools.combine(a, plan=True), a[0], every=True),
    "spectrum": lambda a: spectrum_report(loratools.spectrum(a[0]), modules=True),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", VERBS)
def test_names_and_numbers_are_whole(verb: str, width: int, tmp_path: Path) -> None:
    blocks = VERBS[verb](adapters(tmp_path))

    wide, text = printed(blocks, 1000), printed(blocks, width)

    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text.replace("… and", "")
    shown = [line.strip().strip("│").strip() for line in text.splitlines()]
    if verb != "inspect of several":
        assert any(LONG in line for line in shown)
        if width == 120:
            assert any(LONGER in line for line in shown)
        # Where even the line is too short, it goes on after a dot or an underscore.
        assert LONGER in "".join(shown)
    numbers = re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e-?\d+)?%?(?![\w.])", wide)
    missing = [number for number in numbers if number not in text]
    assert not missing


def test_whole_table_of_an_extraction(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    weights = {name: tensor + 1 for name, tensor in factories.base_weights().items()}
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights=weights)
    report = loratools.extract(base, tuned, rank=2, plan=True)

    text = printed(extract_plan(report, tmp_path / "out"), 40)

    for module in report.modules:
        assert module.name in text


def test_columns_that_fit_are_a_table() -> None:
    rows = Rows([Column("module", ["a.b", "longer.name"], numeric=False), Column("rank", ["4", "16"])])

    assert printed([rows], 80) == "module       rank\na.b             4\nlonger.name    16\n"


def test_columns_to_spare_go_before_the_form_changes() -> None:
    columns = [Column("module", ["a.b"], numeric=False), Column("alpha", ["8"], spare=1), Column("rank", ["4"])]

    assert printed([Rows(columns)], 14) == "module  rank\na.b        4\n"


def test_rows_without_room_are_a_name_with_its_facts_below() -> None:
    columns = [Column("module", ["a.long.name"], numeric=False), Column("rank", ["16"]), Column("error", ["0.25"])]

    assert printed([Rows(columns)], 22) == "a.long.name\n  rank 16  error 0.25\n"
    assert printed([Rows(columns)], 12) == "a.long.name\n  rank 16\n  error 0.25\n"


def test_a_column_below_keeps_the_numbers_in_columns() -> None:
    columns = [
        Column("rank", ["4", "16"]),
        Column("energy", ["0.5", "1"]),
        Column("module", ["a.long.name", "another.name"], numeric=False, below=True),
    ]

    assert printed([Rows(columns)], 24) == (
        "rank  energy\n   4     0.5\n    module a.long.name\n  16       1\n    module another.name\n"
    )


def test_text_is_broken_at_blanks_and_names_after_a_separator() -> None:
    assert wrapped("written to models/base_of_all/merged", 16) == ["written to", "models/base_of_", "all/merged"]
    assert wrapped("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert wrapped("", 4) == [""]


def test_summary_goes_on_below_its_text() -> None:
    text = printed([pairs([("base", "models/first-of-all"), ("rank", "4")])], 18)

    assert text == "base  models/\n      first-of-all\nrank  4\n"
