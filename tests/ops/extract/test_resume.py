"""An extraction that was killed is gone on with: the bytes of an undisturbed one, and nothing but the same one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from click.testing import CliRunner
from reliability.killing import content, killed_when

import loratools
from loratools.cli import verbs
from loratools.errors import ChangedInputError, MachineError, UsageError
from loratools.ops.extract import work
from loratools.storage.run_journal import JOURNAL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes and kills them")

MODULES = factories.layered(3, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (56, 24)})
# The embedding becomes factors too.
UNITS = len(MODULES) + 1
RULES: list[Mapping[str, Any]] = [{"rank": 3}, {"energy": 0.8, "dtype": "float16"}, {"max_params": 900}]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(5)
    weights = factories.base_weights(MODULES)
    changed = [name for name in weights if "proj" in name or "embed" in name]
    tuned = {n: weights[n] + 0.1 * torch.randn(weights[n].shape, generator=generator) for n in changed}
    factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=2)
    factories.checkpoint_folder(tmp_path / "tuned", weights=weights | tuned)
    return tmp_path


def ending_after(calls: int) -> Callable[[int], None]:
    """Progress that ends the process when it is called so often."""
    left = [calls]

    def progress(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    return progress


def killed_extraction(out: str = "out", *, calls: int = 5, **options: Any) -> Path:
    """The hidden folder of an extraction that was killed."""
    killed_when(lambda: loratools.extract("base", "tuned", out, threads=1, progress=ending_after(calls), **options))
    (folder,) = Path().glob(f".{out}.loratools-*")
    return folder


def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each tensor that is decomposed from here on."""
    names: list[str] = []
    decomposed = work.decomposed

    def counted(*args: Any, **options: Any) -> Any:
        names.append("")
        return decomposed(*args, **options)

    monkeypatch.setattr(work, "decomposed", counted)
    return names


def noted_units(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [line for line in lines if "unit" in line]


@pytest.mark.parametrize("rule", RULES, ids=[next(iter(rule)) for rule in RULES])
def test_a_resumed_extraction_gives_the_bytes_and_the_report_of_an_undisturbed_one(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, rule: Mapping[str, Any]
) -> None:
    undisturbed = loratools.extract("base", "tuned", "whole", **rule)
    folder = killed_extraction(**rule)
    done = len(noted_units(folder))
    computed = decompositions(monkeypatch)

    resumed = loratools.extract("base", "tuned", "out", resume=True, **rule)

    assert content(inputs / "out") == content(inputs / "whole")
    assert 2 < done < UNITS
    assert len(computed) == UNITS - done
    assert resumed.rows() == undisturbed.rows()
    same = replace(undisturbed, output=None, adapter=None, warnings=())
    assert replace(resumed, output=None, adapter=None, warnings=()).to_dict() == same.to_dict()
    assert any(f"was resumed: {done} of " in warning for warning in resumed.warnings)
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out", "tuned", "whole"]


def test_factors_within_a_limit_on_all_modules_are_kept_too(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed while it brings each module to its share of the limit."""
    loratools.extract("base", "tuned", "whole", max_params=900)
    left = [3]
    stored = work.stored

    def ending(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return stored(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work, "stored", ending)
        killed_when(lambda: loratools.extract("base", "tuned", "out", max_params=900, threads=1))
    (folder,) = inputs.glob(".out.*")
    kept = sum(line["unit"].startswith("factors of") for line in noted_units(folder))
    computed = decompositions(monkeypatch)

    loratools.extract("base", "tuned", "out", max_params=900, resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert kept >= 1
    assert not computed


def test_an_extraction_that_is_killed_twice_is_resumed_twice(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loratools.extract("base", "tuned", "whole", rank=3)
    first = killed_extraction(calls=3, rank=3)
    before = len(noted_units(first))
    assert killed_extraction(calls=5, rank=3, resume=True) == first
    assert len(noted_units(first)) > before
    computed = decompositions(monkeypatch)

    loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert len(computed) < UNITS - before


@pytest.mark.parametrize("damage", ["one bit", "shorter", "gone", "zeros"])
def test_kept_factors_that_are_not_as_they_were_noted_are_made_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """As after a power cut, which takes what was not flushed."""
    loratools.extract("base", "tuned", "whole", rank=3)
    folder = killed_extraction(rank=3)
    damaged = [path for path in folder.iterdir() if path.name.isdecimal()]
    for path in damaged:
        data = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "shorter":
            path.write_bytes(data[:-4])
        elif damage == "zeros":
            path.write_bytes(bytes(len(data)))
        else:
            data[-1] ^= 1
            path.write_bytes(data)
    computed = decompositions(monkeypatch)

    loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert damaged
    assert len(computed) == UNITS


@pytest.mark.parametrize(
    "line",
    [
        b'{"unit":"factors of x","do',
        b'{"unit":"factors of x","done":{"file":"../../x","bytes":1,"checksum":"","tensors":{},"facts":{}}}\n',
        b'{"unit":"factors of x","done":[1]}\n',
    ],
    ids=["half written", "a file elsewhere", "another shape"],
)
def test_a_line_that_is_not_as_it_is_written_is_left_out(inputs: Path, line: bytes) -> None:
    loratools.extract("base", "tuned", "whole", rank=3)
    folder = killed_extraction(rank=3)
    with (folder / JOURNAL).open("ab") as journal:
        journal.write(line)

    loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert content(inputs / "out") == content(inputs / "whole")


def test_facts_that_are_not_as_they_are_written_are_measured_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratools.extract("base", "tuned", "whole", rank=3)
    folder = killed_extraction(rank=3)
    text = (folder / JOURNAL).read_text()
    (folder / JOURNAL).write_text(text.replace('"gap_bound"', '"gap"'))
    computed = decompositions(monkeypatch)

    loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert content(inputs / "out") == content(inputs / "whole")
    assert len(computed) == UNITS


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 4}, "--rank: 3 before, 4 now"),
        ({"seed": 1}, "--seed: not given before, 1 now"),
        ({"exclude": "*up_proj"}, "--exclude"),
        ({"format": "mlx"}, "--to: peft before, mlx now"),
        ({"exact": True}, "--exact: not given before, True now"),
    ],
)
def test_another_plan_is_refused_and_says_what_differs(inputs: Path, changes: dict[str, Any], named: str) -> None:
    folder = killed_extraction(rank=3)
    before = content(folder)

    with pytest.raises(UsageError, match="something else to do") as caught:
        loratools.extract("base", "tuned", "out", resume=True, **{"rank": 3, **changes})

    assert any(named in line for line in caught.value.details), caught.value.details
    assert content(folder) == before
    assert not (inputs / "out").exists()


@pytest.mark.parametrize("changed", ["base", "tuned", "config"])
def test_a_changed_input_is_refused_by_name(inputs: Path, changed: str) -> None:
    killed_extraction(rank=3)
    path = inputs / {"base": "base/model-00002-of-00002.safetensors", "tuned": "tuned/model.safetensors"}.get(
        changed, "base/config.json"
    )
    data = path.read_bytes()
    if changed == "config":
        path.write_text(json.dumps({**json.loads(data), "rope_theta": 5.0}))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(ChangedInputError, match="not those of the run") as caught:
        loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert caught.value.exit_code == 5
    expected = "the fine-tuned model" if changed == "tuned" else "the base"
    assert [line.endswith(f"of {expected}: another content") for line in caught.value.details] == [True]


def test_a_changed_program_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_extraction(rank=3)
    monkeypatch.setattr("loratools.ops.common.run_plans.__version__", "99.0")

    with pytest.raises(UsageError) as caught:
        loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert caught.value.details == (f"loratools: {loratools.__version__} before, 99.0 now",)


def test_what_was_computed_on_another_processor_is_computed_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of sums depend on the instructions: kept units of another kind would give a mixture."""
    loratools.extract("base", "tuned", "whole", rank=3)
    killed_extraction(rank=3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    computed = decompositions(monkeypatch)

    loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert len(computed) == UNITS
    assert content(inputs / "out") == content(inputs / "whole")


def test_inputs_that_were_moved_are_the_same_by_content(inputs: Path) -> None:
    # A model card names the inputs.
    loratools.extract("base", "tuned", "whole", rank=3, card=False)
    killed_extraction(rank=3, card=False)
    (inputs / "models").mkdir()
    (inputs / "tuned").rename(inputs / "models" / "mine")

    loratools.extract("base", "models/mine", "out", rank=3, resume=True, card=False)

    assert content(inputs / "out") == content(inputs / "whole")


def test_without_a_killed_run_it_begins_anew_and_says_so(inputs: Path) -> None:
    report = loratools.extract("base", "tuned", "out", rank=3, resume=True)

    assert any("begun anew" in warning for warning in report.warnings)


def test_there_is_nothing_to_resume_without_an_output(inputs: Path) -> None:
    with pytest.raises(UsageError, match="resume needs an output"):
        loratools.extract("base", "tuned", rank=3, resume=True)


def test_without_resume_what_a_killed_run_left_is_named_and_goes_when_the_output_is_there(inputs: Path) -> None:
    folder = killed_extraction(rank=3)

    done = CliRunner().invoke(verbs, ["extract", "base", "tuned", "-o", "out", "--rank", "3"])

    assert done.exit_code == 0, done.output
    assert done.output.count("was killed with") == 1
    assert all(word in done.output for word in (folder.name, "--resume", "loratools clean"))
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out", "tuned"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MachineError])
def test_an_ended_extraction_keeps_what_is_done_and_says_how_to_go_on(inputs: Path, error: type[BaseException]) -> None:
    loratools.extract("base", "tuned", "whole", rank=3)
    left = [4]

    def fail(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise error("the disk failed")

    with pytest.raises(error) as caught:
        loratools.extract("base", "tuned", "out", rank=3, threads=1, progress=fail)

    said = caught.value.hint if isinstance(caught.value, MachineError) else caught.value.__notes__[0]  # type: ignore[attr-defined]
    assert "--resume goes on" in said
    assert "loratools clean" in said
    assert len(list(inputs.glob(".out.*"))) == 1
    assert loratools.extract("base", "tuned", "out", rank=3, resume=True).warnings[-1].startswith("a killed run was")
    assert content(inputs / "out") == content(inputs / "whole")


def test_an_error_that_resuming_would_repeat_leaves_nothing(inputs: Path) -> None:
    left = [4]

    def fail(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        loratools.extract("base", "tuned", "out", rank=3, threads=1, progress=fail)

    assert sorted(path.name for path in inputs.iterdir()) == ["base", "tuned"]


def test_an_output_that_is_replaced_is_resumed(inputs: Path) -> None:
    loratools.extract("base", "tuned", "out", rank=1)
    (inputs / "out" / "notes.txt").write_text("a person's")
    loratools.extract("base", "tuned", "whole", rank=3)
    killed_extraction(rank=3, overwrite=True)

    loratools.extract("base", "tuned", "out", rank=3, resume=True, overwrite=True)

    expected = content(inputs / "whole")
    assert isinstance(expected, dict)
    assert content(inputs / "out") == {**expected, "notes.txt": b"a person's"}


def test_an_adapter_of_one_file_is_resumed(inputs: Path) -> None:
    options: dict[str, Any] = {"rank": 3, "format": "gguf", "exclude": ["*q_proj", "*embed*"], "threads": 1}
    loratools.extract("base", "tuned", "whole.gguf", **options)
    killed_when(lambda: loratools.extract("base", "tuned", "out.gguf", progress=ending_after(4), **options))

    report = loratools.extract("base", "tuned", "out.gguf", resume=True, **options)

    assert any("was resumed" in warning for warning in report.warnings)
    assert (inputs / "out.gguf").read_bytes() == (inputs / "whole.gguf").read_bytes()
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "out.gguf", "tuned", "whole.gguf"]


def test_an_embedding_whose_factors_would_be_larger_is_not_decomposed_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = factories.base_weights(MODULES) | {"model.embed_tokens.weight": torch.ones(300, 24)}
    generator = torch.Generator().manual_seed(1)
    tuned = weights | {n: weights[n] + torch.randn(weights[n].shape, generator=generator) for n in list(weights)[:1]}
    tuned |= {name: weights[name] + 0.1, "model.embed_tokens.weight": torch.randn(300, 24, generator=generator)}
    factories.checkpoint_folder(inputs / "base2", weights=weights)
    factories.checkpoint_folder(inputs / "tuned2", weights=tuned)
    loratools.extract("base2", "tuned2", "whole", energy=0.999)
    killed_when(lambda: loratools.extract("base2", "tuned2", "out", energy=0.999, threads=1, progress=ending_after(3)))
    computed = decompositions(monkeypatch)

    report = loratools.extract("base2", "tuned2", "out", energy=0.999, resume=True)

    assert "model.embed_tokens.weight" in [replaced.name for replaced in report.replacements]
    assert len(computed) < 2
    assert content(inputs / "out") == content(inputs / "whole")
