from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file

import loratools
from loratools.checkpoints import open_checkpoint
from loratools.errors import FormatError, InputError, UnsupportedError

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def unet() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"conv_in.weight": torch.randn(5, 4, 3, 3, generator=g), f"{UNET}.weight": torch.randn(10, 6, generator=g)}


def text() -> dict[str, torch.Tensor]:
    return {f"{TEXT}.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(2))}


def vae() -> dict[str, torch.Tensor]:
    return {"encoder.conv_in.weight": torch.ones(3, 3, 1, 1)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    for name, weights, file in (
        ("unet", unet(), "diffusion_pytorch_model.safetensors"),
        ("text_encoder", text(), "model.safetensors"),
        ("vae", vae(), "diffusion_pytorch_model.fp16.safetensors"),
    ):
        (folder / name).mkdir(parents=True)
        save_file(weights, folder / name / file, {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"_class_name": name}))
    config = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    index: dict[str, Any] = {name: ["diffusers", "Some"] for name in ("unet", "vae", "scheduler")}
    index |= {name: ["transformers", "Some"] for name in ("text_encoder", "tokenizer")}
    index |= {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    save_file(unet(), folder / "v1-5-pruned.safetensors")
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_has_the_weights_of_all_its_components(base: Path) -> None:
    found = open_checkpoint(base)

    assert found.layout == "diffusers"
    assert set(found.weights) == {
        *(f"unet.{n}" for n in unet()), *(f"text_encoder.{n}" for n in text()), *(f"vae.{n}" for n in vae()),
    }  # fmt: skip
    assert [left.name for left in found.left_out] == ["v1-5-pruned.safetensors"]
    assert found.warnings == ("vae: the only weights are a variant, 'diffusion_pytorch_model.fp16.safetensors'",)


def test_an_adapter_of_denoiser_and_text_encoder_goes_to_both(base: Path, tmp_path: Path) -> None:
    # The text encoder by the name that transformers 5 gives it in memory.
    shapes = {f"unet.{UNET}": (10, 6), f"text_encoder.{TEXT.removeprefix('text_model.')}": (8, 8)}
    deltas = list(save_adapter(tmp_path / "adapter", shapes).values())

    report = loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    assert report.merged_weights == 2
    out = tmp_path / "out"
    assert files(out) == files(base) - {"v1-5-pruned.safetensors"} | {"loratools.json", "README.md"}
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == unet().keys()
    assert_added(merged[f"{UNET}.weight"], unet()[f"{UNET}.weight"], deltas[0])
    assert torch.equal(merged["conv_in.weight"], unet()["conv_in.weight"])
    merged = load_file(out / "text_encoder" / "model.safetensors")
    assert_added(merged[f"{TEXT}.weight"], text()[f"{TEXT}.weight"], deltas[1])
    assert (out / "vae/diffusion_pytorch_model.fp16.safetensors").read_bytes() == (
        base / "vae/diffusion_pytorch_model.fp16.safetensors"
    ).read_bytes()


def test_an_adapter_of_one_component_finds_it_in_the_pipeline(base: Path, tmp_path: Path) -> None:
    (delta,) = save_adapter(tmp_path / "adapter", {UNET: (10, 6)}).values()

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_added(merged[f"{UNET}.weight"], unet()[f"{UNET}.weight"], delta)


def test_each_component_is_cut_into_shards_of_its_own(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", {UNET: (10, 6)})

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out", max_shard_size=400)

    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors",
        f"{UNET}.weight": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    assert (tmp_path / "out/text_encoder/model.safetensors").is_file()
    again = open_checkpoint(tmp_path / "out")
    assert again.weights.keys() == open_checkpoint(base).weights.keys()


def test_the_config_of_each_component_says_the_dtype_that_it_is_stored_in(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "text_encoder/config.json").read_text()) | {"torch_dtype": "float32"}
    (base / "text_encoder/config.json").write_text(json.dumps(config))
    save_adapter(tmp_path / "adapter", {UNET: (10, 6)})

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out", dtype="float16")

    assert json.loads((tmp_path / "out/text_encoder/config.json").read_text()) == config | {"torch_dtype": "float16"}
    assert (tmp_path / "out/unet/config.json").read_bytes() == (base / "unet/config.json").read_bytes()
    assert load_file(tmp_path / "out/text_encoder/model.safetensors")[f"{TEXT}.weight"].dtype == torch.float16


def test_a_component_is_a_checkpoint_by_itself(base: Path, tmp_path: Path) -> None:
    (delta,) = save_adapter(tmp_path / "adapter", {UNET: (10, 6)}).values()

    loratools.merge(base / "unet", [tmp_path / "adapter"], tmp_path / "out")

    written = {"config.json", "diffusion_pytorch_model.safetensors", "loratools.json", "README.md"}
    assert files(tmp_path / "out") == written
    merged = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert_added(merged[f"{UNET}.weight"], unet()[f"{UNET}.weight"], delta)


def test_a_component_of_pickles_is_written_as_safetensors_and_that_is_said(base: Path, tmp_path: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet(), base / "unet" / "diffusion_pytorch_model.bin")
    save_adapter(tmp_path / "adapter", {UNET: (10, 6)})

    report = loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    assert "'unet' is stored as pickles; the result is written as safetensors" in report.warnings
    assert "unet/diffusion_pytorch_model.safetensors" in files(tmp_path / "out")
    assert "unet/diffusion_pytorch_model.bin" not in files(tmp_path / "out")


def test_a_component_without_readable_weights_is_an_error(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".msgpack"))

    with pytest.raises(FormatError, match="has no weights that can be read"):
        open_checkpoint(base)


def test_variants_beside_the_weights_are_left_out(base: Path) -> None:
    save_file(unet(), base / "unet" / "diffusion_pytorch_model.fp16.safetensors")

    left = {one.name: one.why for one in open_checkpoint(base).left_out}

    assert left["unet/diffusion_pytorch_model.fp16.safetensors"] == "another variant of the weights"


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".hidden", "a/b"])
def test_a_pipeline_that_names_folders_elsewhere_is_refused(base: Path, name: str) -> None:
    index = json.loads((base / "model_index.json").read_text()) | {name: ["diffusers", "Some"]}
    (base / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(InputError) as caught:
        open_checkpoint(base)

    assert caught.value.details == (f"'{name}'",)


def test_a_component_that_is_a_link_out_of_the_pipeline_is_refused(base: Path, tmp_path: Path) -> None:
    (base / "vae").rename(tmp_path / "elsewhere")
    (base / "vae").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(InputError, match="links that lead out"):
        open_checkpoint(base)


def test_a_weight_that_would_come_loose_in_a_pipeline_is_refused(base: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(6)
    save_file({"shared.weight": torch.randn(9, 8, generator=g), "encoder.x.weight": torch.randn(8, 8, generator=g)},
              base / "text_encoder" / "model.safetensors")  # fmt: skip
    (base / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_adapter(tmp_path / "adapter", {"text_encoder.encoder.embed_tokens": (9, 8)})

    with pytest.raises(UnsupportedError, match="no longer be tied"):
        loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")
