"""The program multiplies the adapter with another scale than the training did.

Servers read one alpha and one rank for all modules and no patterns, some also no rsLoRA; programs for images do not
read what diffusers writes into the header. None of them says so, and the adapter is too weak or too strong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from loratools.checks.common.observation import Observation
from loratools.checks.common.servers import SERVERS, served_scale
from loratools.checks.common.subject import Subject
from loratools.formats.common.source import counted

SEVERITY = "error"
NEEDS = "program"
FIX = "fold the scale into B: loratools convert ADAPTER -o OUT --to peft --serve SERVER, or --to comfy for ComfyUI"

# Of two floats that were computed in two ways.
_SAME = 1e-6


def observe(subject: Subject) -> Iterator[Observation]:
    """Modules of which the two scales differ, each with both."""
    if subject.program is None or subject.adapter is None:
        return
    scales = _applied(subject)
    updates = subject.adapter.updates
    differing = tuple(
        f"{name}: {scale:g} in place of {updates[name].scale:g}"
        for name, scale in scales.items()
        if not math.isclose(scale, updates[name].scale, rel_tol=_SAME)
    )
    if differing:
        convert = "--to comfy" if subject.program == "comfyui" else f"--to peft --serve {subject.program}"
        yield Observation(
            f"{subject.program} applies another scale to {counted(len(differing), 'module')}",
            differing,
            f"fold the scale into B: loratools convert ADAPTER -o OUT {convert}",
        )


def _applied(subject: Subject) -> Mapping[str, float]:
    """What the program multiplies modules with, as far as that is known."""
    assert subject.adapter is not None
    loras = {name: lora for name, u in subject.adapter.updates.items() if (lora := u.as_lora()) is not None}
    if subject.program == "comfyui" and subject.adapter.format == "diffusers":
        return {name: 1.0 for name, lora in loras.items() if lora.alpha_source == "metadata"}
    alpha, rank = subject.config.get("lora_alpha"), subject.config.get("r")
    if subject.program not in SERVERS or subject.adapter.format != "peft":
        return {}
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank <= 0:
        return {}
    own_ranks, rslora = SERVERS[subject.program].own_ranks, bool(subject.config.get("use_rslora"))
    return {
        name: served_scale(subject.program, alpha=alpha, rank=lora.rank if own_ranks else rank, rslora=rslora)
        for name, lora in loras.items()
        if lora.rank
    }
