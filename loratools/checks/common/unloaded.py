"""What a program does not load of an adapter that is stored in one of its formats."""

from __future__ import annotations

from collections.abc import Mapping

from loratools import formats
from loratools.adapter import Adapter
from loratools.checks.common.programs import program
from loratools.checks.common.servers import SERVERS, unservable
from loratools.errors import LoraToolsError, UsageError
from loratools.formats.common.base import Base


def unloaded(adapter: Adapter, name: str, base: Base | None) -> Mapping[str, str]:
    """Names of modules and weights that the program does not load, each with the reason."""
    if name in SERVERS:
        return unservable(adapter, name, base.model_type if base is not None else None)
    dropped = _magnitudes_dropped(adapter) if name == "diffusers" else {}
    native = program(name).format
    # What is stored in the program's own format was written for it.
    if adapter.format == native:
        return dropped
    try:
        adapter = formats.fitted_names(adapter, native)
        return {**formats.writer(native).unwritable(adapter, base=base), **dropped}
    except UsageError:
        # It takes the config of the base to tell.
        return dropped
    except LoraToolsError as error:
        return {adapter.name: error.message}


def _magnitudes_dropped(adapter: Adapter) -> dict[str, str]:
    """diffusers loads magnitudes as PEFT spells them, and leaves every `dora_scale` out."""
    if adapter.format in ("diffusers", "peft"):
        return {}
    loras = {name: lora for name, update in adapter.updates.items() if (lora := update.as_lora()) is not None}
    why = "diffusers leaves out the magnitude (DoRA) of other formats"
    return {name: why for name, lora in loras.items() if lora.magnitude is not None}
