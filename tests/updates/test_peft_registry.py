"""Every type that PEFT has is read, or is refused with the reason."""

from __future__ import annotations

import warnings

import pytest

warnings.filterwarnings("ignore", category=DeprecationWarning)
peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402

from loratools.formats._peft_kinds import refusal  # noqa: E402
from loratools.updates._unmergeable import REASONS  # noqa: E402

TYPES = sorted({str(kind.value) for kind in peft.PeftType} | {str(k.value) for k in PEFT_TYPE_TO_TUNER_MAPPING})


@pytest.mark.parametrize("peft_type", TYPES)
def test_a_type_of_peft_is_read_or_has_its_reason(peft_type: str) -> None:
    reason = refusal(peft_type)

    assert reason is None or reason == REASONS.get(peft_type), f"a new kind of PEFT: {peft_type}"


def test_what_peft_does_not_have_is_not_listed() -> None:
    assert set(REASONS) <= set(TYPES)


def test_the_table_can_fail() -> None:
    assert refusal("TOMORROW") == "not a kind known here"
    assert "TOMORROW" not in REASONS
