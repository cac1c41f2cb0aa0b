"""Single files of image models, held against the conversions of diffusers: every weight, by name and value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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


def published(
    model: torch.nn.Module, family: str, *, prefix: str = PREFIX, others: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Random weights under the names of the family's table, of the shapes that a model of diffusers has.

    others: published names of parameters that are no module's weight or bias, by patterns of those of diffusers.
    """
    table = family_named(family)
    assert table is not None
    g = torch.Generator().manual_seed(4)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        fused = table.back(module, "original")
        if fused is None or leaf not in ("weight", "bias"):
            pattern = next((p for p in others or {} if re.fullmatch(p, name)), None)
            assert pattern is not None, name
            original = re.sub(pattern, (others or {})[pattern], name)
            found[f"{prefix}{original}"] = torch.randn(parameter.shape, generator=g)
            continue
        if len(fused.place.targets) > 1:
            parts = [model.get_parameter(f"{t}.{leaf}").shape for t in fused.place.targets]
            shape = (sum(part[0] for part in parts), *parts[0][1:])
        else:
            shape = tuple(parameter.shape)
        stored = "scale" if "query_norm" in fused.name or "key_norm" in fused.name else leaf
        found.setdefault(f"{prefix}{fused.name}.{stored}", torch.randn(shape, generator=g))
    return found


def assert_same(checkpoint: Mapping[str, Tensor], expected: Mapping[str, Tensor], component: str) -> None:
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


@dataclass(frozen=True)
class Published:
    """A model of diffusers, small and with the blocks of a published one, and the conversion of its checkpoint.

    others    published names of parameters that are no module's weight or bias: see `published`
    extra     shapes of what a published checkpoint has beside them
    reshaped  shapes of what it has in another shape than diffusers
    """

    family: str
    model: str
    config: dict[str, Any]
    convert: str
    others: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = PREFIX


_WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "text_dim": 10,
    "freq_dim": 6,
    "in_channels": 4,
    "out_channels": 4,
}
_WAN_TABLES = {r"scale_shift_table": "head.modulation", r"((?:vace_)?blocks\.\d+)\.scale_shift_table": r"\1.modulation"}
_MOTION = "motion_encoder.enc.net_app.convs"
CHECKPOINTS = {
    "sd3": Published(
        "sd3",
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "caption_projection_dim": 12,
            "in_channels": 4,
            "joint_attention_dim": 10,
            "pooled_projection_dim": 14,
            "sample_size": 8,
        },
        "convert_sd3_transformer_checkpoint_to_diffusers",
        extra={"pos_embed": (1, 16, 12)},
    ),
    "ltx": Published(
        "ltx",
        "LTXVideoTransformer3DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "cross_attention_dim": 12,
            "caption_channels": 10,
            "in_channels": 4,
            "out_channels": 4,
        },
        "convert_ltx_transformer_checkpoint_to_diffusers",
        others={r"(.*scale_shift_table)": r"\1"},
    ),
    "ltx2": Published(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "caption_channels": 10,
            "in_channels": 4,
            "out_channels": 4,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "gated_attn": True,
            "audio_gated_attn": True,
        },
        "convert_ltx2_transformer_to_diffusers",
        others={
            r"(.*)video_a2v_cross_attn_scale_shift_table": r"\1scale_shift_table_a2v_ca_video",
            r"(.*)audio_a2v_cross_attn_scale_shift_table": r"\1scale_shift_table_a2v_ca_audio",
            r"(.*scale_shift_table)": r"\1",
        },
    ),
    "cosmos": Published(
        "cosmos",
        "CosmosTransformer3DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_embed_dim": 10,
            "adaln_lora_dim": 4,
            "in_channels": 4,
            "out_channels": 4,
            "extra_pos_embed_type": None,
        },
        "convert_cosmos_transformer_checkpoint_to_diffusers",
        prefix="net.",
    ),
    "hidream": Published(
        "hidream",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [10, 12],
            "text_emb_dim": 6,
            "axes_dims_rope": (4, 4),
            "llama_layers": [0, 1],
            "num_routed_experts": 2,
        },
        "convert_hidream_transformer_to_diffusers",
    ),
    "auraflow": Published(
        "auraflow",
        "AuraFlowTransformer2DModel",
        {
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 6,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "caption_projection_dim": 12,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        "convert_auraflow_transformer_checkpoint_to_diffusers",
        others={"register_tokens": "register_tokens", r"pos_embed\.pos_embed": "positional_encoding"},
        prefix="",
    ),
    "sana": Published(
        "sana",
        "SanaTransformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 6,
            "cross_attention_dim": 12,
            "caption_channels": 10,
            "in_channels": 4,
            "out_channels": 4,
        },
        "convert_sana_transformer_to_diffusers",
        others={
            "scale_shift_table": "final_layer.scale_shift_table",
            r"transformer_blocks\.(\d+)\.scale_shift_table": r"blocks.\1.scale_shift_table",
        },
        extra={"pos_embed": (1, 4), "y_embedder.y_embedding": (3, 10)},
    ),
    "mochi": Published(
        "mochi",
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": 10,
            "time_embed_dim": 6,
        },
        "convert_mochi_transformer_checkpoint_to_diffusers",
        others={"pos_frequencies": "pos_frequencies"},
    ),
    "wan": Published(
        "wan",
        "WanTransformer3DModel",
        {**_WAN, "image_dim": 14, "added_kv_proj_dim": 24},
        "convert_wan_transformer_to_diffusers",
        others=_WAN_TABLES,
    ),
    "VACE": Published(
        "wan",
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0, 1], "vace_in_channels": 6},
        "convert_wan_transformer_to_diffusers",
        others=_WAN_TABLES,
    ),
    "Animate": Published(
        "wan",
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "num_layers": 2,
            "latent_channels": 3,
            "in_channels": 10,
            "image_dim": 14,
            "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": dict.fromkeys(("4", "8", "16", "32", "64", "128", "256", "512"), 4),
            "motion_encoder_size": 512,
            "motion_style_dim": 8,
            "motion_dim": 3,
            "motion_encoder_dim": 10,
            "face_encoder_hidden_dim": 6,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        "convert_wan_transformer_to_diffusers",
        others={
            **_WAN_TABLES,
            r"motion_encoder\.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
            r"motion_encoder\.conv_in\.act_fn\.bias": f"{_MOTION}.0.1.bias",
            **{
                rf"motion_encoder\.res_blocks\.{i}\.conv{n}\.act_fn\.bias": f"{_MOTION}.{i + 1}.conv{n}.{n}.bias"
                for i in range(7)
                for n in (1, 2)
            },
            r"(face_encoder\.padding_tokens)": r"\1",
        },
        reshaped={rf"{_MOTION}\..*\.bias": (1, -1, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_checkpoint_is_found_as_diffusers_converts_it(name: str) -> None:
    case = CHECKPOINTS[name]
    model = getattr(diffusers, case.model)(**case.config)
    checkpoint = published(model, case.family, prefix=case.prefix, others=case.others)
    for pattern, shape in case.reshaped.items():
        for key in [k for k in checkpoint if re.fullmatch(re.escape(case.prefix) + pattern, k)]:
            checkpoint[key] = checkpoint[key].reshape(shape)
    checkpoint |= {f"{case.prefix}{key}": torch.zeros(shape) for key, shape in case.extra.items()}

    expected = getattr(converting, case.convert)(dict(checkpoint), config={**model.config})

    parameters = dict(model.named_parameters())
    assert parameters.keys() <= expected.keys()
    table = family_named(case.family)
    assert table is not None
    modules = {n: expected[n] for n in parameters if table.back(n.rpartition(".")[0], "original") is not None}
    modules = {n: t for n, t in modules.items() if n.endswith(("weight", "bias"))}
    assert len(modules) > 0.8 * len(parameters)
    assert_same(checkpoint, modules, "transformer")
