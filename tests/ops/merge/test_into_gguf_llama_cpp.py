"""llama.cpp computes with a merged GGUF file what it computes with the base and the adapter beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import peft
import pytest
import torch
import transformers
from torch import Tensor

import loratools

# The server of llama.cpp in a wheel; it is heavy, and not everywhere.
pytestmark = peers.needs("xllamacpp", "gguf")
xllamacpp = peers.load("xllamacpp")
gguf = peers.load("gguf")

VOCABULARY, HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 263, 64, 96, 4, 2, 2
PROMPT = [1, 70, 100, 33, 259, 90, 200, 14]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(model_type: str) -> Any:
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(3)
    model: Any
    if model_type == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, 0.15)
    # The end of the text, or half of a character, would leave nothing to compare: these are never the most likely.
    model.lm_head.weight.data[[0, 1, 2, *range(3 + 128, 3 + 256)]] = 0
    return model.eval()


def write_base(model: Any, model_type: str, path: Path, kind: str) -> None:
    """The base as llama.cpp's conversion writes it: rows of heads permuted, a tokenizer of bytes."""
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    bytes_ = [f"<0x{i:02X}>".encode() for i in range(256)]
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *bytes_, b"a", b"b", "▁".encode(), b"c"])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
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


def computed(base: Path, adapter: Path | None = None) -> Tensor:
    """Logarithms of the probabilities of the next token."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": PROMPT, "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0, "cache_prompt": False}
    answer = xllamacpp.Server(params).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    logarithms = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        logarithms[entry["id"]] = entry["logprob"]
    return logarithms


def trained(model: Any, folder: Path) -> Tensor:
    """Save an adapter on all linear layers; the logarithms that PEFT computes with it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.15)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return torch.log_softmax(adapted(torch.tensor([PROMPT])).logits[0, -1].double(), -1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_merged_file_computes_what_peft_and_the_adapter_beside_it_do(model_type: str, tmp_path: Path) -> None:
    model = base_model(model_type)
    model.save_pretrained(tmp_path / "base")
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_base(model, model_type, base, "F32")
    wanted = trained(model, tmp_path / "adapter")

    loratools.merge(base, tmp_path / "adapter", merged)

    loratools.convert(tmp_path / "adapter", tmp_path / "adapter.gguf", format="gguf", base=tmp_path / "base")
    after = computed(merged)
    assert float((wanted - computed(base)).abs().max()) > 1
    # Its cache of keys and values is of float16.
    torch.testing.assert_close(after, wanted, rtol=0, atol=0.02)
    torch.testing.assert_close(after, computed(base, tmp_path / "adapter.gguf"), rtol=0, atol=0.02)
    # And an adapter of llama.cpp's own format gives the same file.
    loratools.merge(base, tmp_path / "adapter.gguf", tmp_path / "again.gguf")
    torch.testing.assert_close(computed(tmp_path / "again.gguf"), after, rtol=0, atol=1e-3)


def test_changed_weights_of_a_quantised_file_as_floats_are_its_values_with_the_adapter(tmp_path: Path) -> None:
    model = base_model("llama")
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_base(model, "llama", base, "Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() == 2:
            values = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
            parameter.data.copy_(torch.from_numpy(values))
    wanted = trained(model, tmp_path / "adapter")

    loratools.merge(base, tmp_path / "adapter", merged, dequantize=True, dtype="float32")

    torch.testing.assert_close(computed(merged), wanted, rtol=0, atol=0.02)
    assert float((wanted - computed(base)).abs().max()) > 1
