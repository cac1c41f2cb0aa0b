"""What files are said to hold of a model in memory, held against transformers: every parameter, by name and value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers as hf

from loratools.checkpoints import open_checkpoint
from loratools.naming.language.aliases import aliases
from loratools.naming.places import Alias, Part, Place

hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

TEXT: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 23,
    "pad_token_id": 0,
}
SEEN: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 18,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}


def text(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **{**TEXT, **more}))


def pictures(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **{**SEEN, **more}))


def llava(kind: str, vision: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = hf.AutoConfig.for_model(
            kind,
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": vision, **SEEN},
            image_token_index=30,
            **more,
        )
        return hf.AutoModelForImageTextToText.from_config(config)

    return make


def gemma3() -> Any:
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 6, "sliding_window": 8},
        vision_config={"model_type": "siglip_vision_model", **SEEN},
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def qwen2_vl(kind: Any, config: Any, **vision: Any) -> Callable[[], Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "type": "default"}
    return lambda: kind(
        config(
            text_config={**TEXT, "rope_scaling": rope},
            vision_config={"depth": 1, "num_heads": 2, "patch_size": 4, "in_channels": 3, **vision},
        )
    )


def qwen3_vl_moe() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(
            text_config={**TEXT, **EXPERTS, "head_dim": 4, "rope_scaling": rope, "decoder_sparse_step": 1},
            vision_config={
                "depth": 1, "num_heads": 2, "hidden_size": 12, "intermediate_size": 18, "out_hidden_size": 16,
                "patch_size": 4, "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
            },
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "llama": text("llama"),
    "gpt_neox": text("gpt_neox"),
    "mixtral": text("mixtral", num_local_experts=3),
    "phimoe": text("phimoe", num_local_experts=3),
    "minimax": text("minimax", num_local_experts=3, head_dim=4, layer_types=["full_attention", "linear_attention"]),
    "qwen2_moe": text("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=14),
    "qwen3_moe": text("qwen3_moe", **EXPERTS, head_dim=4),
    "olmoe": text("olmoe", num_experts=3),
    "deepseek_v3": text(
        "deepseek_v3", n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=10,
        first_k_dense_replace=1, q_lora_rank=6, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
        num_key_value_heads=4,
    ),
    "gpt_oss": text("gpt_oss", num_local_experts=3, head_dim=4, layer_types=["full_attention"] * 2),
    "granitemoe": text("granitemoe", num_local_experts=3),
    "jamba": text("jamba", num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
                  mamba_d_state=3, mamba_dt_rank=2),
    "lfm2_moe": text("lfm2_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, num_dense_layers=1,
                     layer_types=["full_attention", "conv"]),
    "aria_text": lambda: hf.AriaTextForCausalLM(hf.AriaTextConfig(**TEXT, moe_num_experts=3, moe_topk=2)),
    "llava": llava("llava", "clip_vision_model"),
    "llava_next": llava("llava_next", "clip_vision_model", image_grid_pinpoints=[[8, 8]]),
    "llava_onevision": llava("llava_onevision", "siglip_vision_model", image_grid_pinpoints=[[8, 8]]),
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT, "head_dim": 4},
            vision_config={"model_type": "siglip_vision_model", **SEEN, "projection_dim": 16},
            projection_dim=16,
        )
    ),
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, embed_dim=12, hidden_size=16),
    "qwen2_5_vl": qwen2_vl(
        hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig,
        hidden_size=12, out_hidden_size=16, intermediate_size=18, fullatt_block_indexes=[0],
    ),
    "qwen3_vl_moe": qwen3_vl_moe,
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=SEEN, projection_dim=10)),
    "clip_text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)),
    "clip_text_projected": lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)),
    "clip_vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SEEN)),
    "siglip_vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SEEN)),
    "vit": pictures("vit"),
    "vit_mae": lambda: hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(**SEEN, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                        decoder_intermediate_size=14)
    ),
    "dinov2_swiglu": pictures("dinov2", use_swiglu_ffn=True),
    "beit": pictures("beit"),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=16, patch_size=2)
    ),
    "segformer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(hidden_sizes=[4, 6], depths=[1, 1], num_attention_heads=[1, 2], num_encoder_blocks=2,
                           sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 3],
                           decoder_hidden_size=10)
    ),
    "nomic_bert": lambda: hf.AutoModel.from_config(
        hf.AutoConfig.for_model("nomic_bert", **{**TEXT, "num_key_value_heads": 4})
    ),
}  # fmt: skip


def assembled(alias: Alias, stored: dict[str, Tensor]) -> Tensor:
    """The weight that the places of an alias make up; nan where none of them reaches."""
    found = torch.full(alias.shape, torch.nan)
    for place in alias.places:
        values = cut(stored[place.weight], place.at)
        into = cut(found, place.of)
        into.copy_(values.mT if place.transposed else values)
    return found


def cut(values: Tensor, part: Part) -> Tensor:
    if part.expert is not None:
        values = values[part.expert]
    if part.rows is None and part.columns is None:
        return values
    rows, columns = (span.slice if span is not None else slice(None) for span in (part.rows, part.columns))
    return values[rows] if values.dim() < 2 else values[rows, columns]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_in_memory_is_found_with_its_values(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are all the same at first
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    stored = {n: t.read().float() for n, t in base.weights.items()}
    shapes = {n: tuple(t.shape) for n, t in stored.items()}

    known = {n: Alias(shape, (Place(n),)) for n, shape in shapes.items()} | aliases(base.config, shapes)

    wrong = []
    for parameter, values in model.named_parameters():
        alias = known.get(parameter)
        if alias is None:
            wrong.append(f"{parameter} is not known")
        elif alias.shape != tuple(values.shape) or not torch.equal(assembled(alias, stored), values):
            wrong.append(f"{parameter} {tuple(values.shape)} is not what {alias.places[0]} says, {alias.shape}")
    assert wrong == []
