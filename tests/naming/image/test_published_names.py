"""Names of first publications, held against the conversions in diffusers' scripts (`fixtures/image_names`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import pytest
from naming.image.published import family, modules, spelled

from loratools.naming.image.family import sizes

TABLES = Path(__file__).resolve().parents[3] / "fixtures" / "image_names"
ROWS = 12
# What no adapter trains and no table has, with the reason.
WITHOUT = {
    "blocks.{}.norm1.norm": "diffusers has the norms of HunyuanDiT in another order, under the same names",
    "blocks.{}.norm2": "the same",
    "blocks.{}.norm3": "the same",
    "time_extra_emb.style_embedder": "diffusers has the first row alone",
}


def expected(name: str) -> dict[str, list[Any]]:
    """Name in diffusers -> published name, and which spans of its twelve rows."""
    table: dict[str, list[Any]] = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    return table


@pytest.mark.parametrize("name", sorted(path.stem for path in TABLES.glob("*.json")))
def test_published_names_are_those_that_diffusers_converts(name: str) -> None:
    table = family(name)
    assert len(expected(name)) > 20
    for target, (original, *spans) in expected(name).items():
        if target in WITHOUT:
            assert table.find(target.format(5)) is None, target
            continue
        place = table.find(original.format(5))
        assert place is not None, original
        part = place.targets.index(target.format(5))
        if place.swap:
            assert spans == [[ROWS // 2, ROWS], [0, ROWS // 2]], target
        elif len(place.targets) == 1:
            assert spans == [], target
        else:
            shares = sizes(place.split, ROWS, 0, len(place.targets))
            assert shares is not None
            assert spans == [[sum(shares[:part]), sum(shares[: part + 1])]], target


@peers.needs("diffusers")
def test_adapters_of_ace_step_are_named_as_diffusers_converts_them() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ace_step_lora_to_diffusers

    table = family("ace-step")
    published_names = [
        f"layers.{i}.{attention}.{leaf}"
        for i in (0, 23)
        for attention in ("self_attn", "cross_attn")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    for name in published_names:
        converted = _convert_non_diffusers_ace_step_lora_to_diffusers({f"base_model.model.{name}.lora_A.weight": 0})
        place = table.find(f"decoder.{name}")
        assert place is not None
        assert list(converted) == [f"transformer.{place.targets[0]}.lora_A.weight"]


@peers.needs("diffusers")
def test_adapters_of_anima_are_named_as_diffusers_converts_them() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers

    table = family("cosmos")
    names = [n for n in spelled("cosmos", "original", modules("cosmos")) if n.startswith(("blocks.3.", "final", "x_"))]
    assert len(names) > 15
    for name in names:
        converted = _convert_non_diffusers_anima_lora_to_diffusers({f"diffusion_model.{name}.lora_A.weight": 0})
        place = table.find(name)
        assert place is not None
        assert list(converted) == [f"transformer.{place.targets[0]}.lora_A.weight"]


@peers.needs("diffusers")
def test_adapters_of_ltx2_are_named_as_diffusers_converts_them() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers

    table = family("ltx2")
    for rule in table.rules["original"]:
        name = rule.original.format(7)
        converted = _convert_non_diffusers_ltx2_lora_to_diffusers({f"diffusion_model.{name}.lora_A.weight": 0})
        assert list(converted) == [f"transformer.{rule.diffusers[0].format(7)}.lora_A.weight"]
