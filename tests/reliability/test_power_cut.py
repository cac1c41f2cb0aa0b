"""What the order of calls promises of a power cut: nothing has a name before its bytes are on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import factories
import pytest

import loratools
from loratools.storage import files, system
from loratools.storage.run_journal import JOURNAL

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks which file a descriptor is of")


class Recorder:
    """The os module, which notes what is written, flushed and renamed, by the names that the files have."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in ("pwrite", "posix_fallocate", "fsync", "rename", "replace", "link", "copy_file_range", "unlink"):
            return real

        def call(*args: object, **kwargs: object) -> object:
            if name in ("rename", "replace", "link"):
                what = str(args[1])
            elif name == "unlink":
                what = str(args[0])
            else:
                fd = args[1] if name == "copy_file_range" else args[0]
                what = str(Path(f"/proc/self/fd/{fd}").readlink())
            result = real(*args, **kwargs)
            self.events.append(("write" if name in ("pwrite", "posix_fallocate", "copy_file_range") else name, what))
            return result

        return call


@pytest.mark.parametrize("verb", ["merge", "merge one file", "resize", "convert"])
def test_every_file_is_on_the_disk_before_the_output_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    factories.checkpoint_folder(tmp_path / "base", shards=1 if "file" in verb else 2)
    factories.adapter_folder(tmp_path / "style")
    one_file = "file" in verb
    out = tmp_path / ("out.safetensors" if one_file else "out")
    recorder = Recorder()
    files.close_inputs()
    monkeypatch.setattr(system, "os", recorder)
    if verb.startswith("merge"):
        base = tmp_path / "base"
        loratools.merge(base / "model.safetensors" if one_file else base, tmp_path / "style", out)
    elif verb == "resize":
        loratools.resize(tmp_path / "style", out, rank=1)
    else:
        loratools.convert(tmp_path / "style", out, format="mlx", base=tmp_path / "base")
    monkeypatch.setattr(system, "os", os)

    events = recorder.events
    named = next(
        i for i, (kind, what) in enumerate(events) if kind in ("rename", "replace", "link") and what == str(out)
    )
    written = {Path(what).name: i for i, (kind, what) in enumerate(events) if kind == "write" and JOURNAL not in what}
    flushed = {Path(what).name: i for i, (kind, what) in enumerate(events[:named]) if kind == "fsync"}
    assert written
    for name, last in written.items():
        assert last < named, f"{name} is written after the output has its name"
        assert flushed.get(name, -1) > last, f"{name} is not flushed after its last byte"
    # The folder that the files are in, then the output, then the folder that the output is in.
    folders = [what for kind, what in events[:named] if kind == "fsync" and Path(what).name.startswith(".out")]
    assert folders
    assert ("fsync", str(tmp_path)) in events[named:]


def test_a_merge_whose_unflushed_bytes_are_lost_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal may reach the disk before the weights: each unit that it names is held against its checksum."""
    modules = factories.layered(4, {"self_attn.q_proj": (10, 6)})
    factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(modules), shards=2)
    factories.adapter_folder(tmp_path / "style", modules=modules)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "whole")
    left = [7]

    def cut(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out", threads=1, progress=cut)
    for folder in tmp_path.glob(".out.*"):
        for file in folder.glob("*.safetensors"):
            size = file.stat().st_size
            file.write_bytes(bytes(size))  # its final size, and zeros

    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out", resume=True)

    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
