"""Merging into a GGUF file gives a GGUF file: names, orders and types of llama.cpp, and everything else as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import numpy as np
import peers
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs
from loratools.errors import MismatchError, UnsupportedError, UsageError

gguf = peers.load("gguf")
pytestmark = peers.needs("gguf")

WIDTH, INNER, HEADS, KEY_HEADS, WORDS = 64, 96, 4, 2, 50
SHAPES = {
    "token_embd.weight": (WORDS, WIDTH),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (32, WIDTH),
    "blk.0.ffn_up.weight": (INNER, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, INNER),
    "output.weight": (WORDS, WIDTH),
}
LAYER = "model.layers.0"
Q, K, UP, DOWN = (f"{LAYER}.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"))
MODULES = {Q: (WIDTH, WIDTH), K: (32, WIDTH), UP: (INNER, WIDTH)}


def write(
    path: Path,
    kinds: dict[str, str] | str = "F32",
    *,
    architecture: str = "llama",
    shapes: Any = None,
) -> Path:
    """A model of one layer, with keys of many types; matrices in the types by name, or all in one."""
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_embedding_length(WIDTH)
    writer.add_file_type(0)
    writer.add_token_list([f"tök{i}".encode() for i in range(WORDS)])
    writer.add_token_scores([float(i) / 7 for i in range(WORDS)])
    writer.add_array("loose.flags", [True, False, True])
    writer.add_float64("loose.number", 0.1)
    writer.add_string("general.description", "a base, of no use")
    for name, shape in (shapes or SHAPES).items():
        values = generator.standard_normal(shape).astype(np.float32)
        kind = kinds if isinstance(kinds, str) else kinds.get(name, "F32")
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            wanted = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fields(path: Path) -> dict[str, Any]:
    skipped = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    read = gguf.GGUFReader(path).fields
    return {name: (field.types, field.contents()) for name, field in read.items() if name not in skipped}


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def values(path: Path, name: str) -> np.ndarray:
    tensor = tensors(path)[name]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def adapter(folder: Path, modules: dict[str, tuple[int, int]] = MODULES, *, size: float = 0.3) -> tuple[Path, Any]:
    """An adapter of rank 4 and alpha 8, and the delta of each module in float64."""
    pairs = factories.factors(modules, seed=9)
    pairs = {name: (a * size, b * size) for name, (a, b) in pairs.items()}
    path = factories.adapter_folder(folder, modules=modules, values=pairs)
    return path, {name: 2.0 * (b.double() @ a.double()).numpy() for name, (a, b) in pairs.items()}


def as_llama_cpp(delta: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads as llama.cpp's conversion puts them: `permute` of convert_hf_to_gguf.py, by its formula."""
    rows, columns = delta.shape
    return delta.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_floats_are_base_plus_delta_in_the_order_of_llama_cpp_and_all_keys_are_kept(tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf"), tmp_path / "merged.gguf"
    path, delta = adapter(tmp_path / "a")

    report = loratools.merge(base, [(path, 0.5)], out)

    assert report.output == out
    assert report.merged_weights == 3
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1
    expected = {
        "blk.0.attn_q.weight": as_llama_cpp(delta[Q], HEADS),
        "blk.0.attn_k.weight": as_llama_cpp(delta[K], KEY_HEADS),
        "blk.0.ffn_up.weight": delta[UP],
    }
    for name in SHAPES:
        wanted = values(base, name) + 0.5 * expected.get(name, 0)
        np.testing.assert_allclose(values(out, name), wanted, rtol=1e-6, atol=1e-6)
    assert [t.name for t in gguf.GGUFReader(out).tensors] == list(SHAPES)
    before, after = fields(base), fields(out)
    assert {name: after[name] for name in before} == before
    assert list(after) == [*before, "loratools.version", "loratools.merge"]
    record = json.loads(after["loratools.merge"][1])
    assert record["adapters"][0]["weight"] == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base.gguf", "merged.gguf"]


def test_the_same_merge_gives_the_same_bytes_and_is_replaced_and_merged_again(tmp_path: Path) -> None:
    base, out = write(tmp_path / "base.gguf", "Q8_0"), tmp_path / "merged.gguf"
    path, _ = adapter(tmp_path / "a")
    loratools.merge(base, path, out, requantize=True)
    first = out.read_bytes()

    loratools.merge(base, path, out, requantize=True, overwrite=True, threads=2)
    loratools.merge(out, path, tmp_path / "twice.gguf", requantize=True)

    assert out.read_bytes() == first
    assert list(fields(tmp_path / "twice.gguf")) == list(fields(out))


def test_quantised_weights_that_change_need_an_option(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", "Q4_0")
    path, _ = adapter(tmp_path / "a")

    with pytest.raises(UnsupportedError, match="3 weights that the adapters change are quantised") as caught:
        loratools.merge(base, path, tmp_path / "merged.gguf")

    assert "--requantize" in str(caught.value.hint)
    assert "--dequantize" in str(caught.value.hint)
    assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize(("dtype", "kind", "error"), [(None, "F16", 2**-11), ("bfloat16", "BF16", 2**-8)])
def test_dequantize_writes_changed_weights_as_floats_and_copies_the_others(
    tmp_path: Path, dtype: str | None, kind: str, error: float
) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_1"), tmp_path / "merged.gguf"
    path, delta = adapter(tmp_path / "a", {UP: (INNER, WIDTH)})

    report = loratools.merge(base, path, out, dequantize=True, dtype=dtype)

    before, after = tensors(base), tensors(out)
    changed = "blk.0.ffn_up.weight"
    assert report.dequantized == (changed,)
    assert after[changed].tensor_type.name == kind
    np.testing.assert_allclose(values(out, changed), values(base, changed) + delta[UP], rtol=error, atol=1e-6)
    for name in SHAPES.keys() - {changed}:
        assert after[name].tensor_type == before[name].tensor_type
        assert np.array_equal(after[name].data, before[name].data)
    assert fields(out)["general.file_type"] == fields(base)["general.file_type"]


def test_file_type_changes_with_the_type_of_most_values(tmp_path: Path) -> None:
    modules = {UP: (INNER, WIDTH), DOWN: (WIDTH, INNER), Q: (WIDTH, WIDTH)}
    base = write(tmp_path / "base.gguf", "Q5_0")
    path, _ = adapter(tmp_path / "a", modules)

    loratools.merge(base, path, tmp_path / "merged.gguf", dequantize=True)

    assert fields(tmp_path / "merged.gguf")["general.file_type"][1] == gguf.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_requantize_keeps_type_and_scales_and_comes_closer_to_the_sum(tmp_path: Path, kind: str) -> None:
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "merged.gguf"
    path, delta = adapter(tmp_path / "a", {UP: (INNER, WIDTH)})

    report = loratools.merge(base, path, out, requantize=True)

    before, after = tensors(base), tensors(out)
    for name in SHAPES:
        assert after[name].tensor_type == before[name].tensor_type
        assert np.array_equal(after[name].data, before[name].data) == (name != "blk.0.ffn_up.weight")
    moved = values(out, "blk.0.ffn_up.weight") - values(base, "blk.0.ffn_up.weight")
    assert np.linalg.norm(moved - delta[UP]) < np.linalg.norm(delta[UP])
    (told,) = report.requantized
    assert told.scheme == f"gguf: {kind}"
    assert told.gain == pytest.approx((moved * delta[UP]).sum() / np.square(delta[UP]).sum(), abs=1e-5)
    assert fields(out)["general.file_type"] == fields(base)["general.file_type"]


@pytest.mark.parametrize("mode", ["nearest", "stochastic", "adapter"])
def test_an_update_of_zero_changes_no_byte_of_a_quantised_weight(tmp_path: Path, mode: Any) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    zeros = {UP: (torch.randn(4, WIDTH), torch.zeros(INNER, 4))}
    path = factories.adapter_folder(tmp_path / "a", modules={UP: (INNER, WIDTH)}, values=zeros)

    loratools.merge(base, path, out, requantize=True, rounding=mode)

    assert all(np.array_equal(t.data, tensors(base)[name].data) for name, t in tensors(out).items())


@pytest.mark.parametrize("to", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_requantize_to_a_type_gives_the_blocks_of_the_package_for_the_sum(tmp_path: Path, to: Any) -> None:
    base, out = write(tmp_path / "base.gguf", {"blk.0.ffn_up.weight": "MXFP4"}), tmp_path / "merged.gguf"
    identity = {UP: (torch.eye(4, WIDTH), torch.randn(INNER, 4, generator=torch.Generator().manual_seed(2)))}
    path = factories.adapter_folder(tmp_path / "a", modules={UP: (INNER, WIDTH)}, values=identity)

    report = loratools.merge(base, path, out, requantize=to)

    # A is a part of the identity, so that the float32 sum is the same in any order of additions.
    a, b = (factor.double().numpy() for factor in identity[UP])
    total = (values(base, "blk.0.ffn_up.weight") + 2 * b @ a).astype(np.float32)
    wanted = gguf.quants.quantize(total, gguf.GGMLQuantizationType[to.upper()])
    merged = tensors(out)["blk.0.ffn_up.weight"]
    assert merged.tensor_type.name == to.upper()
    assert np.array_equal(merged.data, wanted)
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1


def test_types_of_code_books_are_refused_with_the_type_that_would_do(tmp_path: Path) -> None:
    shapes = {**SHAPES, "blk.0.ffn_up.weight": (INNER, 256)}
    base = write(tmp_path / "base.gguf", {"blk.0.ffn_up.weight": "TQ2_0"}, shapes=shapes)
    path, _ = adapter(tmp_path / "a", {UP: (INNER, 256)})

    with pytest.raises(UnsupportedError, match="cannot be quantised again") as caught:
        loratools.merge(base, path, tmp_path / "merged.gguf", requantize=True)

    assert "blk.0.ffn_up.weight   gguf: TQ2_0" in str(caught.value.details)
    assert "--requantize q8_0" in str(caught.value.hint)
    loratools.merge(base, path, tmp_path / "merged.gguf", requantize="q8_0")
    assert tensors(tmp_path / "merged.gguf")["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_dtype_is_for_matrices_and_vectors_stay_float32(tmp_path: Path) -> None:
    path, _ = adapter(tmp_path / "a")

    loratools.merge(write(tmp_path / "base.gguf"), path, tmp_path / "merged.gguf", dtype="float16")

    kinds = {name: t.tensor_type.name for name, t in tensors(tmp_path / "merged.gguf").items()}
    assert kinds == {name: "F16" if len(shape) > 1 else "F32" for name, shape in SHAPES.items()}
    assert fields(tmp_path / "merged.gguf")["general.file_type"][1] == gguf.LlamaFileType.MOSTLY_F16


def test_experts_are_parts_of_stacked_tensors(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {"token_embd.weight": (WORDS, WIDTH)}
    shapes |= {f"blk.0.ffn_{n}_exps.weight": (3, INNER, WIDTH) for n in ("gate", "up")}
    base = write(tmp_path / "base.gguf", architecture="qwen3moe", shapes=shapes)
    name = f"{LAYER}.mlp.experts.1.up_proj"
    path, delta = adapter(tmp_path / "a", {name: (INNER, WIDTH)})

    loratools.merge(base, path, tmp_path / "merged.gguf")

    wanted = values(base, "blk.0.ffn_up_exps.weight")
    wanted[1] += delta[name]
    np.testing.assert_allclose(values(tmp_path / "merged.gguf", "blk.0.ffn_up_exps.weight"), wanted, atol=1e-6)


def test_queries_keys_and_values_of_falcon_are_ungrouped(tmp_path: Path) -> None:
    each = WIDTH // HEADS
    rows = (HEADS + 2 * KEY_HEADS) * each
    shapes = {"token_embd.weight": (WORDS, WIDTH), "blk.0.attn_qkv.weight": (rows, WIDTH)}
    base = write(tmp_path / "base.gguf", architecture="falcon", shapes=shapes)
    name = "transformer.h.0.self_attention.query_key_value"
    path, delta = adapter(tmp_path / "a", {name: (rows, WIDTH)})

    loratools.merge(base, path, tmp_path / "merged.gguf")

    # As llama.cpp's conversion does it: groups of queries, a key and a value.
    groups = delta[name].reshape(KEY_HEADS, HEADS // KEY_HEADS + 2, each, WIDTH)
    wanted = np.concatenate([groups[:, :-2].reshape(-1, WIDTH), groups[:, -2].reshape(-1, WIDTH),
                             groups[:, -1].reshape(-1, WIDTH)])  # fmt: skip
    stored = "blk.0.attn_qkv.weight"
    np.testing.assert_allclose(values(tmp_path / "merged.gguf", stored), values(base, stored) + wanted, atol=1e-6)


def test_a_name_of_another_kind_of_file_is_refused_both_ways(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf")
    path, _ = adapter(tmp_path / "a")
    with pytest.raises(UsageError, match="gives a GGUF file") as caught:
        loratools.merge(base, path, tmp_path / "merged.safetensors")
    assert caught.value.hint == "name it merged.gguf"

    folder = factories.checkpoint_folder(tmp_path / "hf")
    with pytest.raises(UsageError, match="another file") as caught:
        loratools.merge(folder, path, tmp_path / "merged.gguf")
    assert "convert_hf_to_gguf.py" in str(caught.value.hint)


def test_what_the_header_has_no_room_for_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf")
    path = factories.adapter_folder(
        tmp_path / "a", modules={UP: (INNER, WIDTH)},
        extra={"base_model.model.model.embed_tokens.weight": torch.ones(WORDS + 2, WIDTH),
               "base_model.model.lm_head.weight": torch.ones(WORDS + 2, WIDTH)},
    )  # fmt: skip
    with pytest.raises((UnsupportedError, MismatchError)) as caught:
        loratools.merge(base, path, tmp_path / "merged.gguf")
    assert caught.value.exit_code == 4

    fine, _ = adapter(tmp_path / "b")
    with pytest.raises(UsageError, match="float64"):
        loratools.merge(base, fine, tmp_path / "merged.gguf", dtype="float64")
    with pytest.raises(UsageError, match="--max-shard-size"):
        loratools.merge(base, fine, tmp_path / "merged.gguf", max_shard_size="1MB")
    save_file({f"{UP}.weight": torch.ones(INNER, WIDTH)}, tmp_path / "one.safetensors")
    with pytest.raises(UsageError, match="no GGUF file"):
        loratools.merge(tmp_path / "one.safetensors", fine, tmp_path / "x.safetensors", requantize="q8_0")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--requantize", "BASE", "ADAPTER", "-o", "OUT"], "Q4_0"),
        (["BASE", "ADAPTER", "-o", "OUT", "--requantize"], "Q4_0"),
        (["BASE", "--requantize", "Q8_0", "ADAPTER", "-o", "OUT"], "Q8_0"),
        (["BASE", "ADAPTER", "--requantize=q5_1", "-o", "OUT"], "Q5_1"),
    ],
)
def test_type_after_requantize_is_optional_on_the_command_line(tmp_path: Path, arguments: list[str], kind: str) -> None:
    base, out = write(tmp_path / "base.gguf", "Q4_0"), tmp_path / "merged.gguf"
    path, _ = adapter(tmp_path / "a")
    names = {"BASE": str(base), "ADAPTER": str(path), "OUT": str(out)}

    result = CliRunner().invoke(verbs, ["merge", *(names.get(argument, argument) for argument in arguments)])

    assert result.exit_code == 0, result.output
    assert tensors(out)["blk.0.ffn_up.weight"].tensor_type.name == kind


@pytest.mark.parametrize(
    ("kind", "options"),
    [("F32", {}), ("Q4_0", {"dequantize": True, "dtype": "float32"}), ("Q8_0", {"requantize": True})],
)
def test_verify_accounts_for_a_merged_file(tmp_path: Path, kind: str, options: Any) -> None:
    base, out = write(tmp_path / "base.gguf", kind), tmp_path / "merged.gguf"
    path, _ = adapter(tmp_path / "a")
    other, _ = adapter(tmp_path / "b", size=0.2)
    loratools.merge(base, path, out, **options)

    report = loratools.verify(out, base, path)
    assert report.verdict == "same"
    assert not any("changes nothing" in warning for warning in report.warnings)
    assert loratools.verify(out, base, other).verdict != "same"


def test_moments_are_found_by_the_names_of_the_model_in_memory(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", {"blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_up.weight": "Q4_0"})
    modules = {Q: MODULES[Q], UP: MODULES[UP]}
    adapter = factories.adapter_folder(tmp_path / "adapter", modules=modules, rank=3, alpha=0.1)
    generator = torch.Generator().manual_seed(5)
    inputs = {
        name: torch.randn(200, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator) for name in modules
    }
    in_llama_cpp = {Q: "blk.0.attn_q", UP: "blk.0.ffn_up"}
    for file, named in (
        ("memory", {n: n for n in modules}),
        ("stored", in_llama_cpp),
        ("other", {Q: "a.b", UP: "c.d"}),
    ):
        save_file({named[n]: x.T @ x for n, x in inputs.items()}, tmp_path / f"{file}.safetensors")

    def merged(file: str) -> tuple[dict[str, Any], list[str]]:
        options: dict[str, Any] = {"rounding": "calibrated", "moments": tmp_path / f"{file}.safetensors"}
        report = loratools.merge(base, adapter, tmp_path / f"{file}.gguf", requantize=True, **options)
        stored = {name: np.array(tensor.data) for name, tensor in tensors(tmp_path / f"{file}.gguf").items()}
        return stored, [w for w in report.warnings if "has nothing for" in w]

    (one, no_warnings), (other, _), (without, warned) = merged("memory"), merged("stored"), merged("other")

    assert no_warnings == []
    assert len(warned) == 1
    changed = [n for n in one if not np.array_equal(one[n], without[n])]
    assert set(changed) == {"blk.0.attn_q.weight", "blk.0.ffn_up.weight"}
    assert all(np.array_equal(one[n], other[n]) for n in one)
