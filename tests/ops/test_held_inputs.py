"""Every verb holds every input to what it was: one rewritten in place while it runs ends it with 5, nothing written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import pytest

import loratools
from loratools.errors import LoraToolsError
from loratools.storage import files, held_inputs, safetensors_reader, system

VERBS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "merge": (
        lambda at: loratools.merge(at / "base", [at / "one"], at / "out"),
        ("base/model.safetensors", "base/config.json", "base/tokenizer.json", "one/adapter_model.safetensors",
         "one/adapter_config.json"),
    ),
    "extract": (
        lambda at: loratools.extract(at / "base", at / "tuned", at / "out", rank=2),
        ("base/model.safetensors", "base/config.json", "tuned/model.safetensors", "tuned/config.json"),
    ),
    "combine": (
        lambda at: loratools.combine([at / "one", at / "two"], at / "out"),
        ("one/adapter_model.safetensors", "one/adapter_config.json", "two/adapter_model.safetensors"),
    ),
    "compare_methods": (
        lambda at: loratools.compare_methods([at / "one", at / "two"], ["ties", "linear"], rank=2),
        ("one/adapter_model.safetensors", "two/adapter_config.json"),
    ),
    "resize": (
        lambda at: loratools.resize(at / "one", at / "out", rank=2),
        ("one/adapter_model.safetensors", "one/adapter_config.json"),
    ),
    "convert": (
        lambda at: loratools.convert(at / "one", at / "out", format="mlx", base=at / "base"),
        ("one/adapter_model.safetensors", "one/adapter_config.json", "base/model.safetensors", "base/config.json"),
    ),
    "compare": (
        lambda at: loratools.compare(at / "one", at / "two"),
        ("one/adapter_model.safetensors", "two/adapter_config.json"),
    ),
    "verify": (
        lambda at: loratools.verify(at / "tuned", at / "base", at / "one", threads=1),
        ("base/model.safetensors", "base/config.json", "tuned/model.safetensors", "tuned/config.json",
         "one/adapter_model.safetensors", "one/adapter_config.json"),
    ),
    "verify_files": (
        lambda at: loratools.verify_files(at / "tuned", threads=1),
        ("tuned/model.safetensors", "tuned/config.json"),
    ),
    "spectrum": (
        lambda at: loratools.spectrum(at / "tuned", base=at / "base"),
        ("base/model.safetensors", "tuned/model.safetensors", "tuned/config.json"),
    ),
    "inspect": (
        lambda at: loratools.inspect(at / "one", values=True),
        ("one/adapter_model.safetensors", "one/adapter_config.json"),
    ),
    "save": (
        lambda at: loratools.save(loratools.load(at / "one"), at / "out"),
        ("one/adapter_model.safetensors",),
    ),
}  # fmt: skip
CASES = [(verb, victim) for verb, (_, victims) in VERBS.items() for victim in victims]


class Rewriting:
    """`victim` is rewritten once, its times kept: when another file is first read after it, or before the last look.

    Of a run in which nothing is rewritten, `after_look` tells what was read after inputs were last looked at.

    How many reads a run makes depends on how its threads meet, so that neither moment is told by their number.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, victim: Path, *, when_opened: bool = False, never: bool = False
    ) -> None:
        self.done = never
        self.after_look: set[Path] = set()
        self.opened = False
        self.victim = victim
        real_read, real_look = system.read_into, held_inputs._HeldInputs.changed
        lock = threading.Lock()

        def read(fd: int, buffer: memoryview, offset: int) -> int:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            with lock:
                self.after_look.add(path)
                if path == victim:
                    self.opened = True
                elif self.opened and when_opened:
                    self.rewrite()
            return real_read(fd, buffer, offset)

        def look(held: Any) -> list[str]:
            with lock:
                self.rewrite()
            changes = real_look(held)
            self.after_look.clear()
            return changes

        # A header that was read in an earlier run is kept, and would not be read again in this one.
        monkeypatch.setattr(safetensors_reader, "_last", None)
        monkeypatch.setattr(system, "read_into", read)
        monkeypatch.setattr(held_inputs._HeldInputs, "changed", look)

    def rewrite(self) -> None:
        if not self.done:
            self.done = True
            rewrite(self.victim)


def rewrite(path: Path) -> None:
    """The last bytes become others: values of weights, the closing brace of a config."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size - 1)
        last = file.read(1)
        file.seek(before.st_size - 1)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    factories.checkpoint_folder(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    for seed, name in enumerate(("one", "two")):
        factories.adapter_folder(tmp_path / name, seed=seed)
    loratools.merge(tmp_path / "base", [tmp_path / "one"], tmp_path / "tuned")
    files.close_inputs()
    return tmp_path


def test_every_verb_is_listed() -> None:
    verbs = {name for name in loratools.__all__ if name.islower() and callable(getattr(loratools, name))}
    # The others compute nothing that a later change could contradict: two open, five list what there is, one says what
    # is wrong with files, one removes what no run holds, one shows a report, and one changes a model in memory.
    lists = {"list_adapters", "list_formats", "list_layouts", "list_methods", "list_rules"}
    others = {"load", "open_checkpoint", "check", "clean", "write_page", "merge_into", *lists}
    assert verbs - others == set(VERBS)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system which file a descriptor is of")
@pytest.mark.parametrize(("verb", "victim"), CASES)
def test_input_rewritten_during_the_run_ends_it(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, verb: str, victim: str
) -> None:
    run = VERBS[verb][0]
    with monkeypatch.context() as patched:
        untouched = Rewriting(patched, inputs / victim, never=True)
        run(inputs)
    assert inputs / victim not in untouched.after_look
    if (inputs / "out").exists():
        (inputs / "out").rename(inputs / "before")
    files.close_inputs()

    for when_opened in (True, False):
        original = (inputs / victim).read_bytes()
        with monkeypatch.context() as patched:
            rewriting = Rewriting(patched, inputs / victim, when_opened=when_opened)
            with pytest.raises(LoraToolsError) as caught:
                run(inputs)
        assert rewriting.done
        assert caught.value.exit_code == 5
        assert any(victim in line for line in caught.value.details)
        assert not (inputs / "out").exists()
        assert [path.name for path in inputs.iterdir() if path.name.startswith(".")] == []
        (inputs / victim).write_bytes(original)
        files.close_inputs()
