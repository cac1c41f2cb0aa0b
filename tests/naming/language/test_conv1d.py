from __future__ import annotations

import pytest

from loratools.naming.language.conv1d import is_conv1d


@pytest.mark.parametrize("module", ["transformer.h.0.attn.c_attn", "h.11.mlp.c_fc", "c_proj"])
def test_gpt2_stores_its_linear_layers_transposed(module: str) -> None:
    assert is_conv1d("gpt2", module)


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("gpt2", "transformer.wte"),
        ("gpt2", "lm_head"),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn"),
        ("llama", "model.layers.0.mlp.c_proj"),
        (None, "transformer.h.0.attn.c_attn"),
    ],
)
def test_other_layers_and_models_do_not(model_type: str | None, module: str) -> None:
    assert not is_conv1d(model_type, module)
