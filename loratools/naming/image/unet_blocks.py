"""Blocks of a U-Net, as kohya's block weights number them: BASE, IN00 to IN11, MID, OUT00 to OUT11.

A text encoder, and what belongs to no block, is BASE. Names are those of diffusers (`down_blocks.1.attentions.0`), of
the original code (`input_blocks.4.1`), and either with underscores as in kohya's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratools.errors import UsageError

_IN = tuple(f"IN{i:02}" for i in range(12))
_OUT = tuple(f"OUT{i:02}" for i in range(12))
# By the length of a list, what its numbers are for: SDXL's attention blocks, SD 1's attention blocks, all blocks of
# SDXL, all of SD 1.
_LISTS: dict[int, tuple[str, ...]] = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *_OUT[:6]),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *_OUT[3:]),
    20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
    26: ("BASE", *_IN, "MID", *_OUT),
}
_TEXT = re.compile(r"(^|[._])(text_encoder|te\d?|text_model|conditioner|cond_stage_model)([._]|$)")
_DIFFUSERS = re.compile(
    r"(?:^|[._])(down|up)_blocks[._](\d)[._](attentions|resnets|downsamplers|upsamplers)[._](\d)(?:[._]|$)"
)
_ORIGINAL = re.compile(r"(?:^|[._])(input|output)_blocks[._](\d{1,2})(?:[._]|$)")
_MIDDLE = re.compile(r"(^|[._])(mid_block|middle_block)([._]|$)")
_OUTSIDE = re.compile(r"(^|[._])(time_embed|time_embedding|label_emb|add_embedding|conv_out|out)([._]|$)")


def block_of(name: str) -> str | None:
    """The block that the module `name` is in; None if it is of no such model."""
    if _TEXT.search(name):
        return "BASE"
    if parsed := _DIFFUSERS.search(name):
        side, outer, part, inner = parsed.groups()
        place = 3 * int(outer) + (2 if part.endswith("samplers") else int(inner))
        names = _IN[1:] if side == "down" else _OUT
        return names[place] if place < len(names) else None
    if parsed := _ORIGINAL.search(name):
        names, place = (_IN if parsed[1] == "input" else _OUT), int(parsed[2])
        return names[place] if place < len(names) else None
    if _MIDDLE.search(name):
        return "MID"
    if re.search(r"(^|[._])conv_in([._]|$)", name):
        return "IN00"
    return "BASE" if _OUTSIDE.search(name) else None


def weights_by_block(numbers: Sequence[float]) -> dict[str, float]:
    """Block -> weight, of a list as people write it for kohya's scripts; blocks that a list leaves out keep 1.

    Raises:
        UsageError: No list is of that length.
    """
    if len(numbers) not in _LISTS:
        raise UsageError(
            f"{len(numbers)} block weights; there are lists of 12 and 20 (SDXL), 17 and 26 (Stable Diffusion 1 and 2)",
            hint="numbers go with " + ", ".join(_LISTS[26][:4]) + ", ...; see the documentation of combine",
        )
    return dict.fromkeys(_LISTS[26], 1.0) | dict(zip(_LISTS[len(numbers)], map(float, numbers), strict=True))
