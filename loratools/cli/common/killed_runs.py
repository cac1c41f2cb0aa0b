"""What a verb says of killed runs before it begins its work anew, for whoever would rather go on with one."""

from __future__ import annotations

from pathlib import Path

from loratools.cli.common.output import Output


def warn_of_killed_runs(output: Output, out: Path, *, plan: bool, resume: bool) -> list[str]:
    """Name the killed runs for an output whose work could be gone on with; return what was said."""
    from loratools.ops.common.abandoned import abandoned_warnings

    sentences = [] if plan or resume else abandoned_warnings(out)
    for sentence in sentences:
        output.warn(sentence)
    return sentences
