"""Names of first publications, held against the conversions in diffusers' scripts (`fixtures/image_names`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from naming.image.published import family

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
