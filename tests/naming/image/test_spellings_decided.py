"""Small adapters of every model in every spelling, without a base: of their family or a question, never of another."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import peers
import pytest
from naming.image import published, spellings

import loratools
from loratools.errors import UndecidedError
from loratools.formats.image_parts.notes import NOTES

pytestmark = peers.needs("diffusers")

# What an adapter has of the model: a part of the names of its modules.
SAMPLES = {
    "first blocks": r"[^.]+\.0\..*",
    "queries, keys and values": r"[^.]+\.[01]\..*\.(?:to|add|attn)_(?:[qkv]|qkv|query|key|value)(?:_proj)?",
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("family", sorted(published.MODELS))
def test_a_small_adapter_is_of_its_family_or_a_question(tmp_path: Path, family: str, sample: str) -> None:
    component = published.family(family).component
    for number, spelling in enumerate(spellings.SPELLINGS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, modules = spellings.write(folder, family, spelling, only=SAMPLES[sample])
        adapter = loratools.load(path)
        if adapter.undecided is not None:
            assert isinstance(adapter.undecided, UndecidedError), spelling.title
            continue
        noted = cast("dict[str, object]", adapter.notes.get(NOTES, {}))
        # None where families have the same names, which then mean the same modules.
        assert noted.get("family") in (family, None), spelling.title
        if spelling.folder == "bare":
            # These names are read as those of a language model, which have no family, or as they are in diffusers.
            assert {name.removeprefix(f"{component}.") for name in adapter.updates} == set(modules), spelling.title
        else:
            assert set(adapter.updates) == {f"{component}.{name}" for name in modules}, spelling.title
