"""Every spelling of names that common tools have, for each published model: the table in docs/registries.md holds."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
from naming.image import published, spellings

from loratools.naming.image.evidence import denoisers

pytestmark = peers.needs("diffusers")


def test_the_table_has_every_family() -> None:
    rows = spellings.documented()
    assert rows[:2] == spellings.head()
    assert [row.split("`")[1] for row in rows[2:]] == sorted(published.MODELS)
    assert set(published.MODELS) == {family.name for family in denoisers()}


@pytest.mark.parametrize("family", sorted(published.MODELS))
def test_a_family_is_read_in_the_spellings_that_the_table_says(tmp_path: Path, family: str) -> None:
    assert spellings.row(family, tmp_path) in spellings.documented()


def test_no_cell_of_the_table_says_no() -> None:
    cells = [cell.strip() for row in spellings.documented()[2:] for cell in row.split("|")[2:-1]]
    assert set(cells) == {"yes", "with `--base`"}
