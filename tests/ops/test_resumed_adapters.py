"""Combining, resizing and converting that was killed is gone on with: the bytes of an undisturbed run, of the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from click.testing import CliRunner
from reliability.killing import content, killed_when
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs
from loratools.errors import ChangedInputError, MachineError, OutputExistsError, UsageError
from loratools.ops.common import resumable_work
from loratools.storage.run_journal import JOURNAL, RunJournal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes and kills them")

MODULES = factories.layered(3, {"self_attn.q_proj": (40, 24), "mlp.up_proj": (56, 24)})


@dataclass(frozen=True)
class Case:
    """A verb with its arguments.

    Attributes:
        run: Runs it: the output, and options that come beside or in place of the usual ones.
        units: How many units of work it has.
        computes: The function that works on one module, by its module and name.
        suffix: What the name of its output ends with.
        verb: The command and its arguments, but for the output.
    """

    run: Callable[..., Any]
    units: int
    computes: tuple[str, str]
    verb: tuple[str, ...]
    suffix: str = ""


def combined(out: str, **options: Any) -> Any:
    options = {"rank": 3, "threads": 1, **options}
    return loratools.combine([("one", 0.7), ("two", options.pop("weight", 0.3))], out, **options)


def resized(out: str, **options: Any) -> Any:
    limit = {} if "max_params" in options else {"rank": 2}
    return loratools.resize("one", out, **{"threads": 1, **limit, **options})


def converted(out: str, **options: Any) -> Any:
    return loratools.convert("one", out, **{"format": "mlx", "base": "base", **options})


COMBINE = ("loratools.ops.combine.verb", "combine_module")
RESIZE = ("loratools.ops.resize.verb", "_resized")
CONVERT = ("loratools.ops.convert.verify", "_checked_update")
CASES = {
    "combine": Case(combined, len(MODULES), COMBINE, ("combine", "one=0.7", "two=0.3", "--rank", "3")),
    "resize": Case(resized, len(MODULES), RESIZE, ("resize", "one", "--rank", "2")),
    # The singular values of each module, and then the module.
    "resize within a limit": Case(
        lambda out, **options: resized(out, max_params=700, **options),
        2 * len(MODULES),
        RESIZE,
        ("resize", "one", "--max-params", "700"),
    ),
    # Both factors of each module, transposed; and the comparison of the module.
    "convert": Case(converted, 3 * len(MODULES), CONVERT, ("convert", "one", "--to", "mlx", "--base", "base")),
    "convert one file": Case(
        lambda out, **options: converted(out, **{"format": "gguf", "dtype": "float16", **options}),
        3 * len(MODULES),
        CONVERT,
        ("convert", "one", "--to", "gguf", "--base", "base", "--dtype", "float16"),
        ".gguf",
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A copy of this process has no threads of torch's pool to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resumable_work, "WORTH_KEEPING_BYTES", 0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(MODULES), config=heads)
    for seed, name in enumerate(("one", "two")):
        factories.adapter_folder(tmp_path / name, modules=MODULES, rank=4, seed=seed)
    return tmp_path


def killed_run(case: Case, out: str = "out", *, units: int = 4, **options: Any) -> Path:
    """The hidden folder of a run that was killed when so many units were done."""

    def run() -> None:
        left = [units]
        note = RunJournal.note

        def ending(journal: RunJournal, unit: str, outcome: object) -> None:
            note(journal, unit, outcome)
            left[0] -= 1
            if not left[0]:
                os._exit(9)

        RunJournal.note = ending  # type: ignore[method-assign]
        case.run(out + case.suffix, **options)

    killed_when(run)
    (folder,) = Path().glob(f".{out}{case.suffix}.loratools-*")
    return folder


def computed(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each module that is worked on from here on."""
    module, name = import_module(case.computes[0]), case.computes[1]
    lines: list[str] = []
    work = getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        lines.append("")
        return work(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return lines


def noted_units(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [line for line in lines if "unit" in line]


def document(report: Any) -> dict[str, Any]:
    """What a report says but for where, and what is said of killed runs."""
    changes: dict[str, Any] = {"output": None, "warnings": ()}
    if hasattr(report, "adapter"):
        changes["adapter"] = None
    return dict(replace(report, **changes).to_dict())


@every_case
def test_a_resumed_run_gives_the_bytes_and_the_report_of_an_undisturbed_one(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    undisturbed = case.run(f"whole{case.suffix}")
    # Of a conversion the last units are comparisons, of which two are done.
    done = 2 if case.computes == RESIZE else case.units - len(MODULES) + 2
    done += len(MODULES) if "limit" in name else 0
    folder = killed_run(case, units=done)
    assert len(noted_units(folder)) == done
    lines = computed(case, monkeypatch)

    report = case.run(f"out{case.suffix}", resume=True)

    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")
    assert len(lines) == len(MODULES) - 2
    assert document(report) == document(undisturbed)
    assert f"a killed run was resumed: {done} of {case.units} units" in report.warnings[-1]
    names = ["base", "one", f"out{case.suffix}", "two", f"whole{case.suffix}"]
    assert sorted(path.name for path in inputs.iterdir()) == names


@every_case
def test_a_run_that_is_killed_twice_is_resumed_twice(inputs: Path, name: str) -> None:
    case = CASES[name]
    case.run(f"whole{case.suffix}")
    first = killed_run(case, units=2)
    assert killed_run(case, units=2, resume=True) == first
    assert len(noted_units(first)) == 4

    report = case.run(f"out{case.suffix}", resume=True)

    assert "resumed: 4 of" in report.warnings[-1]
    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")


@every_case
@pytest.mark.parametrize("damage", ["one bit", "shorter", "gone", "zeros"])
def test_kept_work_that_is_not_as_it_was_noted_is_done_again(inputs: Path, name: str, damage: str) -> None:
    """As after a power cut, which takes what was not flushed."""
    case = CASES[name]
    case.run(f"whole{case.suffix}")
    # Of a conversion every tensor.
    units = 2 * len(MODULES) if case.computes == CONVERT else 4
    folder = killed_run(case, units=units)
    damaged = [path for path in folder.iterdir() if path.name != JOURNAL]
    for path in damaged:
        data = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "shorter":
            path.write_bytes(data[:-4])
        elif damage == "zeros":
            path.write_bytes(bytes(len(data)))
        else:
            data[len(data) * 5 // 6] ^= 1
            path.write_bytes(data)

    report = case.run(f"out{case.suffix}", resume=True)

    assert damaged
    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")
    kept = int(report.warnings[-1].split("resumed: ")[1].split()[0])
    assert kept < units


@every_case
@pytest.mark.parametrize("facts", ["no facts", "others"])
def test_a_line_that_is_not_as_it_is_written_is_left_out(inputs: Path, name: str, facts: str) -> None:
    case = CASES[name]
    case.run(f"whole{case.suffix}")
    folder = killed_run(case, units=case.units)
    journal = folder / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if "unit" in line:
            line["done"] = [1] if facts == "no facts" or isinstance(line["done"], str) else {**line["done"], "facts": 3}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"unit":"half wri')

    case.run(f"out{case.suffix}", resume=True)

    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("combine", {"rank": 2}, "--rank: 3 before, 2 now"),
        ("combine", {"weight": 0.4}, "weight of adapter 2: 0.3 before, 0.4 now"),
        ("combine", {"method": "ties", "options": {"density": 0.5, "space": "core"}}, "--method: not given before"),
        ("combine", {"exclude": "*up_proj"}, "--exclude: not given before"),
        ("resize", {"rank": 1}, "--rank: 2 before, 1 now"),
        ("resize", {"dtype": "float16"}, "--dtype: not given before, F16 now"),
        ("resize", {"format": "mlx", "base": "base"}, "--format: peft before, mlx now"),
        ("convert", {"format": "peft"}, "--to: mlx before, peft now"),
        ("convert", {"dtype": "bfloat16"}, "--dtype: not given before, BF16 now"),
        ("convert", {"base": None}, "names, shapes and config of the base: missing now"),
    ],
)
def test_another_plan_is_refused_and_says_what_differs(
    inputs: Path, name: str, changes: dict[str, Any], named: str
) -> None:
    case = CASES[name]
    folder = killed_run(case)
    before = content(folder)

    with pytest.raises((UsageError, ChangedInputError), match="cannot be resumed") as caught:
        case.run("out", resume=True, **changes)

    assert any(named in line for line in caught.value.details), caught.value.details
    assert content(folder) == before
    assert not (inputs / "out").exists()


def test_a_run_of_another_verb_is_refused(inputs: Path) -> None:
    killed_run(CASES["combine"])

    with pytest.raises(UsageError, match="something else to do") as caught:
        CASES["resize"].run("out", resume=True)

    assert "verb: combine before, resize now" in caught.value.details


@every_case
@pytest.mark.parametrize("changed", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_input_is_refused_by_name(inputs: Path, name: str, changed: str) -> None:
    case = CASES[name]
    killed_run(case)
    path = inputs / "one" / changed
    data = path.read_bytes()
    if changed.endswith("json"):
        path.write_text(json.dumps({**json.loads(data), "lora_alpha": 5}))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(ChangedInputError, match="not those of the run") as caught:
        case.run(f"out{case.suffix}", resume=True)

    assert caught.value.exit_code == 5
    adapter = "adapter 1" if name == "combine" else "the adapter"
    assert f"{changed} of {adapter}: another content" in caught.value.details


@every_case
def test_a_changed_program_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    killed_run(case)
    monkeypatch.setattr("loratools.ops.common.run_plans.__version__", "99.0")

    with pytest.raises(UsageError) as caught:
        case.run(f"out{case.suffix}", resume=True)

    assert caught.value.details == (f"loratools: {loratools.__version__} before, 99.0 now",)


def test_an_adapter_that_was_changed_in_memory_is_another_input(inputs: Path) -> None:
    """It has the files of the one that it was read from."""
    killed_run(CASES["resize"])
    adapter = loratools.load("one")
    name = next(iter(adapter.updates))
    lora = adapter.updates[name].as_lora()
    assert lora is not None
    changed = replace(adapter, updates={**adapter.updates, name: replace(lora, alpha=3.0)})

    with pytest.raises(ChangedInputError) as caught:
        loratools.resize(changed, "out", rank=2, resume=True)

    assert caught.value.details == ("modules of the adapter: another content",)


@pytest.mark.parametrize("name", ["combine", "resize"])
def test_what_was_computed_on_another_processor_is_computed_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The last bits of sums depend on the instructions: kept units of another kind would give a mixture."""
    case = CASES[name]
    case.run("whole")
    killed_run(case)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    lines = computed(case, monkeypatch)

    case.run("out", resume=True)

    assert len(lines) == len(MODULES)
    assert content(inputs / "out") == content(inputs / "whole")


@every_case
def test_inputs_that_were_moved_are_the_same_by_content(inputs: Path, name: str) -> None:
    case = CASES[name]
    # A model card names the inputs.
    case.run(f"whole{case.suffix}", card=False)
    killed_run(case, card=False)
    for folder in ("one", "two", "base"):
        (inputs / folder).rename(inputs / f"{folder} elsewhere")
    for folder in ("one", "two", "base"):
        (inputs / folder).symlink_to(inputs / f"{folder} elsewhere")

    report = case.run(f"out{case.suffix}", resume=True, card=False)

    assert "was resumed: 4 of" in report.warnings[-1]
    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")


@every_case
def test_without_a_killed_run_it_begins_anew_and_says_so(inputs: Path, name: str) -> None:
    case = CASES[name]

    assert "begun anew" in case.run(f"out{case.suffix}", resume=True).warnings[-1]


@pytest.mark.parametrize("name", ["combine", "resize"])
def test_there_is_nothing_to_resume_without_an_output(inputs: Path, name: str) -> None:
    with pytest.raises(UsageError, match="resume needs an output"):
        CASES[name].run(None, resume=True) if name == "resize" else loratools.combine(["one"], resume=True)


@every_case
def test_without_resume_what_a_killed_run_left_is_named_and_goes_when_the_output_is_there(
    inputs: Path, name: str
) -> None:
    case = CASES[name]
    folder = killed_run(case)
    out = f"out{case.suffix}"

    done = CliRunner().invoke(verbs, [*case.verb, "-o", out])

    assert done.exit_code == 0, done.output
    assert done.output.count("was killed with 4 units of its work done") == 1
    assert all(word in done.output for word in (folder.name, "--resume", "loratools clean"))
    assert sorted(path.name for path in inputs.iterdir()) == ["base", "one", out, "two"]


@every_case
def test_the_command_goes_on_with_a_killed_run(inputs: Path, name: str) -> None:
    case = CASES[name]
    killed_run(case)

    done = CliRunner().invoke(verbs, [*case.verb, "-o", f"out{case.suffix}", "--resume"])

    assert done.exit_code == 0, done.output
    assert "a killed run was resumed: 4 of" in done.output


@every_case
@pytest.mark.parametrize("error", [KeyboardInterrupt, MachineError])
def test_an_ended_run_keeps_what_is_done_and_says_how_to_go_on(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    case = CASES[name]
    case.run(f"whole{case.suffix}")
    left = [3]
    note = RunJournal.note

    def failing(journal: RunJournal, unit: str, outcome: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise error("the disk failed")
        note(journal, unit, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(RunJournal, "note", failing)
        with pytest.raises(error) as caught:
            case.run(f"out{case.suffix}")

    said = caught.value.hint if isinstance(caught.value, MachineError) else caught.value.__notes__[0]  # type: ignore[attr-defined]
    assert "--resume goes on" in said
    assert "loratools clean" in said
    assert len(list(inputs.glob(".out*"))) == 1
    assert "was resumed" in case.run(f"out{case.suffix}", resume=True).warnings[-1]
    assert content(inputs / f"out{case.suffix}") == content(inputs / f"whole{case.suffix}")


@every_case
def test_an_error_that_resuming_would_repeat_leaves_nothing(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    left = [3]
    note = RunJournal.note

    def failing(journal: RunJournal, unit: str, outcome: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("a bug")
        note(journal, unit, outcome)

    monkeypatch.setattr(RunJournal, "note", failing)
    with pytest.raises(RuntimeError):
        case.run(f"out{case.suffix}")

    assert sorted(path.name for path in inputs.iterdir()) == ["base", "one", "two"]


@pytest.mark.parametrize("name", ["combine", "resize", "convert"])
def test_an_output_that_is_replaced_is_resumed(inputs: Path, name: str) -> None:
    case = CASES[name]
    case.run("whole")
    loratools.resize("two", "out", rank=1)
    (inputs / "out" / "notes.txt").write_text("a person's")
    old = content(inputs / "out")
    killed_run(case, overwrite=True)
    assert content(inputs / "out") == old

    case.run("out", resume=True, overwrite=True)

    expected = content(inputs / "whole")
    assert isinstance(expected, dict)
    assert content(inputs / "out") == {**expected, "notes.txt": b"a person's"}


def test_a_file_that_is_the_output_already_is_not_written_to_by_a_resumed_run(inputs: Path) -> None:
    """A kill between the two names of a file leaves both: the one in the hidden folder, and the output."""
    case = CASES["convert one file"]
    folder = killed_run(case, units=case.units)
    (staged,) = folder.glob("out.gguf")
    os.link(staged, inputs / "out.gguf")
    before = (inputs / "out.gguf").stat()

    with pytest.raises(OutputExistsError):
        case.run("out.gguf", resume=True)
    case.run("out.gguf", resume=True, overwrite=True)

    assert (inputs / "out.gguf").stat().st_ino != before.st_ino
    assert staged.exists() is False


@every_case
def test_of_a_small_adapter_nothing_is_kept(inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(resumable_work, "WORTH_KEEPING_BYTES", 1 << 20)
    units: list[str] = []
    monkeypatch.setattr(RunJournal, "note", lambda journal, unit, outcome: units.append(unit))

    CASES[name].run(f"out{CASES[name].suffix}")

    assert units == []


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"rank": 2, "residual": "NAME-lost.safetensors"}])
def test_updates_of_every_form_are_taken_up_as_they_were(inputs: Path, options: dict[str, str | int]) -> None:
    """One that passes through, one in another dtype, changes of vectors, and what was lost."""
    generator = torch.Generator().manual_seed(3)
    for number, name in enumerate(("first", "second")):
        # The second module is in the first adapter alone.
        modules = {"lora_unet_x_0": (9, 5), "lora_unet_x_1": (8, 6)} if not number else {"lora_unet_x_0": (9, 5)}
        tensors = {}
        for module, (a, b) in factories.factors(modules, rank=3, seed=number).items():
            tensors |= {f"{module}.lora_up.weight": b, f"{module}.lora_down.weight": a}
            bias = torch.randn(len(b), generator=generator)
            tensors |= {f"{module}.alpha": torch.tensor(3.0), f"{module}.diff_b": bias}
        save_file(tensors, inputs / f"{name}.safetensors")

    def run(out: str, *, resume: bool = False) -> Any:
        named = {key: value.replace("NAME", out) if isinstance(value, str) else value for key, value in options.items()}
        sources = ["first.safetensors", "second.safetensors"]
        return loratools.combine(sources, f"{out}.safetensors", threads=1, resume=resume, **named)  # type: ignore[arg-type]

    case = Case(lambda out: run(out.removesuffix(".safetensors")), 0, COMBINE, (), ".safetensors")
    modules = len(run("whole").modules)
    killed_run(case, units=modules)

    report = run("out", resume=True)

    assert f"resumed: {modules} of {modules} units" in report.warnings[-1]
    written = sorted(inputs.glob("whole*"))
    assert len(written) == (2 if "residual" in options else 1)
    for path in written:
        assert path.read_bytes() == (inputs / path.name.replace("whole", "out")).read_bytes()
