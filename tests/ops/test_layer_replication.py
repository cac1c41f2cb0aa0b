"""Layers that an adapter repeats (PEFT's layer_replication): layer N of one adapter need not be layer N of another."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import torch

import loratools
from loratools import formats
from loratools.errors import MismatchError, UnsupportedError

RANGES = [[0, 1], [0, 2], [1, 2]]
ORDER = (0, 0, 1, 1)


def replicated(folder: Path, ranges: list[list[int]] | None = None, seed: int = 0) -> Path:
    modules = factories.layered(4, {"self_attn.q_proj": (6, 5)})
    return factories.adapter_folder(folder, modules=modules, seed=seed, config={"layer_replication": ranges or RANGES})


def plain(folder: Path) -> Path:
    return factories.adapter_folder(folder, modules=factories.layered(2, {"self_attn.q_proj": (6, 5)}))


def base(folder: Path) -> Path:
    weights = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(6, 5) for i in (0, 1)}
    return factories.checkpoint_folder(folder, weights=weights)


def test_it_is_a_field_of_the_adapter(tmp_path: Path) -> None:
    adapter = formats.load(replicated(tmp_path / "a"))

    assert adapter.layer_replication == ((0, 1), (0, 2), (1, 2))
    assert adapter.layer_order == ORDER
    assert formats.load(plain(tmp_path / "b")).layer_order == ()


@pytest.mark.parametrize("other", ["plain", "other ranges"])
def test_adapters_that_count_layers_otherwise_are_not_taken_together(other: str, tmp_path: Path) -> None:
    one = replicated(tmp_path / "one")
    two = plain(tmp_path / "two") if other == "plain" else replicated(tmp_path / "two", [[0, 2], [0, 2]])

    with pytest.raises(MismatchError, match="their layers are not the same"):
        loratools.combine([one, two], tmp_path / "out")
    with pytest.raises(MismatchError, match="their layers are not the same"):
        loratools.compare(one, two)
    with pytest.raises(MismatchError, match="their layers are not the same"):
        loratools.merge(base(tmp_path / "base"), [one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_those_that_count_them_alike_are_combined_and_keep_it(tmp_path: Path) -> None:
    one, two = replicated(tmp_path / "one"), replicated(tmp_path / "two", seed=1)

    loratools.combine([one, two], tmp_path / "out")
    loratools.resize(one, tmp_path / "resized", rank=2)

    for name in ("out", "resized"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["layer_replication"] == RANGES
    assert loratools.compare(one, two).cosine is not None


@pytest.mark.parametrize(
    ("format", "serve", "out"),
    [("peft", "vllm", "o"), ("peft", "sglang", "o"), ("mlx", None, "o"), ("gguf", None, "o.gguf")],
)
def test_what_has_no_place_for_it_is_not_written(format: str, serve: str | None, out: str, tmp_path: Path) -> None:
    source = replicated(tmp_path / "a")

    with pytest.raises(UnsupportedError, match=f"repeats layers of its base.* which {serve or format} cannot"):
        loratools.convert(source, tmp_path / out, format=format, serve=serve, base=base(tmp_path / "base"))
    assert not (tmp_path / out).exists()


def test_peft_keeps_it_and_the_base_is_counted_as_the_adapter_counts(tmp_path: Path) -> None:
    report = loratools.convert(replicated(tmp_path / "a"), tmp_path / "o", format="peft", base=base(tmp_path / "base"))

    assert report.warnings == ()
    assert formats.load(tmp_path / "o").layer_replication == ((0, 1), (0, 2), (1, 2))
    assert len(formats.load(tmp_path / "o").updates) == 4


def test_a_layer_that_the_base_has_not_is_named(tmp_path: Path) -> None:
    source = replicated(tmp_path / "a", [[0, 1], [0, 3]])

    with pytest.raises(MismatchError, match=r"the adapter repeats layer 2, and .* has 2 layers"):
        loratools.convert(source, tmp_path / "o", format="peft", base=base(tmp_path / "base"))
