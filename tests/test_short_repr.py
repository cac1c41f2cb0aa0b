"""How values show themselves in a console: one line, or a few, whatever their size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import factories
import numpy as np
import pytest

import loratools
from loratools.short_repr import few_lines, one_line

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTER, BASE, TUNED = FIXTURES / "llama-tiny-science", FIXTURES / "bert-tiny", FIXTURES / "bert-tiny-tuned"


@dataclass(frozen=True)
class Sample:
    name: str
    count: int = 3
    share: float = 1 / 3
    nothing: str | None = None
    empty: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (10, 6)
    many: tuple[float, ...] = field(default=tuple(range(1000)))


class Row(NamedTuple):
    name: str
    values: tuple[Sample, ...]


def test_line_has_the_fields_that_say_something_and_counts_what_is_long() -> None:
    assert one_line(Sample("q_proj")) == (
        "Sample(name='q_proj', count=3, share=0.333333, sizes=(10, 6), many=<1,000 × int>)"
    )
    assert one_line(Row("x", (Sample("a"),) * 5)) == "Row(name='x', values=<5 × Sample>)"


def test_few_lines_have_a_field_each() -> None:
    assert few_lines(Row("x", ())) == "Row\n  name  'x'"


def test_long_texts_are_cut_off_and_lines_are_joined() -> None:
    text = one_line(Row("a\nb" * 1000, ()))

    assert "\n" not in text
    assert len(text) < 100
    assert "…" in text


def reports() -> dict[str, object]:
    adapter = loratools.load(ADAPTER)
    return {
        "inspect": loratools.inspect(ADAPTER, values=True),
        "inspect of a model": loratools.inspect(BASE),
        "spectrum": loratools.spectrum(ADAPTER),
        "compare": loratools.compare(ADAPTER, FIXTURES / "llama-tiny-shakespeare"),
        "resize": loratools.resize(adapter, rank=2),
        "combine": loratools.combine([ADAPTER, FIXTURES / "llama-tiny-shakespeare"]),
        "extract": loratools.extract(BASE, TUNED, rank=2),
        "merge": loratools.merge(FIXTURES / "llama-tiny", ADAPTER, "nowhere", plan=True),
        "convert": loratools.convert(ADAPTER, "nowhere", format="mlx", plan=True),
    }


@pytest.fixture(scope="module")
def every_report() -> dict[str, object]:
    return reports()


def test_reports_show_themselves_in_a_few_lines(every_report: dict[str, object]) -> None:
    for verb, report in every_report.items():
        lines = repr(report).split("\n")

        assert len(lines) <= 20, verb
        assert max(map(len, lines)) <= 500, verb


def test_rows_of_reports_are_those_of_their_documents(every_report: dict[str, object]) -> None:
    for verb, report in every_report.items():
        if verb in ("merge", "convert"):
            continue  # a plan has measured nothing
        rows = report.rows()  # type: ignore[attr-defined]

        assert rows, verb
        assert len({tuple(row) for row in rows}) == 1, verb
        assert "name" in rows[0], verb


def test_rows_of_a_combination_are_one_for_each_module_and_adapter(every_report: dict[str, object]) -> None:
    report = every_report["combine"]
    assert isinstance(report, loratools.CombineReport)

    rows = report.rows()

    sources = [loratools.load(path) for path in (ADAPTER, FIXTURES / "llama-tiny-shakespeare")]
    assert len(rows) == sum(len(source) for source in sources)
    assert {row["adapter"] for row in rows} == {0, 1}


def test_adapters_updates_and_checkpoints_show_themselves_in_one_line(tmp_path: Path) -> None:
    many = factories.layered(300, {"self_attn.q_proj": (10, 6)})
    folder = factories.adapter_folder(tmp_path / "a", modules=many, ranks={"model.layers.3.self_attn.q_proj": 2})
    adapter = loratools.load(folder)

    assert repr(adapter).endswith(": peft, 300 modules, lora, ranks 2–4>")
    assert repr(adapter["model.layers.7.self_attn.q_proj"]) == (
        "<AdaptedModule 'model.layers.7.self_attn.q_proj': lora, rank 4, scale 2, 6 -> 10>"
    )
    for value in (adapter, *adapter.updates.values(), loratools.open_checkpoint(BASE)):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 300


def test_lazy_tensor_shows_dtype_and_shape() -> None:
    from loratools.tensors.lazy import from_array

    assert repr(from_array(np.ones((3, 5), np.float16))) == "<LazyTensor F16 (3, 5)>"
