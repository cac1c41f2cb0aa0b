"""A merge that was killed is gone on with: the bytes of an undisturbed one, and nothing but the same merge."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from click.testing import CliRunner
from reliability.killing import AtOnce, content, killed_when

import loratools
from loratools.cli import verbs
from loratools.errors import ChangedInputError, LoraToolsError, MachineError, OutputExistsError, UsageError
from loratools.ops.merge import rows, writing
from loratools.storage import system
from loratools.storage.run_journal import JOURNAL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes and kills them")

MODULES = factories.layered(6, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (56, 24)})


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # What is noted when depends on a thread otherwise.
    monkeypatch.setattr(writing, "ThreadPoolExecutor", AtOnce)
    weights = factories.base_weights(MODULES, dtype=torch.bfloat16)
    factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=2)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    factories.adapter_folder(tmp_path / "style", modules=MODULES)
    return tmp_path


def ending_after(units: int) -> Callable[[int], None]:
    """Progress that ends the process when so many units of rows are done."""
    done = [0]

    def progress(nbytes: int) -> None:
        done[0] += 1
        if done[0] == units:
            os._exit(9)

    return progress


def killed_merge(out: str = "out", *, units: int = 9, **options: Any) -> Path:
    """The hidden folder of a merge that was killed."""
    killed_when(lambda: loratools.merge("base", "style", out, threads=1, progress=ending_after(units), **options))
    (folder,) = Path().glob(f".{out}.loratools-*")
    return folder


def computed_units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that are merged from here on."""
    names: list[str] = []

    def merge_rows(unit: Any, *args: Any) -> Any:
        names.append(unit.output.name)
        return rows.merge_rows(unit, *args)

    monkeypatch.setattr(writing, "merge_rows", merge_rows)
    return names


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32", "max_shard_size": 4000}, {"rounding": "stochastic", "seed": 3}, {"manifest": True}],
)
def test_a_resumed_merge_gives_the_bytes_of_an_undisturbed_one(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    undisturbed = loratools.merge("base", "style", "whole", **options)
    killed_merge(**options)
    computed = computed_units(monkeypatch)

    resumed = loratools.merge("base", "style", "out", resume=True, **options)

    assert content(inputs / "out") == content(inputs / "whole")
    assert 0 < len(computed) < undisturbed.merged_weights
    assert (resumed.gain, resumed.max_error_ratio) == (undisturbed.gain, undisturbed.max_error_ratio)
    assert resumed.tensors == undisturbed.tensors
    assert any("a killed run was resumed" in warning for warning in resumed.warnings)
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out", "style", "whole"]


def test_a_run_that_was_killed_before_anything_was_noted_is_begun_anew(inputs: Path) -> None:
    loratools.merge("base", "style", "whole")
    killed_merge(units=1)

    loratools.merge("base", "style", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out", "style", "whole"]


def test_stacks_of_small_weights_are_kept_and_done_again_whole(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {
        f"model.layers.{layer}.mlp.experts.{i}.up_proj": (10, 6 + layer) for layer in range(4) for i in range(20)
    }
    factories.checkpoint_folder(inputs / "experts", weights=factories.base_weights(experts, dtype=torch.bfloat16))
    factories.adapter_folder(inputs / "fine", modules=experts)
    loratools.merge("experts", "fine", "whole")
    killed_when(lambda: loratools.merge("experts", "fine", "out", threads=1, progress=ending_after(4)))
    lengths: list[int] = []
    merge_stack = writing.merge_stack

    def counted(outputs: Any, *args: Any, **options: Any) -> Any:
        lengths.append(len(outputs))
        return merge_stack(outputs, *args, **options)

    monkeypatch.setattr(writing, "merge_stack", counted)

    report = loratools.merge("experts", "fine", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert 0 < len(lengths) < 4
    assert f"{80 - sum(lengths)} of 80 units" in report.warnings[-1]


def test_one_file_is_resumed(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.checkpoint_folder(inputs / "single", weights=factories.base_weights(MODULES))
    base = inputs / "single" / "model.safetensors"
    loratools.merge(base, "style", "whole.safetensors")
    killed_when(lambda: loratools.merge(base, "style", "out.safetensors", threads=1, progress=ending_after(9)))
    computed = computed_units(monkeypatch)

    loratools.merge(base, "style", "out.safetensors", resume=True)

    assert (inputs / "out.safetensors").read_bytes() == (inputs / "whole.safetensors").read_bytes()
    assert 0 < len(computed) < len(MODULES)


def test_a_merge_that_is_killed_twice_is_resumed_twice(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loratools.merge("base", "style", "whole")
    first = killed_merge(units=6)
    assert killed_merge(units=10, resume=True) == first
    computed = computed_units(monkeypatch)

    loratools.merge("base", "style", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert len(computed) < 6


@pytest.mark.parametrize("damage", ["zeros", "one bit", "shorter", "gone", "another header"])
def test_kept_work_that_is_not_as_it_was_noted_is_done_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """As after a power cut, which takes what was not flushed: pages, or whole files."""
    loratools.merge("base", "style", "whole")
    folder = killed_merge(units=12)
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if damage == "zeros":
            data[start:] = bytes(len(data) - start)
        elif damage == "one bit":
            data[start::100] = bytes(byte ^ 1 for byte in data[start::100])
        elif damage == "another header":
            data[20] ^= 1
        file.write_bytes(data[:-50] if damage == "shorter" else data)
        if damage == "gone":
            file.unlink()
    computed = computed_units(monkeypatch)

    loratools.merge("base", "style", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert len(computed) == len(MODULES)


@pytest.mark.parametrize("tail", [b'{"unit":"11","do', b"\x00\x00\x00", b'{"unit":"0","done":["x",1,{}]}\n[1]\n'])
def test_a_line_that_was_half_written_is_left_out(inputs: Path, tail: bytes) -> None:
    loratools.merge("base", "style", "whole")
    folder = killed_merge()
    with (folder / JOURNAL).open("ab") as journal:
        journal.write(tail)

    loratools.merge("base", "style", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float32"}, "--dtype: not given before, F32 now"),
        ({"rounding": "stochastic"}, "--rounding: nearest before, stochastic now"),
        ({"verify": False}, "--no-verify: False before, True now"),
        ({"exclude": "*up_proj"}, "--exclude"),
    ],
)
def test_another_plan_is_refused_and_says_what_differs(inputs: Path, changes: dict[str, Any], named: str) -> None:
    folder = killed_merge()
    before = content(folder)

    with pytest.raises(UsageError, match="something else to do") as caught:
        loratools.merge("base", "style", "out", resume=True, **changes)

    assert any(named in line for line in caught.value.details)
    assert content(folder) == before
    assert not (inputs / "out").exists()


def test_another_weight_is_another_plan(inputs: Path) -> None:
    killed_merge()

    with pytest.raises(UsageError) as caught:
        loratools.merge("base", [("style", 0.5)], "out", resume=True)

    assert caught.value.details == ("weight of adapter 1 (style): 1.0 before, 0.5 now",)


@pytest.mark.parametrize("changed", ["base", "adapter", "config", "tokenizer"])
def test_a_changed_input_is_refused_by_name(inputs: Path, changed: str) -> None:
    killed_merge()
    name, folder = {
        "base": ("model-00001-of-00002.safetensors", "base"),
        "adapter": ("adapter_model.safetensors", "style"),
        "config": ("adapter_config.json", "style"),
        "tokenizer": ("tokenizer.json", "base"),
    }[changed]
    data = bytearray((inputs / folder / name).read_bytes())
    # Of weights the last bit, so that the size is the same.
    other = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else data + b" "
    (inputs / folder / name).write_bytes(other)

    with pytest.raises(ChangedInputError) as caught:
        loratools.merge("base", "style", "out", resume=True)

    assert caught.value.exit_code == 5
    assert any(line.startswith(name) for line in caught.value.details)


def test_a_changed_program_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_merge()
    monkeypatch.setattr("loratools.ops.common.run_plans.__version__", "99.0")

    with pytest.raises(UsageError) as caught:
        loratools.merge("base", "style", "out", resume=True)

    assert caught.value.details == (f"loratools: {loratools.__version__} before, 99.0 now",)


def test_inputs_that_were_moved_are_the_same_by_content(inputs: Path) -> None:
    loratools.merge("base", "style", "whole")
    killed_merge()
    (inputs / "models").mkdir()
    (inputs / "base").rename(inputs / "models" / "base")

    loratools.merge("models/base", "style", "out", resume=True)

    assert content(inputs / "out") == content(inputs / "whole")


def test_adapters_in_memory_are_held_by_their_values(inputs: Path) -> None:
    a, b = torch.randn(4, 24), torch.randn(40, 4)
    name = "model.layers.0.self_attn.q_proj"

    def adapter(b: torch.Tensor) -> loratools.Adapter:
        return loratools.Adapter.from_factors({name: (a, b)})

    killed_when(lambda: loratools.merge("base", adapter(b), "out", threads=1, progress=ending_after(3)))

    with pytest.raises(ChangedInputError, match="not those of the run"):
        loratools.merge("base", adapter(b + 1), "out", resume=True)
    loratools.merge("base", adapter(b), "out", resume=True)


def test_without_a_killed_run_it_begins_anew_and_says_so(inputs: Path) -> None:
    report = loratools.merge("base", "style", "out", resume=True)

    assert any("begun anew" in warning for warning in report.warnings)
    with pytest.raises(OutputExistsError):
        loratools.merge("base", "style", "out", resume=True)


def test_without_resume_what_a_killed_run_left_is_named_and_goes_when_the_output_is_there(inputs: Path) -> None:
    folder = killed_merge()

    done = CliRunner().invoke(verbs, ["merge", "base", "style", "-o", "out"])

    assert done.exit_code == 0
    assert done.output.count("was killed with") == 1
    assert all(word in done.output for word in (folder.name, "--resume", "loratools clean"))
    assert "was killed" not in (inputs / "out" / "loratools.json").read_text()
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out", "style"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MachineError])
def test_an_ended_merge_keeps_what_is_done_and_says_how_to_go_on(inputs: Path, error: type[BaseException]) -> None:
    loratools.merge("base", "style", "whole")
    left = [9]

    def fail(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise error("the disk failed")

    with pytest.raises(error) as caught:
        loratools.merge("base", "style", "out", threads=1, progress=fail)

    said = caught.value.hint if isinstance(caught.value, LoraToolsError) else caught.value.__notes__[0]
    assert said is not None
    assert "--resume" in said
    assert "loratools clean" in said
    assert len(list(inputs.glob(".out.*"))) == 1
    loratools.merge("base", "style", "out", resume=True)
    assert content(inputs / "out") == content(inputs / "whole")


def test_an_error_that_resuming_would_repeat_leaves_nothing(inputs: Path) -> None:
    left = [9]

    def fail(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        loratools.merge("base", "style", "out", threads=1, progress=fail)

    assert sorted(path.name for path in inputs.iterdir()) == ["base", "style"]


def test_a_run_that_is_alive_is_not_resumed(inputs: Path) -> None:
    killed = killed_merge()
    held = system.lock_folder(killed)
    try:
        with pytest.raises(MachineError, match="being written by another run"):
            loratools.merge("base", "style", "out", resume=True)
    finally:
        assert held is not None
        os.close(held)


def test_an_output_that_is_replaced_is_resumed(inputs: Path) -> None:
    loratools.merge("base", [("style", 0.5)], "out")
    (inputs / "out" / "notes.txt").write_text("a person's")
    loratools.merge("base", "style", "whole")
    killed_merge(overwrite=True)

    loratools.merge("base", "style", "out", resume=True, overwrite=True)

    expected = content(inputs / "whole")
    assert isinstance(expected, dict)
    assert content(inputs / "out") == {**expected, "notes.txt": b"a person's"}


def test_the_manifest_of_one_file_is_refused(inputs: Path) -> None:
    factories.checkpoint_folder(inputs / "single")
    factories.adapter_folder(inputs / "other")

    with pytest.raises(UsageError, match="no record beside it"):
        loratools.merge("single/model.safetensors", "other", "out.safetensors", manifest=True)


def test_the_plan_is_in_the_journal_with_every_input(inputs: Path) -> None:
    folder = killed_merge()

    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]

    head, plan = lines[0], next(line["plan"] for line in lines if "plan" in line)
    assert (head["output"], head["loratools"]) == ("out", loratools.__version__)
    assert sorted(plan["inputs"]) == [
        "adapter_config.json of adapter 1 (style)", "adapter_model.safetensors of adapter 1 (style)",
        "config.json of base", "model-00001-of-00002.safetensors of the base",
        "model-00002-of-00002.safetensors of the base", "tokenizer.json of base",
    ]  # fmt: skip
    assert [line["unit"] for line in lines if "unit" in line]
