"""Names and orders of GGUF, held against the gguf package's own table."""

from __future__ import annotations

import peers
import pytest
import torch

from loratools.naming import gguf as names
from loratools.naming.gguf_weights import heads_of
from loratools.naming.heads import ungrouped

pytestmark = peers.needs("gguf")
gguf = peers.load("gguf")


@pytest.mark.parametrize("model_type", sorted(names.BY_MODEL_TYPE))
def test_every_name_is_the_gguf_packages(model_type: str) -> None:
    architecture = names.BY_MODEL_TYPE[model_type]
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(arch, 4)

    for hf in architecture.modules:
        module = hf.format(2)
        found = names.gguf_module(architecture, module)
        assert found == table.get_name(module), module
        inner, plain = architecture.wrapped
        in_memory = inner + module.removeprefix(plain) if inner and module.startswith(plain) else module
        assert names.gguf_module(architecture, in_memory) == found
        assert names.hf_module(architecture, str(found)) == in_memory
    if architecture.mixture is not None:
        for role in ("gate_proj", "up_proj", "down_proj"):
            stack = names.gguf_stack(architecture, f"model.layers.2.{architecture.mixture}", role)
            # How llama.cpp's conversion calls what it has stacked.
            role_there = (
                {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[role] if model_type == "mixtral" else role
            )
            merged = f"model.layers.2.{'block_sparse_moe' if model_type == 'mixtral' else 'mlp'}.experts.{role_there}"
            if model_type not in ("llama", "mistral"):
                assert stack in (
                    table.get_name(merged),
                    table.get_name(merged.replace("block_sparse_moe", "layers")),
                ), merged
            assert names.hf_stack(architecture, str(stack)) == (f"model.layers.2.{architecture.mixture}", role)


def test_names_that_are_not_there_are_none() -> None:
    llama = names.BY_NAME["llama"]

    assert names.gguf_module(llama, "model.layers.2.self_attn.qkv_proj") is None
    assert names.gguf_module(llama, "model.layers.2.experts.1.x") is None
    assert names.hf_module(llama, "blk.0.attn_qkv") is None
    assert names.gguf_stack(names.BY_NAME["qwen2"], "model.layers.2.mlp", "up_proj") is None
    assert names.hf_stack(names.BY_NAME["qwen2"], "blk.2.ffn_up_exps") is None


@pytest.mark.parametrize(
    ("model_type", "module", "word"),
    [
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", "stand in turn"),
        ("qwen3_next", "model.layers.1.linear_attn.in_proj_qkvz", "another order"),
        ("qwen3_5", "model.language_model.layers.1.linear_attn.out_proj", "another order"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj", "cuts it in two"),
        ("llama4_text", "model.layers.1.feed_forward.experts.gate_up_proj", "apart"),
        ("llama", "model.layers.1.self_attn.qkv_proj", "no module of llama"),
        ("granitemoehybrid", "model.layers.1.block_sparse_moe.input_linear", "apart"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wi", "no module of t5"),
    ],
)
def test_a_module_that_the_conversion_changes_has_no_name_and_a_reason(model_type: str, module: str, word: str) -> None:
    architecture = names.BY_MODEL_TYPE[model_type]

    assert names.gguf_module(architecture, module) is None
    assert word in architecture.reason_absent(module)


@pytest.mark.parametrize(
    ("experts", "layers", "name", "end"),
    [
        (0, ["mamba", "attention"], "granitehybrid", ""),
        (8, ["mamba", "attention"], "granitehybrid", "_shexp"),
        (0, ["attention", "attention"], "granite", ""),
        (8, ["full_attention", "full_attention"], "granitemoe", "_shexp"),
    ],
)
def test_granite_4_has_names_by_its_experts_and_an_architecture_by_its_layers(
    experts: int, layers: list[str], name: str, end: str
) -> None:
    config = {"num_local_experts": experts, "layer_types": layers}

    architecture = names.architecture_of("granitemoehybrid", config)

    assert architecture is not None
    assert architecture.name == name
    shared = "model.layers.3.shared_mlp"
    assert names.gguf_halves(architecture, f"{shared}.input_linear") == (f"blk.3.ffn_gate{end}", f"blk.3.ffn_up{end}")
    assert names.gguf_module(architecture, f"{shared}.output_linear") == f"blk.3.ffn_down{end}"
    assert names.hf_module(architecture, f"blk.3.ffn_down{end}") == f"{shared}.output_linear"
    assert names.hf_of_half(architecture, f"blk.3.ffn_up{end}") == (f"{shared}.input_linear", 1)
    assert names.hf_of_half(architecture, "blk.3.attn_v") is None


def test_a_module_has_the_name_of_the_model_in_memory_whichever_of_its_names_is_given() -> None:
    inner, plain = "model.language_model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"

    assert names.model_name("qwen2_vl", plain) == names.model_name("qwen2_vl", inner) == inner
    assert names.model_name("qwen2", plain) == plain
    assert names.model_name("qwen2_vl", "visual.blocks.0.attn.qkv") == "visual.blocks.0.attn.qkv"
    assert names.model_name(None, plain) == plain


def test_a_file_is_read_with_the_names_of_the_model_of_text_alone() -> None:
    """A file says its architecture, and not whether the model that it was trained with also sees."""
    for name, model_type in {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen35": "qwen3_5_text"}.items():
        assert names.BY_NAME[name] is names.BY_MODEL_TYPE[model_type]
    assert set(names.REFUSED).isdisjoint(names.BY_MODEL_TYPE)


def test_rows_of_falcon_are_ungrouped_as_its_conversion_slices_them() -> None:
    """Two groups of two query heads, a key and a value, each of three rows, by view and cat as llama.cpp has it."""
    rows = torch.arange(2 * 4 * 3)
    groups = rows.view(2, 4, 3)
    expected = torch.cat([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])

    assert torch.equal(torch.tensor(ungrouped(24, queries=4, keys=2)), expected)
    with pytest.raises(ValueError, match="25 rows cannot be 4 heads"):
        ungrouped(25, queries=4, keys=2)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, (8, 2)),
        ({"num_attention_heads": 8}, (8, 8)),
        ({"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True}, (71, 1)),
        ({"model_type": "falcon", "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True},
         (128, 8)),
        ({"model_type": "falcon", "num_attention_heads": 32, "multi_query": False}, (32, 32)),
        ({}, None),
        ({"num_attention_heads": 8, "num_key_value_heads": 0}, None),
    ],
)  # fmt: skip
def test_heads_are_those_of_the_config(config: dict[str, object], heads: tuple[int, int] | None) -> None:
    assert heads_of(config) == heads
