"""Published image and video models: their classes in diffusers at full size, for names and shapes of every module.

Models are made on torch's `meta` device, without memory for their weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from loratools.formats.image_parts.spellings import grouped
from loratools.naming.image.evidence import family_named
from loratools.naming.image.family import Family
from loratools.tensors.lazy import LazyTensor

Shapes = dict[str, tuple[int, int]]
# The UNet of Stable Diffusion XL.
SDXL: dict[str, object] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The refiner's.
SDXL_REFINER: dict[str, object] = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
_HEADS_OF_128 = {"attention_head_dim": 128}


class Size(NamedTuple):
    """A published model: what differs from the defaults of its class in diffusers, and where its sizes are stated.

    Attributes:
        config: Fields of its class, where they are not the defaults.
        source: Repository, file and name of the configuration that states the sizes, or the class with these defaults.
    """

    config: dict[str, object]
    source: str


# Scripts of diffusers at 58eb52c, musubi-tuner at 30c658c, sd-scripts at 48d368f, DiffSynth-Studio at fed7b18. Those
# of one model stand in the class's defaults: the class was written for it, and says so in its documentation.
_SCRIPTS = "diffusers scripts/convert_{}_to_diffusers.py"
_MUSUBI = "musubi-tuner src/musubi_tuner/{}"
# family -> class of diffusers, and each published size by its name; the first is the one that is tried everywhere.
PUBLISHED: dict[str, tuple[str, dict[str, Size]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {"dev": Size({"guidance_embeds": True}, _SCRIPTS.format("flux") + ": 19 and 38 blocks, 3072 wide")},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "dev": Size(
                {"num_layers": 8, "num_single_layers": 48, **_HEADS_OF_128, "num_attention_heads": 48,
                 "joint_attention_dim": 15360},
                _SCRIPTS.format("flux2") + ": flux2-dev",
            ),
            "klein 9B": Size(
                {"num_layers": 8, "num_single_layers": 24, **_HEADS_OF_128, "num_attention_heads": 32,
                 "joint_attention_dim": 12288, "guidance_embeds": False},
                _SCRIPTS.format("flux2") + ": klein-9b",
            ),
            "klein 4B": Size(
                {"num_layers": 5, "num_single_layers": 20, **_HEADS_OF_128, "num_attention_heads": 24,
                 "joint_attention_dim": 7680, "guidance_embeds": False},
                _SCRIPTS.format("flux2") + ": klein-4b",
            ),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "3.5 medium": Size(
                {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm",
                 "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
                _SCRIPTS.format("sd3") + ": heads as many as blocks, of 64; pos_embed of 384; attn2 in the first 13",
            ),
            "3 medium": Size(
                {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                 "pos_embed_max_size": 192},
                _SCRIPTS.format("sd3") + ": heads as many as blocks, of 64; no norms of queries and keys",
            ),
            "3.5 large": Size(
                {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
                 "pos_embed_max_size": 192},
                _SCRIPTS.format("sd3") + ": heads as many as blocks, of 64; norms of queries and keys",
            ),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "2.1 T2V 14B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
                _SCRIPTS.format("wan") + ": Wan-T2V-14B",
            ),
            "2.1 T2V 1.3B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
                _SCRIPTS.format("wan") + ": Wan-T2V-1.3B",
            ),
            "2.1 I2V 14B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36,
                 "image_dim": 1280, "added_kv_proj_dim": 5120},
                _SCRIPTS.format("wan") + ": Wan-I2V-14B-480p",
            ),
            "2.2 TI2V 5B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48,
                 "out_channels": 48},
                _SCRIPTS.format("wan") + ": Wan2.2-TI2V-5B",
            ),
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "T/2 cfgdistill": Size(
                {**_HEADS_OF_128, "num_attention_heads": 24, "num_layers": 20, "num_single_layers": 40,
                 "text_embed_dim": 4096, "guidance_embeds": True},
                _SCRIPTS.format("hunyuan_video") + ": HYVideo-T/2-cfgdistill",
            )
        },
    ),
    "hunyuan-video15": (
        "HunyuanVideo15Transformer3DModel",
        {"all": Size({}, _MUSUBI.format("hunyuan_video_1_5/hunyuan_video_1_5_models.py") + ": 54 blocks, 2048 wide")},
    ),
    "hunyuan-image": (
        "HunyuanImageTransformer2DModel",
        {
            "2.1": Size(
                {**_HEADS_OF_128, "num_attention_heads": 28, "num_layers": 20, "num_single_layers": 40,
                 "text_embed_dim": 3584, "text_embed_2_dim": 1472},
                _SCRIPTS.format("hunyuan_image") + ": transformer_config",
            ),
            "2.1 distilled": Size(
                {"guidance_embeds": True, "text_embed_2_dim": 1472, "use_meanflow": True},
                _SCRIPTS.format("hunyuan_image") + ": transformer_config of the distilled one",
            ),
        },
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {"all": Size({}, _MUSUBI.format("qwen_image/qwen_image_model.py") + ": 60 blocks, 24 heads of 128")},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"all": Size({}, _MUSUBI.format("zimage/zimage_config.py") + ": 30 layers and 2 refiners, 3840 wide")},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"2B": Size({"cap_feat_dim": 2304}, "sd-scripts library/lumina_models.py: get_2b_config")},
    ),
    # Its authors' package has the class, and diffusers has not.
    "omnigen2": (
        "OmniGen2Transformer2DModel",
        {
            "all": Size(
                {"hidden_size": 2520, "num_layers": 32, "num_refiner_layers": 2, "num_attention_heads": 21,
                 "num_kv_heads": 7, "multiple_of": 256, "text_feat_dim": 2048, "patch_size": 2, "in_channels": 16},
                "OmniGen2 options/ft.yml at 0f72fa9: arch_opt; ComfyUI comfy/model_detection.py: omnigen2",
            )
        },
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {"all": Size({}, _MUSUBI.format("krea2/krea2_utils.py") + ": 28 layers, 6144 wide, 48 heads, 12 of keys")},
    ),
    "ideogram4": (
        "Ideogram4Transformer2DModel",
        {"all": Size({}, _MUSUBI.format("ideogram4/ideogram4_model.py") + ": 34 layers, 4608 wide, 18 heads")},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "2B": Size({}, _SCRIPTS.format("ltx") + ": 28 layers, 32 heads of 64"),
            "13B": Size(
                {"num_layers": 48, **_HEADS_OF_128, "cross_attention_dim": 4096},
                _SCRIPTS.format("ltx") + ": 0.9.7",
            ),
        },
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {
            "2.0": Size({}, _SCRIPTS.format("ltx2") + ": 2.0"),
            "2.3": Size(
                dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True),
                _SCRIPTS.format("ltx2") + ": 2.3",
            ),
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {
            "2B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 16, "num_layers": 28, "extra_pos_embed_type": None,
                 "text_embed_dim": 1024},
                _SCRIPTS.format("cosmos") + ": Cosmos-2.0-Diffusion-2B-Text2Image, which Anima has as well",
            ),
            "14B": Size(
                {**_HEADS_OF_128, "num_attention_heads": 40, "num_layers": 36, "extra_pos_embed_type": None,
                 "text_embed_dim": 1024},
                _SCRIPTS.format("cosmos") + ": Cosmos-2.0-Diffusion-14B-Text2Image",
            ),
        },
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "I1": Size(
                {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096],
                 "llama_layers": [*range(32), *[31] * 16]},
                "ComfyUI comfy/model_detection.py: hidream; HiDream-I1 hi_diffusers/models/transformers (16 and 32)",
            )
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"sigma": Size({"caption_channels": 4096}, _SCRIPTS.format("pixart_sigma") + ": 28 layers, 16 heads of 72")},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {"all": Size({}, "ComfyUI comfy/ldm/aura/mmdit.py at 0a1ae64: MMDiT, 4 and 32 layers, 3072 wide")},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "1.6B": Size(
                {"num_attention_heads": 70, "attention_head_dim": 32, "num_cross_attention_heads": 20,
                 "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "num_layers": 20},
                _SCRIPTS.format("sana") + ": SanaMS_1600M_P1_D20",
            ),
            "0.6B": Size(
                {"num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 16,
                 "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "num_layers": 28},
                _SCRIPTS.format("sana") + ": SanaMS_600M_P1_D28",
            ),
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "2B": Size({"num_layers": 30, "num_attention_heads": 30}, _SCRIPTS.format("cogvideox") + ": 2B"),
            "5B": Size({"num_layers": 42, "num_attention_heads": 48}, _SCRIPTS.format("cogvideox") + ": 5B"),
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"1": Size({}, "ComfyUI comfy/model_detection.py: mochi_preview, 48 blocks, 3072 and 1536 wide")},
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        {
            "video lite": Size(
                {"model_dim": 1792, "ff_dim": 7168, "num_text_blocks": 2, "num_visual_blocks": 32},
                _MUSUBI.format("kandinsky5/configs.py") + ": k5-lite-t2v-5s-sd",
            ),
            "video pro": Size(
                {"model_dim": 4096, "ff_dim": 16384, "num_text_blocks": 4, "num_visual_blocks": 60, "time_dim": 1024},
                _MUSUBI.format("kandinsky5/configs.py") + ": k5-pro-t2v-5s-hd",
            ),
            "image lite": Size(
                {"model_dim": 2560, "ff_dim": 10240, "num_text_blocks": 2, "num_visual_blocks": 50},
                _MUSUBI.format("kandinsky5/configs.py") + ": k5-lite-t2i-hd",
            ),
        },
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            "g/2": Size(
                {"in_channels": 4, "patch_size": 2, "num_layers": 40, "hidden_size": 1408, "mlp_ratio": 4.3637},
                "HunyuanDiT hydit/modules/models.py: DiT-g/2",
            )
        },
    ),
    "ace-step": (
        "AceStepTransformer1DModel",
        {
            "1.5": Size(
                {},
                "ACE-Step-1.5 acestep/models/common/configuration_acestep_v15.py at 68ef61d: 24 layers, 2048 wide, "
                "16 heads and 8 of keys",
            ),
            "1.5 XL": Size(
                {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "encoder_hidden_size": 2048},
                "DiffSynth-Studio diffsynth/configs/model_configs.py: acestep-v15-xl-base",
            ),
        },
    ),
    "sd": (
        "UNet2DConditionModel",
        {
            "1": Size(
                {"cross_attention_dim": 768, "attention_head_dim": 8},
                "sd-scripts library/model_util.py: UNET_PARAMS (320 channels by 1, 2, 4, 4; text of 768; 8 heads)",
            ),
            "2": Size(
                {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
                "sd-scripts library/model_util.py: V2_UNET_PARAMS",
            ),
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {"base": Size(SDXL, "sd-scripts library/sdxl_original_unet.py: text of 2048, 320 channels by 1, 2, 4")},
    ),
    "sdxl-refiner": (
        "UNet2DConditionModel",
        {"1.0": Size(SDXL_REFINER, "generative-models configs/inference/sd_xl_refiner.yaml")},
    ),
}  # fmt: skip
# Class of diffusers and what differs from its defaults, for one published model of each family.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    name: (kind, next(iter(sizes.values())).config) for name, (kind, sizes) in PUBLISHED.items()
}
KINDS = ("full", "attention only", "one block", "LoKr only")


@cache
def modules(name: str, size: str | None = None) -> Shapes:
    """Every linear layer of a published model, by its name in diffusers, with outputs and inputs.

    Args:
        name: The family.
        size: Which of its published models; the first, if None.
    """
    import diffusers
    import torch

    kind, sizes = PUBLISHED[name]
    config = sizes[size or next(iter(sizes))].config
    if name == "omnigen2":
        return _omnigen2(**config)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def _omnigen2(
    *,
    hidden_size: int,
    num_layers: int,
    num_refiner_layers: int,
    num_attention_heads: int,
    num_kv_heads: int,
    multiple_of: int,
    text_feat_dim: int,
    patch_size: int,
    in_channels: int,
) -> Shapes:
    """The linear layers of OmniGen2, as `transformer_omnigen2.py` of its authors and ComfyUI's `omnigen2.py` say."""
    keys = hidden_size // num_attention_heads * num_kv_heads
    inner = -(-4 * hidden_size // multiple_of) * multiple_of
    conditioning, patch = min(hidden_size, 1024), patch_size**2 * in_channels
    block = {
        "attn.to_q": (hidden_size, hidden_size),
        "attn.to_k": (keys, hidden_size),
        "attn.to_v": (keys, hidden_size),
        "attn.to_out.0": (hidden_size, hidden_size),
        "feed_forward.linear_1": (inner, hidden_size),
        "feed_forward.linear_2": (hidden_size, inner),
        "feed_forward.linear_3": (inner, hidden_size),
    }
    modulation = {"norm1.linear": (4 * hidden_size, conditioning)}
    stages = {
        "noise_refiner": (num_refiner_layers, block | modulation),
        "ref_image_refiner": (num_refiner_layers, block | modulation),
        "context_refiner": (num_refiner_layers, block),
        "layers": (num_layers, block | modulation),
    }
    return {
        "x_embedder": (hidden_size, patch),
        "ref_image_patch_embedder": (hidden_size, patch),
        "time_caption_embed.timestep_embedder.linear_1": (conditioning, 256),
        "time_caption_embed.timestep_embedder.linear_2": (conditioning, conditioning),
        "time_caption_embed.caption_embedder.1": (hidden_size, text_feat_dim),
        **{
            f"{s}.{i}.{n}": shape
            for s, (count, names) in stages.items()
            for i in range(count)
            for n, shape in names.items()
        },
        "norm_out.linear_1": (hidden_size, conditioning),
        "norm_out.linear_2": (patch, hidden_size),
    }


def family(name: str) -> Family:
    known = family_named(name)
    assert known is not None, name
    return known


def spelled(name: str, spelling: str, shapes: Shapes) -> Shapes:
    """The same modules as `spelling` has them; what is fused there is as wide as its parts together."""
    if spelling == "diffusers":
        return shapes
    table = family(name)
    found: Shapes = {}
    for target, shape in shapes.items():
        back = table.back(target, spelling)
        if back is None:
            continue
        parts = [shapes[part] for part in back.place.targets if part in shapes]
        if len(parts) == len(back.place.targets):
            found[back.name] = (sum(rows for rows, _ in parts), shape[1])
    return found


def samples(name: str, kind: str) -> Iterator[tuple[str, Shapes]]:
    """What an adapter of a kind has, in each spelling: its modules with outputs and inputs, as a file tells them."""
    shapes = modules(name)
    if kind == "attention only":
        shapes = {n: shape for n, shape in shapes.items() if re.search(r"att", n)}
    if kind == "one block":
        blocks = [re.match(r"\D*\d+\.(?:\D+\.\d+\.)?", n) for n in shapes]
        starts = [match[0] for match in blocks if match is not None]
        middle = starts[len(starts) // 2]
        shapes = {n: shape for n, shape in shapes.items() if n.startswith(middle)}
    for spelling in ("diffusers", *family(name).rules):
        names = spelled(name, spelling, shapes)
        yield spelling, _as_lokr(names) if kind == "LoKr only" else names


def _as_lokr(shapes: Mapping[str, tuple[int, int]]) -> Shapes:
    """The sizes that a file of LoKr tells, whose factors are stored in place of A and B."""
    tensors: dict[str, LazyTensor] = {}
    for name, (rows, columns) in shapes.items():
        m, n = (next(f for f in (8, 4, 2, 1) if size % f == 0) for size in (rows, columns))
        tensors |= {
            f"{name}.lokr_w1": _shaped(m, n),
            f"{name}.lokr_w2_a": _shaped(rows // m, 3),
            f"{name}.lokr_w2_b": _shaped(3, columns // n),
        }
    known, _, _ = grouped(tensors)
    found: Shapes = {}
    for name, module in known.items():
        outputs, inputs = module.sizes
        assert outputs is not None
        assert inputs is not None
        found[name] = (outputs, inputs)
    return found


def _shaped(*shape: int) -> LazyTensor:
    return LazyTensor(shape, "F32", None)  # type: ignore[arg-type]
