"""Tiny models of transformers with random weights, as they are and quantised: the bases of adapters in tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def llama_config(
    *,
    vocabulary: int,
    width: int,
    inner: int,
    heads: int,
    key_heads: int,
    layers: int = 2,
    tied: bool = False,
    **fields: Any,
) -> LlamaConfig:
    """The config of a Llama of these sizes.

    Args:
        vocabulary: Rows of the embedding.
        width: The size of hidden states.
        inner: Outputs of the up projection.
        heads: Attention heads.
        key_heads: Heads of keys and values.
        layers: Decoder layers.
        tied: Whether the head is tied to the embedding.
        fields: Further fields, by the names of transformers.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        **fields,
    )


def llama(*, seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    """A Llama with weights drawn with `seed`, ready to compute; sizes as of `llama_config`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**sizes)).eval()


def save_llama_in_fp8_blocks(folder: Path) -> LlamaForCausalLM:
    """Save a Llama whose linear layers are float8 with a scale for each block of 128 x 128; the model in bfloat16."""
    model = llama(vocabulary=80, width=128, inner=384, heads=4, key_heads=4, layers=1).to(torch.bfloat16)
    stored: dict[str, Tensor] = {}
    for name, values in model.state_dict().items():
        if name.endswith("_proj.weight"):
            stored[name] = (values * 3000).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = (torch.rand(values.shape[0] // 128, values.shape[1] // 128) + 0.5) / 3000
        else:
            stored[name] = values.contiguous()
    _save(folder, model, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    return model


def save_gpt_oss_in_mxfp4(folder: Path) -> GptOssForCausalLM:
    """Save a gpt-oss whose experts are random numbers in MXFP4; the model in bfloat16, with other experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    stored: dict[str, Tensor] = {}
    for name, values in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = values.contiguous()
            continue
        experts, inputs, outputs = values.shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    _save(folder, model, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return model


def _save(folder: Path, model: PreTrainedModel, stored: Mapping[str, Tensor], quantisation: Mapping[str, Any]) -> None:
    folder.mkdir()
    save_file(dict(stored), folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "dtype": "bfloat16", "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}), encoding="utf-8")
