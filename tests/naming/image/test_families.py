"""Tables of module names against the models of diffusers and transformers, and against diffusers' own converters."""

from __future__ import annotations

import peers
import pytest
import torch
from naming.image.published import SDXL, SDXL_REFINER

from loratools.naming.image.evidence import denoisers
from loratools.naming.image.family import Family
from loratools.naming.image.text_encoders import families as encoders

SD = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
# family, and which of its models -> class of diffusers and its config; small in depth only, with everything switched on
# that has weights.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "sd": ("UNet2DConditionModel", dict(SD)),
    "sdxl": ("UNet2DConditionModel", dict(SDXL)),
    "sdxl-refiner": ("UNet2DConditionModel", dict(SDXL_REFINER)),
    "flux": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "wan": ("WanTransformer3DModel", {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "wan, VACE": ("WanVACETransformer3DModel", {"num_layers": 2, "vace_layers": [0, 1]}),
    "wan, Animate": ("WanAnimateTransformer3DModel", {"num_layers": 6}),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "hunyuan-video, FramePack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 2, "has_image_proj": True, "has_clean_x_embedder": True},
    ),
    "hunyuan-video15": ("HunyuanVideo15Transformer3DModel", {"num_layers": 2, "use_meanflow": True}),
    "hunyuan-image": (
        "HunyuanImageTransformer2DModel",
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "text_embed_2_dim": 1472,
            "guidance_embeds": True,
            "use_meanflow": True,
        },
    ),
    "hunyuan-dit": ("HunyuanDiT2DModel", {"in_channels": 4, "patch_size": 2, "num_layers": 4}),
    "ltx": ("LTXVideoTransformer3DModel", {"num_layers": 2}),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {
            "num_layers": 2,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {"num_layers": 2, "extra_pos_embed_type": None, "use_crossattn_projection": True},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [4096, 4096],
            "llama_layers": [0, 1],
        },
    ),
    "pixart": ("PixArtTransformer2DModel", {"num_layers": 2, "caption_channels": 4096}),
    "auraflow": ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 2, "num_single_dit_layers": 2}),
    "sana": ("SanaTransformer2DModel", {"num_layers": 2}),
    "sana, Sprint": (
        "SanaTransformer2DModel",
        {"num_layers": 2, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    "cogvideox": ("CogVideoXTransformer3DModel", {"num_layers": 2, "ofs_embed_dim": 512}),
    # The last of its 48 blocks is another.
    "mochi": ("MochiTransformer3DModel", {}),
    "ace-step": ("AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    "kandinsky5": ("Kandinsky5Transformer3DModel", {"num_text_blocks": 1, "num_visual_blocks": 2}),
    "qwen-image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    "z-image": ("ZImageTransformer2DModel", {"n_layers": 2}),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2}),
    "krea2": ("Krea2Transformer2DModel", {}),
}


def family(name: str) -> Family:
    return next(f for f in (*denoisers(), *encoders()) if f.name == name.partition(",")[0])


def modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules with a weight that an adapter may train: all but the norms, of which few adapters know."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.modules.conv._ConvNd)}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, torch.nn.Module]]:
    import diffusers

    with torch.device("meta"):
        return {name: modules(getattr(diffusers, cls)(**config)) for name, (cls, config) in MODELS.items()}


@peers.needs("diffusers")
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_the_model_is_in_the_table_of_its_family(
    name: str, built: dict[str, dict[str, torch.nn.Module]]
) -> None:
    table = family(name)
    assert len(built[name]) > 20
    for module in built[name]:
        place = table.find(module)
        assert place is not None, module
        assert place.targets == (module,)


@peers.needs("diffusers")
@pytest.mark.parametrize("name", MODELS)
def test_flattened_names_are_told_apart(name: str, built: dict[str, dict[str, torch.nn.Module]]) -> None:
    table = family(name)
    for module in built[name]:
        place = table.find(module.replace(".", "_"), flat=True)
        assert place is not None, module
        assert place.targets == (module,)


@peers.needs("diffusers")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flat", [False, True])
def test_names_of_the_first_publication_come_back(
    name: str, flat: bool, built: dict[str, dict[str, torch.nn.Module]]
) -> None:
    table = family(name)
    for spelling in table.rules:
        for module in built[name]:
            fused = table.back(module, spelling)
            assert fused is not None, module
            assert fused.place.targets[fused.part] == module
            assert table.find(fused.name.replace(".", "_") if flat else fused.name, flat=flat) == fused.place


def test_a_number_that_the_model_does_not_have_is_not_known() -> None:
    assert family("sd").find("down_blocks.4.resnets.0.conv1") is None
    assert family("sdxl").find("down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q") is None
    assert family("flux").find("double_blocks.3.img_mlp.1") is None
    assert family("flux").find("double_blocks_3_img_mlp_1", flat=True) is None


@peers.needs("diffusers")
@pytest.mark.parametrize(("name", "config"), [("sd", SD), ("sdxl", SDXL)])
def test_diffusers_reads_the_ldm_names_of_every_layer_the_same(
    name: str, config: dict[str, object], built: dict[str, dict[str, torch.nn.Module]]
) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    table = family(name)
    original: dict[str, str] = {}
    for module in built[name]:
        fused = table.back(module, "original")
        assert fused is not None
        original[f"model.diffusion_model.{fused.name}.weight"] = module
    # Its values are the names that we expect, so that what it calls them can be compared. It also needs the norms.
    tokens = {key: torch.full((1,), float(i)) for i, key in enumerate(original)}
    norms = {
        key.rpartition(".proj_in.")[0] + ".norm.weight": torch.full((1,), -1.0)
        for key in original
        if ".proj_in." in key
    }
    full = {
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": None,
        "num_class_embeds": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **config,
    }
    biased = {k.replace(".weight", ".bias"): torch.full((1,), -1.0) for k in [*tokens, *norms, *_norms()]}
    converted = convert_ldm_unet_checkpoint(
        {**{k: torch.full((1,), -1.0) for k in _norms()}, **norms, **biased, **tokens}, full
    )
    names = list(original.values())
    got = {key.removesuffix(".weight"): names[int(v.item())] for key, v in converted.items() if v.item() >= 0}
    assert {k: v for k, v in got.items() if k != v} == {}
    assert len(got) == len(names)


def _norms() -> list[str]:
    return ["model.diffusion_model.out.0.weight"]


def test_text_encoders_of_transformers_are_in_the_tables() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=2))
        t5 = T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu"))
    for model, name in ((clip, "clip"), (t5, "t5")):
        for module in modules(model):
            full = module if module.startswith(("text_", "encoder.block")) else f"text_model.{module}"
            assert family(name).find(full) is not None, module
            assert family(name).find(full.replace(".", "_"), flat=True) is not None, module
