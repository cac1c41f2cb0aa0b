"""Image files as strangers made them: odd alphas, magnitudes, biases, headers, and modules without a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import FormatError, UndecidedError, UnsupportedError

Tensors = dict[str, torch.Tensor]
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
SQUARE, WIDE = f"{BLOCK}_attn1_to_q", f"{BLOCK}_attn2_to_k"
SQUARE_MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE_MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def factors(name: str, out: int, into: int, rank: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(out + rank)
    return {
        f"{name}.lora_down.weight": torch.randn(rank, into, generator=generator),
        f"{name}.lora_up.weight": torch.randn(out, rank, generator=generator),
    }


def stored(tmp_path: Path, extra: Tensors, header: dict[str, str] | None = None) -> Path:
    """A file of Stable Diffusion 1 with one square module, one of other widths, and what is strange."""
    path = tmp_path / "a.safetensors"
    save_file(factors(SQUARE, 320, 320) | factors(WIDE, 320, 768) | extra, path, header)
    return path


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(2)],
    ids=["one axis", "two axes", "bfloat16", "integer"],
)
def test_an_alpha_of_any_shape_and_dtype_is_one_number(tmp_path: Path, alpha: torch.Tensor) -> None:
    adapter = loratools.load(stored(tmp_path, {f"{SQUARE}.alpha": alpha}))

    assert adapter.updates[SQUARE_MODULE].scale == 2.0 / 4
    assert adapter.updates[WIDE_MODULE].scale == 1.0


def test_a_negative_alpha_turns_the_update_round(tmp_path: Path) -> None:
    adapter = loratools.load(stored(tmp_path, {f"{SQUARE}.alpha": torch.tensor(-2.0)}))

    assert adapter.updates[SQUARE_MODULE].scale == -0.5


@pytest.mark.parametrize("shape", [(768, 1), (1, 320), (7, 1), (1, 1)])
def test_a_magnitude_along_no_axis_of_the_module_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = stored(tmp_path, {f"{WIDE}.dora_scale": torch.ones(shape)})

    with pytest.raises(FormatError) as caught:
        loratools.load(path)

    assert f"a magnitude {list(shape)} that is neither of outputs nor of inputs" in caught.value.details[0]


def test_a_difference_of_a_bias_needs_the_outputs_of_its_module(tmp_path: Path) -> None:
    path = stored(tmp_path, {f"{SQUARE}.diff_b": torch.ones(7)})

    with pytest.raises(FormatError) as caught:
        loratools.load(path)

    assert caught.value.details == (f"'{SQUARE}' has 320 outputs, and a difference of its bias of [7]",)


def test_a_module_of_rank_0_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(factors(SQUARE, 320, 320, rank=0) | factors(WIDE, 320, 768), path)

    with pytest.raises(FormatError) as caught:
        loratools.load(path)
    loratools.resize(path, tmp_path / "b.safetensors", rank=2, exclude=[f"{SQUARE}.*"])

    assert "empty, or no matrices" in caught.value.details[0]
    assert {name.partition(".")[0] for name in load_file(tmp_path / "b.safetensors")} == {WIDE}


def test_embeddings_in_a_file_of_factors_can_be_left_out_as_the_hint_says(tmp_path: Path) -> None:
    path = stored(tmp_path, {"bundle_emb.token.clip_l": torch.ones(2, 768)})

    with pytest.raises(UnsupportedError) as caught:
        loratools.resize(path, tmp_path / "b.safetensors", rank=2)
    report = loratools.resize(path, tmp_path / "b.safetensors", rank=2, exclude=["bundle_emb.*"])

    hint = "leave the embeddings out with --exclude GLOB; programs load them from a file of their own"
    assert caught.value.hint == hint
    assert any("'bundle_emb.token.clip_l'" in warning for warning in report.warnings)


def test_names_of_two_formats_in_one_file_are_a_question(tmp_path: Path) -> None:
    other = factors("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v", 320, 320)

    with pytest.raises(UndecidedError, match="could be comfy or kohya"):
        loratools.load(stored(tmp_path, other))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev/lora flux-1-dev/lora"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ({"loratools.family": "flux"}, "flux"),
    ],
)
def test_a_header_of_another_family_than_the_names_is_a_warning(
    tmp_path: Path, header: dict[str, str], text: str
) -> None:
    adapter = loratools.load(stored(tmp_path, {}, header))

    family = "sdxl" if "sdxl" in text else "flux"
    warning = f"its header names {family} ('{text}'), and its modules are those of sd, as which it is read"
    assert adapter.warnings == (warning,)
    assert SQUARE_MODULE in adapter.updates


@pytest.mark.parametrize("header", [{"ss_base_model_version": "sd_v1"}, {"loratools.family": "no family"}, {}])
def test_a_header_that_agrees_or_names_no_family_is_no_warning(tmp_path: Path, header: dict[str, str]) -> None:
    assert loratools.load(stored(tmp_path, {}, header)).warnings == ()


@pytest.mark.parametrize(
    "header",
    [
        {"ss_tag_frequency": "{no JSON"},
        {"ss_tag_frequency": "[" * 5000},
        {"ss_tag_frequency": json.dumps({"folder": {"tag": 10**400}})},
        {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"},
        {"ss_network_args": "{broken"},
        {"ss_steps": "abc", "ss_epoch": "-1", "ss_training_started_at": "1e999"},
        {"modelspec.date": "not a date"},
    ],
)
def test_texts_of_the_header_that_mean_nothing_stop_no_verb(tmp_path: Path, header: dict[str, str]) -> None:
    path = stored(tmp_path, {}, header)

    loratools.inspect(path).to_dict()
    report = loratools.resize(path, tmp_path / "b.safetensors", rank=2)

    assert {module.rank for module in report.modules} == {2}


def test_invalid_values_in_the_header_of_diffusers_are_said_of_that_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": "8"})}
    name = SQUARE_MODULE
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 320), f"{name}.lora_B.weight": torch.ones(320, 4)}, path, metadata
    )

    with pytest.raises(FormatError) as caught:
        loratools.load(path)

    assert caught.value.message == f"'lora_adapter_metadata' of '{path}' has 1 invalid value"
    assert caught.value.details == ('lora_alpha = "8": an alpha is a finite number',)
