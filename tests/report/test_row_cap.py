"""A table of names without a pattern ends somewhere, and counts what it leaves out."""

from rich.console import Console

from loratools.ops.inspect.entries import AdapterEntry, InspectReport, TensorEntry
from loratools.report.inspection import inspection_report


def lines(count: int, *, modules: bool) -> list[str]:
    entries = tuple(TensorEntry(f"t{i:07d}", (2,), "F32", 2, None) for i in range(count))
    entry = AdapterEntry(
        path="x", format="peft", base_model=None, bytes=8 * count, parameters=2 * count, dtypes={"F32": count},
        modules=(), replacements=entries, metadata={}, warnings=(),
    )  # fmt: skip
    console = Console(width=100)
    with console.capture() as captured:
        console.print(*inspection_report(InspectReport((entry,)), modules=modules), sep="\n")
    return captured.get().splitlines()


def test_a_thousand_rows_are_shown_and_the_rest_is_counted() -> None:
    shown = lines(1003, modules=False)

    assert sum(line.strip().startswith("t0") for line in shown) == 1000
    assert "… and 3 replaced weights more, whose names have no pattern; --modules lists every one" in shown


def test_every_row_is_shown_where_it_was_asked_for() -> None:
    shown = lines(1003, modules=True)

    assert sum(line.strip().startswith("t0") for line in shown) == 1003
    assert not any("more" in line for line in shown)
