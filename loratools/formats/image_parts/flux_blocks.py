"""Names that begin with `double_blocks.` or `single_blocks.`: those of FLUX, or of a model that has taken them over."""

from __future__ import annotations

from collections.abc import Collection

from loratools.naming.image.evidence import denoisers

BLOCKS = ("double_blocks.", "single_blocks.")
_FLUX = ("flux", "flux2")


def are_of_flux(names: Collection[str]) -> bool:
    """Whether these names are FLUX's: all are, or no other model (HunyuanVideo, HunyuanImage) has them all."""
    knowing = (family for family in denoisers() if all(family.find(name) is not None for name in names))
    families = {family.name for family in knowing}
    return not families or any(name in families for name in _FLUX)
