"""Pipelines of diffusers with tiny transformers, one for each loader, and what a transformer of each is called with."""

from __future__ import annotations

from typing import Any

import torch
from naming.image import published

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
        {**_HEADS, "num_layers": 3, "pooled_projection_dim": 28, "in_channels": 4, "text_embed_dim": 24,
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
         "caption_channels": [20, 20], "text_emb_dim": 24, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8),
         "llama_layers": [0, 1, 1, 0]},
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
         "cap_feat_dim": 20, "axes_dims": [4, 4, 8], "axes_lens": [72, 8, 8]},
    ),
    "ideogram4": (
        "Ideogram4Pipeline",
        {"in_channels": 6, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "intermediate_size": 40, "adaln_dim": 12, "llm_features_dim": 20, "mrope_section": (4, 2, 2)},
    ),
    "cosmos": (
        "Cosmos2_5_PredictBasePipeline",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 20, "adaln_lora_dim": 12,
         "max_size": (4, 8, 8), "extra_pos_embed_type": None,
         "concat_padding_mask": False},
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


def inputs(family: str) -> dict[str, Any]:
    """What the denoiser of a family is called with: small random latents, texts and positions, the same each time."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.tensor([0.5])
    match family:
        case "sd3":
            return {
                "hidden_states": random(1, 16, 8, 8),
                "encoder_hidden_states": random(1, 5, 24),
                "pooled_projections": random(1, 20),
                "timestep": time,
            }
        case "flux" | "flux2":
            axes = 3 if family == "flux" else 4
            image, text = torch.zeros(12, axes), torch.zeros(5, axes)
            image[:, 1], image[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
            pooled = {"pooled_projections": random(1, 20)} if family == "flux" else {}
            return {
                "hidden_states": random(1, 12, 6),
                "encoder_hidden_states": random(1, 5, 24),
                "timestep": time,
                "img_ids": image,
                "txt_ids": text,
                "guidance": torch.tensor([3.0]),
                **pooled,
            }
        case "qwen-image":
            return {
                "hidden_states": random(1, 12, 8),
                "encoder_hidden_states": random(1, 5, 24),
                "timestep": time,
                "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
                "img_shapes": [(1, 3, 4)],
            }
        case "wan":
            return {
                "hidden_states": random(1, 4, 1, 8, 8),
                "encoder_hidden_states": random(1, 5, 20),
                "encoder_hidden_states_image": random(1, 3, 28),
                "timestep": time,
            }
        case "hunyuan-video":
            return {
                "hidden_states": random(1, 4, 1, 8, 8),
                "encoder_hidden_states": random(1, 5, 24),
                "encoder_attention_mask": torch.ones(1, 5),
                "pooled_projections": random(1, 20),
                "timestep": time,
                "guidance": torch.tensor([3.0]),
            }
        case "ltx":
            return {
                "hidden_states": random(1, 24, 6),
                "encoder_hidden_states": random(1, 5, 20),
                "timestep": time,
                "encoder_attention_mask": torch.ones(1, 5),
                "num_frames": 2,
                "height": 3,
                "width": 4,
            }
        case "ltx2":
            return {
                "hidden_states": random(1, 24, 6),
                "audio_hidden_states": random(1, 7, 5),
                "encoder_hidden_states": random(1, 5, 20),
                "audio_encoder_hidden_states": random(1, 5, 20),
                "timestep": time,
                "num_frames": 2,
                "height": 3,
                "width": 4,
                "audio_num_frames": 7,
            }
        case "sana" | "auraflow":
            text = 20 if family == "sana" else 24
            return {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 5, text), "timestep": time}
        case "cogvideox":
            return {
                "hidden_states": random(1, 2, 4, 8, 8),
                "encoder_hidden_states": random(1, 6, 20),
                "timestep": torch.tensor([7]),
            }
        case "mochi":
            return {
                "hidden_states": random(1, 4, 2, 8, 8),
                "encoder_hidden_states": random(1, 5, 24),
                "timestep": time,
                "encoder_attention_mask": torch.ones(1, 5),
            }
        case "lumina2":
            return {
                "hidden_states": random(1, 4, 8, 8),
                "encoder_hidden_states": random(1, 5, 20),
                "timestep": time,
                "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
            }
        case "hidream":
            return {
                "hidden_states": random(1, 4, 8, 8),
                "timesteps": time,
                "pooled_embeds": random(1, 24),
                "encoder_hidden_states_t5": random(1, 5, 20),
                "encoder_hidden_states_llama3": random(2, 1, 5, 20),
            }
        case "kandinsky5":
            places = (torch.arange(1), torch.arange(4), torch.arange(4))
            return {
                "hidden_states": random(1, 1, 8, 8, 4),
                "encoder_hidden_states": random(1, 5, 20),
                "pooled_projections": random(1, 28),
                "timestep": time,
                "visual_rope_pos": places,
                "text_rope_pos": torch.arange(5),
            }
        case "krea2":
            return {
                "hidden_states": random(1, 12, 6),
                "encoder_hidden_states": random(1, 5, 2, 20),
                "timestep": time,
                "position_ids": torch.arange(17)[:, None].repeat(1, 3),
            }
        case "z-image":
            return {"x": [random(4, 1, 8, 8)], "t": time, "cap_feats": [random(5, 20)]}
        case "ideogram4":
            return {
                "hidden_states": random(1, 17, 6),
                "encoder_hidden_states": random(1, 17, 20),
                "timestep": time,
                "position_ids": torch.arange(17)[None, :, None].repeat(1, 1, 3),
                "segment_ids": torch.zeros(1, 17, dtype=torch.long),
                "indicator": torch.tensor([[3] * 5 + [2] * 12]),
            }
        case "cosmos":
            return {
                "hidden_states": random(1, 4, 2, 8, 8),
                "encoder_hidden_states": random(1, 5, 20),
                "timestep": time,
                "fps": 24,
            }
    raise KeyError(family)
