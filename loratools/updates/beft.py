"""BEFT: what is trained is added to the biases of a few layers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.tensors.views import reshaped
from loratools.updates.full import Full
from loratools.updates.parts.peft_fields import shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

PEFT_PARTS = ("beft_bias",)
PEFT_FIELDS = ("init_weights",)


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """A bias that the base does not have is an error: there is nothing to add to, and PEFT refuses it as well.

    Raises:
        FormatError: The bias has another shape.
    """
    (bias,) = module.need(*PEFT_PARTS)
    shaped(module, beft_bias=(1, None))
    return {".bias": Full(reshaped(bias, (bias.elements,)))}
