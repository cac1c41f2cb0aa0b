"""Pipelines of diffusers load what was converted from the authors' names, at tiny sizes: one for each loader.

Each layer of the loaded model is given a random input: it has to put out `x (W + alpha / r B A)^T + b`, with the
product computed in float64 from the factors themselves. A layer without factors has to be a plain one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from naming.image import published
from safetensors.torch import save_file

import loratools

pytestmark = peers.needs("diffusers")
RANK, ALPHA = 2, 3.0
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
# Family -> pipeline of diffusers and the configuration of its tiny model; no two widths of a model are equal by chance.
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": (
        "StableDiffusion3Pipeline",
        {**_HEADS, "num_layers": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
         "pooled_projection_dim": 20, "sample_size": 8, "pos_embed_max_size": 8, "dual_attention_layers": (0,)},
    ),
    "flux": (
        "FluxPipeline",
        {**_HEADS, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
         "in_channels": 6, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
    ),
    "flux2": (
        "Flux2Pipeline",
        {**_HEADS, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24, "in_channels": 6,
         "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "qwen-image": (
        "QwenImagePipeline",
        {**_HEADS, "num_layers": 2, "joint_attention_dim": 24, "in_channels": 8, "out_channels": 2,
         "axes_dims_rope": (4, 4, 8)},
    ),
    "wan": (
        "WanPipeline",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
         "freq_dim": 16, "ffn_dim": 36, "num_layers": 2, "image_dim": 28, "added_kv_proj_dim": 24},
    ),
    "hunyuan-video": (
        "HunyuanVideoPipeline",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 4, 8)},
    ),
    "ltx": (
        "LTXPipeline",
        {**_HEADS, "in_channels": 6, "out_channels": 6, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 20},
    ),
    "ltx2": (
        "LTX2Pipeline",
        {**_HEADS, "in_channels": 6, "out_channels": 6, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 20, "audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 2,
         "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16},
    ),
    "sana": (
        "SanaPipeline",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 4,
         "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 20, "sample_size": 8},
    ),
    "auraflow": (
        "AuraFlowPipeline",
        {**_HEADS, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 24,
         "caption_projection_dim": 32, "pos_embed_max_size": 16, "sample_size": 8},
    ),
    "cogvideox": (
        "CogVideoXPipeline",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12, "text_embed_dim": 20, "num_layers": 2,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6},
    ),
    "mochi": (
        "MochiPipeline",
        {**_HEADS, "num_layers": 3, "pooled_projection_dim": 24, "in_channels": 4, "text_embed_dim": 20,
         "time_embed_dim": 8},
    ),
    "lumina2": (
        "Lumina2Pipeline",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 4),
         "axes_lens": (8, 8, 8), "cap_feat_dim": 20},
    ),
    "hidream": (
        "HiDreamImagePipeline",
        {**_HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "caption_channels": [20, 20], "text_emb_dim": 24, "axes_dims_rope": (8, 8), "max_resolution": (8, 8),
         "llama_layers": [0, 1]},
    ),
    "kandinsky5": (
        "Kandinsky5T2VPipeline",
        {"in_text_dim": 20, "in_text_dim2": 28, "time_dim": 24, "model_dim": 32, "ff_dim": 40, "num_text_blocks": 1,
         "num_visual_blocks": 2, "axes_dims": (4, 4, 8)},
    ),
    "krea2": (
        "Krea2Pipeline",
        {"in_channels": 6, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 40, "timestep_embed_dim": 8, "text_hidden_dim": 20,
         "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 28, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (4, 4, 8)},
    ),
    "z-image": (
        "ZImagePipeline",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 20, "axes_dims": [4, 4, 8], "axes_lens": [8, 8, 8]},
    ),
    "ideogram4": (
        "Ideogram4Pipeline",
        {"in_channels": 6, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "intermediate_size": 40, "adaln_dim": 12, "llm_features_dim": 20, "mrope_section": (4, 2, 2)},
    ),
    "cosmos": (
        "Cosmos2_5_PredictBasePipeline",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 20, "adaln_lora_dim": 12,
         "max_size": (4, 8, 8), "extra_pos_embed_type": None},
    ),
}  # fmt: skip


def model(family: str) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(3)
    made: torch.nn.Module = getattr(diffusers, published.MODELS[family][0])(**PIPELINES[family][1])
    return made.eval()


def pipeline(name: str, transformer: torch.nn.Module) -> Any:
    """A pipeline of nothing but the model that a LoRA is loaded into."""
    import diffusers

    cls = getattr(diffusers, name)
    pipe = object.__new__(cls)
    diffusers.DiffusionPipeline.__init__(pipe)
    expected, _ = cls._get_signature_keys(cls)
    pipe.register_modules(**(dict.fromkeys(expected) | {"transformer": transformer}))
    return pipe


def linear_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_computes_with_what_was_converted_from_the_authors_names(tmp_path: Path, family: str) -> None:
    name, _ = PIPELINES[family]
    base = model(family)
    weights = {n: (m.weight.detach().clone(), m.bias) for n, m in linear_layers(base).items()}
    table = published.family(family)
    generator = torch.Generator().manual_seed(11)
    factors = {
        n: (torch.randn(RANK, w.shape[1], generator=generator), torch.randn(w.shape[0], RANK, generator=generator))
        for n, (w, _) in weights.items()
        if table.find(n) is not None
    }
    stored: dict[str, torch.Tensor] = {}
    for n, (a, b) in factors.items():
        stored |= {f"transformer.{n}.lora_A.weight": a, f"transformer.{n}.lora_B.weight": b * (ALPHA / RANK)}
    save_file(stored, tmp_path / "source.safetensors", {"loratools.family": family})
    loratools.convert(tmp_path / "source.safetensors", tmp_path / "comfy.safetensors", format="comfy", base=family)
    loratools.convert(tmp_path / "comfy.safetensors", tmp_path / "out.safetensors", format="diffusers", base=family)

    pipe = pipeline(name, base)
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))

    layers = {n: m for n, m in base.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(factors)
    for n, layer in layers.items():
        weight, bias = weights[n]
        a, b = factors[n]
        x = torch.randn(3, weight.shape[1], generator=generator)
        expected = x.double() @ (weight.double() + ALPHA / RANK * b.double() @ a.double()).T
        if bias is not None:
            expected = expected + bias.double()
        with torch.no_grad():
            output = layer(x).double()
        # float32: sums of at most 200 products.
        assert float((output - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), n


def test_every_loader_with_a_family_of_transformers_has_a_pipeline_here() -> None:
    from naming.image.test_loaders import LOADERS

    families = {family for families in LOADERS.values() for family in families}
    # UNets have whole pipelines in test_image_clients.py; that of HunyuanVideo 1.5 has no `load_lora_weights`.
    assert families - {"sd", "sdxl", "hunyuan-video15"} == set(PIPELINES)
