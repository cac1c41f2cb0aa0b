"""Every type that PEFT has is read, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

warnings.filterwarnings("ignore", category=DeprecationWarning)
peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from updates import test_parity_loha_to_kasa as loha_to_kasa  # noqa: E402
from updates import test_parity_vera_to_supertuning as vera_to_supertuning  # noqa: E402
from updates import test_replacing_kinds as replacing  # noqa: E402

from loratools.formats.peft_parts.config import FIELDS, refusals  # noqa: E402
from loratools.formats.peft_parts.kinds import known_fields, refusal  # noqa: E402
from loratools.updates.parts.unmergeable import REASONS  # noqa: E402

TYPES = sorted({str(kind.value) for kind in peft.PeftType} | {str(k.value) for k in PEFT_TYPE_TO_TUNER_MAPPING})


@pytest.mark.parametrize("peft_type", TYPES)
def test_a_type_of_peft_is_read_or_has_its_reason(peft_type: str) -> None:
    reason = refusal(peft_type)

    assert reason is None or reason == REASONS.get(peft_type), f"a new kind of PEFT: {peft_type}"


CONFIGS = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
LISTED = [name for name in CONFIGS if name != "LORA" and refusal(name) is None]


def test_every_type_that_is_read_is_merged_by_a_test_and_by_peft_to_the_same_weights() -> None:
    types = {config: kind for kind, config in CONFIGS.items()}
    held = {types[getattr(peft, config)] for config, _, _ in loha_to_kasa.CASES.values()}
    held |= {types[case.config] for case in vera_to_supertuning.CASES.values()}
    held |= {name.partition(" ")[0] for name in replacing.CONFIGS}

    # What LoRA has of its own, each layer with each option, is in test_lora_parity.
    assert held | {"LORA"} == {*LISTED, "LORA"}


def test_every_field_of_the_config_of_lora_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(CONFIGS["LORA"])}

    assert fields <= set(FIELDS), "a new field of PEFT: does it change the result?"


@pytest.mark.parametrize("peft_type", LISTED)
def test_every_field_of_a_config_is_known(peft_type: str) -> None:
    known = FIELDS | known_fields(peft_type)

    assert {field.name for field in dataclasses.fields(CONFIGS[peft_type])} <= set(known)
    assert set(known_fields(peft_type)) <= {field.name for field in dataclasses.fields(CONFIGS[peft_type])}


@pytest.mark.parametrize("peft_type", LISTED)
def test_a_field_of_tomorrow_is_refused_by_name(peft_type: str) -> None:
    found = refusals({"peft_type": peft_type, "r": 4, "use_tomorrow": True, "not_used": False})

    assert [(name, line.partition(":")[0]) for name, line, _ in found] == [("use_tomorrow", "'use_tomorrow' = true")]


def test_what_peft_does_not_have_is_not_listed() -> None:
    assert set(REASONS) <= set(TYPES)


@pytest.mark.parametrize("name", ["QALORA", "KASA", "FULL", "LYCORIS_OFT", "LORA_EXPERTS", "lora", "vera"])
def test_files_of_kinds_that_are_no_type_of_peft_are_not_taken_for_one(name: str) -> None:
    assert refusal(name) == "not a kind known here"


def test_the_table_can_fail() -> None:
    assert refusal("TOMORROW") == "not a kind known here"
    assert "TOMORROW" not in REASONS
