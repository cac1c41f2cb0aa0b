"""An adapter in shards is read whole, or refused by the name of what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats
from loratools.errors import FormatError


def sharded(folder: Path, *, count: int = 3, index: str | None = "model.safetensors.index.json") -> Path:
    """The adapter of `factories.adapter_folder`, its tensors dealt out to `count` files."""
    factories.adapter_folder(folder)
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    holders = {}
    for i in range(count):
        name = f"adapter_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, folder / name, {"format": "pt"})
        holders |= dict.fromkeys(part, name)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": holders}))
    return folder


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "adapter_model.safetensors.index.json", None])
@pytest.mark.parametrize("given", ["", "adapter_model-00002-of-00003.safetensors"])
def test_all_shards_are_read(index: str | None, given: str, tmp_path: Path) -> None:
    source, single = sharded(tmp_path / "in", index=index), factories.adapter_folder(tmp_path / "single")

    adapter = formats.load(source / given)

    assert adapter.warnings == ()
    wanted = formats.load(single).tensors()
    assert adapter.tensors().keys() == wanted.keys()
    assert all(torch.equal(t.read(), wanted[name].read()) for name, t in adapter.tensors().items())


def test_a_folder_of_shards_is_found_below_another(tmp_path: Path) -> None:
    sharded(tmp_path / "run" / "checkpoint-10")

    assert formats.find_adapters(tmp_path / "run") == [tmp_path / "run" / "checkpoint-10"]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "adapter_model.safetensors.index.json", None])
def test_inspect_takes_the_index_of_shards_for_no_model(index: str | None, tmp_path: Path) -> None:
    sharded(tmp_path / "run" / "checkpoint-10", index=index)

    alone = loratools.inspect(tmp_path / "run" / "checkpoint-10")
    below = loratools.inspect(tmp_path / "run")

    for report in (alone, below):
        (entry,) = report.sources
        assert isinstance(entry, loratools.AdapterEntry)
        assert len(entry.modules) == 4


def damaged_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = folder / "model.safetensors.index.json"
    document = json.loads(file.read_text())
    change(document["weight_map"])
    file.write_text(json.dumps(document))


def without_a_shard(folder: Path) -> None:
    (folder / "adapter_model-00002-of-00003.safetensors").unlink()


def with_a_shard_of_another(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "adapter_model-00001-of-00002.safetensors")


def with_a_tensor_twice(folder: Path) -> None:
    first, second = (folder / f"adapter_model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file({**load_file(first), **dict(list(load_file(second).items())[:1])}, first)


def with_an_index_of_absent_shards(folder: Path) -> None:
    damaged_index(folder, lambda lines: lines.update(gone="adapter_model-00004-of-00004.safetensors"))


def with_an_index_of_fewer_tensors(folder: Path) -> None:
    damaged_index(folder, lambda lines: lines.pop(sorted(lines)[0]) and None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_a_shard, "2 of the 3 shards"),
        (with_a_shard_of_another, "more than one adapter"),
        (with_a_tensor_twice, "in more than one shard"),
        (with_an_index_of_absent_shards, "do not agree on 1 tensor"),
        (with_an_index_of_fewer_tensors, "do not agree on 1 tensor"),
    ],
)
def test_shards_that_are_not_all_of_it_are_refused(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    source = sharded(tmp_path / "in")
    damage(source)

    with pytest.raises(FormatError, match=says):
        formats.load(source)


def test_a_merge_of_shards_is_that_of_the_single_file(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")

    loratools.merge(base, [sharded(tmp_path / "in")], tmp_path / "out")
    loratools.merge(base, [factories.adapter_folder(tmp_path / "single")], tmp_path / "wanted")

    merged, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
