"""The folder of a training run, and its best checkpoint according to the trainer's record.

transformers' Trainer writes `checkpoint-STEP` folders, and in each of them (at the end also beside them)
`trainer_state.json` with `best_model_checkpoint`, `best_metric`, `best_global_step` and the history of its log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from loratools.errors import LoraToolsError
from loratools.short_repr import one_line
from loratools.storage.origins import shown

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
# The log of a long training has a few hundred bytes for each logged step.
_MOST_BYTES = 100_000_000


class TrainingRun(NamedTuple):
    """What the trainer recorded about a training run.

    Attributes:
        path: The folder of the run.
        state: The file with the record: the latest `trainer_state.json` of the run.
        steps: How many optimiser steps the run had made when the file was written; None if unknown.
        best: The name of the folder of the best checkpoint; None if the file names none.
        best_exists: Whether that folder exists.
        best_step: The optimiser step of the best checkpoint; None if unknown.
        metric: The name of the metric that was compared, such as eval_loss; None if the log does not show it.
        metric_value: Its value for the best checkpoint.
        error: Why the file cannot be read; None if it can.
    """

    path: str
    state: str
    steps: int | None = None
    best: str | None = None
    best_exists: bool = False
    best_step: int | None = None
    metric: str | None = None
    metric_value: float | None = None
    error: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `runs` in the document of `loratools inspect --json`."""
        return self._asdict()


def training_runs(folder: Path, sources: Iterable[Path]) -> list[TrainingRun]:
    """The runs in `folder`, or `folder` itself, for the names of the sources found in it."""
    folders = dict.fromkeys([folder, *(path.parent for path in sources if _CHECKPOINT.fullmatch(path.name))])
    return [run for each in folders if (run := _training_run(each)) is not None]


def _training_run(folder: Path) -> TrainingRun | None:
    state = _latest_state(folder)
    if state is None:
        return None
    # Imported here, so that adapters outside of a run do not pay for it.
    from loratools.storage.json_file import read_json

    try:
        fields = read_json(state, max_bytes=_MOST_BYTES, infinities=True)
    except LoraToolsError as error:
        return TrainingRun(shown(folder), shown(state), error=error.message)
    path = fields.get("best_model_checkpoint")
    step = _whole_number(fields.get("best_global_step"))
    # It is a path on the training machine, of Windows or POSIX.
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1] if isinstance(path, str) else None
    if name is None and step is not None:
        name = f"checkpoint-{step}"
    match = _CHECKPOINT.fullmatch(name or "")
    if step is None and match is not None:
        step = int(match[1])
    value = fields.get("best_metric")
    metric_value = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return TrainingRun(
        path=shown(folder),
        state=shown(state),
        steps=_whole_number(fields.get("global_step")),
        best=name,
        best_exists=name is not None and (folder / name).is_dir(),
        best_step=step,
        metric=_metric(fields.get("log_history"), step, metric_value),
        metric_value=metric_value,
    )


def _latest_state(folder: Path) -> Path | None:
    """The state file beside the checkpoints, else that of the last checkpoint; None if `folder` is no run."""
    try:
        numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
    except OSError:
        return None
    if not numbered:
        return None
    candidates = [folder, *(path for _, path in sorted(numbered, reverse=True))]
    return next((path / _STATE for path in candidates if (path / _STATE).is_file()), None)


def _metric(history: object, step: int | None, value: float | None) -> str | None:
    """The name of the logged metric that had this value at this step."""
    if not isinstance(history, list) or value is None:
        return None
    at_step = [entry for entry in history if isinstance(entry, dict) and entry.get("step") == step]
    names = [name for entry in at_step for name, logged in entry.items() if name != "step" and logged == value]
    return next((name for name in names if name.startswith("eval_")), names[0] if names else None)


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
