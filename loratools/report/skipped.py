"""What of an input is in no result, as lines: many things that are skipped for one reason share a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratools.skipped import Skipped


def lines_of_skipped(
    skipped: Sequence[Skipped],
    begin: str,
    *,
    every: bool,
    most: int,
    details: Callable[[Sequence[Skipped]], str] = lambda _: "",
) -> list[str]:
    """Lines such as `left out: NAME (REASON)`, sorted by reason.

    Args:
        skipped: What is in no result.
        begin: What a line begins with: `left out`.
        every: Name each one, however many have the same reason.
        most: So many of one reason are named one by one.
        details: What is added to the reason of those on one line.
    """
    lines = []
    for why in sorted({each.why for each in skipped}):
        members = [each for each in skipped if each.why == why]
        if every or len(members) <= most:
            lines += [f"{begin}: {each.name} ({why}{details([each])})" for each in members]
        else:
            lines.append(f"{begin}: {members[0].name} and {len(members) - 1} more ({why}{details(members)})")
    return lines
