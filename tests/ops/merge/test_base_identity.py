"""When a merge warns that an adapter is for another model: only where the base itself says so, or does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest

from loratools import merge

Q = "model.layers.0.self_attn.q_proj"


def warnings(tmp_path: Path, named: str, *, base_folder: str = "base", in_config: str | None = None) -> list[str]:
    """Warnings of a base model, from a merge of an adapter that names its base `named`."""
    base = factories.checkpoint_folder(tmp_path / base_folder)
    if in_config is not None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "_name_or_path": in_config}))
    adapter = factories.adapter_folder(tmp_path / "style", config={"base_model_name_or_path": named})
    return [w for w in merge(base, [adapter], tmp_path / "out").warnings if "is for" in w]


@pytest.mark.parametrize("named", ["meta/llama-9", "/somewhere/llama-9", "llama-9"])
def test_a_base_in_a_folder_of_another_name_is_no_evidence(tmp_path: Path, named: str) -> None:
    assert warnings(tmp_path, named, base_folder="model") == []


@pytest.mark.parametrize(
    ("named", "in_config"),
    [
        ("meta/llama-9", "meta/llama-9"),
        ("meta/llama-9", "mirror/Llama_9"),
        ("packager/llama-9-bnb-4bit", "meta/llama-9"),
        ("meta/llama-9", "/data/checkpoint-200"),
        ("/data/checkpoint-200", "meta/llama-9"),
    ],
)
def test_a_base_whose_config_agrees_or_names_a_folder_is_no_evidence(
    tmp_path: Path, named: str, in_config: str
) -> None:
    assert warnings(tmp_path, named, in_config=in_config) == []


def test_a_base_whose_config_says_it_is_another_model_is_warned_of(tmp_path: Path) -> None:
    (warning,) = warnings(tmp_path, "meta/llama-9", in_config="meta/llama-2")

    assert (
        warning
        == f"'{tmp_path / 'style'}' is for 'meta/llama-9', and '{tmp_path / 'base'}' says that it is 'meta/llama-2'"
    )


def test_a_base_in_the_cache_of_the_hub_is_the_model_of_its_folder(tmp_path: Path) -> None:
    (warning,) = warnings(tmp_path, "meta/llama-9", base_folder="models--meta--llama-2/snapshots/0f3a")
    assert "says that it is 'meta/llama-2'" in warning


def test_a_base_of_its_name_in_the_cache_of_the_hub_is_no_evidence(tmp_path: Path) -> None:
    assert warnings(tmp_path, "meta/llama-9", base_folder="models--meta--llama-9/snapshots/0f3a") == []


def test_modules_without_a_place_and_another_name_are_warned_of(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    modules = {Q: (10, 6), "model.layers.9.self_attn.q_proj": (10, 6)}
    adapter = factories.adapter_folder(
        tmp_path / "style", modules=modules, config={"base_model_name_or_path": "meta/llama-9"}
    )

    report = merge(base, [adapter], tmp_path / "out", allow_partial=True)

    assert any("is for 'meta/llama-9', and 1 of its names do not fit" in w for w in report.warnings)
