"""Real clients load what we write and compute the same: diffusers pipelines, at tiny sizes, and LyCORIS.

The expected output is that of a model whose weights were changed by float64 arithmetic from the factors themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats

# module -> A, B, alpha
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
UNET = {
    "sample_size": 8,
    "block_out_channels": (4, 8, 8, 12),
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 10,
}
SDXL = {
    "sample_size": 8,
    "block_out_channels": (4, 8, 12),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 22,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
FLUX = {
    "num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12,
    "num_layers": 2, "num_single_layers": 3, "pooled_projection_dim": 10, "in_channels": 6, "guidance_embeds": True,
}  # fmt: skip


def unet(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**config).double().eval()


def text_encoder(width: int = 10) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7,
    )  # fmt: skip
    return CLIPTextModel(config).double().eval()


def factors(modules: Iterable[tuple[str, torch.nn.Module]], *, step: float = 1.0, ranks: int = 2) -> Factors:
    """LoRA of ranks from 2 on, and of alphas that differ by `step`; convolutions too."""
    generator = torch.Generator().manual_seed(5)
    made: Factors = {}
    for i, (name, module) in enumerate(modules):
        rank = 2 + i % ranks
        if isinstance(module, torch.nn.Linear):
            a, b = (rank, module.in_features), (module.out_features, rank)
        elif isinstance(module, torch.nn.Conv2d):
            a = (rank, module.in_channels, *module.kernel_size)
            b = (module.out_channels, rank, 1, 1)
        else:
            continue
        tensors = [0.2 * torch.randn(*shape, generator=generator) for shape in (a, b)]
        made[name] = tensors[0], tensors[1], 3 + step * (i % 3)
    assert made
    return made


def merged(model: torch.nn.Module, made: Factors) -> torch.nn.Module:
    changed = copy.deepcopy(model)
    for name, (a, b, alpha) in made.items():
        weight = changed.get_submodule(name).weight
        rank = a.shape[0]
        delta = b.double().reshape(b.shape[0], rank) @ a.double().reshape(rank, -1)
        weight.data += (alpha / rank * delta).reshape(weight.shape)
    return changed


def kohya(made: Factors, prefix: str, rename: Any = None) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for name, (a, b, alpha) in made.items():
        flat = f"{prefix}{(rename(name) if rename else name).replace('.', '_')}"
        stored |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(alpha)}
    return stored


def run_unet(model: torch.nn.Module, config: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 3, config["cross_attention_dim"], generator=generator, dtype=torch.float64)
    added = {
        "text_embeds": torch.randn(1, 10, generator=generator, dtype=torch.float64),
        "time_ids": torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.float64),
    }
    more = {"added_cond_kwargs": added} if "addition_embed_type" in config else {}
    with torch.no_grad():
        return model(sample, torch.tensor([7.0]), text, **more).sample


def run_text(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 7, 11]])).last_hidden_state


def pipeline(kind: str, **parts: Any) -> Any:
    """A pipeline of nothing but the parts that a LoRA is loaded into."""
    import diffusers

    cls = getattr(diffusers, kind)
    pipe = object.__new__(cls)
    diffusers.DiffusionPipeline.__init__(pipe)
    expected, _ = cls._get_signature_keys(cls)
    pipe.register_modules(**(dict.fromkeys(expected) | parts))
    return pipe


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def convert(source: Path, out: Path, to: str) -> Path:
    report = loratools.convert(source, out, format=to)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-6
    assert not [d for d in report.dropped if d.what != "metadata"]
    return out


@peers.needs("diffusers")
def test_sd15_from_kohya_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    base, encoder = unet(UNET), text_encoder()
    made = factors(base.named_modules())
    text = factors((n, m) for n, m in encoder.named_modules() if "layers." in n)
    stored = kohya(made, "lora_unet_") | kohya(text, "lora_te_text_model_")
    save_file(stored, tmp_path / "kohya.safetensors", {"ss_base_model_version": "sd_v1"})
    source = formats.load(tmp_path / "kohya.safetensors")
    assert source.format == "kohya"
    assert len(source.updates) == len(made) + len(text)
    out = convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors", "diffusers")
    pipe = pipeline("StableDiffusionPipeline", unet=copy.deepcopy(base), text_encoder=copy.deepcopy(encoder))
    pipe.load_lora_weights(str(out))
    expected = run_unet(merged(base, made), UNET)
    assert not torch.allclose(expected, run_unet(base, UNET), rtol=1e-3)
    close(run_unet(pipe.unet, UNET), expected)
    close(run_text(pipe.text_encoder), run_text(merged(encoder, text)))
    back = convert(out, tmp_path / "back.safetensors", "kohya")
    again = load_file(back)
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)


@peers.needs("diffusers")
def test_sd15_written_as_kohya_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    base = unet(UNET)
    # With alphas that differ by module, diffusers takes most of them at the most common one.
    made = factors(((n, m) for n, m in base.named_modules() if "attn" in n or ".ff." in n), step=0)
    save_file(kohya(made, "lycoris_"), tmp_path / "lycoris.safetensors")
    out = convert(tmp_path / "lycoris.safetensors", tmp_path / "kohya.safetensors", "kohya")
    pipe = pipeline("StableDiffusionPipeline", unet=copy.deepcopy(base), text_encoder=text_encoder())
    pipe.load_lora_weights(str(out))
    close(run_unet(pipe.unet, UNET), run_unet(merged(base, made), UNET))


@peers.needs("diffusers")
def test_sdxl_with_ldm_names_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    from loratools.naming.image.evidence import family_named

    family = family_named("sdxl")
    assert family is not None

    def ldm(name: str) -> str:
        back = family.back(name, "original")
        assert back is not None
        return back.name

    base, first, second = unet(SDXL), text_encoder(), text_encoder(12)
    made = factors(base.named_modules())
    texts = [factors((n, m) for n, m in e.named_modules() if "layers." in n) for e in (first, second)]
    stored = kohya(made, "lora_unet_", ldm)
    stored |= kohya(texts[0], "lora_te1_text_model_") | kohya(texts[1], "lora_te2_text_model_")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in stored
    save_file(stored, tmp_path / "kohya.safetensors")
    out = convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors", "diffusers")
    pipe = pipeline(
        "StableDiffusionXLPipeline", unet=copy.deepcopy(base), text_encoder=first, text_encoder_2=copy.deepcopy(second)
    )
    plain = copy.deepcopy(second)
    pipe.load_lora_weights(str(out))
    close(run_unet(pipe.unet, SDXL), run_unet(merged(base, made), SDXL))
    close(run_text(pipe.text_encoder_2), run_text(merged(plain, texts[1])))
    again = load_file(convert(out, tmp_path / "back.safetensors", "kohya"))
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    comfy = convert(out, tmp_path / "comfy.safetensors", "comfy")
    assert "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight" in load_file(comfy)


@peers.needs("diffusers")
def test_sdxl_written_as_kohya_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    base, encoder = unet(SDXL), text_encoder(12)
    made = factors(((n, m) for n, m in base.named_modules() if "attn" in n or ".ff." in n), ranks=1)
    text = factors(((n, m) for n, m in encoder.named_modules() if "self_attn" in n), ranks=1)
    save_file(
        as_diffusers(made, "unet") | as_diffusers(text, "text_encoder_2.text_model"), tmp_path / "one.safetensors"
    )
    out = convert(tmp_path / "one.safetensors", tmp_path / "kohya.safetensors", "kohya")
    keys = set(load_file(out))
    assert "lora_unet_output_blocks_0_1_transformer_blocks_2_ff_net_2.lora_up.weight" in keys
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys
    parts = {"unet": copy.deepcopy(base), "text_encoder": text_encoder(), "text_encoder_2": copy.deepcopy(encoder)}
    pipe = pipeline("StableDiffusionXLPipeline", **parts)
    pipe.load_lora_weights(str(out))
    close(run_unet(pipe.unet, SDXL), run_unet(merged(base, made), SDXL))
    close(run_text(pipe.text_encoder_2), run_text(merged(encoder, text)))


@peers.needs("diffusers")
def test_flux_written_as_kohya_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    base = flux()
    # Of single blocks, diffusers cuts at the widths of the real model; what lies outside of blocks, it names wrongly.
    chosen = ((n, m) for n, m in base.named_modules() if n.startswith("transformer_blocks"))
    made = factors(chosen, step=0)
    save_file(as_diffusers(made, "transformer"), tmp_path / "one.safetensors", {"loratools.family": "flux"})
    out = convert(tmp_path / "one.safetensors", tmp_path / "kohya.safetensors", "kohya")
    assert "lora_unet_double_blocks_1_txt_attn_qkv.lora_up.weight" in load_file(out)
    pipe = pipeline("FluxPipeline", transformer=copy.deepcopy(base), text_encoder=text_encoder())
    pipe.load_lora_weights(str(out))
    close(run_flux(pipe.transformer), run_flux(merged(base, made)))


def as_diffusers(made: Factors, part: str) -> dict[str, torch.Tensor]:
    """With the scale in B, which needs nothing in the header."""
    stored = {}
    for name, (a, b, alpha) in made.items():
        stored[f"{part}.{name}.lora_A.weight"] = a
        stored[f"{part}.{name}.lora_B.weight"] = (b.double() * alpha / a.shape[0]).float()
    return stored


@peers.needs("diffusers")
@pytest.mark.parametrize("through", ["kohya", "comfy", "onetrainer", "lycoris", "bfl", "diffusers"])
def test_flux_goes_through_every_format_and_runs_in_diffusers_as_computed(tmp_path: Path, through: str) -> None:
    base = flux()
    made = factors(base.named_modules())
    stored = as_diffusers(made, "transformer")
    save_file(stored, tmp_path / "one.safetensors", {"format": "pt"})
    between = convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", through)
    assert formats.load(between).format == through
    out = convert(between, tmp_path / "three.safetensors", "diffusers")
    again = load_file(out)
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    pipe = pipeline("FluxPipeline", transformer=copy.deepcopy(base), text_encoder=text_encoder())
    pipe.load_lora_weights(str(out))
    close(run_flux(pipe.transformer), run_flux(merged(base, made)))


def flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(4)
    return FluxTransformer2DModel(**FLUX).double().eval()


def run_flux(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        return model(
            hidden_states=random(1, 5, 6),
            encoder_hidden_states=random(1, 3, 12),
            pooled_projections=random(1, 10),
            timestep=torch.tensor([0.3], dtype=torch.float64),
            guidance=torch.tensor([2.0], dtype=torch.float64),
            img_ids=torch.zeros(5, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


@peers.needs("diffusers", "lycoris")
@pytest.mark.parametrize("kohya_names", [True, False])
def test_locon_made_by_lycoris_with_cores_runs_in_diffusers_as_lycoris_does(tmp_path: Path, kohya_names: bool) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    base, adapted = unet(UNET), unet(UNET)
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [r".*conv1", r".*attn1\.to_q", r".*ff\.net\.2"]})
    sizes = {"linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 3, "conv_alpha": 2}
    net = create_lycoris(adapted, 1.0, algo="locon", use_tucker=True, **sizes)
    net.apply_to()
    generator = torch.Generator().manual_seed(8)
    for parameter in net.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).double()
    stored = {k: v.float().contiguous() for k, v in net.state_dict().items()}
    assert any(k.endswith("lora_mid.weight") for k in stored)
    if kohya_names:
        stored = {k.replace("lycoris_", "lora_unet_"): v for k, v in stored.items()}
    save_file(stored, tmp_path / "lycoris.safetensors", {"ss_base_model_version": "sd_v1"})
    out = convert(tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors", "diffusers")
    pipe = pipeline("StableDiffusionPipeline", unet=copy.deepcopy(base), text_encoder=text_encoder())
    pipe.load_lora_weights(str(out))
    expected = run_unet(adapted, UNET)
    assert not torch.allclose(expected, run_unet(base, UNET), rtol=1e-2)
    close(run_unet(pipe.unet, UNET), expected)


@peers.needs("diffusers")
def test_dora_of_outputs_runs_in_diffusers_as_computed(tmp_path: Path) -> None:
    base = unet(UNET)
    made = factors((n, m) for n, m in base.named_modules() if n.endswith(("attn1.to_q", "proj_in")))
    changed = copy.deepcopy(base)
    stored = kohya(made, "lora_unet_")
    generator = torch.Generator().manual_seed(6)
    for name, (a, b, alpha) in made.items():
        weight = changed.get_submodule(name).weight
        delta = b.double().reshape(b.shape[0], -1) @ a.double().reshape(a.shape[0], -1) * alpha / a.shape[0]
        sum_ = weight.data.reshape(weight.shape[0], -1) + delta
        magnitude = torch.rand(weight.shape[0], 1, generator=generator) + 0.5
        weight.data = (magnitude.double() * sum_ / sum_.norm(dim=1, keepdim=True)).reshape(weight.shape)
        stored[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude.reshape(-1, *(1,) * (weight.dim() - 1))
    save_file(stored, tmp_path / "kohya.safetensors", {"ss_base_model_version": "sd_v1"})
    out = convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors", "diffusers")
    pipe = pipeline("StableDiffusionPipeline", unet=copy.deepcopy(base), text_encoder=text_encoder())
    pipe.load_lora_weights(str(out))
    close(run_unet(pipe.unet, UNET), run_unet(changed, UNET))
    again = load_file(convert(out, tmp_path / "back.safetensors", "kohya"))
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)


@peers.needs("diffusers")
def test_what_diffusers_saves_itself_is_read_with_its_alphas(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = unet(UNET)
    base.add_adapter(
        LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "to_k"], alpha_pattern={"attn2.to_k": 5}, use_rslora=True)
    )
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path), get_peft_model_state_dict(base), unet_lora_adapter_metadata=base.peft_config["default"].to_dict()
    )
    found = formats.load(tmp_path)
    assert found.format == "diffusers"
    scales = {n: u.scale for n, u in found.updates.items()}
    assert all(name.startswith("unet.") for name in scales)
    for name, layer in base.named_modules():
        if hasattr(layer, "scaling"):
            assert scales[f"unet.{name}"] == pytest.approx(layer.scaling["default"])
    assert {u.alpha_source for u in found.updates.values()} == {"metadata"}
