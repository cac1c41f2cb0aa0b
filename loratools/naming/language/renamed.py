"""What transformers 5 calls in memory what files call otherwise, where nothing else is the matter with it.

Facts from the conversion mapping of transformers 5.23, held against models in memory by test. Rules follow each other;
the name after each of them is taken too, since every one was the name in memory of some version of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loratools.naming.language.vision import in_memory
from loratools.naming.renaming import Shapes

_Rules = Sequence[tuple[str, str]]

# Language models with something to see or hear by, which were one model inside another.
_INSIDE = "language_model.model."
_WITH_EYES: _Rules = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?!model\.|language_model\.|lm_head\.)", "model."),
    (r"(^|\.)(\w*(?:vision|image|video)_tower)\.vision_model\.", r"\1\2."),
)
_QWEN_VL: _Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_MIXTRAL: _Rules = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE: _Rules = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
)
_BERT_LIKE_PARTS: _Rules = (
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# transformers 5 saves the layers of this model's decoder as `decoder.decoder_encoder.layer`, and reads them back.
_VIT_MAE: _Rules = (
    (r"(^|[._])encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    *_BERT_LIKE_PARTS,
)
_SWIN: _Rules = (
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.relative_position_bias_table$",
     ".attention.relative_position_bias.relative_position_bias_table"),
    *_BERT_LIKE_PARTS,
)  # fmt: skip
_SEGFORMER: _Rules = (
    (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bencoder\.layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
    (r"^decode_head\.linear_c\.", "decode_head.linear_projections."),
)
_DETR: _Rules = (
    (r"\.out_proj\.", ".o_proj."),
    (r"\.layers\.(\d+)\.fc([12])\.", r".layers.\1.mlp.fc\2."),
)
_NOMIC: _Rules = (
    (r"^encoder\.layers\.|(?<=\.)encoder\.layers\.", "layers."),
    (r"\bemb_ln\.", "embeddings.LayerNorm."),
    (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.fc11\.", ".up_proj."),
    (r"\.fc12\.", ".gate_proj."),
    (r"\.fc2\.", ".down_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
# By the `model_type` of a config.
_BY_TYPE: dict[str, _Rules] = {
    "aria_text": (
        (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
    ),
    "conditional_detr": _DETR,
    "deformable_detr": _DETR,
    "detr": _DETR,
    "dinov2": ((r"\.mlp\.weights_out\.", ".mlp.down_proj."),),
    "dinov2_with_registers": ((r"\.mlp\.weights_out\.", ".mlp.down_proj."),),
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hy_v3": ((r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),),
    "kimi_linear": _MIXTRAL,
    "laguna": ((r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),),
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "nemotron_h": ((r"^backbone\.", "model."),),
    "nomic_bert": _NOMIC,
    "phimoe": (*_MIXTRAL, (r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_vl": _QWEN_VL,
    "rt_detr": _DETR,
    "rt_detr_v2": _DETR,
    "segformer": _SEGFORMER,
    "swin": _SWIN,
    "vit_mae": _VIT_MAE,
}
# By the beginning of the architecture's name, where a type has several.
_BY_CLASS: dict[str, _Rules] = {
    "CLIPTextModel": ((r"^text_model\.", ""),),
    "CLIPVisionModel": ((r"^vision_model\.", ""),),
    "GPTNeoXForCausalLM": ((r"^embed_out\.", "lm_head."),),
    "SiglipTextModel": ((r"^text_model\.", ""),),
    "SiglipVisionModel": ((r"^vision_model\.", ""),),
    "Siglip2TextModel": ((r"^text_model\.", ""),),
    "Siglip2VisionModel": ((r"^vision_model\.", ""),),
}
# TensorFlow's names of a norm's parameters, which old files of BERT have.
_LEGACY: _Rules = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"))


def names_in_memory(config: Mapping[str, object], stored: Shapes) -> dict[str, str]:
    """Name in memory -> name in the files, of the weights where the two differ."""
    model_type = config.get("model_type")
    names = in_memory(model_type if isinstance(model_type, str) else None, stored)
    rules = [(re.compile(pattern), new) for pattern, new in _rules(config, stored)]
    if not rules:
        return names
    for name in stored:
        renamed = name
        for pattern, new in rules:
            later = pattern.sub(new, renamed)
            if later != renamed and later not in stored:
                names[later] = name
            renamed = later
    return names


def _rules(config: Mapping[str, object], stored: Shapes) -> list[tuple[str, str]]:
    rules: list[tuple[str, str]] = list(_LEGACY) if any(name.endswith("LayerNorm.gamma") for name in stored) else []
    rules += _BY_TYPE.get(str(config.get("model_type")), ())
    architectures = config.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else []:
        rules += _BY_CLASS.get(str(architecture), ())
    if any(name.startswith(_INSIDE) for name in stored):
        rules += _WITH_EYES
    text = config.get("text_config")
    if isinstance(text, Mapping) and "model_type" in text and text["model_type"] != config.get("model_type"):
        rules += _BY_TYPE.get(str(text["model_type"]), ())
    return rules
