"""Reading of image formats: what is found, what is refused, and by which name. Files are made without our writer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats
from loratools.errors import FormatError, UndecidedError, UnsupportedError
from loratools.formats import Base
from loratools.updates.full import Full
from loratools.updates.lora import LoRA

Tensors = dict[str, torch.Tensor]
# In the folder of the checkout, or further up where that is a worktree.
KEY_SHAPES = next((p for up in Path(__file__).parents[2:] if (p := up / "shared/real/key_shapes").is_dir()), None)


def lora(
    module: str, out: int, into: int, *, rank: int = 2, alpha: float | None = 3.0, spelled: str = "kohya"
) -> Tensors:
    generator = torch.Generator().manual_seed(len(module))
    down, up = {
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "peft": ("lora_A.weight", "lora_B.weight"),
        "dot": ("lora.down.weight", "lora.up.weight"),
        "old": ("down.weight", "up.weight"),
    }[spelled]
    joint = "_lora." if spelled == "old" else "."
    found = {
        f"{module}{joint}{down}": torch.randn(rank, into, generator=generator),
        f"{module}{joint}{up}": torch.randn(out, rank, generator=generator),
    }
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def stored(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata or {"format": "pt"})
    return path


def test_an_alpha_of_0_is_read_as_the_rank_and_said(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
    found = formats.load(stored(tmp_path, lora(module, 8, 5, alpha=0.0)))
    assert [(u.alpha, u.scale) for u in found.updates.values()] == [(2.0, 1.0)]
    assert any("1 module with an alpha of 0" in warning for warning in found.warnings)
    told = formats.load(stored(tmp_path, lora(module, 8, 5, alpha=3.0)))
    assert not any("alpha of 0" in warning for warning in told.warnings)


SPELLINGS = {
    "attention processors": ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_out", "old"),
    "the same below unet": ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_out", "old"),
    "lora.down": ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "dot"),
    "peft": ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "peft"),
}  # fmt: skip


@pytest.mark.parametrize("generation", SPELLINGS)
def test_every_generation_of_diffusers_names_the_same_module(tmp_path: Path, generation: str) -> None:
    module, spelled = SPELLINGS[generation]
    found = formats.load(stored(tmp_path, lora(module, 8, 5, alpha=None, spelled=spelled)))
    assert found.format == "diffusers"
    assert list(found.updates) == ["unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"]
    (update,) = found.updates.values()
    assert (update.shape, update.scale, update.alpha_source) == ((8, 5), 1.0, "assumed")


def test_text_encoders_of_diffusers_until_peft_are_read(tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.3.self_attn"
    old = {k.replace("_lora.", "_lora."): v for k, v in lora(f"{layer}.to_q", 8, 5, alpha=None, spelled="old").items()}
    linear = {
        f"{layer}.out_proj.lora_linear_layer.down.weight": torch.ones(2, 5),
        f"{layer}.out_proj.lora_linear_layer.up.weight": torch.ones(8, 2),
    }
    found = formats.load(stored(tmp_path, old | linear))
    assert list(found.updates) == [f"{layer}.out_proj", f"{layer}.q_proj"]


def test_a_language_model_below_transformer_is_left_to_peft(tmp_path: Path) -> None:
    path = stored(tmp_path, lora("transformer.h.0.attn.c_attn", 9, 5, alpha=None, spelled="peft"))
    assert formats.detect(path) == ["peft"]


def test_a_fused_module_is_cut_and_every_piece_has_its_rows(tmp_path: Path) -> None:
    tensors = lora("diffusion_model.single_blocks.4.linear1", 7 * 6, 6, spelled="peft")
    found = formats.load(stored(tmp_path, tensors | lora("diffusion_model.img_in", 6, 4, spelled="peft")))
    b = tensors["diffusion_model.single_blocks.4.linear1.lora_B.weight"]
    block = "transformer.single_transformer_blocks.4"
    cuts = {"attn.to_q": (0, 6), "attn.to_k": (6, 12), "attn.to_v": (12, 18), "proj_mlp": (18, 42)}
    for name, (start, stop) in cuts.items():
        update = found.updates[f"{block}.{name}"]
        assert isinstance(update, LoRA)
        assert torch.equal(update.b.read(), b[start:stop])
        assert update.scale == 1.5


def test_shift_and_scale_stand_in_the_other_order_at_the_end_of_flux(tmp_path: Path) -> None:
    tensors = lora("lora_unet_final_layer_adaLN_modulation_1", 12, 6) | lora("lora_unet_img_in", 6, 4)
    tensors |= lora("lora_unet_double_blocks_0_img_mod_lin", 36, 6)
    found = formats.load(stored(tmp_path, tensors))
    update = found.updates["transformer.norm_out.linear"]
    b = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(update.parts["B"].read(), torch.cat([b[6:], b[:6]]))
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "again.safetensors", format="kohya")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_parts_of_a_fused_module_that_are_missing_are_written_as_zeros(tmp_path: Path) -> None:
    block = "transformer.single_transformer_blocks.1"
    tensors = lora(f"{block}.attn.to_k", 6, 6, alpha=None, spelled="peft")
    tensors |= lora(f"{block}.proj_out", 6, 6 + 24, alpha=None, spelled="peft")
    path = stored(tmp_path, tensors | lora("transformer.x_embedder", 6, 4, alpha=None, spelled="peft"))
    loratools.convert(path, tmp_path / "k.safetensors", format="kohya")
    up = load_file(tmp_path / "k.safetensors")["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    expected = torch.zeros(3 * 6 + 4 * 6, 2)
    expected[6:12] = tensors[f"{block}.attn.to_k.lora_B.weight"]
    assert torch.equal(up, expected)
    loratools.convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", format="diffusers")
    again = load_file(tmp_path / "d.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_different_scales_of_fused_parts_are_folded(tmp_path: Path) -> None:
    attention = "transformer.transformer_blocks.0.attn"
    tensors = lora("transformer.x_embedder", 6, 4, alpha=None, spelled="peft")
    for leaf, rank in (("to_q", 2), ("to_k", 3), ("to_v", 2)):
        tensors |= lora(f"{attention}.{leaf}", 6, 6, rank=rank, alpha=None, spelled="peft")
    config = {"transformer.r": 2, "transformer.lora_alpha": 1.0, "transformer.alpha_pattern": {"to_v": 5.0}}
    path = stored(tmp_path, tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    report = loratools.convert(path, tmp_path / "k.safetensors", format="kohya")
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-6
    made = load_file(tmp_path / "k.safetensors")
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    got = made[f"{qkv}.lora_up.weight"].double() @ made[f"{qkv}.lora_down.weight"].double()
    got *= made[f"{qkv}.alpha"].item() / 7
    scales = {"to_q": 1 / 2, "to_k": 1 / 3, "to_v": 5 / 2}
    b, a = ({leaf: tensors[f"{attention}.{leaf}.lora_{part}.weight"].double() for leaf in scales} for part in "BA")
    expected = torch.cat([s * b[leaf] @ a[leaf] for leaf, s in scales.items()])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_differences_and_biases_are_updates_of_their_own(tmp_path: Path) -> None:
    block = "diffusion_model.blocks.3"
    tensors = lora(f"{block}.self_attn.q", 6, 5, spelled="peft")
    tensors |= {f"{block}.self_attn.q.diff_b": torch.ones(6), f"{block}.norm3.diff": torch.ones(5)}
    tensors |= {f"{block}.norm3.diff_b": torch.full((5,), 2.0)}
    found = formats.load(stored(tmp_path, tensors))
    kinds = {name: update.kind for name, update in found.updates.items()}
    assert kinds == {
        "transformer.blocks.3.attn1.to_q": "lora",
        "transformer.blocks.3.attn1.to_q.bias": "full",
        "transformer.blocks.3.norm2": "full",
        "transformer.blocks.3.norm2.bias": "full",
    }
    bias = found.updates["transformer.blocks.3.norm2.bias"]
    assert isinstance(bias, Full)
    assert torch.equal(bias.diff.read(), torch.full((5,), 2.0))
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "again.safetensors", format="comfy")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_control_lora_of_flux_has_biases_and_norms(tmp_path: Path) -> None:
    tensors = lora("double_blocks.0.img_attn.qkv", 18, 6, alpha=None, spelled="peft")
    tensors |= {"double_blocks.0.img_attn.qkv.lora_B.bias": torch.arange(18.0)}
    tensors |= {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(3)}
    found = formats.load(stored(tmp_path, tensors | lora("img_in", 6, 9, alpha=None, spelled="peft")))
    assert found.format == "bfl"
    assert list(found.replacements) == ["transformer.transformer_blocks.0.attn.norm_k.weight"]
    bias = found.updates["transformer.transformer_blocks.0.attn.to_k.bias"]
    assert torch.equal(bias.parts["diff"].read(), torch.arange(6.0, 12.0))
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "again.safetensors", format="bfl")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(load_file(tmp_path / "lora.safetensors"))
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_names_of_the_authors_of_hunyuan_video_are_found_behind_either_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = lora(f"{prefix}double_blocks.7.txt_attn_qkv", 18, 6, spelled="peft")
    tensors |= lora(f"{prefix}single_blocks.3.modulation.linear", 18, 6, spelled="peft")
    found = formats.load(stored(tmp_path, tensors))
    block = "transformer.transformer_blocks.7.attn"
    assert list(found.updates) == [
        "transformer.single_transformer_blocks.3.norm.linear",
        *(f"{block}.add_{leaf}_proj" for leaf in "kqv"),
    ]


def test_files_of_peft_without_its_config_are_flux_where_the_names_are(tmp_path: Path) -> None:
    module = "base_model.model.double_blocks.0.img_attn.proj"
    path = stored(tmp_path, lora(module, 6, 6, alpha=None, spelled="peft"))
    assert list(formats.load(path).updates) == ["transformer.transformer_blocks.0.attn.to_out.0"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    path.rename(tmp_path / "folder" / "adapter_model.safetensors")
    assert list(formats.load(tmp_path / "folder").updates) == ["double_blocks.0.img_attn.proj"]


def test_names_in_no_table_are_kept_and_refused_where_they_would_change(tmp_path: Path) -> None:
    path = stored(tmp_path, lora("lora_unet_tower_3_mix_in", 6, 5) | lora("lora_unet_tower_3_mix_out", 5, 6))
    assert list(formats.load(path).updates) == ["lora_unet_tower_3_mix_in", "lora_unet_tower_3_mix_out"]
    loratools.convert(path, tmp_path / "again.safetensors", format="kohya")
    assert set(load_file(tmp_path / "again.safetensors")) == set(load_file(path))
    with pytest.raises(UnsupportedError, match="none of its 2 module names") as caught:
        loratools.convert(path, tmp_path / "other.safetensors", format="comfy")
    assert any("tower_3_mix_in" in line for line in caught.value.details)
    assert caught.value.hint is not None
    assert "--base" in caught.value.hint


def test_a_base_tells_where_the_dots_were(tmp_path: Path) -> None:
    path = stored(tmp_path, lora("lora_unet_tower_3_mix_in", 6, 5) | lora("lora_unet_head", 5, 6))
    base = Base({"model.diffusion_model.tower.3.mix_in.weight": (6, 5), "model.diffusion_model.head.weight": (5, 6)})
    found = formats.load(path, base=base)
    assert list(found.updates) == ["diffusion_model.head", "diffusion_model.tower.3.mix_in"]


def test_a_base_with_two_modules_of_the_same_letters_cannot_tell(tmp_path: Path) -> None:
    path = stored(tmp_path, lora("lora_unet_mix_in", 6, 5))
    base = Base({"mix.in.weight": (6, 5), "mix_in.weight": (6, 5)})
    with pytest.raises(UndecidedError, match="several modules of the base"):
        formats.load(path, base=base)


FAULTS: dict[str, tuple[Tensors, str]] = {
    "no partner": ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 5)}, "has no partner"),
    "different ranks": (
        {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 5),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(6, 3),
        },
        "make no product",
    ),
    "two alphas": (
        lora("lora_unet_mid_block_resnets_0_conv1", 6, 5, alpha=None)
        | {"lora_unet_mid_block_resnets_0_conv1.alpha": torch.ones(2)},
        "one is needed",
    ),
    "no number": (lora("lora_unet_mid_block_resnets_0_conv1", 6, 5, alpha=float("nan")), "an alpha of nan"),
    "a magnitude of nothing": (
        lora("lora_unet_mid_block_resnets_0_conv1", 6, 5)
        | {"lora_unet_mid_block_resnets_0_conv1.dora_scale": torch.ones(1, 7)},
        "neither of outputs nor of inputs",
    ),
    "alone": (
        lora("lora_unet_mid_block_resnets_0_conv1", 6, 5)
        | {"lora_unet_mid_block_resnets_0_conv2.alpha": torch.ones(())},
        "has no partner",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_together_are_named(tmp_path: Path, fault: str) -> None:
    tensors, words = FAULTS[fault]
    with pytest.raises(FormatError) as caught:
        formats.load(stored(tmp_path, tensors))
    assert any(words in line for line in caught.value.details)


def test_what_is_no_part_of_an_update_is_refused_by_name(tmp_path: Path) -> None:
    tensors = lora("lora_unet_mid_block_resnets_0_conv1", 6, 5) | {"bundle_emb.cat.string_to_param": torch.ones(3)}
    with pytest.raises(UnsupportedError) as caught:
        formats.load(stored(tmp_path, tensors))
    assert any("bundle_emb.cat" in line for line in caught.value.details)


def test_hashes_are_made_anew_and_other_texts_kept(tmp_path: Path) -> None:
    import hashlib

    tensors = lora("lora_unet_mid_block_resnets_0_conv1", 6, 5)
    old = {"sshs_model_hash": "a" * 64, "sshs_legacy_hash": "b" * 8, "ss_base_model_version": "sd_v1", "ss_tag": "cat"}
    report = loratools.convert(stored(tmp_path, tensors, old), tmp_path / "k.safetensors", format="kohya")
    data = (tmp_path / "k.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    texts = json.loads(data[8:start])["__metadata__"]
    assert texts["ss_tag"] == "cat"
    assert texts["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert len(texts["sshs_legacy_hash"]) == 8
    assert not report.dropped


# Key lists of public files: names and shapes, filled with random values.
RANKS = {
    "flux_dora_onetrainer": ("onetrainer", {4}),
    "flux_lora_aitoolkit": ("comfy", {16}),
    "flux_lora_diffusers": ("diffusers", {32}),
    "flux_lora_kohya_with_te1": ("kohya", {4}),
    "flux_lora_xlabs": ("xlabs", {16}),
    "krea2_lora_kohya": ("kohya", {32}),
}
CAN_HOLD = {
    "flux_dora_onetrainer": ("onetrainer",),
    "flux_lora_aitoolkit": ("kohya", "diffusers", "comfy", "onetrainer", "lycoris", "bfl"),
    "flux_lora_diffusers": ("kohya", "diffusers", "comfy", "onetrainer", "lycoris", "bfl"),
    "flux_lora_kohya_with_te1": ("kohya", "diffusers", "comfy", "onetrainer"),
    "flux_lora_xlabs": ("kohya", "diffusers", "comfy", "onetrainer", "lycoris", "bfl", "xlabs"),
    "krea2_lora_kohya": ("kohya", "diffusers", "comfy", "onetrainer", "lycoris"),
}


def _in_the_middle(key: str) -> bool:
    number = re.search(r"(?:blocks?|layers)[._](\d+)[._]", key)
    return number is not None and int(number[1]) in {*range(2, 10), *range(12, 18), *range(24, 37)}


@pytest.mark.parametrize("name", RANKS)
def test_public_files_go_through_every_format_that_can_hold_them(tmp_path: Path, name: str) -> None:
    if KEY_SHAPES is None:
        pytest.skip("the key lists of public files lie in ../shared, which is not here")
    shapes = json.loads((KEY_SHAPES / f"{name}.json").read_text())
    generator = torch.Generator().manual_seed(0)
    # All widths are multiples of 64, and kept in proportion: the files are of several hundred MB.
    tensors = {
        key: torch.randn([n // 64 if n >= 64 else n for n in shape], generator=generator).half()
        for key, shape in shapes.items()
    }
    tensors |= {key: torch.tensor(2.0) for key, shape in shapes.items() if not shape}
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    adapter = formats.load(source)
    assert (adapter.format, {u.rank for u in adapter.updates.values()}) == RANKS[name]
    # From here on without most of the blocks in the middle, which tell nothing new; the last ones tell the depth.
    tensors = {key: tensor for key, tensor in tensors.items() if not _in_the_middle(key)}
    save_file(tensors, source)
    adapter = formats.load(source)
    read = adapter.tensors()
    for format in sorted({"kohya", "diffusers", "comfy", "onetrainer", "lycoris", "bfl", "xlabs"}):
        between, back = tmp_path / f"{format}.safetensors", tmp_path / f"{format}-back.safetensors"
        if format not in CAN_HOLD[name]:
            with pytest.raises(UnsupportedError, match="cannot be written as"):
                loratools.convert(source, between, format=format)
            continue
        loratools.convert(source, between, format=format)
        report = loratools.convert(between, back, format=adapter.format, from_format=format)
        assert report.max_relative_error == 0
        found = formats.load(back).tensors()
        assert found.keys() == read.keys()
        assert all(torch.equal(found[key].read(), read[key].read()) for key in read)
        again = load_file(back)
        assert {key: v.shape for key, v in again.items() if not key.endswith(".alpha")} == {
            key: v.shape for key, v in tensors.items() if not key.endswith(".alpha")
        }
        assert all(torch.equal(v.to(again[key].dtype), again[key]) for key, v in tensors.items())


@pytest.mark.parametrize("key", ["bundle_emb.cat.clip_l", "bundle_emb.cat.string_to_param.*", "<s1>"])
def test_bundled_embeddings_are_refused_as_what_they_are(key: str, tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**lora(module, 6, 5), key: torch.ones(2, 5)}, tmp_path / "a.safetensors")

    with pytest.raises(UnsupportedError, match="textual inversion") as caught:
        formats.load(tmp_path / "a.safetensors")

    assert key in str(caught.value)
    assert "--from" not in str(caught.value)


def test_a_file_of_embeddings_is_not_called_a_model(tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(2, 5), "clip_g": torch.ones(2, 7)}, tmp_path / "a.safetensors")

    with pytest.raises(FormatError, match="textual inversion"):
        formats.load(tmp_path / "a.safetensors")


def test_what_a_kind_misses_is_said_in_one_line(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {f"{module}.hada_{part}": torch.ones(3, 3) for part in ("w1_a", "w1_b", "w2_a")}
    save_file(parts, tmp_path / "a.safetensors")

    with pytest.raises(FormatError) as caught:
        formats.load(tmp_path / "a.safetensors")

    assert caught.value.details == (f"'{module}' has hada_w1_a, hada_w1_b, hada_w2_a without hada_w2_b",)
