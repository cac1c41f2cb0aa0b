"""Deltas in the wrong place, in a part of the weights, of another kind of sum, or beyond a dtype, are told by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import factories
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import loratools

SHAPES = {
    "self_attn.q_proj": (24, 24), "self_attn.k_proj": (24, 24), "self_attn.o_proj": (24, 24), "mlp.up_proj": (56, 24),
}  # fmt: skip
MODULES = factories.layered(4, SHAPES)
RANK, SCALE = 5, 1.4
DTYPES = [torch.float32, torch.bfloat16]
Deltas = Mapping[str, Tensor]
Change = Callable[[str, Tensor, Deltas], Tensor]


def inputs(tmp_path: Path, dtype: torch.dtype, adapters: int = 1) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Write a base in two shards and adapters; the weights of the base, and the deltas of each adapter in float64."""
    weights = {name: (tensor * 0.05).to(dtype) for name, tensor in factories.base_weights(MODULES).items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=2)
    deltas = []
    for i in range(adapters):
        pairs = {n: (a * 0.1, b * 0.1) for n, (a, b) in factories.factors(MODULES, rank=RANK, seed=4 + i).items()}
        factories.adapter_folder(
            tmp_path / f"style{i}", values=pairs, rank=RANK, alpha=SCALE * RANK, config={"task_type": None}
        )
        deltas.append({name: SCALE * (b.double() @ a.double()) for name, (a, b) in pairs.items()})
    return weights, deltas


def verified(tmp_path: Path, weights: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> loratools.VerifyReport:
    """Write the merged weights in the dtype of the base, and verify them with all adapters."""
    stored = {name: merged[name].to(weight.dtype) if name in merged else weight for name, weight in weights.items()}
    factories.checkpoint_folder(tmp_path / "merged", weights=stored, shards=2)
    adapters = sorted(tmp_path.glob("style?"))
    return loratools.verify(tmp_path / "merged", tmp_path / "base", adapters)


def told(tmp_path: Path, dtype: torch.dtype, change: Change) -> list[tuple[str, str, int]]:
    """Code, message and number of weights of each finding, where a weight is changed by `change` of its module."""
    weights, (deltas,) = inputs(tmp_path, dtype)
    merged = {f"{name}.weight": change(name, weights[f"{name}.weight"].double(), deltas) for name in MODULES}
    report = verified(tmp_path, weights, merged)
    assert report.verdict == "different"
    return [(finding.code, finding.message, len(finding.names)) for finding in report.diagnosis]


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exchanged_queries_and_keys_are_told_by_their_names(tmp_path: Path, dtype: torch.dtype) -> None:
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def exchanged(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        leaf = name.rpartition(".")[2]
        return weight + deltas[name.replace(leaf, other.get(leaf, leaf))]

    assert sorted(told(tmp_path, dtype, exchanged)) == [
        ("other-module", "the delta of k_proj was added to q_proj", 4),
        ("other-module", "the delta of q_proj was added to k_proj", 4),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_are_shifted_by_one_are_told_with_the_distance(tmp_path: Path, dtype: torch.dtype) -> None:
    def shifted(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        before = re.sub(r"layers\.\d", f"layers.{layer_of(name) - 1}", name)
        return weight + deltas[before] if before in deltas else weight

    assert told(tmp_path, dtype, shifted) == [
        ("other-module", "the delta of another layer was added: 1 layer before", 12),
        ("not-applied", "the weights are those of the base: no adapter was applied to them (4 of 16 weights)", 4),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rows_of_heads_in_another_order_are_told_with_the_size_of_the_heads(
    tmp_path: Path, dtype: torch.dtype, inverse: bool
) -> None:
    def reordered(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        if "q_proj" not in name and "k_proj" not in name:
            return weight + deltas[name]
        # Four heads of six rows: the halves of each, in turn or one after the other.
        halves = (4, 3, 2) if inverse else (4, 2, 3)
        return weight + deltas[name].reshape(*halves, 24).transpose(1, 2).reshape(24, 24)

    way = (
        "one half of a head after the other, where the base has them in turn"
        if inverse
        else "the halves of a head in turn, where the base has one after the other"
    )
    assert told(tmp_path, dtype, reordered) == [
        ("rows-reordered", f"the rows of the delta were added in another order: {way} (heads of 6 rows)", 8)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_weight_on_a_part_of_the_modules_is_told_for_these(tmp_path: Path, dtype: torch.dtype) -> None:
    def partly_halved(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        return weight + (0.5 if "up_proj" in name else 1.0) * deltas[name]

    assert told(tmp_path, dtype, partly_halved) == [
        ("adapter-weight", "the adapter was applied with 0.5 times the weight given", 4)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shard_that_was_not_merged_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, (deltas,) = inputs(tmp_path, dtype)
    shard = "model-00002-of-00002.safetensors"
    unmerged = set(load_file(tmp_path / "base" / shard)) & {f"{name}.weight" for name in MODULES}
    merged = {
        f"{name}.weight": weights[f"{name}.weight"].double() + deltas[name]
        for name in MODULES
        if f"{name}.weight" not in unmerged
    }

    (finding,) = verified(tmp_path, weights, merged).diagnosis

    assert finding.code == "not-applied"
    assert set(finding.names) == unmerged
    assert finding.message.endswith(f"({len(unmerged)} of 16 weights, all those of {shard})")


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_into_a_base_that_was_merged_before_is_told_as_applied_twice(tmp_path: Path, dtype: torch.dtype) -> None:
    def again(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        return (weight + deltas[name]).to(dtype).double() + deltas[name]

    assert [(code, count) for code, _, count in told(tmp_path, dtype, again)] == [("applied-twice", 16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_state_of_the_training_is_told_with_its_cosine(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, (deltas,) = inputs(tmp_path, dtype)
    generator = torch.Generator().manual_seed(8)
    changes, cosines = {}, []
    for name, delta in deltas.items():
        noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
        changes[name] = delta + 0.3 * noise * delta.norm() / noise.norm()
        cosines.append(float((changes[name] * delta).sum() / (changes[name].norm() * delta.norm())))
    merged = {f"{name}.weight": weights[f"{name}.weight"].double() + changes[name] for name in MODULES}

    (finding,) = verified(tmp_path, weights, merged).diagnosis

    assert finding.code == "unexplained-change"
    assert len(finding.names) == 16
    low, high = f"{min(cosines):.2f}", f"{max(cosines):.2f}"
    assert finding.message.endswith(f"(cosine with them {low})" if low == high else f"{low} to {high})")


@pytest.mark.parametrize("dtype", DTYPES)
def test_change_that_is_of_no_module_of_the_adapter_is_not_taken_for_one(tmp_path: Path, dtype: torch.dtype) -> None:
    def another(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer_of(name)), dtype=torch.float64)
        return weight + 0.05 * noise

    assert {code for code, _, _ in told(tmp_path, dtype, another)} <= {"other-change", "unexplained-change"}


class Model(nn.Module):
    """The linear layers of the base, which PEFT can merge into."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in MODULES:
            parent: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            weight = weights[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight.data = weight.clone()
            parent.add_module(last, layer)

    def forward(self) -> None:
        raise NotImplementedError


def merged_by_peft(tmp_path: Path, weights: Mapping[str, Tensor], combination: str) -> dict[str, Tensor]:
    """What PEFT merges after it has combined both adapters, each with a weight of 1, into a third."""
    model = peft.PeftModel.from_pretrained(Model(weights), str(tmp_path / "style0"), adapter_name="first")
    model.load_adapter(str(tmp_path / "style1"), adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type=combination)
    model.set_adapter("both")
    merged = model.merge_and_unload(adapter_names=["both"])
    return {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_that_peft_concatenated_before_it_merged_are_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, _ = inputs(tmp_path, dtype, 2)

    report = verified(tmp_path, weights, merged_by_peft(tmp_path, weights, "cat"))

    assert (report.verdict, report.diagnosis) == ("same", ())
    if dtype == torch.bfloat16:
        assert report.merged_by == ("PEFT (add_weighted_adapter with 'cat', then merged)",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_whose_factors_peft_added_are_told_as_that(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, _ = inputs(tmp_path, dtype, 2)

    report = verified(tmp_path, weights, merged_by_peft(tmp_path, weights, "linear"))

    assert report.verdict == "different"
    assert [(finding.code, len(finding.names)) for finding in report.diagnosis] == [("factors-added", 16)]
    assert "as add_weighted_adapter of PEFT does with 'linear'" in report.diagnosis[0].message


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_that_peft_brought_to_a_smaller_rank_are_not_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, _ = inputs(tmp_path, dtype, 2)

    report = verified(tmp_path, weights, merged_by_peft(tmp_path, weights, "svd"))

    # The sum of two adapters of rank 5 has rank 10, of which the best 5 are kept.
    assert report.verdict == "different"
    assert {finding.code for finding in report.diagnosis} == {"unexplained-change"}


def test_averages_of_factors_are_told_as_that(tmp_path: Path) -> None:
    weights, _ = inputs(tmp_path, torch.float32, 2)
    pairs = [load_file(tmp_path / f"style{i}" / "adapter_model.safetensors") for i in range(2)]
    merged = {}
    for name in MODULES:
        a, b = (
            sum(0.5 * each[f"base_model.model.{name}.lora_{part}.weight"].double() for each in pairs) for part in "AB"
        )
        merged[f"{name}.weight"] = weights[f"{name}.weight"].double() + SCALE * (torch.as_tensor(b) @ a)
    factories.checkpoint_folder(
        tmp_path / "merged", weights={n: merged.get(n, w).to(w.dtype) for n, w in weights.items()}
    )

    report = loratools.verify(
        tmp_path / "merged", tmp_path / "base", [(tmp_path / "style0", 0.5), (tmp_path / "style1", 0.5)]
    )

    assert [(finding.code, len(finding.names)) for finding in report.diagnosis] == [("factors-added", 16)]
    assert "(each times its weight)" in report.diagnosis[0].message


def test_sum_beyond_float16_is_told_with_the_largest_number_even_where_it_was_computed_rightly(tmp_path: Path) -> None:
    weights, (deltas,) = inputs(tmp_path, torch.float16)
    name = next(iter(MODULES))
    # Above 65504, the largest number of float16, with the delta; without it just below.
    row, column = map(int, (deltas[name] == deltas[name].max()).nonzero()[0])
    big = {n: w.clone() for n, w in weights.items()}
    big[f"{name}.weight"][row, column] = 65504.0
    factories.checkpoint_folder(tmp_path / "base", weights=big, shards=2)
    factor = 32 / float(deltas[name][row, column])
    merged = {f"{n}.weight": (big[f"{n}.weight"].double() + factor * deltas[n]).half() for n in MODULES}
    factories.checkpoint_folder(tmp_path / "merged", weights={**big, **merged}, shards=2)
    assert int(merged[f"{name}.weight"].isinf().sum()) == 1

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", [(tmp_path / "style0", factor)])

    assert report.verdict == "different"
    assert [(finding.code, finding.message, finding.names) for finding in report.diagnosis] == [
        ("not-finite", "1 value is NaN or infinite; the largest number of F16 is 65504", (f"{name}.weight",))
    ]


def test_values_that_are_no_numbers_are_told_as_such(tmp_path: Path) -> None:
    def broken(name: str, weight: Tensor, deltas: Deltas) -> Tensor:
        merged = weight + deltas[name]
        merged[3, 4] = math.nan
        return merged

    findings = told(tmp_path, torch.bfloat16, broken)

    assert [(code, count) for code, _, count in findings] == [("not-finite", 16)]
    assert findings[0][1].startswith("1 value is NaN or infinite")


def test_untouched_weight_that_overflowed_when_it_was_cast_is_different(tmp_path: Path) -> None:
    weights, (deltas,) = inputs(tmp_path, torch.float32)
    weights["model.norm.weight"][2] = 70000.0
    factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=2)
    merged = {f"{name}.weight": weights[f"{name}.weight"].double() + deltas[name] for name in MODULES}
    stored = {name: merged.get(name, weight).half() for name, weight in weights.items()}
    factories.checkpoint_folder(tmp_path / "merged", weights=stored, shards=2)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style0")

    assert (report.verdict, report.different) == ("different", ("model.norm.weight",))
