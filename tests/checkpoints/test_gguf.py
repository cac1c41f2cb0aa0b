"""GGUF files as models, as every verb reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
import torch

import loratools
from loratools.checkpoints import open_checkpoint
from loratools.errors import FormatError, UnsupportedError

gguf = peers.load("gguf")
pytestmark = peers.needs("gguf")

SHAPES = {"blk.0.attn_q.weight": (64, 32), "blk.0.ffn_down.weight": (32, 96), "blk.0.ffn_up.weight": (96, 32)}


def write(path: Path, kind: str = "Q8_0", *, seed: int = 0, extra: dict[str, np.ndarray] | None = None) -> Path:
    """A Llama of one layer: matrices in one block type, the norm in float32."""
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(32)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, shape in {"token_embd.weight": (50, 32), **SHAPES}.items():
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_have_the_shapes_of_the_model_and_the_values_of_the_package(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "Q4_0")

    checkpoint = open_checkpoint(path)

    theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    assert checkpoint.weights.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.array_equal(checkpoint.weights[name].read().numpy(), values)
    assert checkpoint.tied == {"output.weight": "token_embd.weight"}
    assert checkpoint.config["num_attention_heads"] == 4


def test_inspect_says_which_types_and_how_many(tmp_path: Path) -> None:
    (entry,) = loratools.inspect(write(tmp_path / "model.gguf", "Q5_1")).to_dict()["sources"]

    assert entry["layout"] == "gguf"
    assert entry["parameters"] == 50 * 32 + 64 * 32 + 2 * 32 * 96 + 32
    (group,) = entry["quantised"]
    assert (group["scheme"], group["format"], group["bits"], group["group"]) == ("gguf", "Q5_1", 6.0, 32)
    assert set(group["weights"]) == {"token_embd.weight", *SHAPES}


def test_difference_of_two_files_is_extracted_and_has_a_spectrum(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", seed=1)
    before, after = open_checkpoint(base).weights, open_checkpoint(tuned).weights
    name = "blk.0.ffn_up.weight"
    delta = after[name].read().double() - before[name].read().double()

    report = loratools.spectrum(tuned, base=base)

    (module,) = [m for m in report.modules if m.name == "blk.0.ffn_up"]
    assert module.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_names_of_a_base_are_those_of_transformers_where_they_are_known(tmp_path: Path) -> None:
    from loratools.formats.common.opened_base import open_base

    base = open_base(write(tmp_path / "model.gguf"))

    assert base.shapes["model.layers.0.self_attn.q_proj.weight"] == (64, 32)
    assert base.shapes["model.layers.0.mlp.down_proj.weight"] == (32, 96)
    assert base.config["model_type"] == "llama"


def test_a_part_of_a_model_is_refused_with_the_way_to_join_it(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00003.gguf")

    with pytest.raises(UnsupportedError, match="one of 3 parts") as caught:
        open_checkpoint(path)

    assert "llama-gguf-split" in str(caught.value.hint)


def test_a_file_that_ends_early_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-4096])

    with pytest.raises(FormatError, match="cut off"):
        open_checkpoint(path)


def test_an_adapter_in_gguf_is_no_model(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.weight.lora_a": np.ones((4, 32), np.float32)}

    with pytest.raises(UnsupportedError, match="is an adapter"):
        open_checkpoint(write(tmp_path / "model.gguf", extra=extra))


def test_values_are_read_by_torch_and_by_numpy_alike(tmp_path: Path) -> None:
    from loratools.storage.arrays import read_array

    weight = open_checkpoint(write(tmp_path / "model.gguf", "Q4_1")).weights["blk.0.ffn_down.weight"]

    assert torch.equal(torch.from_numpy(read_array(weight, "F64", 5, 9)), weight.read_rows(5, 9).double())


def test_values_that_are_not_finite_are_counted_in_packed_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "Q8_0")
    place = open_checkpoint(path).stored["blk.0.ffn_up.weight"].location
    assert place is not None
    data = bytearray(path.read_bytes())
    data[place.offset : place.offset + 2] = np.float16(np.inf).tobytes()
    data[place.offset + 2 : place.offset + 34] = bytes([1] * 32)
    path.write_bytes(data)

    (entry,) = loratools.inspect(path, values=True).to_dict()["sources"]

    found = {tensor["name"]: tensor["non_finite"] for tensor in entry["tensors"]}
    assert found == dict.fromkeys(found, 0) | {"blk.0.ffn_up.weight": 32}
