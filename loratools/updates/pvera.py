"""PVeRA: VeRA whose inner scale is drawn from a normal distribution while training; merged is its mean.

Lambda_d and A hold means first and logarithms of variances after them, and only the first half of each is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from loratools.tensors.views import rows
from loratools.updates.parts.peft_fields import shaped, shared
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update
from loratools.updates.vera import UNSEEN_SIZES, VeRA

PEFT_PARTS = ("pvera_lambda_b", "pvera_lambda_d")
PEFT_SHARED = ("pvera_A", "pvera_B")
PEFT_FIELDS = (
    "projection_prng_key",
    "save_projection",
    "pvera_dropout",
    "d_initial",
    "init_weights",
    "sample_at_inference",
    "generator_seed",
)


@dataclass(frozen=True)
class PVeRA(VeRA):
    """A PVeRA update: VeRA with the means of its random scales.

    `sample_at_inference` draws around the means, and cannot be merged.
    """

    kind: ClassVar[str] = "pvera"


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: saved without the shared matrices.
    FormatError: parts are missing, or do not fit each other.
    """
    lambda_b, lambda_d = module.need("pvera_lambda_b", "pvera_lambda_d")
    a, b = (shared(module, name, UNSEEN_SIZES) for name in PEFT_SHARED)
    rank = b.shape[-1]
    shaped(module, pvera_lambda_d=(2 * rank,), pvera_lambda_b=(None,), pvera_A=(2 * rank, None), pvera_B=(None, rank))
    if b.shape[0] < lambda_b.shape[0]:
        shaped(module, pvera_lambda_b=(b.shape[0],))
    return {"": PVeRA(rows(a, 0, rank), b, lambda_b, rows(lambda_d, 0, rank))}
