"""Names, formats and headers of what combine, resize and convert write of image adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import MismatchError, UndecidedError, UnsupportedError
from loratools.ops.common.output import format_that_holds

Tensors = dict[str, torch.Tensor]


def lora(module: str, out: int, into: int, *, spelled: str = "kohya", rank: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(len(module) + out)
    down, up = {
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "peft": ("lora_A.weight", "lora_B.weight"),
        "diffsynth": ("lora_A.default.weight", "lora_B.default.weight"),
    }[spelled]
    return {
        f"{module}.{down}": torch.randn(rank, into, generator=generator),
        f"{module}.{up}": torch.randn(out, rank, generator=generator),
    }


def modules(path: Path) -> set[str]:
    return {key.partition(".lora_")[0] for key in load_file(path) if ".lora_" in key}


# Of models in no table, or of which these names do not tell the model: what is written has the very names of the file.
OPAQUE = {
    "kohya": ("lora_unet_tower_{}_self_attn_mix", "kohya"),
    "comfy": ("diffusion_model.tower.{}.self_attn.mix", "peft"),
    "comfy of a text encoder": ("text_encoders.qwen3_06b.transformer.model.layers.{}.self_attn.q_proj", "peft"),
    "lycoris": ("lycoris_tower_{}_self_attn_mix", "kohya"),
    "fused in the file": ("diffusion_model.double_blocks.{}.img_attn.qkv", "peft"),
    "apart in the file": ("diffusion_model.layers.{}.attention.to_q", "peft"),
}


@pytest.mark.parametrize("case", OPAQUE)
def test_names_come_back_letter_by_letter_where_the_format_stays(tmp_path: Path, case: str) -> None:
    name, spelled = OPAQUE[case]
    tensors: Tensors = {}
    for i in range(3):
        tensors |= lora(name.format(i), 18, 6, spelled=spelled)
    source = tmp_path / "a.safetensors"
    save_file(tensors, source)
    wanted = {name.format(i) for i in range(3)}

    loratools.resize(source, tmp_path / "resized.safetensors", rank=2)
    loratools.combine([(source, 0.5), source], tmp_path / "combined.safetensors")
    to = loratools.load(source).format
    loratools.convert(source, tmp_path / "converted.safetensors", format=to)

    for result in ("resized", "combined", "converted"):
        assert modules(tmp_path / f"{result}.safetensors") == wanted
    down = "lora_down" if spelled == "kohya" else "lora_A"
    # A module that is fused in the file gets its rank as a whole.
    assert load_file(tmp_path / "resized.safetensors")[f"{name.format(0)}.{down}.weight"].shape == (2, 6)


# Diffusers' name is one in all of these models, and their authors' is another in each.
SHARED = tuple(f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(3))


@pytest.mark.parametrize("format", ["comfy", "kohya", "bfl", "bare"])
def test_names_of_diffusers_that_several_models_have_are_one_question(tmp_path: Path, format: str) -> None:
    source = tmp_path / "a.safetensors"
    save_file({key: t for name in SHARED for key, t in lora(name, 6, 6, spelled="peft").items()}, source)

    with pytest.raises(UndecidedError) as caught:
        loratools.convert(source, tmp_path / "b.safetensors", format=format)
    with pytest.raises(UndecidedError) as caught_again:
        loratools.save(source, tmp_path / "b.safetensors", format=format)

    for error in (caught.value, caught_again.value):
        assert error.exit_code == 3
        assert f"the modules of '{source}' cannot be named as another format names them: it may be of" in error.message
        assert "krea2" in error.message
        assert error.hint == "name the model it is for: --base BASE"
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("format", "written"),
    [("comfy", "diffusion_model.blocks.{}.attn.wq"), ("kohya", "lora_unet_blocks_{}_attn_wq")],
)
def test_a_named_family_answers_how_names_of_diffusers_are_written(tmp_path: Path, format: str, written: str) -> None:
    source = tmp_path / "a.safetensors"
    save_file({key: t for name in SHARED for key, t in lora(name, 6, 6, spelled="peft").items()}, source)

    loratools.convert(source, tmp_path / "b.safetensors", format=format, base="krea2")

    assert modules(tmp_path / "b.safetensors") == {written.format(i) for i in range(3)}


def test_a_plan_and_a_partial_conversion_ask_the_question_too(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    encoder = lora("text_encoder.text_model.encoder.layers.0.mlp.fc1", 10, 6, spelled="peft")
    save_file(lora(SHARED[0], 6, 6, spelled="peft") | encoder, source)

    with pytest.raises(UndecidedError):
        loratools.convert(source, tmp_path / "b.safetensors", format="comfy", plan=True)
    with pytest.raises(UndecidedError):
        loratools.convert(source, tmp_path / "b.safetensors", format="comfy", allow_partial=True)


def test_names_of_no_family_are_one_error_that_names_them(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    header = {"lora_adapter_metadata": "{}"}
    names = ["transformer.tower.0.mix", "transformer.tower.1.mix"]
    save_file({k: t for n in names for k, t in lora(n, 6, 5, spelled="peft").items()}, source, header)

    with pytest.raises(UnsupportedError) as caught:
        loratools.convert(source, tmp_path / "b.safetensors", format="comfy")

    assert "none of its 2 module names is known in any model here" in caught.value.message
    assert caught.value.details == ("'tower.0.mix'", "'tower.1.mix'")


def test_a_result_that_the_format_of_its_inputs_cannot_name_is_planned_as_peft(tmp_path: Path) -> None:
    adapter = loratools.Adapter.from_factors({SHARED[0]: (torch.randn(2, 6), torch.randn(6, 2))})
    adapter = replace(adapter, format="comfy", notes={"image": {"metadata": {}, "family": None, "source": "comfy"}})

    chosen = format_that_holds(adapter, None, "comfy", base=None, requested=False)

    assert chosen.name == "peft"
    assert "comfy cannot hold the result: the modules of" in chosen.warnings[0]


@pytest.mark.parametrize(("encoders", "first"), [(1, "lora_te_"), (2, "lora_te1_"), (3, "lora_te1_")])
def test_text_encoders_alone_are_written_as_kohya_numbers_them(tmp_path: Path, encoders: int, first: str) -> None:
    source = tmp_path / "a.safetensors"
    module = "text_model.encoder.layers.0.mlp.fc1"
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")[:encoders]
    tensors = {k: t for part in parts for k, t in lora(f"{part}.{module}", 10, 6, spelled="peft").items()}
    save_file(tensors, source, {"lora_adapter_metadata": "{}"})

    loratools.convert(source, tmp_path / "b.safetensors", format="kohya")

    prefixes = (first, "lora_te2_", "lora_te3_")[:encoders]
    assert modules(tmp_path / "b.safetensors") == {f"{p}{module.replace('.', '_')}" for p in prefixes}


def test_a_header_of_another_family_than_the_given_base_is_a_warning(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora(SHARED[0], 6, 6, spelled="peft"), source, {"ss_base_model_version": "flux_2_dev"})

    report = loratools.convert(source, tmp_path / "b.safetensors", format="comfy", base="krea2")
    same = loratools.convert(source, tmp_path / "c.safetensors", format="diffusers", base="flux2")

    assert modules(tmp_path / "b.safetensors") == {"diffusion_model.blocks.0.attn.wq"}
    assert (
        "its header names flux2 ('flux_2_dev'), and the given base is of krea2: it is read as an adapter of the base"
    ) in report.warnings
    assert not any("header" in warning for warning in same.warnings)


def test_flat_names_of_two_models_are_a_question_and_a_config_answers(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora("lora_unet_layers_0_attention_out", 6, 6), source)
    with pytest.raises(UndecidedError) as caught:
        loratools.convert(source, tmp_path / "b.safetensors", format="diffusers")
    assert "z-image" in str(caught.value)
    assert caught.value.hint is not None
    assert "--base" in caught.value.hint
    config = tmp_path / "base" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"_class_name": "ZImageTransformer2DModel"}))
    loratools.convert(source, tmp_path / "b.safetensors", format="diffusers", base=config)
    assert modules(tmp_path / "b.safetensors") == {"transformer.layers.0.attention.to_out.0"}


def test_names_of_a_single_file_in_no_table_are_no_names_of_diffusers(tmp_path: Path) -> None:
    source, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    save_file(lora("lora_unet_tower_0_mix_in", 6, 5), source)
    save_file({"tower.0.mix_in.weight": torch.ones(6, 5)}, base)
    with pytest.raises(UnsupportedError) as caught:
        loratools.convert(source, tmp_path / "b.safetensors", format="diffusers", base=base)
    assert "diffusion_model.tower.0.mix_in" in caught.value.details[0]
    loratools.convert(source, tmp_path / "c.safetensors", format="comfy", base=base)
    assert modules(tmp_path / "c.safetensors") == {"diffusion_model.tower.0.mix_in"}


def test_two_spellings_of_one_model_meet(tmp_path: Path) -> None:
    one: Tensors = {}
    two: Tensors = {}
    for i in range(2):
        one |= lora(f"blocks.{i}.self_attn.q", 10, 6, spelled="diffsynth")
        two |= lora(f"diffusion_model.blocks.{i}.self_attn.q", 10, 6, spelled="peft")
    save_file(one, tmp_path / "diffsynth.safetensors")
    save_file(two, tmp_path / "comfy.safetensors")
    report = loratools.combine([tmp_path / "diffsynth.safetensors", tmp_path / "comfy.safetensors"])
    assert report.adapter is not None
    wanted = torch.zeros(10, 6, dtype=torch.float64)
    for tensors, name in ((one, "blocks.1.self_attn.q"), (two, "diffusion_model.blocks.1.self_attn.q")):
        a, b = sorted((k, t) for k, t in tensors.items() if k.startswith(name))
        wanted += b[1].double() @ a[1].double()
    update = report.adapter.updates["transformer.blocks.1.attn1.to_q"]
    product = update.parts["B"].read().double() @ update.parts["A"].read().double() * update.scale
    assert torch.allclose(product, wanted, atol=1e-5)
    assert sorted(report.adapter.updates) == [f"transformer.blocks.{i}.attn1.to_q" for i in range(2)]


def test_adapters_that_share_no_module_and_hang_elsewhere_are_refused(tmp_path: Path) -> None:
    save_file(lora("lora_unet_tower_0_mix", 6, 5), tmp_path / "a.safetensors")
    save_file(lora("diffusion_model.tower.0.mix", 6, 5, spelled="peft"), tmp_path / "b.safetensors")
    with pytest.raises((UndecidedError, MismatchError), match="shares no module"):
        loratools.combine([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "c")


def test_a_folder_of_peft_has_the_names_of_the_model_itself(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora("transformer.single_transformer_blocks.5.proj_out", 6, 30, spelled="peft"), source)
    report = loratools.resize(source, tmp_path / "small", rank=2)
    assert any("for diffusers" in warning for warning in report.warnings)
    names = set(load_file(tmp_path / "small" / "adapter_model.safetensors"))
    module = "base_model.model.single_transformer_blocks.5.proj_out"
    assert names == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}


def test_a_folder_of_peft_holds_one_part_of_a_pipeline(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    unet = lora("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", 8, 8, spelled="peft")
    text = lora("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", 9, 9, spelled="peft")
    save_file(unet | text, source)
    with pytest.raises(UnsupportedError) as caught:
        loratools.resize(source, tmp_path / "small", rank=2)
    assert "one of 2 parts of a pipeline" in caught.value.details[0]


def test_a_folder_of_peft_that_names_its_class_is_read_as_of_that_model(tmp_path: Path) -> None:
    folder = tmp_path / "klein"
    folder.mkdir()
    module = "single_transformer_blocks.3.attn.to_qkv_mlp_proj"
    save_file(lora(f"base_model.model.{module}", 54, 6, spelled="peft"), folder / "adapter_model.safetensors")
    mapping = {"base_model_class": "Flux2Transformer2DModel", "parent_library": "diffusers.models"}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "auto_mapping": mapping}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert list(loratools.load(folder).updates) == [f"transformer.{module}"]
    loratools.convert(folder, tmp_path / "b.safetensors", format="comfy")
    assert modules(tmp_path / "b.safetensors") == {"diffusion_model.single_blocks.3.linear1"}


def test_the_header_says_the_rank_and_alpha_that_the_tensors_have(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    module = "lora_unet_output_blocks_4_1_transformer_blocks_0_attn2_to_k"
    texts = {"ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_network_module": "networks.lora", "ss_tag": "cat"}
    save_file(lora(module, 8, 2048, rank=16) | {f"{module}.alpha": torch.tensor(8.0)}, source, texts)
    loratools.resize(source, tmp_path / "resized.safetensors", rank=5)
    loratools.convert(source, tmp_path / "converted.safetensors", format="kohya")
    with safe_open(tmp_path / "resized.safetensors", "pt") as file:
        resized, alpha = file.metadata(), float(file.get_tensor(f"{module}.alpha"))
    assert (resized["ss_network_dim"], float(resized["ss_network_alpha"]), resized["ss_tag"]) == ("5", alpha, "cat")
    with safe_open(tmp_path / "converted.safetensors", "pt") as file:
        converted = file.metadata()
    assert (converted["ss_network_dim"], converted["ss_network_alpha"]) == ("16", "8.0")


def test_names_as_inspect_prints_them_choose_modules_that_keep_their_own(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora("diffusion_model.blocks.0.self_attn.q", 6, 6, spelled="peft")
              | lora("diffusion_model.blocks.0.cross_attn.k", 6, 6, spelled="peft"), source)  # fmt: skip
    assert "transformer.blocks.0.attn1.to_q" in loratools.load(source).updates
    loratools.resize(source, tmp_path / "b.safetensors", rank=2, include=["transformer.*.attn1.*"])
    assert modules(tmp_path / "b.safetensors") == {"diffusion_model.blocks.0.self_attn.q"}


@pytest.mark.parametrize("spelled", ["lora_unet__blocks_0_self_attn_q", "lora_unet_blocks_0_self_attn_q"])
def test_both_prefixes_of_flat_names_are_read(tmp_path: Path, spelled: str) -> None:
    save_file(lora(spelled, 6, 6), tmp_path / "a.safetensors")
    assert list(loratools.load(tmp_path / "a.safetensors").updates) == ["transformer.blocks.0.attn1.to_q"]


@pytest.mark.parametrize("suffix", ["lora.down.weight", "lora_down.weight", "dora_scale"])
def test_what_has_the_shape_of_an_adapter_is_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    tensors = lora("tower.0.mix", 6, 5) | {f"tower.0.mix.{suffix}": torch.ones(6, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(loratools.LoraToolsError):
        loratools.inspect(tmp_path / "a.safetensors")
