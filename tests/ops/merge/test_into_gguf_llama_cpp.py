"""llama.cpp computes with a merged GGUF file what it computes with the base and the adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp_models
import peers
import peft
import pytest
import torch
from formats.llama_cpp import computed, next_token
from llama_cpp_models import TARGETS
from torch import Tensor

import loratools

pytestmark = peers.needs("xllamacpp", "gguf")
gguf = peers.load("gguf")


def trained(model: Any, folder: Path) -> Tensor:
    """Save an adapter on all linear layers; the logarithms that PEFT computes with it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    adapted = llama_cpp_models.randomised(peft.get_peft_model(model, config).eval())
    adapted.save_pretrained(folder)
    return next_token(adapted)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_merged_file_computes_what_peft_and_the_adapter_beside_it_do(model_type: str, tmp_path: Path) -> None:
    model = llama_cpp_models.base_model(model_type)
    model.save_pretrained(tmp_path / "base")
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    llama_cpp_models.write_base(model, model_type, base, "F32")
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
    model = llama_cpp_models.base_model("llama")
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    llama_cpp_models.write_base(model, "llama", base, "Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() == 2:
            values = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
            parameter.data.copy_(torch.from_numpy(values))
    wanted = trained(model, tmp_path / "adapter")

    loratools.merge(base, tmp_path / "adapter", merged, dequantize=True, dtype="float32")

    torch.testing.assert_close(computed(merged), wanted, rtol=0, atol=0.02)
    assert float((wanted - computed(base)).abs().max()) > 1
