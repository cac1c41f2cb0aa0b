"""Names that are written for each published model: the table in docs/registries.md holds, and clients look for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from naming.image import published, written
from naming.image.test_published_names import TABLES
from safetensors.torch import load_file

pytestmark = peers.needs("diffusers")
diffusers = peers.load("diffusers")

FAMILIES = sorted(published.MODELS)
# Families whose trainers in kohya's spelling flatten other names than those of the authors' checkpoints.
TRAINED_AS: dict[str, str] = {
    "sd": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",  # sd-scripts trains diffusers' UNet
    "z-image": "layers.0.attention.to_q",  # musubi-tuner trains queries, keys and values apart
    "hunyuan-video15": "double_blocks.0.img_attn_q",  # the same
}


def flat(name: str) -> str:
    return name.replace(".", "_")


def test_the_table_has_every_family() -> None:
    lines = written.documented()
    assert lines[:2] == written.head()
    assert [line.split("`")[1] for line in lines[2:]] == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_what_is_written(family: str) -> None:
    assert written.row(family) in written.documented()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_format_has_the_name_that_its_clients_make_of_the_models_own(family: str) -> None:
    names, module = written.documented_names(family), written.query(family)
    component = "unet" if published.MODELS[family][0].startswith("UNet") else "transformer"
    assert names["diffusers"] == f"{component}.{module}"
    # ComfyUI looks for the names of its own model behind this prefix, and for these with underscores behind kohya's.
    authors = names["comfy"].removeprefix("diffusion_model.")
    assert authors != names["comfy"]
    assert names["kohya"] == f"lora_unet_{flat(TRAINED_AS.get(family, authors))}"
    assert names.get("onetrainer") == (None if component == "unet" else f"lora_transformer_{flat(module)}")
    assert names.get("bfl") == (authors if family in ("flux", "flux2") else None)


def skeleton(name: str, rows: int, columns: int) -> torch.nn.Module:
    """A model with one linear layer of this name, without memory for its weight."""
    root = module = torch.nn.Module()
    *parents, leaf = name.split(".")
    for parent in parents:
        module.add_module(parent, inner := torch.nn.Module())
        module = inner
    module.add_module(leaf, torch.nn.Linear(columns, rows, device="meta"))
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_finds_the_factors_in_a_model_of_diffusers(tmp_path: Path, family: str) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    module = written.query(family)
    folder = written.write(tmp_path, family, "peft")
    assert folder is not None
    model: Any = skeleton(module, *published.modules(family)[module])
    config = LoraConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = get_peft_model(model, config)
    stored = load_file(folder / "adapter_model.safetensors")
    assert set_peft_model_state_dict(model, stored).unexpected_keys == []
    name = written.documented_names(family)["peft"]
    assert set(get_peft_model_state_dict(model)) == set(stored) == {f"{name}.lora_{f}.weight" for f in "AB"}


@pytest.mark.parametrize("family", sorted(path.stem for path in TABLES.glob("*.json")))
def test_the_authors_name_is_the_one_that_scripts_of_diffusers_convert(family: str) -> None:
    names = json.loads((TABLES / f"{family}.json").read_text(encoding="utf-8"))
    original, *_ = names[re.sub(r"(?<=\.)0(?=\.)", "{}", written.query(family), count=1)]
    # The models of ComfyUI have in one module what these two checkpoints have in three.
    original = original.replace("img_attn_q", "img_attn.qkv")
    assert written.documented_names(family)["comfy"] == f"diffusion_model.{original.format(0)}"


@pytest.mark.parametrize(("family", "converter"), [("ace-step", "ace_step"), ("cosmos", "anima")])
def test_the_authors_name_is_the_one_that_a_converter_of_diffusers_reads(family: str, converter: str) -> None:
    from diffusers.loaders import lora_conversion_utils

    convert = getattr(lora_conversion_utils, f"_convert_non_diffusers_{converter}_lora_to_diffusers")
    names = written.documented_names(family)
    # The decoder is the part of ACE-Step that its trainers wrap, so that their files begin below it.
    authors = re.sub("diffusion_model.decoder.", "base_model.model.", names["comfy"])
    assert list(convert({f"{authors}.lora_A.weight": 0})) == [f"{names['diffusers']}.lora_A.weight"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_loader_of_stable_diffusion_finds_the_unet_in_kohyas_file(tmp_path: Path, family: str) -> None:
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel(**published.MODELS[family][1]).config
    loader = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    state, alphas = loader.lora_state_dict(str(written.write(tmp_path, family, "kohya")), unet_config=config)
    name = written.documented_names(family)["diffusers"]
    assert set(diffusers.utils.convert_unet_state_dict_to_peft(state)) == {f"{name}.lora_{f}.weight" for f in "AB"}
    assert list(alphas.values()) == [1.0]
