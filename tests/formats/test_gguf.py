"""GGUF adapters, read by the gguf package and computed with as llama.cpp does: names, order of rows, alpha / rank."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import numpy as np
import peers
import pytest
import torch
from safetensors.torch import load_file

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import FormatError, MismatchError, UnsupportedError, UsageError
from loratools.formats import Base
from loratools.ops.convert.verb import convert
from loratools.ops.merge.verb import merge
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

gguf = peers.load("gguf")

HEADS, KEY_HEADS, SIZE, HIDDEN = 3, 1, 4, 12
SHAPES = {
    "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    "self_attn.k_proj": (KEY_HEADS * SIZE, HIDDEN),
    "self_attn.v_proj": (KEY_HEADS * SIZE, HIDDEN),
    "mlp.down_proj": (HIDDEN, 20),
}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def config(folder: Path, model_type: str = "llama", **fields: object) -> Path:
    """A base that is nothing but its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **heads, **fields}))
    return folder


def runtime(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds, by the base's tensor: alpha / rank * b @ a, or b @ a where alpha is 0; in float64."""
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    weights = {name.rpartition(".")[0] for name in found}
    assert set(found) == {f"{w}.lora_{part}" for w in weights for part in "ab"}
    made = {}
    for weight in weights:
        a, b = found[f"{weight}.lora_a"], found[f"{weight}.lora_b"]
        made[weight] = (alpha / b.shape[-1] if alpha else 1.0) * (b @ a)
    return made


def as_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's conversion, which the base's own weights went through."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def wanted(adapter: Path, *, permuted: bool) -> dict[str, np.ndarray]:
    """The same from PEFT's files and formula."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    said = json.loads((adapter / "adapter_config.json").read_text())
    made = {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key].double().numpy(), tensors[key.replace("lora_A", "lora_B")].double().numpy()
        alpha = said["alpha_pattern"].get(name, said["lora_alpha"]) if "alpha_pattern" in said else said["lora_alpha"]
        delta = alpha / (a.shape[0] ** 0.5 if said.get("use_rslora") else a.shape[0]) * b @ a
        layer, _, module = name.removeprefix("model.layers.").partition(".")
        if permuted and module in ("self_attn.q_proj", "self_attn.k_proj"):
            delta = as_llama_cpp(delta, HEADS if "q_proj" in module else KEY_HEADS)
        made[f"blk.{layer}.{GGUF_NAMES[module]}.weight"] = delta
    return made


@peers.needs("gguf")
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("case", ["plain", "ranks", "rslora", "alphas"])
def test_llama_cpp_adds_what_peft_adds(case: str, model_type: str, tmp_path: Path) -> None:
    options: dict[str, object] = {"alpha": 5}
    last = "model.layers.1.mlp.down_proj"
    if case == "ranks":
        options["ranks"] = {last: 2}
    elif case == "rslora":
        options |= {"ranks": {last: 2}, "config": {"use_rslora": True}}
    elif case == "alphas":
        options["config"] = {"alpha_pattern": {last: 3}}
    source = factories.adapter_folder(
        tmp_path / "in",
        modules=factories.layered(2, SHAPES),
        **options,  # type: ignore[arg-type]
    )
    base = config(tmp_path / "base", model_type)

    report = convert(source, tmp_path / "out.gguf", format="gguf", base=base)

    found, right = runtime(tmp_path / "out.gguf"), wanted(source, permuted=model_type == "llama")
    assert found.keys() == right.keys()
    for name, delta in right.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-5, atol=1e-6)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 2.0**-22
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.architecture").contents() == model_type
    assert any("folded" in w for w in report.warnings) == (case in ("rslora", "alphas"))


def test_a_plain_adapter_comes_back_without_a_bit_changed(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules=factories.layered(2, SHAPES), dtype=torch.float16)
    base = config(tmp_path / "base")

    convert(source, tmp_path / "out.gguf", format="gguf", base=base)
    report = convert(tmp_path / "out.gguf", tmp_path / "back", format="peft", base=base)
    convert(tmp_path / "back", tmp_path / "again.gguf", format="gguf", base=base)

    assert report.max_relative_error == 0.0
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "back"))
    assert {k: t.tolist() for k, t in before.items()} == {k: t.tolist() for k, t in after.items()}
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert formats.load(tmp_path / "back").base_model == "tiny/base"


@peers.needs("gguf")
def test_experts_are_stacked_with_zeros_for_those_left_alone(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in (0, 2)]
    source = factories.adapter_folder(
        tmp_path / "in", modules=dict.fromkeys(names, (10, 6)), ranks={names[1]: 2}, alpha=3
    )
    base = config(tmp_path / "base", "qwen3_moe", num_experts=4)

    convert(source, tmp_path / "out.gguf", format="gguf", base=base)

    (delta,) = runtime(tmp_path / "out.gguf").values()
    assert delta.shape == (4, 10, 6)
    adapter = formats.load(source)
    for e, name in ((0, names[0]), (2, names[1])):
        factors = adapter.updates[name].factors()
        assert factors is not None
        np.testing.assert_allclose(delta[e], (factors.b @ factors.a).numpy(), rtol=1e-5, atol=1e-6)
    assert not delta[[1, 3]].any()


@peers.needs("gguf")
def test_the_embedding_is_looked_up_in_a_transposed(tmp_path: Path) -> None:
    a, b = torch.randn(4, 13), torch.randn(12, 4)
    update = LoRA(from_torch(a), from_torch(b), 6.0, "config", embedding=True)

    report = convert(
        Adapter({"model.embed_tokens": update}), tmp_path / "out.gguf", format="gguf", base=config(tmp_path / "base")
    )

    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    # llama.cpp takes a token's row of lora_a and multiplies it with lora_b.
    delta = 6.0 / 4 * found["token_embd.weight.lora_a"] @ found["token_embd.weight.lora_b"].T
    np.testing.assert_allclose(delta, 1.5 * (b @ a).T.numpy(), rtol=1e-5, atol=1e-5)
    assert report.max_relative_error == 0.0
    (back,) = formats.load(tmp_path / "out.gguf").updates.values()
    assert (back.shape, back.rank) == ((13, 12), 4)


def test_a_merge_knows_the_heads_of_its_base(tmp_path: Path) -> None:
    weights = factories.base_weights(factories.layered(2, SHAPES))
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=heads)
    source = factories.adapter_folder(tmp_path / "in", modules=factories.layered(2, SHAPES))
    convert(source, tmp_path / "in.gguf", format="gguf", base=base)

    merge(base, [source], tmp_path / "one")
    merge(base, [tmp_path / "in.gguf"], tmp_path / "two")

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in weights)
    assert not torch.equal(
        one["model.layers.1.self_attn.q_proj.weight"], weights["model.layers.1.self_attn.q_proj.weight"]
    )


def test_a_magnitude_has_no_place(tmp_path: Path) -> None:
    dora = LoRA(
        from_torch(torch.ones(4, 6)), from_torch(torch.ones(10, 4)), 6.0, "config", magnitude=from_torch(torch.ones(10))
    )
    adapter = Adapter({"model.layers.0.mlp.up_proj": dora})

    with pytest.raises(UnsupportedError, match="1 part of") as raised:
        convert(adapter, tmp_path / "out.gguf", format="gguf", base=config(tmp_path / "base"))

    assert "no magnitude (DoRA)" in raised.value.details[0]


def test_rows_are_uncertain_without_the_heads_of_the_base(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules=factories.layered(2, SHAPES))
    base = config(tmp_path / "base")
    convert(source, tmp_path / "out.gguf", format="gguf", base=base)

    adapter = formats.load(tmp_path / "out.gguf")

    assert set(adapter.updates) == set(factories.layered(2, SHAPES))
    assert "4 modules, such as 'model.layers.0.self_attn.k_proj'" in adapter.uncertainties[0]
    with pytest.raises(UnsupportedError) as raised:
        convert(tmp_path / "out.gguf", tmp_path / "back", format="peft")
    assert "--base BASE" in str(raised.value.hint)
    # Where no rows are interleaved nothing is uncertain.
    convert(source, tmp_path / "qwen.gguf", format="gguf", base=config(tmp_path / "qwen", "qwen2"))
    assert formats.load(tmp_path / "qwen.gguf").uncertainties == ()


@peers.needs("gguf")
def test_what_gguf_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    source = factories.adapter_folder(
        tmp_path / "in",
        modules={"model.layers.0.self_attn.v_proj": (4, 12), "lm_head": (13, 12), "model.other": (5, 6)},
        extra={"model.norm.weight": torch.ones(12)},
    )

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out.gguf", format="gguf", base=config(tmp_path / "base", tie_word_embeddings=True))

    assert [line.partition(":")[0] for line in raised.value.details] == ["lm_head", "model.norm.weight", "model.other"]
    report = convert(
        source,
        tmp_path / "out.gguf",
        format="gguf",
        allow_partial=True,
        base=config(tmp_path / "base", tie_word_embeddings=False),
    )
    assert [d.name for d in report.dropped if d.what != "metadata"] == ["model.norm.weight", "model.other"]
    assert set(runtime(tmp_path / "out.gguf")) == {"blk.0.attn_v.weight", "output.weight"}


def test_a_base_is_needed_and_must_be_the_right_one(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules=factories.layered(1, SHAPES))
    with pytest.raises(UsageError, match="gguf needs the config of the base"):
        convert(source, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(UnsupportedError, match="model_type 'mamba'"):
        convert(source, tmp_path / "out.gguf", format="gguf", base=config(tmp_path / "mamba", "mamba"))
    with pytest.raises(MismatchError, match="12 rows cannot be 7 heads"):
        convert(source, tmp_path / "out.gguf", format="gguf", base=config(tmp_path / "seven", num_attention_heads=7))
    with pytest.raises(UsageError, match=r"gguf writes one file, '\*\.gguf'"):
        convert(source, tmp_path / "out", format="gguf", base=config(tmp_path / "base"))
    convert(source, tmp_path / "out.gguf", format="gguf", base=tmp_path / "base")
    with pytest.raises(MismatchError, match=r"is for llama, and .* is qwen2"):
        formats.load(tmp_path / "out.gguf", base=Base({}, {"model_type": "qwen2"}, tmp_path / "base"))


def foreign(path: Path, tensors: dict[str, np.ndarray], *, alpha: float | None = 8.0, **fields: str) -> Path:
    """A GGUF adapter as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, fields.get("arch", "qwen2"))
    writer.add_type("adapter")
    writer.add_string("adapter.type", fields.get("type", "lora"))
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@peers.needs("gguf")
@pytest.mark.parametrize(
    ("alpha", "scale", "source"), [(8.0, 2.0, "metadata"), (0.0, 1.0, "metadata"), (None, 1.0, "assumed")]
)
def test_alpha_0_means_a_scale_of_1(alpha: float | None, scale: float, source: str, tmp_path: Path) -> None:
    pair = {"blk.1.ffn_up.weight.lora_a": np.ones((4, 6), np.float32)}
    pair["blk.1.ffn_up.weight.lora_b"] = np.ones((10, 4), np.float32)

    (update,) = formats.load(foreign(tmp_path / "x.gguf", pair, alpha=alpha)).updates.values()

    assert (update.scale, update.alpha_source, update.shape) == (scale, source, (10, 6))


@peers.needs("gguf")
def test_faults_of_a_file_are_named(tmp_path: Path) -> None:
    a, b = np.ones((4, 6), np.float32), np.ones((10, 4), np.float32)
    with pytest.raises(FormatError) as raised:
        formats.load(foreign(tmp_path / "1.gguf", {"blk.1.ffn_up.weight.lora_a": a}))
    assert raised.value.details == ("'blk.1.ffn_up' has lora_a alone",)
    with pytest.raises(FormatError):
        formats.load(foreign(tmp_path / "2.gguf", {"blk.1.ffn_up.weight.lora_a": b, "blk.1.ffn_up.weight.lora_b": a}))
    with pytest.raises(UnsupportedError, match="1 tensor that are not read"):
        formats.load(foreign(tmp_path / "3.gguf", {"blk.1.attn_norm.weight": a}))
    with pytest.raises(UnsupportedError, match=r"'blk\.1\.strange', no module of qwen2"):
        formats.load(foreign(tmp_path / "4.gguf", {"blk.1.strange.weight.lora_a": a, "blk.1.strange.weight.lora_b": b}))
    with pytest.raises(UnsupportedError, match="architecture 'mamba'"):
        formats.load(foreign(tmp_path / "5.gguf", {"blk.1.x.weight.lora_a": a}, arch="mamba"))
    with pytest.raises(UnsupportedError, match="type 'control'"):
        formats.load(foreign(tmp_path / "6.gguf", {"blk.1.x.weight.lora_a": a}, type="control"))


@peers.needs("gguf")
def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.add_tensor("token_embd.weight", np.ones((4, 6), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert formats.detect(tmp_path / "model.gguf") == []


@pytest.mark.parametrize(
    ("model_type", "module", "written"),
    [
        ("qwen2_5_vl", "model.language_model.layers.1.self_attn.q_proj", "blk.1.attn_q"),
        ("gemma3", "model.language_model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("gpt_oss", "model.layers.1.mlp.router", "blk.1.ffn_gate_inp"),
        ("llama4", "language_model.model.layers.1.feed_forward.shared_expert.up_proj", "blk.1.ffn_up_shexp"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_a_proj_with_mqa", "blk.1.attn_kv_a_mqa"),
        ("lfm2", "model.layers.1.conv.out_proj", "blk.1.shortconv.out_proj"),
        ("glm4", "model.layers.1.mlp.gate_up_proj", "blk.1.ffn_up"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k", "dec.blk.1.cross_attn_k"),
        ("falcon", "transformer.h.1.mlp.dense_h_to_4h", "blk.1.ffn_up"),
        ("qwen3_next", "model.layers.1.mlp.shared_expert.gate_proj", "blk.1.ffn_gate_shexp"),
    ],
)
@peers.needs("gguf")
def test_renamed_architectures_add_the_same_product_and_come_back(
    model_type: str, module: str, written: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, HIDDEN, generator=generator), torch.randn(20, 3, generator=generator)
    adapter = Adapter({module: LoRA(from_torch(a), from_torch(b), 6.0, "config")})
    base = formats.Base({}, {"model_type": model_type})

    convert(adapter, tmp_path / "out.gguf", format="gguf", base=base)

    found = runtime(tmp_path / "out.gguf")
    assert list(found) == [f"{written}.weight"]
    np.testing.assert_allclose(found[f"{written}.weight"], 2.0 * (b.double() @ a.double()).numpy(), rtol=1e-6)
    assert list(formats.load(tmp_path / "out.gguf", base=base)) == [module]


@peers.needs("gguf")
def test_architectures_that_cannot_be_proven_are_refused_by_name(tmp_path: Path) -> None:
    adapter = Adapter(
        {"model.layers.0.self_attn.q_proj": LoRA(*map(from_torch, (torch.ones(2, 6), torch.ones(8, 2))), 2.0, "config")}
    )

    with pytest.raises(UnsupportedError, match=r"'nemotron_h': llama.cpp names its layers by a pattern of the config"):
        convert(adapter, tmp_path / "out.gguf", format="gguf", base=formats.Base({}, {"model_type": "nemotron_h"}))
