"""Every conversion of a mixture of experts that the installed transformers registers: by value, or with a reason.

transformers 5 makes its experts in memory from files by a mapping, in which each model has its own converters. A model
whose converters are not held here would be matched by luck.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter

from loratools.naming.language.aliases import aliases
from loratools.naming.language.experts import fused_in_memory
from loratools.naming.places import Alias

# Every size differs: experts, what an expert has inside, and the width of the model.
EXPERTS, INNER, WIDTH = 3, 5, 8
LAYER = "model.layers.0"
# What a pattern of a converter ends with, where files have experts one by one, and the sizes of such a weight.
_ONE = re.compile(r"(?P<before>.*\.)?experts\.\*\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_OUT_OF_THE_LAYER = {"gate_proj", "up_proj", "w1", "w3"}

# Models whose experts are brought into memory in another way than by stacking single ones, and what holds here of them.
OTHERWISE = {
    "dots3_note_vision_encoder": "its experts are called fc1, fc3 and fc2, and are of an encoder of images",
    "ernie4_5_vl_moe": "one list of experts is cut into those of texts and those of images, which have other sizes",
    "inkling2_text": "gate and up come in one tensor, row by row in turn, and are in memory one after the other",
    "inkling_mm_model": "gate and up come in one tensor, row by row in turn, and are in memory one after the other",
    "nemo_speechlm": "its files have the experts fused as (experts, in, out) under names of their own",
    "qwen3_vl_moe": "its first files have the experts transposed: held by test_aliases, by value",
    "step3p7": "its files have gate and up of all experts in two tensors, which are one in memory",
}


def patterns(converter: WeightConverter, side: str) -> list[str]:
    given: Any = getattr(converter, side)
    return [given] if isinstance(given, str) else list(given)


def of_experts(converters: Sequence[Any]) -> list[WeightConverter]:
    return [
        c
        for c in converters
        if isinstance(c, WeightConverter)
        and any("experts" in text for side in ("source_patterns", "target_patterns") for text in patterns(c, side))
    ]


REGISTERED = {
    name: found
    for name, converters in conversion_mapping._build_checkpoint_conversion_mapping().items()
    if (found := of_experts(converters))
}


def sources(converter: WeightConverter) -> list[re.Match[str] | None]:
    return [_ONE.fullmatch(text.replace("\\", "").removeprefix(".")) for text in patterns(converter, "source_patterns")]


def is_stack(converter: WeightConverter) -> bool:
    """Whether it stacks single experts, gate and up one after the other."""
    operations = [type(operation).__name__ for operation in converter.operations]
    return all(sources(converter)) and operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


STACKED = sorted(name for name, converters in REGISTERED.items() if all(map(is_stack, converters)))


def test_every_registered_mixture_is_held_by_value_or_has_its_reason() -> None:
    assert sorted(set(REGISTERED) - set(STACKED)) == sorted(OTHERWISE)
    assert len(STACKED) > 30, "the mapping of transformers has another shape: look at it again"


def stored_experts(converter: WeightConverter) -> tuple[dict[str, Tensor], str, Tensor]:
    """The weights of single experts in files, the name of the fused one, and its values by the converter's operations.

    MergeModulelist(dim=0) stacks the experts of each pattern, Concatenate(dim=1) puts the stacks below each other.
    """
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    stacks = []
    for found in sources(converter):
        assert found is not None
        parent = f"{LAYER}.{found['before'] or 'mlp.'}"
        size = (INNER, WIDTH) if found["leaf"] in _OUT_OF_THE_LAYER else (WIDTH, INNER)
        names = [f"{parent}experts.{i}.{found['leaf']}.weight" for i in range(EXPERTS)]
        stored |= {name: torch.randn(*size, generator=generator) for name in names}
        stacks.append(torch.stack([stored[name] for name in names]))
    (target,) = patterns(converter, "target_patterns")
    assert found is not None
    parent = f"{LAYER}.{found['before'] or 'mlp.'}"
    return stored, f"{parent}experts.{target.rpartition('.')[2]}", torch.cat(stacks, dim=1)


def assembled(alias: Alias, stored: dict[str, Tensor]) -> Tensor:
    """The weight that the places of an alias make up; nan where none of them reaches."""
    values = torch.full(alias.shape, torch.nan)
    for place in alias.places:
        part = stored[place.weight]
        rows = slice(None) if place.of.rows is None else place.of.rows.slice
        values[place.of.expert, rows] = part.T if place.transposed else part
    return values


@pytest.mark.parametrize("name", STACKED)
def test_single_experts_are_the_fused_ones_that_transformers_makes_of_them(name: str) -> None:
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for converter in REGISTERED[name]:
        weights, fused, values = stored_experts(converter)
        stored |= weights
        expected[fused] = values
    shapes = {weight: tuple(values.shape) for weight, values in stored.items()}

    found = aliases({"model_type": name}, shapes)

    for fused, values in expected.items():
        # Mixtral and its like have another name for the mixture in memory, which leads to the same places.
        assert torch.equal(assembled(found[fused], stored), values), fused
    if name == name.lower():  # a model type, and not the name of a class
        assert set(fused_in_memory({"model_type": name}, shapes)) == set(expected)
