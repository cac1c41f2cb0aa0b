"""Tiny models that llama.cpp runs: with the names of transformers, and as GGUF files of llama.cpp's own conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import torch
import transformers
from formats.llama_cpp import NOT_COMPARED, VOCABULARY, add_vocabulary

gguf = peers.load("gguf")

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 64, 96, 4, 2, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(model_type: str) -> Any:
    """A model with random weights, whose next token is one that can be printed."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(3)
    model: Any
    if model_type == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    elif model_type == "glm4":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        model = transformers.Glm4ForCausalLM(
            transformers.Glm4Config(**config, head_dim=HIDDEN // HEADS, rope_parameters=rope, pad_token_id=0)
        )
    else:
        # The language model of Qwen2-VL computes what Qwen2 does where there is nothing to see.
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.15)
    model.lm_head.weight.data[NOT_COMPARED] = 0
    return model.eval()


def write_base(model: Any, model_type: str, path: Path, kind: str = "F32") -> None:
    """The base as llama.cpp's conversion writes it: rows of heads permuted, a tokenizer of bytes.

    Args:
        model: The model of `base_model`.
        model_type: Its architecture, as GGUF names it.
        path: The file to write.
        kind: How matrices of the layers are stored, by the name of ggml; the others are float32.
    """
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS // (2 if model_type == "glm4" else 1))
    if model_type == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    writer.add_file_type(0)
    add_vocabulary(writer)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        if model_type == "llama" and heads is not None:
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind == "F32" or values.ndim < 2 or not stored.startswith("blk."):
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def randomised(adapted: Any) -> Any:
    """A model with an adapter, whose factors are all random; B is 0 before training."""
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    return adapted
