"""Families whose modules have the same names are told apart by how many blocks their published models have."""

import pytest

from loratools.errors import UndecidedError
from loratools.naming.image.evidence import decide, denoisers


# FLUX.1: 19 double and 38 single blocks. FLUX.2 [dev]: 8 double and 48 single ones.
@pytest.mark.parametrize(
    ("name", "blocks", "family"),
    [
        ("double_blocks.{}.img_attn.proj", 19, "flux"),
        ("transformer_blocks.{}.attn.to_q", 19, "flux"),
        ("single_blocks.{}.linear2", 38, "flux"),
        ("single_blocks.{}.linear2", 48, "flux2"),
    ],
)
def test_the_number_of_blocks_decides_between_families(name: str, blocks: int, family: str) -> None:
    names = {name.format(number): (None, None) for number in range(blocks)}
    both = [known for known in denoisers() if known.name in ("flux", "flux2")]

    assert len([known for known in both if all(map(known.find, names))]) == 2
    assert decide(names, both).families[0].name == family


def test_a_number_of_blocks_that_no_family_has_decides_nothing() -> None:
    names = {f"single_blocks.{number}.linear2": (None, None) for number in range(31)}
    both = [known for known in denoisers() if known.name in ("flux", "flux2")]

    with pytest.raises(UndecidedError, match="flux or flux2"):
        decide(names, both)
