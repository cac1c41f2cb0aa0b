"""inspect of the folder of a training run names the best checkpoint, by the file that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
from cli_runner import CliRunner
from transformers import TrainerState

import loratools
from loratools.cli import verbs

HISTORY = [
    {"step": 500, "loss": 2.5, "epoch": 1.0},
    {"step": 500, "eval_loss": 1.25, "eval_accuracy": 0.5, "epoch": 1.0},
    {"step": 1000, "eval_loss": 1.75, "eval_accuracy": 0.75, "epoch": 2.0},
]


def run_folder(path: Path, *, state_in: str = "checkpoint-1000", **fields: object) -> Path:
    """A run with checkpoints 500 and 1000, whose trainer's state is that of `fields`."""
    for step in (500, 1000):
        factories.adapter_folder(path / f"checkpoint-{step}", seed=step)
    state = TrainerState(global_step=1000, max_steps=1500, log_history=HISTORY)
    for name, value in fields.items():
        setattr(state, name, value)
    state.save_to_json(str(path / state_in / "trainer_state.json"))
    return path


@pytest.mark.parametrize("best", ["/somewhere/else/run/checkpoint-500", "C:\\runs\\mine\\checkpoint-500\\"])
def test_best_checkpoint_is_the_one_that_the_trainer_names(tmp_path: Path, best: str) -> None:
    run = run_folder(tmp_path / "run", best_model_checkpoint=best, best_metric=1.25)

    (found,) = loratools.inspect(run).runs

    assert (found.best, found.best_exists, found.best_step, found.steps) == ("checkpoint-500", True, 500, 1000)
    assert (found.metric, found.metric_value) == ("eval_loss", 1.25)
    assert Path(found.state) == run / "checkpoint-1000" / "trainer_state.json"


def test_state_beside_the_checkpoints_counts_before_that_of_the_last_one(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", best_model_checkpoint="run/checkpoint-500", best_metric=1.25)
    run_folder(run, state_in=".", best_model_checkpoint="run/checkpoint-1000", best_metric=0.75)

    (found,) = loratools.inspect(run).runs

    assert (found.best, found.metric) == ("checkpoint-1000", "eval_accuracy")


def test_step_alone_names_the_folder_and_a_deleted_one_is_said_to_be_gone(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", best_global_step=250, best_metric=1.0)

    done = CliRunner().invoke(verbs, ["inspect", str(run)])

    assert loratools.inspect(run).runs[0].best == "checkpoint-250"
    assert "checkpoint-250, which is not in" in done.stdout


def test_a_run_without_a_best_checkpoint_names_none(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")

    done = CliRunner().invoke(verbs, ["inspect", str(run)])

    assert loratools.inspect(run).runs[0].best is None
    assert "best:" not in done.stdout


def test_runs_below_the_folder_are_each_told(tmp_path: Path) -> None:
    for name, step in (("a", 500), ("b", 1000)):
        run_folder(tmp_path / name, best_global_step=step)

    runs = loratools.inspect(tmp_path).runs

    assert [(Path(run.path).name, run.best_step) for run in runs] == [("a", 500), ("b", 1000)]


def test_trained_adapter_beside_its_checkpoints_is_told_too(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", best_global_step=500)
    factories.adapter_folder(run, seed=7)

    report = loratools.inspect(run)

    assert [Path(entry.path) for entry in report.sources] == [run]
    assert report.runs[0].best == "checkpoint-500"


def test_damaged_state_is_told_and_hides_no_adapter(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "checkpoint-1000" / "trainer_state.json").write_text("{", encoding="utf-8")

    done = CliRunner().invoke(verbs, ["inspect", str(run), "--json"])

    document = json.loads(done.stdout)
    assert (done.exit_code, len(document["sources"])) == (0, 2)
    assert "trainer_state.json" in document["runs"][0]["error"]


def test_folder_of_adapters_that_is_no_run_has_none(tmp_path: Path) -> None:
    factories.adapter_folder(tmp_path / "one")
    factories.adapter_folder(tmp_path / "two", seed=1)

    assert loratools.inspect(tmp_path).runs == ()
