"""torchtune, Megatron, loralib, cloneofsimo and Sam_LoRA: each against its own formula, written out, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import FormatError, MismatchError, UnsupportedError
from loratools.formats import Base
from loratools.ops.convert.verb import convert

SHARED = Path(__file__).parents[2].parent / "shared"
HEADS, KEY_HEADS, SIZE, HIDDEN = 6, 2, 4, 10
LLAMA = Base(
    {}, {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "intermediate_size": 14}
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def delta(adapter: Adapter, name: str) -> Tensor:
    factors = adapter.updates[name].factors()
    assert factors is not None
    return factors.b @ factors.a


def tune(folder: Path, *, magnitude: bool = False) -> tuple[Path, dict[str, Tensor]]:
    shapes = {
        "layers.1.attn.q_proj": (HEADS * SIZE, HIDDEN), "layers.1.attn.k_proj": (KEY_HEADS * SIZE, HIDDEN),
        "layers.1.attn.output_proj": (HIDDEN, HEADS * SIZE), "layers.0.mlp.w1": (14, HIDDEN), "output": (13, HIDDEN),
    }  # fmt: skip
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"] = random(3, into), random(out, 3)
        if magnitude:
            tensors[f"{name}.magnitude"] = random(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    return folder, tensors


def test_torchtune_rows_of_heads_are_put_back(tmp_path: Path) -> None:
    folder, tensors = tune(tmp_path / "tune", magnitude=True)
    assert formats.detect(folder) == ["torchtune"]

    adapter = formats.load(folder, base=LLAMA)

    def to_peft(rows: Tensor, heads: int) -> Tensor:
        # torchtune's tune_to_peft_adapter_weights.
        return rows.view(heads, SIZE // 2, 2, -1).transpose(1, 2).reshape(rows.shape)

    for tune_name, name, heads in (
        ("layers.1.attn.q_proj", "model.layers.1.self_attn.q_proj", HEADS),
        ("layers.1.attn.k_proj", "model.layers.1.self_attn.k_proj", KEY_HEADS),
        ("layers.1.attn.output_proj", "model.layers.1.self_attn.o_proj", None),
        ("layers.0.mlp.w1", "model.layers.0.mlp.gate_proj", None),
        ("output", "lm_head", None),
    ):
        update = adapter.updates[name]
        a, b, m = (tensors[f"{tune_name}.{part}"] for part in ("lora_a.weight", "lora_b.weight", "magnitude"))
        wanted = b if heads is None else to_peft(b, heads)
        assert torch.equal(update.parts["B"].read(), wanted)
        assert torch.equal(update.parts["A"].read(), a)
        assert torch.equal(update.parts["magnitude"].read(), m if heads is None else to_peft(m, heads).flatten())
        assert (update.scale, update.alpha_source) == (2.0, "config")


def test_torchtune_needs_to_know_the_base(tmp_path: Path) -> None:
    folder, tensors = tune(tmp_path / "tune")

    assert "2 modules, such as 'model.layers.1.self_attn.k_proj'" in formats.load(folder).uncertainties[0]
    with pytest.raises(UnsupportedError, match="model_type 'mamba'"):
        formats.load(folder, base=Base({}, {"model_type": "mamba"}))
    with pytest.raises(MismatchError, match="24 rows cannot be 5 heads"):
        formats.load(folder, base=Base({}, {"model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 2}))
    # Qwen's are in the order of Hugging Face.
    adapter = formats.load(folder, base=Base({}, {"model_type": "qwen2", "num_attention_heads": 5}))
    assert torch.equal(
        adapter.updates["model.layers.1.self_attn.q_proj"].parts["B"].read(),
        tensors["layers.1.attn.q_proj.lora_b.weight"],
    )


@pytest.mark.parametrize("style", ["mcore", "nemo"])
def test_megatron_groups_of_heads_are_taken_apart(style: str, tmp_path: Path) -> None:
    group = HEADS // KEY_HEADS + 2
    qkv = "self_attention.linear_qkv.adapter" if style == "mcore" else "self_attention.adapter_layer.lora_kqv_adapter"
    fc1 = "mlp.linear_fc1.adapter" if style == "mcore" else "mlp.adapter_layer.lora_hto4h_adapter"
    a, b = random(3, HIDDEN), random(KEY_HEADS * group * SIZE, 3)
    up = random(28, 3)
    tensors = {
        f"model.decoder.layers.2.{qkv}.linear_in.weight": a,
        f"model.decoder.layers.2.{qkv}.linear_out.weight": b,
    }
    tensors |= {
        f"model.decoder.layers.2.{fc1}.linear_in.weight": a.clone(),
        f"model.decoder.layers.2.{fc1}.linear_out.weight": up,
    }
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")

    adapter = formats.load(tmp_path / "x.ckpt", base=LLAMA)

    by_group = (b @ a).view(KEY_HEADS, group, SIZE, HIDDEN)
    wanted = {
        "self_attn.q_proj": by_group[:, :-2].reshape(-1, HIDDEN),
        "self_attn.k_proj": by_group[:, -2].reshape(-1, HIDDEN),
        "self_attn.v_proj": by_group[:, -1].reshape(-1, HIDDEN),
        "mlp.gate_proj": up[:14] @ a,
        "mlp.up_proj": up[14:] @ a,
    }
    assert set(adapter.updates) == {f"model.layers.2.{name}" for name in wanted}
    for name, right in wanted.items():
        torch.testing.assert_close(delta(adapter, f"model.layers.2.{name}"), right, rtol=1e-12, atol=1e-12)
    assert "by groups of heads" in formats.load(tmp_path / "x.ckpt").uncertainties[0]
    report = convert(tmp_path / "x.ckpt", tmp_path / "out", format="peft", base=LLAMA, alpha=6)
    assert report.max_relative_error == 0.0
    assert {u.scale for u in formats.load(tmp_path / "out").updates.values()} == {2.0}


def test_loralib_has_factors_without_alpha_and_whole_heads(tmp_path: Path) -> None:
    tensors = {"m.query.lora_A": random(3, 6), "m.query.lora_B": random(10, 3), "head.weight": random(4, 10)}
    tensors |= {"head.bias": random(4), "m.key.bias": random(10)}
    torch.save(tensors, tmp_path / "x.bin")

    assert formats.detect(tmp_path / "x.bin") == ["loralib"]
    adapter = formats.load(tmp_path / "x.bin")

    assert adapter.updates["m.query"].alpha_source == "assumed"
    torch.testing.assert_close(delta(adapter, "m.query"), tensors["m.query.lora_B"] @ tensors["m.query.lora_A"])
    assert {name: r.declared for name, r in adapter.replacements.items()} == {
        "head.weight": "modules_to_save", "head.bias": "modules_to_save", "m.key.bias": "bias",
    }  # fmt: skip


def test_a_merged_layer_of_loralib_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"m.c_attn.lora_A": random(6, 5), "m.c_attn.lora_B": random(20, 3)}, tmp_path / "x.bin")

    with pytest.raises(UnsupportedError, match="1 merged linear layer of loralib") as raised:
        formats.load(tmp_path / "x.bin")

    assert raised.value.details == ("'m.c_attn'",)


def sam_file(path: Path, *, blocks: int = 2, rank: int = 3, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A file as SAMed saves it, with a trained part of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"mask_decoder.x.weight": torch.randn(2, 6, generator=generator)}
    for number in range(2 * blocks):
        tensors[f"w_a_{number:03d}"] = torch.randn(rank, width, generator=generator)
        tensors[f"w_b_{number:03d}"] = torch.randn(width, rank, generator=generator) * (number + 1)
    torch.save(tensors, path)
    return tensors


def sam_delta(tensors: dict[str, Tensor], block: int) -> Tensor:
    """What SAMed adds to `qkv` of a block: B A of the queries to its first third, and of the values to its last."""
    q, v = (tensors[f"w_b_{2 * block + i:03d}"].double() @ tensors[f"w_a_{2 * block + i:03d}"].double() for i in (0, 1))
    return torch.cat([q, torch.zeros_like(q), v])


def test_sam_has_an_update_for_the_queries_and_one_for_the_values_of_each_block(tmp_path: Path) -> None:
    tensors = sam_file(tmp_path / "x.pth")

    adapter = formats.load(tmp_path / "x.pth")

    assert (adapter.format, list(adapter.replacements)) == ("sam-lora", ["mask_decoder.x.weight"])
    assert [(name, update.rank, update.scale) for name, update in adapter.updates.items()] == [
        (f"image_encoder.blocks.{block}.attn.{part}", 3, 1.0) for block in (0, 1) for part in "qv"
    ]
    # There is no alpha that could have been another.
    assert not any(update.assumes_alpha for update in adapter.updates.values())
    torch.testing.assert_close(delta(adapter, "image_encoder.blocks.1.attn.v"), sam_delta(tensors, 1)[12:])
    torch.save({k: t for k, t in tensors.items() if k != "w_b_003"}, tmp_path / "cut.pth")
    with pytest.raises(FormatError, match="1 fault"):
        formats.load(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "encoder", ["image_encoder.blocks.{}.attn.qkv.weight", "vision_encoder.layers.{}.attn.qkv.weight"]
)
def test_sam_is_merged_into_rows_of_the_one_qkv(encoder: str, tmp_path: Path) -> None:
    """Into a file of Segment Anything, and into one of transformers."""
    tensors = sam_file(tmp_path / "x.pth")
    base = {encoder.format(block): random(18, 6) for block in (0, 1, 2)}
    (tmp_path / "base").mkdir()
    save_file({**base, "mask_decoder.x.weight": random(2, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "sam"}))

    loratools.merge(tmp_path / "base", [(tmp_path / "x.pth", 0.5)], tmp_path / "out", exclude="mask_decoder.*")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 1):
        name = encoder.format(block)
        torch.testing.assert_close(
            merged[name].double(), base[name].double() + 0.5 * sam_delta(tensors, block), rtol=2**-23, atol=1e-6
        )
    assert torch.equal(merged[encoder.format(2)], base[encoder.format(2)])


def test_sam_adapter_is_written_as_peft_with_one_update_of_each_qkv(tmp_path: Path) -> None:
    tensors = sam_file(tmp_path / "x.pth")

    report = loratools.convert(tmp_path / "x.pth", tmp_path / "out", format="peft")

    assert report.max_relative_error == 0.0
    assert not [text for text in report.warnings if "alpha" in text]
    written = formats.load(tmp_path / "out")
    for block in (0, 1):
        update = written.updates[f"image_encoder.blocks.{block}.attn.qkv"]
        assert (update.shape, update.rank, update.scale) == ((18, 6), 6, 1.0)
        found = delta(written, f"image_encoder.blocks.{block}.attn.qkv")
        torch.testing.assert_close(found.double(), sam_delta(tensors, block), rtol=1e-6, atol=1e-6)


def test_sam_is_resized_and_combined_part_by_part_into_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = (sam_file(tmp_path / f"{seed}.pth", seed=seed, rank=2 + seed) for seed in (0, 1))

    loratools.combine([tmp_path / "0.pth", tmp_path / "1.pth"], tmp_path / "sum.safetensors", exclude="mask_decoder.*")
    loratools.resize(tmp_path / "0.pth", tmp_path / "small.safetensors", rank=1)

    summed, small = (load_file(tmp_path / f"{name}.safetensors") for name in ("sum", "small"))
    assert sorted(summed) == sorted(name for name in first if name.startswith("w_"))
    for block in (0, 1):
        expected = sam_delta(first, block) + sam_delta(second, block)
        torch.testing.assert_close(sam_delta(summed, block), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(small["mask_decoder.x.weight"], first["mask_decoder.x.weight"])
    # The nearest of rank 1, of each part on its own.
    u, s, v = torch.linalg.svd(first["w_b_002"].double() @ first["w_a_002"].double())
    nearest = s[0] * u[:, :1] @ v[:1]
    torch.testing.assert_close(small["w_b_002"].double() @ small["w_a_002"].double(), nearest, rtol=1e-4, atol=1e-4)


def test_sam_and_its_conversion_to_peft_are_one_adapter(tmp_path: Path) -> None:
    sam_file(tmp_path / "x.pth")
    loratools.convert(tmp_path / "x.pth", tmp_path / "out", format="peft")

    report = loratools.compare(tmp_path / "x.pth", tmp_path / "out")

    assert report.cosine == pytest.approx(1, abs=1e-12)
    assert not report.only_in_first
    assert not report.only_in_second


def test_blocks_that_samed_cannot_number_are_refused_by_name(tmp_path: Path) -> None:
    sam_file(tmp_path / "x.pth", blocks=3)

    with pytest.raises(UnsupportedError, match=r"1 part of .* cannot be written as sam-lora") as refused:
        loratools.resize(
            tmp_path / "x.pth", tmp_path / "out.safetensors", rank=1, exclude=["*.1.attn.*", "*.2.attn.q", "mask*"]
        )

    assert refused.value.details == (
        "image_encoder.blocks.2.attn.v: of a block behind one without queries and values: SAMed numbers blocks without "
        "gaps",
    )


def stable_diffusion(layers: dict[str, int], *, rank: int = 1) -> dict[str, Tensor]:
    """Factors of the layers of attention in Stable Diffusion 1 with an eighth of its width, as the trainer walks."""
    tensors: dict[str, Tensor] = {}
    number = 0

    def add(model: str, into: int, out: int) -> None:
        nonlocal number
        tensors[f"{model}:{number}:down"], tensors[f"{model}:{number}:up"] = random(rank, into), random(out, rank)
        number += 1

    for width in (40, 40, 80, 80, 160, 160, 160, 160, 160, 80, 80, 80, 40, 40, 40, 160):
        for kind in ("self", "gate", "text"):
            if kind == "gate":
                add("unet", width, 8 * width)
                continue
            add("unet", width, width)
            for _ in ("k", "v"):
                add("unet", width if kind == "self" else layers["text"], width)
            add("unet", width, width)
    number = 0
    for _ in range(4 * layers["encoder"]):
        add("text_encoder", layers["text"], layers["text"])
    return tensors


def test_cloneofsimo_numbers_are_modules_of_stable_diffusion(tmp_path: Path) -> None:
    tensors = stable_diffusion({"text": 24, "encoder": 2})
    header = {"unet": '["GEGLU", "CrossAttention", "Attention"]', "text_encoder": '["CLIPAttention"]'}
    save_file({**tensors, "<s1>": random(24)}, tmp_path / "x.safetensors", header)

    adapter = formats.load(tmp_path / "x.safetensors")

    assert (adapter.format, list(adapter.replacements)) == ("cloneofsimo", ["<s1>"])
    for number, name in {
        0: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        4: "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        6: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        8: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        54: "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        135: "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    }.items():
        torch.testing.assert_close(delta(adapter, name), tensors[f"unet:{number}:up"] @ tensors[f"unet:{number}:down"])
    leaves = [
        f"text_encoder.text_model.encoder.layers.1.self_attn.{leaf}"
        for leaf in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    assert set(leaves) < set(adapter.updates)
    save_file({k: t for k, t in tensors.items() if not k.startswith("unet:143")}, tmp_path / "less.safetensors", header)
    with pytest.raises(UnsupportedError, match="143 layers, where Stable Diffusion has 144"):
        formats.load(tmp_path / "less.safetensors")


@peers.needs("diffusers")
def test_the_names_of_cloneofsimo_are_diffusers_and_transformers_own(tmp_path: Path) -> None:
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32, 64, 64), cross_attention_dim=24, norm_num_groups=8, attention_head_dim=8
    )
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=31
        )
    )
    tensors = stable_diffusion({"text": 24, "encoder": 2})
    save_file(tensors, tmp_path / "x.safetensors")

    names = set(formats.load(tmp_path / "x.safetensors").updates)

    linear = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and ".attn" in n}
    linear |= {f"unet.{n}" for n, _ in unet.named_modules() if n.endswith("ff.net.0.proj")}
    # transformers 5 leaves out the `text_model.` that diffusers' files have.
    found = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and "self_attn" in n]
    linear |= {f"text_encoder.text_model.{n.removeprefix('text_model.')}" for n in found}
    assert names == linear


@pytest.mark.parametrize(
    "file", ["microsoft-lora/roberta_base_lora_mnli.bin", "cloneofsimo-lora/lora_disney.safetensors"]
)
def test_real_files_go_through_peft_without_a_tensor_lost_or_changed(file: str, tmp_path: Path) -> None:
    path = SHARED / "real" / "adapters" / file
    if not path.exists():
        pytest.skip("../shared with real adapters is not here")
    source = formats.load(path)

    report = convert(path, tmp_path / "out", format="peft", allow_partial=True)

    back = formats.load(tmp_path / "out")
    assert {d.name for d in report.dropped if d.what == "weight"} == {
        n for n in source.replacements if n.startswith("<")
    }
    assert report.max_relative_error == 0.0
    assert back.updates.keys() == source.updates.keys()
    for name, update in source.updates.items():
        for part, tensor in update.parts.items():
            assert torch.equal(back.updates[name].parts[part].read(), tensor.read())
        assert back.updates[name].scale == update.scale == 1.0
    assert set(back.replacements) == {n for n in source.replacements if not n.startswith("<")}


@pytest.mark.parametrize(("config", "scale"), [({"rank": 3, "alpha": 0.25, "dropout": 0.0}, 0.25), (None, 0.1)])
def test_mlx_vlm_multiplies_with_alpha_whatever_the_rank(
    config: dict[str, object] | None, scale: float, tmp_path: Path
) -> None:
    module = "language_model.model.layers.0.self_attn.q_proj"
    a, b = random(6, 3), random(3, 10)
    save_file({f"{module}.A": a, f"{module}.B": b}, tmp_path / "adapters.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    adapter = formats.load(tmp_path)

    assert (adapter.format, list(adapter)) == ("mlx-vlm", [module])
    # Its layer computes `y = x W^T + alpha * (x @ A) @ B`.
    torch.testing.assert_close(delta(adapter, module), (scale * a @ b).T, rtol=1e-12, atol=1e-12)
    assert any("assumed" in warning for warning in adapter.warnings) == (config is None)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.A": (6, 3)},
        {"x.A": (6, 3), "x.B": (4, 10)},
        {"x.A": (6, 3), "x.B": (3, 10), "x.weight": (10, 6)},
        {"x.A": (6,), "x.B": (3, 10)},
        {"A": (6, 3), "B": (3, 10)},
        {"x.A_log": (6, 3), "x.B_log": (3, 10)},
    ],
)
def test_other_tensors_called_a_and_b_are_not_mlx_vlms(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file({name: random(*shape) for name, shape in tensors.items()}, tmp_path / "adapters.safetensors")

    assert "mlx-vlm" not in formats.detect(tmp_path)


@pytest.mark.parametrize("alpha", [0, True, "1", [1]])
def test_an_alpha_of_mlx_vlm_that_is_no_number_is_refused(alpha: object, tmp_path: Path) -> None:
    save_file({"x.y.A": random(6, 3), "x.y.B": random(3, 10)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 3, "alpha": alpha}))

    with pytest.raises(FormatError, match="alpha = "):
        formats.load(tmp_path)
