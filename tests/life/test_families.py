"""One merge for each family of models: what the merged model computes is what PEFT's unmerged one does.

Adapters are random and not zero. Both models compute in float64, so that they differ by the rounding of the merged
weights and by nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

import loratools

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
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 9, 30, 4, 17, 8]])}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()}


@dataclass(frozen=True)
class Family:
    """model: as it is made. lora: what of it is trained. options: of loading it."""

    model: Callable[[], Any]
    lora: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    inputs: Callable[[], dict[str, Any]] = words
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, kind: Any, path: Path) -> Any:
        return kind.from_pretrained(path, **self.options).eval()


def causal(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **{**TEXT, **more}))


def llava() -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **SEEN},
            image_token_index=30,
        )
    )


def clip() -> Any:
    config = hf.CLIPConfig(text_config={**TEXT, "eos_token_id": 8}, vision_config=SEEN, projection_dim=10)
    return hf.CLIPModel(config)


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=10, attention_head_dim=2,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def noise() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    text = torch.randn(1, 5, 10, generator=g).double()
    sample = torch.randn(1, 3, 8, 8, generator=g).double()
    return {"sample": sample, "timestep": 7, "encoder_hidden_states": text, "return_dict": False}


def flows() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    drawn = {"hidden_states": (1, 6, 4), "encoder_hidden_states": (1, 5, 10), "pooled_projections": (1, 6)}
    made: dict[str, Any] = {name: torch.randn(shape, generator=g).double() for name, shape in drawn.items()}
    made |= {"img_ids": torch.arange(18).reshape(6, 3).double(), "txt_ids": torch.zeros(5, 3).double()}
    return {**made, "timestep": torch.tensor([0.3]).double(), "return_dict": False}


# The quick way to compute with experts knows no float64.
EAGER = {"experts_implementation": "eager"}
PROJECTIONS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": list(EXPERTS)}
FAMILIES: dict[str, Family] = {
    "roberta": Family(lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT))),
    "distilbert": Family(lambda: hf.DistilBertModel(hf.DistilBertConfig(
        vocab_size=31, dim=16, hidden_dim=22, n_layers=2, n_heads=4, max_position_embeddings=23))),
    "opt": Family(causal("opt", ffn_dim=22, word_embed_proj_dim=16)),
    "bloom": Family(causal("bloom", n_layer=2, n_head=4)),
    "gpt_neox": Family(causal("gpt_neox"), {"target_modules": ["query_key_value", "dense_h_to_4h", "embed_out"]}),
    "llama": Family(causal("llama"), {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    "mistral": Family(causal("mistral", sliding_window=4)),
    "qwen3": Family(causal("qwen3", head_dim=6, tie_word_embeddings=True),
                    {"target_modules": "all-linear", "use_dora": True}),
    "gemma3": Family(causal("gemma3_text", head_dim=6, sliding_window=4)),
    "phi3": Family(causal("phi3")),
    "mixtral": Family(causal("mixtral", num_local_experts=3), PROJECTIONS, options=EAGER),
    "qwen3_moe": Family(
        causal("qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, head_dim=4), PROJECTIONS,
        options=EAGER,
    ),
    "gpt_oss": Family(
        causal("gpt_oss", num_local_experts=3, num_experts_per_tok=2, head_dim=4, layer_types=["full_attention"] * 2),
        PROJECTIONS, options=EAGER,
    ),
    "mamba": Family(causal("mamba", state_size=3, time_step_rank=2),
                    {"target_modules": ["in_proj", "x_proj", "embeddings"]}),
    "llava": Family(llava, inputs=lambda: {"input_ids": torch.tensor([[5, 30, 30, 30, 30, 9]]), **pixels()}),
    "clip": Family(clip, {"target_modules": ["q_proj", "fc1", "visual_projection", "patch_embedding"]},
                   lambda: {**words(), **pixels()}),
    "vit": Family(lambda: hf.ViTModel(hf.ViTConfig(**SEEN)), inputs=pixels),
    "unet": Family(unet, {"target_modules": ["to_q", "to_out.0", "proj_in", "conv1", "conv_in", "time_emb_proj"]},
                   noise),
    "flux": Family(flux, {"target_modules": ["to_q", "add_k_proj", "proj_mlp", "proj_out", "norm.linear"]}, flows),
}  # fmt: skip

# Mixtures of experts adapted by the names of their modules, as people write them: PEFT 0.21 turns these into the
# parameters that transformers 5 has, and stores `target_parameters` without a path.
BY_NAME = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
MIXTURES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": causal("qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, head_dim=4),
    "mixtral": causal("mixtral", num_local_experts=3),
    "olmoe": causal("olmoe", num_experts=3, num_experts_per_tok=2),
    "glm4_moe": causal("glm4_moe", n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, head_dim=4,
                       first_k_dense_replace=1, n_group=1, topk_group=1),
    "deepseek_v3": causal("deepseek_v3", n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=10, n_group=1,
                          topk_group=1, first_k_dense_replace=1, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4,
                          qk_rope_head_dim=4, v_head_dim=4, num_key_value_heads=4),
    "ernie4_5_moe": causal("ernie4_5_moe", moe_num_experts=3, moe_k=2, moe_intermediate_size=10),
    "minimax_m2": causal("minimax_m2", num_local_experts=3, num_experts_per_tok=2, head_dim=4),
    "hunyuan_v1_moe": causal("hunyuan_v1_moe", num_experts=3, moe_topk=2, head_dim=4),
}  # fmt: skip
FAMILIES |= {f"{name} by name": Family(made, BY_NAME, options=EAGER) for name, made in MIXTURES.items()}
FAMILIES |= {
    f"{name} all linear": Family(MIXTURES[name], options=EAGER) for name in ("qwen3_moe", "olmoe", "deepseek_v3")
}
FAMILIES["qwen3_moe down alone"] = Family(
    MIXTURES["qwen3_moe"], {"target_modules": ["q_proj", "down_proj"]}, options=EAGER
)
FAMILIES["qwen3_moe by a pattern"] = Family(
    MIXTURES["qwen3_moe"],
    {"target_modules": r".*\.(q|k)_proj", "target_parameters": ["gate_up_proj"]},
    options=EAGER,
)


def output(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    parts = [found] if isinstance(found, Tensor) else list(found.values() if hasattr(found, "values") else found)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture(params=[
    pytest.param(name, marks=peers.needs("diffusers")) if name in ("unet", "flux") else name for name in FAMILIES
])  # fmt: skip
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_merged_model_computes_what_pefts_unmerged_one_does(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = family.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual initialisation is too small to tell layers apart
            parameter.add_(0.2 * torch.randn(parameter.shape))
    kind = type(model)
    model.save_pretrained(tmp_path / "base")
    inputs = family.inputs()
    plain = output(family.load(kind, tmp_path / "base").double(), inputs)
    config = LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, **family.lora)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    report = loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", threads=1)

    unmerged = PeftModel.from_pretrained(family.load(kind, tmp_path / "base"), tmp_path / "adapter").eval().double()
    expected = output(unmerged, inputs)
    merged = output(family.load(kind, tmp_path / "out").double(), inputs)
    difference, effect = (float((other - expected).abs().max()) for other in (merged, plain))
    assert report.verified
    assert effect > 1e-2
    assert difference < 2e-5 * max(1.0, float(expected.abs().max()))
    assert difference < 1e-3 * effect


@peers.needs("diffusers")
def test_adapters_of_denoiser_and_text_encoder_merge_into_one_pipeline(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(12)
    models = {"unet": unet(), "text_encoder": hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, eos_token_id=8))}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "base" / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    kinds = {name: type(model) for name, model in models.items()}
    targets = {"unet": ["to_q", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    for name, model in models.items():
        config = LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, target_modules=targets[name])
        get_peft_model(model, config).save_pretrained(tmp_path / name)

    loratools.merge(tmp_path / "base", [tmp_path / name for name in models], tmp_path / "out", threads=1)

    inputs = {"unet": noise(), "text_encoder": words()}
    for name, kind in kinds.items():
        unmerged = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base" / name), tmp_path / name)
        expected = output(unmerged.eval().double(), inputs[name])
        plain, merged = (
            output(kind.from_pretrained(tmp_path / folder / name).eval().double(), inputs[name])
            for folder in ("base", "out")
        )
        difference, effect = (float((other - expected).abs().max()) for other in (merged, plain))
        assert difference < 2e-5 * max(1.0, float(expected.abs().max()))
        assert difference < 1e-3 * effect
