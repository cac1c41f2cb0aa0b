"""Single files of image models, held against the conversions of diffusers: every weight, by name and value."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from naming.language.test_aliases import assembled
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.naming.image.evidence import family_named
from loratools.naming.image.original import original_aliases

pytestmark = peers.needs("diffusers")
diffusers = peers.load("diffusers")
converting = peers.load("diffusers.loaders.single_file_utils")

PREFIX = "model.diffusion_model."


def unet(**more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=2, layers_per_block=2, **more)


def sd1() -> diffusers.UNet2DConditionModel:
    return unet(block_out_channels=(4, 6, 8, 8), cross_attention_dim=768, attention_head_dim=2)


def sdxl() -> diffusers.UNet2DConditionModel:
    return unet(
        block_out_channels=(4, 6, 8), cross_attention_dim=2048, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=14,
    )  # fmt: skip


def published(model: torch.nn.Module, family: str) -> dict[str, Tensor]:
    """Random weights under the names of the family's table, of the shapes that a model of diffusers has."""
    table = family_named(family)
    assert table is not None
    g = torch.Generator().manual_seed(4)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        fused = table.back(module, "original")
        assert fused is not None, module
        if len(fused.place.targets) > 1:
            parts = [model.get_parameter(f"{t}.{leaf}").shape for t in fused.place.targets]
            shape = (sum(part[0] for part in parts), *parts[0][1:])
        else:
            shape = tuple(parameter.shape)
        stored = "scale" if "query_norm" in fused.name or "key_norm" in fused.name else leaf
        found.setdefault(f"{PREFIX}{fused.name}.{stored}", torch.randn(shape, generator=g))
    return found


def assert_same(checkpoint: dict[str, Tensor], expected: dict[str, Tensor], component: str) -> None:
    known = original_aliases({name: tuple(t.shape) for name, t in checkpoint.items()})
    for name, values in expected.items():
        assert torch.equal(assembled(known[f"{component}.{name}"], checkpoint), values), name
    assert len(expected) > 20


@pytest.mark.parametrize(("family", "make"), [("sd", sd1), ("sdxl", sdxl)])
def test_unet_is_found_as_diffusers_converts_it(family: str, make: Any) -> None:
    model = make()
    checkpoint = published(model, family)
    config = {**model.config, "num_class_embeds": None}

    expected = converting.convert_ldm_unet_checkpoint(dict(checkpoint), config)

    assert expected.keys() == dict(model.named_parameters()).keys()
    assert_same(checkpoint, expected, "unet")


def test_an_adapter_of_diffusers_merged_into_a_single_file_computes_what_it_did(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    model = sd1()
    checkpoint = published(model, "sd")
    save_file(checkpoint, tmp_path / "sd.safetensors")
    config = {**model.config, "num_class_embeds": None}

    def loaded(values: dict[str, Tensor]) -> diffusers.UNet2DConditionModel:
        made = sd1().eval()
        made.load_state_dict({n: 0.3 * t for n, t in converting.convert_ldm_unet_checkpoint(values, config).items()})
        return made.double()

    trained = peft.get_peft_model(
        loaded(dict(checkpoint)).float(),
        peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False,
                        target_modules=["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj", "conv_in"]),
    )  # fmt: skip
    trained.save_pretrained(tmp_path / "adapter")

    # The model is three tenths of what the file holds, so that its numbers stay small; so is what is added.
    loratools.merge(tmp_path / "sd.safetensors", [(tmp_path / "adapter", 1 / 0.3)], tmp_path / "out")

    g = torch.Generator().manual_seed(7)
    inputs = torch.randn(1, 4, 8, 8, generator=g).double(), 7, torch.randn(1, 5, 768, generator=g).double()
    with torch.no_grad():
        merged = loaded(load_file(tmp_path / "out" / "sd.safetensors"))(*inputs).sample
        expected = trained.double()(*inputs).sample
        plain = loaded(dict(checkpoint))(*inputs).sample
    assert float((merged - expected).abs().max()) < 1e-4 * float((plain - expected).abs().max())


def test_flux_is_found_as_diffusers_converts_it() -> None:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=19, num_single_layers=38, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, axes_dims_rope=(2, 2, 0), guidance_embeds=True,
    )  # fmt: skip
    checkpoint = published(model, "flux")

    # The conversion has the width of the published model in it; here it is one that fits into a test.
    source = inspect.getsource(converting.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("3072") == 1
    namespace = dict(vars(converting))
    exec(source.replace("3072", "8"), namespace)
    expected = namespace["convert_flux_transformer_checkpoint_to_diffusers"](dict(checkpoint))

    assert expected.keys() == dict(model.named_parameters()).keys()
    assert_same(checkpoint, expected, "transformer")


def test_open_clip_is_found_as_diffusers_converts_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=31, hidden_size=8, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, projection_dim=6,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    g = torch.Generator().manual_seed(5)
    prefix = "conditioner.embedders.1.model."
    shapes = {
        "token_embedding.weight": (31, 8), "positional_embedding": (9, 8), "ln_final.weight": (8,),
        "ln_final.bias": (8,), "text_projection": (8, 6),
    }  # fmt: skip
    for i in range(2):
        shapes |= {
            f"transformer.resblocks.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": (8,), "ln_1.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,),
                "attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,),
                "attn.out_proj.weight": (8, 8), "attn.out_proj.bias": (8,),
                "mlp.c_fc.weight": (14, 8), "mlp.c_fc.bias": (14,), "mlp.c_proj.weight": (8, 14),
                "mlp.c_proj.bias": (8,),
            }.items()
        }  # fmt: skip
    checkpoint = {prefix + name: torch.randn(shape, generator=g) for name, shape in shapes.items()}

    expected = converting.convert_open_clip_checkpoint(model, dict(checkpoint), prefix=prefix)

    checkpoint[f"{PREFIX}out.2.weight"] = torch.zeros(4, 4, 3, 3)  # a file of such an encoder has a denoiser too
    expected.pop("text_model.embeddings.position_ids", None)
    assert_same(checkpoint, expected, "text_encoder_2")
