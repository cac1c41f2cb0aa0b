"""Names that begin with `double_blocks.` or `single_blocks.`: those of FLUX, or of a model that has taken them over."""

from __future__ import annotations

from collections.abc import Collection

from loratools.formats.common.base import Base
from loratools.formats.image_parts.reading import given_base
from loratools.naming.image.evidence import denoisers

BLOCKS = ("double_blocks.", "single_blocks.")
_FLUX = ("flux", "flux2")


def are_of_flux(names: Collection[str], base: Base | None) -> bool:
    """Whether these names are FLUX's: all are, or no other model (HunyuanVideo, HunyuanImage) has them all.

    Args:
        names: Of the modules.
        base: The model that a person has named; where that is another which has all these names, they are its own.
    """
    named_base = given_base(base)
    if named_base is not None and named_base.family.name not in _FLUX and all(map(named_base.family.find, names)):
        return False
    knowing = (family for family in denoisers() if all(family.find(name) is not None for name in names))
    families = {family.name for family in knowing}
    return not families or any(name in families for name in _FLUX)
