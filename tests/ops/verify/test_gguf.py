"""GGUF files that loratools merged: what went into them, and that what is untouched is not taken for changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import numpy as np
import peers
import pytest

import loratools

gguf = peers.load("gguf")
pytestmark = peers.needs("gguf")

Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
MODULES = {Q: (64, 64), K: (32, 64), DOWN: (64, 96)}
SHAPES = {
    "token_embd.weight": (50, 64), "blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64),
    "blk.0.ffn_down.weight": (64, 96), "blk.0.ffn_up.weight": (96, 64),
}  # fmt: skip


def write(path: Path, kind: str) -> Path:
    """A Llama of one layer with its matrices in one ggml type."""
    generator = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(64)
    ggml_type = gguf.GGMLQuantizationType[kind]
    for name, shape in SHAPES.items():
        values = (generator.standard_normal(shape) * 0.05).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("F32", {}), ("F16", {}), ("BF16", {}), ("F32", {"dtype": "bfloat16"}), ("Q8_0", {"requantize": True}),
        ("Q4_0", {"requantize": True}), ("Q5_1", {"dequantize": True}),
    ],
)  # fmt: skip
def test_a_merged_file_holds_its_adapter_and_no_other(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "merged.gguf"
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1)
    other = factories.adapter_folder(tmp_path / "b", modules=MODULES, seed=2)
    loratools.merge(base, adapter, out, **options)

    right, wrong = loratools.verify(out, base, adapter), loratools.verify(out, base, other)

    assert (right.verdict, wrong.verdict) == ("same", "different")
    document = right.to_dict()
    assert document["unexplained"] == document["untouched"]["different"] == []  # type: ignore[index]


@pytest.mark.parametrize("option", ["requantize", "dequantize"])
def test_an_untouched_tensor_in_blocks_that_was_changed_is_named(option: str, tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1)
    loratools.merge(base, adapter, out, **{option: True})  # type: ignore[arg-type]
    stored = loratools.open_checkpoint(out).stored["blk.0.ffn_up.weight"].location
    assert stored is not None
    data = bytearray(out.read_bytes())
    data[stored.offset + 2] ^= 0x11  # two codes of the first block, after its scale of two bytes
    out.write_bytes(data)

    report = loratools.verify(out, base, adapter)

    assert report.verdict == "different"
    assert report.to_dict()["untouched"]["different"] == ["blk.0.ffn_up.weight"]  # type: ignore[index]


RETYPED = [("Q4_0", "q8_0"), ("Q8_0", "q4_0"), ("Q4_0", "q5_1"), ("Q8_0", "q5_0"), ("Q5_1", "q4_1"), ("Q4_0", "q4_0")]


@pytest.mark.parametrize(("kind", "other_type"), RETYPED)
def test_a_merge_that_was_quantised_to_a_type_is_told_by_doing_it_again(
    kind: str, other_type: Any, tmp_path: Path
) -> None:
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "merged.gguf"
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1)
    other = factories.adapter_folder(tmp_path / "b", modules=MODULES, seed=2)
    loratools.merge(base, adapter, out, requantize=other_type)

    right, wrong = loratools.verify(out, base, adapter), loratools.verify(out, base, other)

    new_type = f" {other_type} with new scales" if kind.lower() != other_type else ""
    assert (right.verdict, right.diagnosis, right.merged_by) == ("same", (), ("loratools",))
    assert f"loratools with --requantize{new_type}" in right.recipes[0][0]
    assert wrong.verdict != "same"


@pytest.mark.parametrize("rounding", ["stochastic", "adapter"])
def test_a_merge_to_a_type_is_told_with_its_rounding(rounding: Any, tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1)
    loratools.merge(base, adapter, out, requantize="q5_0", rounding=rounding)

    report = loratools.verify(out, base, adapter)

    assert report.verdict == "same"
    assert f"--requantize q5_0 --rounding {rounding}" in report.recipes[0][0]


@pytest.mark.parametrize(("weight", "defect"), [(1e-12, "not-applied"), (-1.0, "subtracted"), (2.0, "applied-twice")])
def test_a_defect_of_a_merge_to_a_type_is_told_by_its_name(weight: float, defect: str, tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    # Alpha is the rank: a scale of 2 that was applied twice would be the same.
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1, rank=3, alpha=3)
    loratools.merge(base, [(adapter, weight)], out, requantize="q8_0")

    report = loratools.verify(out, base, adapter)

    assert (report.verdict, [finding.code for finding in report.diagnosis]) == ("different", [defect])


def test_a_value_that_was_changed_after_a_merge_to_a_type_is_not_called_the_same(tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES, seed=1)
    loratools.merge(base, adapter, out, requantize="q8_0")
    stored = loratools.open_checkpoint(out).stored["blk.0.attn_q.weight"].location
    assert stored is not None
    data = bytearray(out.read_bytes())
    data[stored.offset + 5] ^= 0x10
    out.write_bytes(data)

    assert loratools.verify(out, base, adapter).verdict != "same"
