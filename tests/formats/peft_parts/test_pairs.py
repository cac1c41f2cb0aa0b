"""Factors of plain linear layers are read in one go, to the updates that reading each module by itself gives."""

from __future__ import annotations

import pytest
import torch
from peft_folders import Stored, factors

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import FormatError
from loratools.formats.peft_parts import lora
from loratools.formats.peft_parts.keys import Factor, WholeWeight, parse_keys

Q, V = "layers.0.q_proj", "layers.1.v_proj"


def in_both_ways(path: object, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Adapter, Adapter]:
    at_once = formats.load(path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "_sound_pairs", lambda *arguments: None)
        one_by_one = formats.load(path, **options)
    return at_once, one_by_one


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 4}},
        {"r": 2},
        {"lora_alpha": 0},
        {"modules_to_save": ["head"]},
    ],
    ids=["plain", "rslora", "patterns", "another rank", "no alpha", "a head"],
)
@pytest.mark.parametrize("rank_from", [None, "config"])
def test_pairs_are_read_as_their_modules_would_be(
    fields: dict[str, object], rank_from: str | None, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"base_model.model.head.weight": torch.ones(3, 6)} if "modules_to_save" in fields else {}
    path = stored(factors(V) | factors(Q) | head, **fields)

    at_once, one_by_one = in_both_ways(path, monkeypatch, rank_from=rank_from)

    assert list(at_once.updates) == [Q, V]
    assert at_once == one_by_one


def test_keys_of_pairs_are_told_from_all_others() -> None:
    parsed = parse_keys([*factors(Q), *factors(V), "base_model.model.head.weight"])

    assert set(parsed.pairs) == {Q, V}
    assert parsed.pairs[Q] == (f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight")
    assert parsed.others == {"base_model.model.head.weight": WholeWeight("head.weight", "plain", None)}
    assert len(parsed) == 5


@pytest.mark.parametrize(
    "odd",
    [
        f"base_model.model.{Q}.lora_magnitude_vector",
        f"base_model.model.{Q}.lora_B.bias",
        f"base_model.model.{Q}.base_layer.lora_A.weight",
        "base_model.model.embed.lora_embedding_A",
        "base_model.model.other.lora_A.weight",
        "base_model.model.other.lora_A.default.weight",
    ],
)
def test_one_factor_beside_the_pairs_has_every_module_looked_at(odd: str) -> None:
    keys = [*factors(Q), odd]

    parsed = parse_keys(keys)

    assert parsed.pairs == {}
    assert list(parsed.others) == keys
    assert all(isinstance(meaning, Factor) for meaning in parsed.others.values())


@pytest.mark.parametrize(
    "b", [torch.ones(10, 3), torch.ones(0, 4), torch.ones(10, 4, 2, 1), torch.ones(10, 4, dtype=torch.int32)]
)
def test_pair_that_makes_no_product_is_refused_by_its_name(b: torch.Tensor, stored: Stored) -> None:
    path = stored(factors(V) | factors(Q) | {f"base_model.model.{Q}.lora_B.weight": b})

    with pytest.raises(FormatError) as raised:
        formats.load(path)

    assert Q in "\n".join(raised.value.details)
    assert V not in "\n".join(raised.value.details)
