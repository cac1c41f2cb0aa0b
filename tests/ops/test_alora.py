"""aLoRA: an adapter that acts after certain tokens. It is read and written by all verbs; merging it has no sense."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import numpy as np
import peers
import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats

gguf = peers.load("gguf")

TOKENS = [128000, 17, 3]
MODULE = "model.layers.0.self_attn.v_proj"


def alora(folder: Path, tokens: object = TOKENS) -> Path:
    return factories.adapter_folder(
        folder, modules={MODULE: (10, 6)}, alpha=5, config={"alora_invocation_tokens": tokens}
    )


def test_the_field_is_that_of_peft() -> None:
    assert LoraConfig(alora_invocation_tokens=TOKENS).alora_invocation_tokens == TOKENS


def test_it_is_inspected_and_its_tokens_are_a_field_of_the_adapter(tmp_path: Path) -> None:
    folder = alora(tmp_path / "adapter")

    (entry,) = loratools.inspect(folder, values=True).sources

    assert entry.to_dict()["kinds"] == {"lora": 1}
    assert loratools.load(folder).invocation_tokens == tuple(TOKENS)


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_what_is_written_acts_after_the_same_tokens(verb: str, tmp_path: Path) -> None:
    folder, out = alora(tmp_path / "adapter"), tmp_path / "out"
    if verb == "convert":
        loratools.convert(folder, out, format="peft")
    elif verb == "resize":
        loratools.resize(folder, out, rank=2)
    else:
        loratools.combine([folder, (folder, 0.5)], out)

    assert json.loads((out / "adapter_config.json").read_text())["alora_invocation_tokens"] == TOKENS


@peers.needs("gguf")
def test_gguf_has_the_tokens_under_the_key_of_llama_cpp_and_gives_them_back(tmp_path: Path) -> None:
    base = formats.Base({}, {"model_type": "qwen2"})

    loratools.convert(alora(tmp_path / "adapter"), tmp_path / "out.gguf", format="gguf", base=base)

    field = gguf.GGUFReader(tmp_path / "out.gguf").get_field(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS)
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert list(map(int, field.contents())) == TOKENS
    again = loratools.load(tmp_path / "out.gguf", base=base)
    assert again.invocation_tokens == tuple(TOKENS)
    np.testing.assert_array_equal(again.delta(MODULE), loratools.load(tmp_path / "adapter").delta(MODULE))


def test_a_merge_refuses_it_with_the_reason(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    import torch

    save_file({f"{MODULE}.weight": torch.ones(10, 6)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")

    with pytest.raises(loratools.UnsupportedError, match="merged weights act on every token") as raised:
        loratools.merge(base, alora(tmp_path / "adapter"), tmp_path / "out")
    assert str(TOKENS) in raised.value.details[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "serve"), [("mlx", None), ("peft", "vllm"), ("peft", "sglang")])
def test_what_has_no_place_for_the_tokens_is_refused(format: str, serve: str | None, tmp_path: Path) -> None:
    with pytest.raises(loratools.UnsupportedError, match="it would act on every token"):
        loratools.convert(alora(tmp_path / "adapter"), tmp_path / "out", format=format, serve=serve)


def test_adapters_that_act_after_different_tokens_are_not_combined(tmp_path: Path) -> None:
    one, other = alora(tmp_path / "one"), alora(tmp_path / "other", [5])
    plain = alora(tmp_path / "plain", None)

    for pair in ([one, other], [one, plain]):
        with pytest.raises(loratools.MismatchError, match="act after different tokens"):
            loratools.combine(pair)


@pytest.mark.parametrize("tokens", ["17", [1, "2"], [-3], {"a": 1}, [1.5], 4])
def test_what_are_no_tokens_is_refused(tokens: object, tmp_path: Path) -> None:
    with pytest.raises(loratools.FormatError, match="no numbers of tokens"):
        loratools.load(alora(tmp_path / "adapter", tokens))


def test_the_file_of_weights_says_nothing_of_the_tokens(tmp_path: Path) -> None:
    """PEFT stores them in the config alone, so that the factors of an aLoRA are those of any LoRA."""
    assert len(load_file(alora(tmp_path / "adapter") / "adapter_model.safetensors")) == 2
