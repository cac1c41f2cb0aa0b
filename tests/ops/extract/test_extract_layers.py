"""Extraction of every kind of layer, and back: merging what was extracted at full rank gives the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from loratools.checkpoints import open_checkpoint
from loratools.ops.extract.verb import ExtractReport, extract
from loratools.ops.merge.verb import merge
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts


def _pair(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object] | None = None
) -> tuple[Path, Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    deltas = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config=config)
    tuned = {name: w + deltas[name] for name, w in weights.items()}
    return base, factories.checkpoint_folder(tmp_path / "tuned", weights=tuned, config=config), tuned


def _merged(base: Path, report: ExtractReport, out: Path) -> dict[str, Tensor]:
    assert report.adapter is not None
    merge(base, [report.adapter], out)
    return {name: tensor.read() for name, tensor in open_checkpoint(out).weights.items()}


def _assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


SHAPES: dict[str, tuple[int, ...]] = {
    "unet.conv_in.weight": (10, 4, 3, 3),
    "unet.conv_in.bias": (10,),
    "unet.mix.weight": (9, 10, 1, 1),
    "unet.time.weight": (7, 9, 5),
    "unet.depthwise.weight": (8, 1, 3, 3),
    "unet.norm.weight": (9,),
    "unet.norm.bias": (9,),
    "unet.proj.weight": (11, 9),
    "unet.word_embeddings.weight": (23, 6),
}


def test_every_kind_of_layer_comes_back_at_full_rank(tmp_path: Path) -> None:
    base, tuned, wanted = _pair(tmp_path, SHAPES)

    report = extract(base, tuned, rank=99, embeddings="lora")

    assert {m.name: (m.rank, m.shape) for m in report.modules} == {
        "unet.conv_in": (10, (10, 4, 3, 3)),
        "unet.mix": (9, (9, 10, 1, 1)),
        "unet.time": (7, (7, 9, 5)),
        "unet.proj": (9, (11, 9)),
        "unet.word_embeddings": (6, (23, 6)),
    }
    assert {r.name: r.declared for r in report.replacements} == {
        "unet.conv_in.bias": "bias",
        # One input channel may be a grouped convolution, whose factors PEFT does not merge.
        "unet.depthwise.weight": "modules_to_save",
        "unet.norm.bias": "modules_to_save",
        "unet.norm.weight": "modules_to_save",
    }
    assert report.skipped == ()
    assert report.change_captured == pytest.approx(1)
    _assert_close(_merged(base, report, tmp_path / "merged"), wanted)


def test_factors_of_a_convolution_have_its_kernel_in_a(tmp_path: Path) -> None:
    base, tuned, wanted = _pair(tmp_path, SHAPES)

    report = extract(base, tuned, rank=3, include=["unet.conv_in"])

    assert report.adapter is not None
    (update,) = report.adapter.updates.values()
    assert isinstance(update, LoRA)
    assert (update.a.shape, update.b.shape) == ((3, 4, 3, 3), (10, 3, 1, 1))
    delta = (wanted["unet.conv_in.weight"] - open_checkpoint(base).weights["unet.conv_in.weight"].read()).double()
    product = torch.einsum("or,rikl->oikl", update.b.read().double()[:, :, 0, 0], update.a.read().double())
    s = torch.linalg.svdvals(delta.flatten(1))
    assert report.modules[0].error == pytest.approx(float((delta - product).norm() / delta.norm()), rel=1e-5)
    assert report.modules[0].error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)


@pytest.mark.parametrize(("model_type", "turned"), [("mixtral", False), ("gpt_oss", True)])
def test_fused_experts_have_factors_each_and_one_rank(tmp_path: Path, model_type: str, turned: bool) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base, tuned, wanted = _pair(tmp_path, {name: (3, 10, 7), "a.weight": (5, 4)}, {"model_type": model_type})

    full, some = (extract(base, tuned, rank=rank, include=["*experts*"]) for rank in (99, 2))

    assert [(m.name, m.rank, m.shape) for m in full.modules] == [(name, 7, (3, 10, 7))]
    found = _merged(base, full, tmp_path / "merged")
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    assert some.adapter is not None
    update = some.adapter.updates[name]
    assert isinstance(update, LoRAExperts)
    assert update.shape == ((3, 7, 10) if turned else (3, 10, 7))
    # PEFT's packing: an expert's rows of A together, its columns of B apart.
    a = update.a.read().double().reshape(3, 2, -1)
    b = update.b.read().double().reshape(-1, 2, 3)
    product = torch.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a)
    delta = (wanted[name] - open_checkpoint(base).weights[name].read()).double()
    tails = torch.linalg.svdvals(delta)[:, 2:]
    assert some.error == pytest.approx(float((delta - product).norm() / delta.norm()), rel=1e-5)
    assert some.error == pytest.approx(float(tails.norm() / delta.norm()), rel=1e-4)


def test_an_expert_that_did_not_change_gets_zeros(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    weights = {name: torch.randn(4, 8, 6)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    changed = weights[name].clone()
    changed[1] += torch.outer(torch.arange(8.0), torch.ones(6))
    changed[3] += 1
    tuned = factories.checkpoint_folder(tmp_path / "tuned", weights={name: changed})

    report = extract(base, tuned, energy=1.0)

    assert [(m.rank, m.error is not None and m.error < 1e-6) for m in report.modules] == [(1, True)]
    torch.testing.assert_close(_merged(base, report, tmp_path / "merged")[name], changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "kind"), [(2, "lora"), (5, "whole")])
def test_an_embedding_becomes_what_is_smaller(tmp_path: Path, rank: int, kind: str) -> None:
    # 23 * 6 numbers whole, rank * (23 + 6) as factors.
    base, tuned, wanted = _pair(tmp_path, {"embed_tokens.weight": (23, 6), "proj.weight": (9, 8)})

    report = extract(base, tuned, rank=rank)
    by_value = extract(base, tuned, energy=0.5 if kind == "lora" else 0.999)
    planned = extract(base, tuned, rank=rank, plan=True)

    for found in (report, by_value):
        assert [r.name for r in found.replacements] == (["embed_tokens.weight"] if kind == "whole" else [])
    assert {m.name for m in planned.modules} == {m.name for m in report.modules}
    if kind == "whole":
        assert report.adapter is not None
        assert torch.equal(
            report.adapter.replacements["embed_tokens.weight"].tensor.read(), wanted["embed_tokens.weight"]
        )


def test_a_tied_embedding_is_written_whole_into_the_base(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (30, 6), "model.layers.0.mlp.up_proj.weight": (9, 6)}
    base, tuned, wanted = _pair(tmp_path, shapes, {"tie_word_embeddings": True})

    report = extract(base, tuned, rank=6, embeddings="lora")

    assert [(r.name, r.declared) for r in report.replacements] == [("model.embed_tokens.weight", "embedding")]
    assert any("tied head" in w for w in report.warnings)
    _assert_close(_merged(base, report, tmp_path / "merged"), wanted)


def test_gpt2_layers_that_are_square_come_back(tmp_path: Path) -> None:
    shapes = {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_attn.weight": (8, 24), "wte.weight": (19, 8)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}
    base, tuned, wanted = _pair(tmp_path, shapes, config)

    report = extract(base, tuned, rank=99, embeddings="lora")

    _assert_close(_merged(base, report, tmp_path / "merged"), wanted)


def test_modules_can_be_taken_whole(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.0.{n}": s for n, s in {"up.weight": (9, 6), "up.bias": (9,), "down.weight": (6, 9)}.items()
    }
    base, tuned, wanted = _pair(tmp_path, shapes)

    report = extract(base, tuned, rank=1, whole=["*.up"])

    assert [m.name for m in report.modules] == ["model.layers.0.down"]
    assert [(r.name, r.declared) for r in report.replacements] == [
        (f"model.layers.0.up.{leaf}", "modules_to_save") for leaf in ("bias", "weight")
    ]
    found = _merged(base, report, tmp_path / "merged")
    assert torch.equal(found["model.layers.0.up.weight"], wanted["model.layers.0.up.weight"])
