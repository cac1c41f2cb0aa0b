"""llama.cpp itself loads what we write as GGUF, and computes what PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp_models
import peers
import peft
import pytest
import torch
from formats.llama_cpp import computed, next_token
from llama_cpp_models import TARGETS

from loratools.ops.convert.verb import convert

pytestmark = peers.needs("xllamacpp", "gguf")

FUSED_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2vl", "glm4"])
def test_llama_cpp_computes_what_peft_computes(model_type: str, tmp_path: Path) -> None:
    model = llama_cpp_models.base_model(model_type)
    model.save_pretrained(tmp_path / "base")
    llama_cpp_models.write_base(model, model_type, tmp_path / "base.gguf")
    plain = next_token(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"model.layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 9}, target_modules=TARGETS if model_type != "glm4" else FUSED_TARGETS,
    )  # fmt: skip
    adapted = llama_cpp_models.randomised(peft.get_peft_model(model, config).eval())
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = next_token(adapted)

    if model_type == "qwen2vl":
        saved = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**saved, "model_type": "qwen2_vl"}))
    convert(tmp_path / "adapter", tmp_path / "adapter.gguf", format="gguf", base=tmp_path / "base" / "config.json")

    # Its cache of keys and values is of float16.
    torch.testing.assert_close(computed(tmp_path / "base.gguf"), plain, rtol=0, atol=0.02)
    found = computed(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert float((wanted - plain).abs().max()) > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
