"""Every spelling of names that common tools have, for each published model: the table in docs/registries.md holds."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
from naming.image import published, spellings

import loratools
from loratools.errors import LoraToolsError
from loratools.naming.image.evidence import denoisers

pytestmark = peers.needs("diffusers")
# Families without a class in diffusers from which a published model could be made.
WITHOUT_CLASS = {"omnigen2"}


def test_the_table_has_every_family_that_diffusers_has() -> None:
    rows = spellings.documented()
    assert rows[:2] == spellings.head()
    assert [row.split("`")[1] for row in rows[2:]] == sorted(published.MODELS)
    assert set(published.MODELS) == {family.name for family in denoisers()} - WITHOUT_CLASS


@pytest.mark.parametrize("family", sorted(published.MODELS))
def test_a_family_is_read_in_the_spellings_that_the_table_says(tmp_path: Path, family: str) -> None:
    assert spellings.row(family, tmp_path) in spellings.documented()


def test_no_cell_of_the_table_says_no() -> None:
    cells = [cell.strip() for row in spellings.documented()[2:] for cell in row.split("|")[2:-1]]
    assert set(cells) == {"yes", "with `--base`"}


@pytest.mark.parametrize("spelling", spellings.SPELLINGS, ids=lambda spelling: spelling.title)
def test_a_base_of_another_family_is_refused_or_changes_nothing(tmp_path: Path, spelling: spellings.Spelling) -> None:
    path, modules = spellings.write(tmp_path, "z-image", spelling)
    if spelling.folder:
        # A folder of PEFT keeps its names, which are not FLUX's.
        names = {name.removeprefix("transformer.") for name in loratools.load(path, base="flux").updates}
        assert names == set(modules)
    else:
        with pytest.raises(LoraToolsError, match="flux"):
            loratools.load(path, base="flux")
