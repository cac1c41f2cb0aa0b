"""Merging with `dequantize`: the result is a model of floats, which its clients load as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import peers
import pytest
import tiny_models
import torch
from cli_runner import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import merge
from loratools.checkpoints import open_checkpoint
from loratools.cli import verbs
from loratools.errors import UnsupportedError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def int8_base(folder: Path, *, config: dict[str, object]) -> dict[str, Tensor]:
    """A base with q_proj (10, 6) and v_proj (7, 6) of layer 0 in bitsandbytes' int8, and the rest in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    weights = factories.base_weights(dtype=torch.bfloat16)
    packed: dict[str, Tensor] = {}
    for module, rows in ((Q, 10), (V, 7)):
        packed[f"{module}.weight"] = torch.randint(-127, 128, (rows, 6), generator=generator, dtype=torch.int8)
        packed[f"{module}.SCB"] = torch.rand(rows, generator=generator) + 0.5
        packed[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    factories.checkpoint_folder(folder, weights=weights | packed, config=config)
    return packed


def config_fields(folder: Path) -> dict[str, object]:
    """What the config says beside the fields that every checkpoint of the factory has."""
    written = json.loads((folder / "config.json").read_text())
    assert isinstance(written, dict)
    return {k: v for k, v in written.items() if k not in ("architectures", "model_type", "tie_word_embeddings")}


def int8_values(packed: dict[str, Tensor], module: str) -> Tensor:
    """W = weight * SCB / 127 by rows, in float64."""
    return packed[f"{module}.weight"].double() * packed[f"{module}.SCB"].double()[:, None] / 127


def test_touched_and_untouched_weights_are_floats_of_the_config_and_no_part_of_them_is_left(tmp_path: Path) -> None:
    config = {"torch_dtype": "float16", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    packed = int8_base(tmp_path / "base", config=config)
    before = load_file(tmp_path / "base" / "model.safetensors")
    factors = factories.factors({Q: (10, 6)})
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)}, rank=4, alpha=8, values=factors)

    report = merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True)

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == {name for name in before if not name.endswith(("SCB", "weight_format"))}
    assert list(after) == [name for name in before if name in after]
    a, b = factors[Q]
    touched = int8_values(packed, Q) + 8 / 4 * b.double() @ a.double()
    for module, exact in ((Q, touched), (V, int8_values(packed, V))):
        stored = after[f"{module}.weight"]
        assert stored.dtype == torch.float16
        # One rounding to 11 bits, and the float32 of what is rounded.
        assert ((stored.double() - exact).abs() <= exact.abs() * 2**-11 * 1.001).all()
    others = after.keys() - {f"{Q}.weight", f"{V}.weight"}
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert config_fields(tmp_path / "out") == {"torch_dtype": "float16"}
    assert set(report.dequantized) == {f"{Q}.weight", f"{V}.weight"}
    assert (report.merged_weights, report.untouched) == (1, len(after) - 1)
    assert report.max_error_ratio is not None
    assert report.max_error_ratio <= 1
    reopened = open_checkpoint(tmp_path / "out")
    assert reopened.quantisation is None


def test_a_dtype_that_is_asked_for_goes_before_that_of_the_config(tmp_path: Path) -> None:
    packed = int8_base(tmp_path / "base", config={"torch_dtype": "float16", "quantization_config": {"x": 1}})
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True, dtype="float32")

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    torch.testing.assert_close(after[f"{V}.weight"].double(), int8_values(packed, V), rtol=2**-22, atol=0)
    assert config_fields(tmp_path / "out") == {"torch_dtype": "float32"}


def test_without_a_dtype_in_the_config_it_is_the_one_that_the_scheme_computes_in(tmp_path: Path) -> None:
    int8_base(tmp_path / "base", config={"quantization_config": {"load_in_8bit": True}})
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True)

    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[f"{V}.weight"].dtype == torch.float32


def test_files_and_sections_that_describe_a_quantisation_are_left_out_of_the_result(tmp_path: Path) -> None:
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config: dict[str, object] = {
        "torch_dtype": "bfloat16",
        "quantization_config": section,
        "quantization": {"group_size": 64, "bits": 8},
        "compression_config": {"format": "int-quantized"},
        "text_config": {"hidden_size": 6, "quantization_config": section},
    }
    int8_base(tmp_path / "base", config=config)
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "generation_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    report = merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True, plan=True)
    merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True)

    assert config_fields(tmp_path / "out") == {"torch_dtype": "bfloat16", "text_config": {"hidden_size": 6}}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "loratools.json", "README.md"}
    assert report.plan is not None
    assert {left.name for left in report.plan.base.left_out} == {
        "hf_quant_config.json", "quantize_config.json", "quant_config.json"
    }  # fmt: skip


def test_the_plan_has_the_sizes_of_floats_and_names_what_is_dequantised(tmp_path: Path) -> None:
    int8_base(tmp_path / "base", config={"torch_dtype": "bfloat16", "quantization_config": {"load_in_8bit": True}})
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})
    arguments = ["merge", str(tmp_path / "base"), str(adapter), "-o", str(tmp_path / "out"), "--dequantize"]

    planned = CliRunner().invoke(verbs, [*arguments, "--plan", "--json"])
    table = CliRunner().invoke(verbs, [*arguments, "--plan"])
    done = CliRunner().invoke(verbs, [*arguments, "--json"])

    assert (planned.exit_code, table.exit_code, done.exit_code) == (0, 0, 0), planned.output + done.output
    plan, report = json.loads(planned.stdout)["plan"], json.loads(done.stdout)
    assert plan["bytes"] == report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert set(plan["dequantized"]) == set(report["dequantized"]) == {f"{Q}.weight", f"{V}.weight"}
    assert "2 quantised weights written as BF16" in " ".join(table.stdout.split())


def test_a_tied_head_of_a_quantised_embedding_is_stored_on_its_own(tmp_path: Path) -> None:
    weights = factories.base_weights(dtype=torch.bfloat16)
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] = torch.randn(11, 6).to(torch.float8_e4m3fn)
    weights["model.embed_tokens.weight_scale"] = torch.rand(11, 1) + 0.5
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=config)
    factors = factories.factors({"lm_head": (11, 6)})
    adapter = factories.adapter_folder(tmp_path / "a", modules={"lm_head": (11, 6)}, values=factors)

    merge(base, [adapter], tmp_path / "out", dequantize=True)

    after = load_file(tmp_path / "out" / "model.safetensors")
    scaled = weights["model.embed_tokens.weight"].float() * weights["model.embed_tokens.weight_scale"]
    a, b = factors["lm_head"]
    # The runtime computes with the scaled values in the dtype of the model; the update is added to those.
    exact = scaled.bfloat16().double() + 2 * b.double() @ a.double()
    assert torch.equal(after["model.embed_tokens.weight"], scaled.bfloat16())
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert ((after["lm_head.weight"].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_a_component_of_a_pipeline_is_dequantised_by_its_own_config(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "unet").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text(
        json.dumps({
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        })
    )  # fmt: skip
    numbers = torch.randint(-127, 128, (10, 6), dtype=torch.int8)
    constants = torch.rand(10) + 0.5
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{module}.weight": numbers, f"{module}.SCB": constants, f"{module}.weight_format": torch.tensor(0).byte()},
        folder / "unet" / "diffusion_pytorch_model.safetensors",
    )
    config = {"_class_name": "UNet2DConditionModel", "torch_dtype": "float16", "quantization_config": {"bits": 8}}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    save_file({"encoder.conv_in.weight": torch.randn(4, 3)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    adapter = factories.adapter_folder(tmp_path / "a", modules={f"unet.{module}": (10, 6)}, prefix="")

    merge(folder, [adapter], tmp_path / "out", dequantize=True)

    after = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {f"{module}.weight": torch.float16}
    written = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert written == {"_class_name": "UNet2DConditionModel", "torch_dtype": "float16"}


def test_repeated_layers_of_a_quantised_base_are_merged_as_floats(tmp_path: Path) -> None:
    packed = int8_base(
        tmp_path / "base",
        config={"num_hidden_layers": 2, "torch_dtype": "float32", "quantization_config": {"load_in_8bit": True}},
    )
    config = {"layer_replication": [[0, 2], [0, 1]]}
    adapter = factories.adapter_folder(
        tmp_path / "a", modules={"model.layers.2.self_attn.q_proj": (10, 6)}, config=config
    )

    with pytest.raises(UnsupportedError, match="repeats layers") as caught:
        merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert "--dequantize" in str(caught.value.hint)
    merge(tmp_path / "base", [adapter], tmp_path / "out", dequantize=True)

    after = load_file(tmp_path / "out" / "model.safetensors")
    values = int8_values(packed, V)
    for layer in (0, 2):
        torch.testing.assert_close(
            after[f"model.layers.{layer}.self_attn.v_proj.weight"].double(), values, rtol=2**-22, atol=0
        )


def test_an_unchanged_weight_that_is_not_read_cannot_be_written_as_floats(tmp_path: Path) -> None:
    weights = factories.base_weights(dtype=torch.bfloat16)
    weights[f"{UP}.weight"] = torch.randint(-9, 9, (6, 8), dtype=torch.int8)
    weights[f"{UP}.weight_scales"] = torch.ones(8).half()
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    with pytest.raises(UnsupportedError, match="quantised in a way that is not read") as caught:
        merge(base, [adapter], tmp_path / "out", dequantize=True)

    assert f"{UP}.weight   eetq" in caught.value.details[0]
    assert not (tmp_path / "out").exists()


def test_a_base_of_plain_weights_is_merged_and_the_option_is_said_to_change_nothing(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights())
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    report = merge(base, [adapter], tmp_path / "out", dequantize=True)

    assert any("--dequantize changes nothing" in warning for warning in report.warnings)
    assert report.dequantized == ()


@peers.needs("mlx.core")
def test_an_mlx_folder_has_the_values_of_mlx_and_no_quantisation(tmp_path: Path) -> None:
    import mlx.core as mx
    import numpy as np

    values = np.random.default_rng(2).standard_normal((40, 128)).astype(np.float32)
    folder = tmp_path / "base"
    folder.mkdir()
    weight, scales, biases = mx.quantize(mx.array(values), group_size=64, bits=4)
    stored = {f"{V}.weight": weight, f"{V}.scales": scales, f"{V}.biases": biases, f"{Q}.weight": mx.array(values[:24])}
    mx.save_safetensors(str(folder / "model.safetensors"), stored, metadata={"format": "mlx"})
    section = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps({"quantization": section, "quantization_config": section}))
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (24, 128)})

    merge(folder, [adapter], tmp_path / "out", dequantize=True)

    loaded: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert set(loaded) == {f"{V}.weight", f"{Q}.weight"}
    expected = mx.dequantize(weight, scales, biases, group_size=64, bits=4)
    assert bool(mx.array_equal(loaded[f"{V}.weight"], expected))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {}


def trained_adapter(model: Any, folder: Path, targets: list[str]) -> None:
    """A PEFT adapter of the model with random factors of both kinds, small beside its weights."""
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped.save_pretrained(folder)


@peers.needs("bitsandbytes")
@pytest.mark.parametrize(("codes", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_llama_in_four_bits_answers_as_peft_with_the_adapter_on_it(tmp_path: Path, codes: str, nested: bool) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = tiny_models.llama(vocabulary=96, width=64, inner=128, heads=4, key_heads=2)
    plain.save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=codes, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    quantised.save_pretrained(tmp_path / "quantised")
    trained_adapter(plain, tmp_path / "a", ["q_proj", "v_proj", "down_proj"])
    with torch.no_grad():
        alone = quantised(TOKENS).logits
        expected = PeftModel.from_pretrained(quantised, str(tmp_path / "a"))(TOKENS).logits

    report = merge(tmp_path / "quantised", [tmp_path / "a"], tmp_path / "out", dequantize=True)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.dtype == torch.float32
    assert len(report.dequantized) == 14
    with torch.no_grad():
        logits = merged(TOKENS).logits
    # The kernels of bitsandbytes sum in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float((expected - alone).abs().max()))


def test_a_gpt_oss_in_mxfp4_answers_as_peft_on_its_dequantised_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    folder = tmp_path / "mxfp4"
    model = tiny_models.save_gpt_oss_in_mxfp4(folder)
    trained_adapter(model, tmp_path / "a", ["q_proj", "v_proj"])
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base.float(), str(tmp_path / "a"))(TOKENS).logits

    merge(folder, [tmp_path / "a"], tmp_path / "out", dequantize=True, dtype="float32")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_llama_in_fp8_blocks_answers_as_peft_on_its_dequantised_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = tmp_path / "fp8"
    model = tiny_models.save_llama_in_fp8_blocks(folder)
    trained_adapter(model, tmp_path / "a", ["k_proj", "gate_proj"])
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base.float(), str(tmp_path / "a"))(TOKENS).logits

    report = merge(folder, [tmp_path / "a"], tmp_path / "out", dequantize=True, dtype="float32")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (report.merged_weights, len(report.dequantized)) == (2, 7)
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
