"""Published image and video models: their classes in diffusers at full size, for names and shapes of every module.

Models are made on torch's `meta` device, without memory for their weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

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
# Class of diffusers and what differs from its defaults, for one published model of each family.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": "rms_norm"},
    ),
    "wan": ("WanTransformer3DModel", {}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}),
    "hunyuan-video15": ("HunyuanVideo15Transformer3DModel", {}),
    "hunyuan-image": ("HunyuanImageTransformer2DModel", {"guidance_embeds": True, "text_embed_2_dim": 1472}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
    "krea2": ("Krea2Transformer2DModel", {}),
    "ideogram4": ("Ideogram4Transformer2DModel", {}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "cosmos": (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 16, "extra_pos_embed_type": None, "text_embed_dim": 1024},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "llama_layers": list(range(48))},
    ),
    "pixart": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "sana": ("SanaTransformer2DModel", {}),
    "cogvideox": ("CogVideoXTransformer3DModel", {}),
    "mochi": ("MochiTransformer3DModel", {}),
    "kandinsky5": ("Kandinsky5Transformer3DModel", {"model_dim": 1792, "ff_dim": 7168}),
    "hunyuan-dit": ("HunyuanDiT2DModel", {"in_channels": 4, "patch_size": 2, "num_layers": 40}),
    "ace-step": ("AceStepTransformer1DModel", {}),
    "sd": ("UNet2DConditionModel", {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sdxl-refiner": ("UNet2DConditionModel", SDXL_REFINER),
}
KINDS = ("full", "attention only", "one block", "LoKr only")


@cache
def modules(name: str) -> Shapes:
    """Every linear layer of the published model, by its name in diffusers, with outputs and inputs."""
    import diffusers
    import torch

    kind, config = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


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
