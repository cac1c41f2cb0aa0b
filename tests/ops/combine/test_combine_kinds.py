"""Combining and resizing what is no plain pair of factors of a linear layer: held against dense float64 deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError, UsageError
from loratools.ops.combine.verb import combine
from loratools.ops.compare.verb import compare
from loratools.ops.resize.verb import resize
from loratools.tensors.lazy import from_torch
from loratools.updates.full import Full
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts
from loratools.updates.parts.protocol import Update

_GENERATOR = torch.Generator().manual_seed(1)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR, dtype=torch.float64)


def _conv(rank: int, alpha: float) -> tuple[LoRA, Tensor]:
    a, b = _random(rank, 4, 3, 2), _random(7, rank, 1, 1)
    delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a) * alpha / rank
    return LoRA(from_torch(a), from_torch(b), alpha, "config"), delta


def _tucker(rank: int, alpha: float) -> tuple[LoRA, Tensor]:
    a, b, mid = _random(rank, 4, 1, 1), _random(7, rank, 1, 1), _random(rank, rank, 3, 2)
    delta = torch.einsum("op,pqkl,qi->oikl", b[:, :, 0, 0], mid, a[:, :, 0, 0]) * alpha / rank
    return LoRA(from_torch(a), from_torch(b), alpha, "config", mid=from_torch(mid)), delta


def _embedding(rank: int, alpha: float) -> tuple[LoRA, Tensor]:
    a, b = _random(rank, 11), _random(6, rank)
    return LoRA(from_torch(a), from_torch(b), alpha, "config", embedding=True), (b @ a).T * alpha / rank


def _full(*shape: int) -> tuple[Full, Tensor]:
    diff = _random(*shape)
    return Full(from_torch(diff), 0.5), 0.5 * diff


def _adapter(updates: Mapping[str, Update]) -> Adapter:
    return Adapter(dict(updates))


def _values(update: Update) -> Tensor:
    """What an update of the result stores, by the definition of its kind."""
    if isinstance(update, Full):
        return update.scale * update.diff.read()
    assert isinstance(update, LoRA)
    a, b = update.a.read(), update.b.read()
    if update.embedding:
        return (b @ a).T * update.scale
    if update.mid is not None:
        return torch.einsum("op,pqkl,qi->oikl", b[:, :, 0, 0], update.mid.read(), a[:, :, 0, 0]) * update.scale
    if a.ndim == 2:
        return b @ a * update.scale
    return torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a) * update.scale


@pytest.mark.parametrize(
    ("one", "two"),
    [(_conv(2, 3.0), _conv(3, 5.0)), (_conv(2, 3.0), _tucker(3, 2.0)), (_embedding(2, 3.0), _embedding(3, 7.0))],
    ids=["conv", "tucker", "embedding"],
)
def test_convolutions_and_embeddings_add_as_what_they_are(one: tuple[LoRA, Tensor], two: tuple[LoRA, Tensor]) -> None:
    report = combine([(_adapter({"m": one[0]}), 0.5), (_adapter({"m": two[0]}), -2.0)])

    assert report.adapter is not None
    update = report.adapter.updates["m"]
    assert update.shape == one[0].shape
    torch.testing.assert_close(_values(update), 0.5 * one[1] - 2 * two[1], rtol=1e-12, atol=1e-12)
    assert report.error == pytest.approx(0, abs=1e-12)


def test_resized_convolution_is_the_truncated_matrix_of_its_kernel() -> None:
    update, delta = _conv(4, 3.0)
    u, s, vt = torch.linalg.svd(delta.reshape(7, -1), full_matrices=False)

    report = resize(_adapter({"m": update}), rank=2)

    assert report.adapter is not None
    smaller = report.adapter.updates["m"]
    assert (smaller.rank, smaller.shape) == (2, (7, 4, 3, 2))
    assert report.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-10)
    torch.testing.assert_close(_values(smaller).reshape(7, -1), (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-9, atol=1e-9)


def test_one_by_one_convolution_meets_a_linear_layer() -> None:
    a, b = _random(2, 4, 1, 1), _random(7, 2, 1, 1)
    conv = LoRA(from_torch(a), from_torch(b), 2.0, "config")
    linear = LoRA(from_torch(_random(3, 4)), from_torch(_random(7, 3)), 3.0, "config")

    report = combine([_adapter({"m": conv}), _adapter({"m": linear})])

    assert report.adapter is not None
    wanted = b[:, :, 0, 0] @ a[:, :, 0, 0] + linear.b.read() @ linear.a.read()
    assert report.adapter.updates["m"].shape == (7, 4, 1, 1)
    torch.testing.assert_close(_values(report.adapter.updates["m"])[:, :, 0, 0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_a_whole_difference_becomes_lora_with_its_error(shape: tuple[int, int]) -> None:
    update, delta = _full(*shape)
    s = torch.linalg.svdvals(delta)

    report = resize(_adapter({"m": update}), rank=2)

    assert report.adapter is not None
    assert report.adapter.updates["m"].kind == "lora"
    assert [(m.rank_in, m.rank) for m in report.modules] == [(5, 2)]
    assert report.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-10)
    distance = float((_values(report.adapter.updates["m"]) - delta).norm() / delta.norm())
    assert distance == pytest.approx(report.error, rel=1e-10)


def test_a_whole_difference_joins_a_lora() -> None:
    full, delta = _full(9, 5)
    lora = LoRA(from_torch(_random(2, 5)), from_torch(_random(9, 2)), 3.0, "config")

    report = combine([(_adapter({"m": full}), 2.0), _adapter({"m": lora})], rank=3)

    wanted = 2 * delta + 1.5 * lora.b.read() @ lora.a.read()
    s = torch.linalg.svdvals(wanted)
    assert report.error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-10)


def test_vectors_add_whatever_the_method() -> None:
    (one, first), (two, second) = _full(6), _full(6)

    report = combine(
        [(_adapter({"n": one}), 0.5), (_adapter({"n": two}), 3.0)], method="ties", options={"space": "core"}
    )

    assert report.adapter is not None
    torch.testing.assert_close(_values(report.adapter.updates["n"]), 0.5 * first + 3 * second, rtol=1e-14, atol=1e-14)
    assert [(m.rank_in, m.rank, m.error) for m in report.modules] == [(None, None, 0.0)]
    assert resize(_adapter({"n": one}), rank=2).unchanged == 1


def test_what_depends_on_its_base_is_refused_all_at_once_by_name() -> None:
    magnitude = from_torch(_random(9))
    dora = LoRA(from_torch(_random(2, 5)), from_torch(_random(9, 2)), 3.0, "config", magnitude=magnitude)
    adapter = _adapter({"d": dora, "e": replace(dora, magnitude_of="in"), "n": _full(6)[0]})

    for verb in (
        lambda: combine([adapter]),
        lambda: resize(adapter, rank=1),
        lambda: compare(adapter, adapter),
    ):
        with pytest.raises(UnsupportedError, match=r"[24] of [36] updates") as raised:
            verb()
        told = "\n".join(raised.value.details)
        assert "DoRA: its delta depends on the weights of the base" in told
        assert told.count("\n") in (1, 3)
        assert raised.value.hint is not None
        assert "--exclude" in raised.value.hint
    assert resize(adapter, rank=1, exclude=["d", "e"]).unchanged == 1


def test_dense_results_need_a_limit() -> None:
    lora = LoRA(from_torch(_random(2, 5)), from_torch(_random(9, 2)), 3.0, "config")

    with pytest.raises(UsageError, match="no low rank") as raised:
        combine([_adapter({"m": lora})] * 2, method="ties")
    assert raised.value.hint is not None
    assert "space=core" in raised.value.hint


def _experts(rank: int, alpha: float, packing: str = "peft") -> tuple[LoRAExperts, Tensor]:
    """PEFT's packing: an expert's rows of A together, its columns of B apart."""
    a, b = _random(3 * rank, 5), _random(9, rank * 3)
    update = LoRAExperts(from_torch(a), from_torch(b), 3, alpha, "config", packing=packing)  # type: ignore[arg-type]
    by_expert = b.reshape(9, rank, 3) if packing == "peft" else b.reshape(9, 3, rank).transpose(1, 2)
    return update, torch.einsum("ore,eri->eoi", by_expert, a.reshape(3, rank, 5)) * alpha / rank


def _expert_values(update: Update) -> Tensor:
    assert isinstance(update, LoRAExperts)
    assert update.packing == "peft"
    a, b = update.a.read().double(), update.b.read().double()
    rank = a.shape[0] // 3
    return torch.einsum("ore,eri->eoi", b.reshape(9, rank, 3), a.reshape(3, rank, 5)) * update.alpha / rank


def test_fused_experts_are_combined_one_by_one_and_fused_again() -> None:
    (one, first), (two, second) = _experts(2, 3.0), _experts(3, 2.0, "expert-major")
    pair = [(_adapter({"e": one}), 0.5), (_adapter({"e": two}), 2.0)]

    exact, cut = combine(pair), combine(pair, energy=0.9)

    assert exact.adapter is not None
    assert cut.adapter is not None
    assert [m.name for m in exact.modules] == ["e[0]", "e[1]", "e[2]"]
    wanted = 0.5 * first + 2 * second
    torch.testing.assert_close(_expert_values(exact.adapter.updates["e"]), wanted, rtol=1e-12, atol=1e-12)
    distance = float((_expert_values(cut.adapter.updates["e"]) - wanted).norm() / wanted.norm())
    assert cut.error == pytest.approx(distance, rel=1e-9)


def test_fused_experts_alone_keep_their_values_and_are_resized() -> None:
    update, delta = _experts(3, 2.0)

    same, small = combine([_adapter({"e": update})]), resize(_adapter({"e": update}), rank=2)

    assert same.adapter is not None
    assert small.adapter is not None
    kept = same.adapter.updates["e"]
    assert isinstance(kept, LoRAExperts)
    assert kept.a.read().equal(update.a.read())
    assert kept.b.read().equal(update.b.read())
    assert kept.alpha == 2.0
    smaller = _expert_values(small.adapter.updates["e"])
    for e in range(3):
        s = torch.linalg.svdvals(delta[e])
        assert float((smaller[e] - delta[e]).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-9)


def test_residual_of_experts_completes_them(tmp_path: Path) -> None:
    update, delta = _experts(3, 2.0)
    adapter = _adapter({"layers.0.mlp.experts.up": update})

    report = combine([adapter], tmp_path / "out", rank=2, residual=tmp_path / "rest")

    assert report.residual is not None
    both = [formats.load(tmp_path / n).updates["layers.0.mlp.experts.up"] for n in ("out", "rest")]
    torch.testing.assert_close(sum(map(_expert_values, both)), delta, rtol=1e-10, atol=1e-10)


def test_experts_of_other_counts_are_refused() -> None:
    other = LoRAExperts(from_torch(_random(8, 5)), from_torch(_random(9, 8)), 4, 2.0, "config")

    with pytest.raises(MismatchError, match="experts of 'e'"):
        combine([_adapter({"e": _experts(2, 1.0)[0]}), _adapter({"e": other})])
