"""llama.cpp computes what PEFT does with Granite 4: attention, Mamba, and a gated layer that it has in two halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import peft
import torch
import transformers
from formats.llama_cpp import NOT_COMPARED, VOCABULARY, add_vocabulary, computed, next_token

import loratools

pytestmark = peers.needs("xllamacpp", "gguf")
gguf = peers.load("gguf")

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 64, 96, 4, 2, 2
MAMBA_HEADS, MAMBA_HEAD, STATE, KERNEL = 8, 16, 16, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "input_linear", "output_linear"]


def base_model() -> Any:
    torch.manual_seed(3)
    model = transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, shared_intermediate_size=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, num_local_experts=0,
            num_experts_per_tok=0, layer_types=["mamba", "attention"], mamba_n_heads=MAMBA_HEADS,
            mamba_d_head=MAMBA_HEAD, mamba_d_state=STATE, mamba_n_groups=1, mamba_d_conv=KERNEL, mamba_expand=2,
            position_embedding_type="rope", max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0,
            embedding_multiplier=2.0, logits_scaling=3.0, residual_multiplier=0.5, attention_multiplier=0.3,
            tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.15)
    model.lm_head.weight.data[NOT_COMPARED] = 0
    return model.eval()


def write_base(model: Any, path: Path) -> None:
    """The base as llama.cpp's conversion writes it."""
    writer = gguf.GGUFWriter(path, "granitehybrid")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, KEY_HEADS])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_scaling_finetuned(True)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(MAMBA_HEADS * MAMBA_HEAD)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(MAMBA_HEADS)
    writer.add_ssm_group_count(1)
    writer.add_embedding_scale(2.0)
    writer.add_logit_scale(3.0)
    writer.add_residual_scale(0.5)
    writer.add_attention_scale(0.3)
    writer.add_file_type(0)
    add_vocabulary(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE_HYBRID, LAYERS)
    for name, stored in model.state_dict().items():
        values, layer = stored.float(), name.partition("layers.")[2].partition(".")[0]
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        if "shared_mlp.input_linear" in name:
            for part, half in zip(("gate", "up"), values.chunk(2), strict=True):
                writer.add_tensor(f"blk.{layer}.ffn_{part}.weight", half.contiguous().numpy())
            continue
        if heads is not None:
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        named = {
            "shared_mlp.output_linear.weight": (f"blk.{layer}.ffn_down.weight", values),
            "mamba.conv1d.weight": (f"blk.{layer}.ssm_conv1d.weight", values.reshape(-1, KERNEL)),
            "mamba.A_log": (f"blk.{layer}.ssm_a", -torch.exp(values).reshape(-1, 1)),
            "mamba.D": (f"blk.{layer}.ssm_d", values.reshape(-1, 1)),
            "mamba.dt_bias": (f"blk.{layer}.ssm_dt.bias", values),
            "mamba.norm.weight": (f"blk.{layer}.ssm_norm.weight", values.reshape(1, -1)),
        }
        end = name.partition(f"layers.{layer}.")[2] if layer else name
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias")) if end not in named else None
        written, of = named.get(end, (mapped, values))
        writer.add_tensor(written, of.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_computes_what_peft_computes(tmp_path: Path) -> None:
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    write_base(model, tmp_path / "base.gguf")
    plain = next_token(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = next_token(adapted)

    report = loratools.convert(
        tmp_path / "adapter", tmp_path / "adapter.gguf", format="gguf", base=tmp_path / "base" / "config.json"
    )

    assert not report.dropped or {skipped.what for skipped in report.dropped} == {"metadata"}
    torch.testing.assert_close(computed(tmp_path / "base.gguf", None), plain, rtol=0, atol=0.005)
    assert float((expected - plain).abs().max()) > 0.1
    torch.testing.assert_close(
        computed(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), expected, rtol=0, atol=0.005
    )
