"""The JSON schema of recipes takes what the reader takes, and refuses what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import yaml

from loratools.errors import LoraToolsError
from loratools.methods import settings
from loratools.ops.combine.recipe import read_recipe

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
GOOD = [
    "adapters: [one, two]",
    "method: ties\nset: {density: 0.3, space: core}\nrank: 16\nadapters:\n- {adapter: one, weight: 0.7}\n- two",
    "adapters:\n- {adapter: one, modules: {'*.q_proj': 0.5}, blocks: [1, 0.5]}",
    "include: '*.q_proj'\nexclude: ['*.1.*']\nheads: average\ncalibrate: svc\nnorm_match: true",
]
BAD = [
    "methd: ties",
    "method: tiess",
    "method: ties\nset: {densty: 0.3}",
    "set: {density: 0.3}",
    "rank: four",
    "adapters:\n- {adapter: one, weihgt: 0.7}",
    "adapters:\n- {weight: 0.7}",
    "heads: last",
    "norm_match: 3",
    "adapters:\n- {adapter: one, blocks: [a]}",
]


def is_read(path: Path, text: str) -> bool:
    path.write_text(text, encoding="utf-8")
    try:
        recipe = read_recipe(path)
        settings(recipe.method, recipe.set)
    except LoraToolsError:
        return False
    return True


@peers.needs("jsonschema")
@pytest.mark.parametrize(("text", "good"), [*((text, True) for text in GOOD), *((text, False) for text in BAD)])
def test_schema_and_reader_agree(tmp_path: Path, text: str, good: bool) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(SCHEMA)
    assert Draft202012Validator(SCHEMA).is_valid(yaml.safe_load(text)) is good
    assert is_read(tmp_path / "recipe.yaml", text) is good
