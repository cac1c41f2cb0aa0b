"""Names and orders of GGUF, held against the gguf package's own table."""

from __future__ import annotations

import peers
import pytest

from loratools.naming import gguf as names

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
        assert names.hf_module(architecture, str(found)) == module
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
