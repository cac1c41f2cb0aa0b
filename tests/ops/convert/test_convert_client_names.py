"""What is written has the names that its client looks for: those of the base's class in memory, or of MLX's model."""

from __future__ import annotations

from pathlib import Path

import factories
import peers
import pytest
import torch

import loratools
from loratools import formats
from loratools.errors import UnsupportedError

TEXT = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "vocab_size": 23}  # fmt: skip
QWEN = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "text_config": TEXT}
LLAVA = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
PART = "layers.1.self_attn.q_proj"
SHAPE = (12, 12)


def base(folder: Path, stored: str, config: dict[str, object], *, others: tuple[str, ...] = ()) -> Path:
    names = [f"{stored}layers.{i}.self_attn.q_proj" for i in (0, 1)]
    weights = {f"{name}.weight": torch.zeros(SHAPE) for name in names}
    weights |= {f"{name}.weight": torch.zeros(7, 12) for name in others}
    return factories.checkpoint_folder(folder, weights=weights, config=config)


@pytest.mark.parametrize(
    ("stored", "config", "trained", "in_memory"),
    [
        # As transformers called the language model before version 4.52, and since.
        ("model.", QWEN, "model.", "model.language_model."),
        ("model.", QWEN, "model.language_model.", "model.language_model."),
        ("model.", QWEN, "language_model.model.", "model.language_model."),
        ("language_model.model.", LLAVA, "language_model.model.", "model.language_model."),
        # Trained as a language model of its own.
        ("language_model.model.", LLAVA, "model.", "model.language_model."),
        # Trained without its head, or inside of something.
        ("model.", {}, "", "model."),
        ("model.", {}, "policy.model.", "model."),
        ("model.", {}, "model.model.", "model."),
        # Files of the inner model, which has a name in memory once it has a head.
        ("", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "transformer.", "transformer."),
        ("", {"model_type": "gpt2", "architectures": ["GPT2Model"]}, "transformer.", ""),
    ],
)
def test_modules_get_the_names_of_the_base_s_class(
    stored: str, config: dict[str, object], trained: str, in_memory: str, tmp_path: Path
) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={trained + PART: SHAPE})

    report = loratools.convert(source, tmp_path / "out", format="peft", base=base(tmp_path / "base", stored, config))

    before, after = formats.load(source), formats.load(tmp_path / "out")
    assert list(after.updates) == [in_memory + PART]
    torch.testing.assert_close(after.updates[in_memory + PART].parts["B"].read(),
                               before.updates[trained + PART].parts["B"].read())  # fmt: skip
    assert any("1 part renamed" in w for w in report.warnings) == (trained != in_memory)


def test_replaced_weights_are_renamed_as_modules_are(tmp_path: Path) -> None:
    source = factories.adapter_folder(
        tmp_path / "in", modules={f"model.{PART}": SHAPE}, extra={"model.embed_tokens.weight": torch.ones(7, 12)},
        config={"modules_to_save": ["embed_tokens"]},
    )  # fmt: skip
    model = base(tmp_path / "base", "model.", QWEN, others=("model.embed_tokens",))

    loratools.convert(source, tmp_path / "out", format="peft", base=model)

    assert list(formats.load(tmp_path / "out").replacements) == ["model.language_model.embed_tokens.weight"]


def test_peft_applies_what_is_written_for_a_server(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 12, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config=vision,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    source = factories.adapter_folder(
        tmp_path / "in", modules={f"model.{PART}": SHAPE}, prefix="_orig_mod.base_model.model."
    )

    loratools.convert(source, tmp_path / "out", format="peft", serve="vllm", base=tmp_path / "base")

    weight = model.model.language_model.get_submodule(PART).weight.detach().double()
    factors = formats.load(source).updates[f"model.{PART}"].factors()
    assert factors is not None
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(
        adapted.model.language_model.get_submodule(PART).weight.detach().double(), weight + factors.b @ factors.a,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("trained", ["model.language_model.", "language_model.model."])
def test_mlx_has_the_language_model_outermost(trained: str, with_base: bool, tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={trained + PART: SHAPE})
    model = base(tmp_path / "base", "model.", QWEN) if with_base else None

    loratools.convert(source, tmp_path / "out", format="mlx", base=model)

    assert list(formats.load(tmp_path / "out").updates) == [f"language_model.model.{PART}"]


@peers.needs("mlx_lm")
@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3n"])
def test_names_are_those_of_mlx_lm(model_type: str) -> None:
    from importlib import import_module
    from inspect import signature

    from loratools.naming.mlx import model_name

    module = import_module(f"mlx_lm.models.{model_type}")
    text = dict(TEXT, model_type=model_type, tie_word_embeddings=False, rms_norm_eps=1e-6, max_position_embeddings=32)
    if model_type == "gemma3n":
        text |= {
            "head_dim": 4, "rope_theta": 1e4, "rope_local_base_freq": 1e4, "vocab_size_per_layer_input": 23,
            "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4, "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2,
            "altup_coef_clip": 1,
            "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 2, "query_pre_attn_scalar": 4,
            "final_logit_softcapping": 30.0, "rope_scaling": None, "intermediate_size": 20, "use_bidirectional": False,
        }  # fmt: skip
        known = signature(module.TextConfig).parameters
        text = {name: value for name, value in text.items() if name in known}
    model = module.Model(module.ModelArgs(model_type=model_type, text_config=text))

    names = {name for name, _ in model.named_modules()}
    assert model_name(f"model.language_model.{PART}", model_type, inner=True) in names
    if model_type != "gemma3n":  # its head is its embedding
        assert model_name("lm_head", model_type, inner=True) in names


def test_eyes_have_no_module_in_mlx_lm(tmp_path: Path) -> None:
    modules = {f"model.language_model.{PART}": SHAPE, "model.visual.blocks.0.attn.proj": (7, 12)}
    source = factories.adapter_folder(tmp_path / "in", modules=modules)
    model = base(tmp_path / "base", "model.", QWEN, others=("visual.blocks.0.attn.proj",))

    with pytest.raises(UnsupportedError, match="only the language part"):
        loratools.convert(source, tmp_path / "out", format="mlx", base=model)
    report = loratools.convert(source, tmp_path / "out", format="mlx", base=model, allow_partial=True)

    assert [d.name for d in report.dropped if d.what == "module"] == ["model.visual.blocks.0.attn.proj"]


def test_what_the_base_has_no_place_for_is_refused(tmp_path: Path) -> None:
    modules = {"model.layers.0.q": (6, 5), "model.layers.1.q": (6, 5), "model.layers.0.v": (7, 5)}
    source = factories.adapter_folder(tmp_path / "in", modules=modules)
    weights = {"model.layers.0.q.weight": torch.zeros(6, 5), "model.layers.0.v.weight": torch.zeros(8, 5)}
    model = factories.checkpoint_folder(tmp_path / "base", weights=weights)

    with pytest.raises(UnsupportedError, match="2 parts") as caught:
        loratools.convert(source, tmp_path / "out", format="peft", base=model)
    report = loratools.convert(source, tmp_path / "out", format="peft", base=model, allow_partial=True)

    assert "model.layers.0.v: no place in the base: adapter 5 -> 7, base 5 -> 8" in caught.value.details
    assert any("model.layers.1.q: no place in the base: no such weight" in line for line in caught.value.details)
    assert list(formats.load(tmp_path / "out").updates) == ["model.layers.0.q"]
    assert [d.name for d in report.dropped if d.what == "module"] == ["model.layers.0.v", "model.layers.1.q"]
