"""What is said of runs that were killed while they wrote the same output."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from loratools.formats.common.source import counted
from loratools.storage.files import quoted
from loratools.storage.output_paths import real_path_of
from loratools.storage.resumption import abandoned_runs


def abandoned_warnings(out: Path) -> list[str]:
    """A sentence for each killed run whose work could be gone on with, to be said before the work begins anew."""
    sentences = []
    for run in abandoned_runs(real_path_of(out)):
        begun = datetime.fromtimestamp(run.recorded.head.started, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        sentences.append(
            f"a run for {quoted(out)} that began at {begun} was killed with {counted(len(run.recorded.units), 'unit')} "
            f"of its work done, in {quoted(run.path)}: --resume goes on with it; it is removed when this run is done, "
            "or by 'loratools clean'"
        )
    return sentences


def resumed_remarks(out: Path, resumed: bool, resumed_units: int, units: int) -> list[str]:
    """What `--resume` found to go on with."""
    if not resumed:
        return [f"no killed run had left anything to go on with for {quoted(out)}: it was begun anew"]
    return [
        f"a killed run was resumed: {resumed_units} of {counted(units, 'unit')} of work were done and right, and were "
        "kept"
    ]
