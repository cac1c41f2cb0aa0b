"""Names that torch.compile, FSDP, DDP and their like put around modules are no part of an adapter's names."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
from safetensors.torch import load_file, save_file

from loratools import formats
from loratools.errors import FormatError
from loratools.formats.common.wrappers import unwrapped

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_A.weight"


@pytest.mark.parametrize(
    "wrapped",
    [
        f"_orig_mod.{KEY}",
        f"module.{KEY}",
        f"module._orig_mod.{KEY}",
        f"_orig_mod.module.{KEY}",
        f"module.module.{KEY}",
        f"_forward_module.{KEY}",
        f"_fsdp_wrapped_module.{KEY}",
        KEY.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        KEY.replace("model.layers", "_orig_mod.model.layers"),
        KEY.replace("model.layers", "module.model.layers"),
        KEY.replace("q_proj.", "q_proj._fsdp_wrapped_module."),
        KEY.replace("lora_A.", "lora_A._fsdp_wrapped_module."),
    ],
)
def test_a_name_is_what_it_was_before_training_wrapped_it(wrapped: str) -> None:
    beside = wrapped.replace("lora_A", "lora_B")

    assert unwrapped([wrapped, beside]).names == {wrapped: KEY, beside: KEY.replace("lora_A", "lora_B")}


@pytest.mark.parametrize(
    "names",
    [
        [KEY],
        ["module.weight", "module.bias"],
        ["module.layers.0.lora_A.weight", "other.layers.0.lora_A.weight"],
        ["base_model.model.layers.0.module.lora_A.weight"],
        ["encoder._orig_mod"],
    ],
)
def test_a_model_may_call_a_module_of_its_own_so(names: list[str]) -> None:
    assert unwrapped(names).wrappers == {}
    assert unwrapped(names).names == {name: name for name in names}


def test_reading_says_how_many_names_were_wrapped_and_by_what(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", prefix="_orig_mod.base_model.model.", alpha=8)
    file = source / "adapter_config.json"
    pattern = {"_orig_mod.model.layers.0.self_attn.q_proj": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": pattern}))

    adapter = formats.load(source)

    assert sorted(adapter.updates) == sorted(factories.MODULES)
    assert adapter.updates[MODULE].scale == 3 / 4
    assert adapter.updates["model.layers.0.self_attn.v_proj"].scale == 8 / 4
    (warning,) = adapter.warnings
    assert f"torch.compile: {2 * len(factories.MODULES)} tensors" in warning


def test_a_tensor_that_is_there_with_and_without_its_wrapper_is_refused(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, f"_orig_mod.{KEY}": tensors[KEY] + 1}, file)

    with pytest.raises(FormatError, match="1 tensor both inside of a wrapper of training and not"):
        formats.load(source)
