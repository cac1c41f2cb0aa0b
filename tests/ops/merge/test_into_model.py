"""merge_into: a model in memory has the values that a merge of its files has, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import loratools
from loratools.errors import InputError, MismatchError, UnsupportedError, UsageError
from loratools.tensors.lazy import from_torch

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def saved(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter that PEFT made for the base, with values in place of the zeros that training starts from."""
    torch.manual_seed(9)
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
            elif "modules_to_save" in name:
                parameter.add_(0.125)
    model.save_pretrained(folder)
    return folder


def assert_same(model: nn.Module, merged: Path) -> None:
    """That the parameters of the model are, to the bit, those of the folder as transformers loads it."""
    expected = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    values = model.state_dict()
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "adapter"])
def test_values_are_those_of_the_file_merge(tmp_path: Path, rounding: Any) -> None:
    base = saved(tmp_path / "base")
    one, two = (
        trained(base, tmp_path / "one"),
        trained(base, tmp_path / "two", use_dora=True, target_modules=["v_proj"]),
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")

    report = loratools.merge_into(model, [(one, 0.7), two], rounding=rounding, seed=3)

    by_file = loratools.merge(base, [(one, 0.7), two], tmp_path / "out", rounding=rounding, seed=3)
    assert_same(model, tmp_path / "out")
    assert (report.merged_weights, report.gain, report.output) == (by_file.merged_weights, by_file.gain, None)


def test_float32_model_is_close_to_what_peft_merges(tmp_path: Path) -> None:
    from peft import PeftModel

    base = saved(tmp_path / "base", dtype=torch.float32)
    adapter = trained(base, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(base)

    loratools.merge_into(model, adapter)

    peer: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = peer.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_tied_head_that_is_trained_gets_values_of_its_own(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=True)
    adapter = trained(base, tmp_path / "one", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = model.model.embed_tokens.weight.detach().clone()

    loratools.merge_into(model, adapter)

    loratools.merge(base, adapter, tmp_path / "out")
    assert_same(model, tmp_path / "out")
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    model.save_pretrained(tmp_path / "again")
    assert_same(model, tmp_path / "again")


def test_tied_embedding_that_is_adapted_changes_the_head_as_in_files(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=True)
    adapter = trained(base, tmp_path / "one", target_modules=["embed_tokens"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")

    loratools.merge_into(model, adapter)

    loratools.merge(base, adapter, tmp_path / "out")
    assert_same(model, tmp_path / "out")


def test_experts_that_transformers_fuses_in_memory_are_merged(tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=3, num_experts_per_tok=2)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    experts = [f"model.layers.{layer}.block_sparse_moe.experts.{i}" for layer in range(2) for i in range(3)]
    modules = {f"{expert}.w3": (40, 24) for expert in experts} | {f"{experts[4]}.w2": (24, 40)}
    adapter = factories.adapter_folder(tmp_path / "one", modules=modules, rank=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")

    loratools.merge_into(model, adapter)

    loratools.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert_same(model, tmp_path / "out")


def test_convolutions_and_plain_modules_are_merged() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 7)).double()
    a, b = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    before = model[0].weight.detach().clone()

    update = loratools.LoRA(from_torch(a), from_torch(b), alpha=1.0, alpha_source="config")
    loratools.merge_into(model, loratools.Adapter({"0": update}))

    expected = before + 1.0 / 2 * torch.einsum("or,ricd->oicd", b[..., 0, 0].double(), a.double())
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-14, atol=1e-15)


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    good = trained(base, tmp_path / "one")
    values = {"model.layers.1.mlp.down_proj": (torch.full((3, 40), 1e30), torch.full((24, 3), 1e30))}
    bad = factories.adapter_folder(tmp_path / "bad", values=values, rank=3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(InputError, match="down_proj"):
        loratools.merge_into(model, [good, bad])

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "one", modules={"model.layers.0.nowhere": (6, 4)})

    with pytest.raises(MismatchError, match="do not fit"):
        loratools.merge_into(AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base")), adapter)


def test_a_model_with_adapters_of_peft_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, tmp_path / "one")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(UsageError, match="adapters of PEFT around its layers") as caught:
        loratools.merge_into(model, adapter)

    assert "unload" in (caught.value.hint or "")


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    with pytest.raises(UnsupportedError, match="quantised"):
        loratools.merge_into(model, adapter)


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    adapter = trained(saved(tmp_path / "base"), tmp_path / "one")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))

    with pytest.raises(UsageError, match="not in memory"):
        loratools.merge_into(model, adapter)


def test_a_larger_vocabulary_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=True)
    adapter = factories.adapter_folder(
        tmp_path / "one",
        modules={"model.layers.0.self_attn.q_proj": (24, 24)},
        extra={"model.embed_tokens.weight": torch.ones(53, 24)},
        config={"modules_to_save": ["embed_tokens"]},
    )
    model = AutoModelForCausalLM.from_pretrained(base)

    with pytest.raises(MismatchError, match="another shape") as caught:
        loratools.merge_into(model, adapter)

    assert "resize_token_embeddings" in (caught.value.hint or "")
    assert json.loads((base / "config.json").read_text())["vocab_size"] == 50
