"""Factors wait on the disk of the output: none are held in memory, nothing stays behind, and the bytes are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.errors import InputError
from loratools.ops.extract import work
from loratools.ops.extract.verb import extract
from loratools.ops.finetune import delta
from loratools.storage import scratch

MODULES = {
    "model.layers.0.self_attn.q_proj": (11, 6),
    "model.layers.0.mlp.down_proj": (6, 14),
    "model.layers.1.self_attn.v_proj": (4, 6),
}


def _pair(tmp_path: Path, *, broken: bool = False) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(5)
    weights = factories.base_weights(MODULES)
    tuned = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items() if "proj" in n}
    if broken:
        tuned["model.layers.1.self_attn.v_proj.weight"][2, 3] = float("nan")
    return (
        factories.checkpoint_folder(tmp_path / "base", weights=weights),
        factories.checkpoint_folder(tmp_path / "tuned", weights=weights | tuned),
    )


@pytest.mark.parametrize("rule", [{"rank": 3}, {"max_params": 150}])
def test_all_factors_go_to_the_disk_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Mapping[str, int]
) -> None:
    before, after = _pair(tmp_path)
    kept: list[str] = []
    original = scratch.Scratch.keep

    def watched(self: scratch.Scratch, unit: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> object:
        found = original(self, unit, tensors, facts)
        assert all(t.location is not None and t.location.file.path.parent.parent == tmp_path for t in found.values())
        kept.extend(name for name in found if name in ("a", "b"))
        return found

    monkeypatch.setattr(scratch.Scratch, "keep", watched)
    written = extract(before, after, tmp_path / "out", **rule)  # type: ignore[arg-type]
    assert sorted(kept) == ["a"] * 3 + ["b"] * 3

    in_memory = extract(before, after, **rule)  # type: ignore[arg-type]

    assert len(kept) == 6
    assert written.adapter is not None
    assert in_memory.adapter is not None
    on_disk = formats.load(tmp_path / "out").tensors()
    for name, tensor in in_memory.adapter.tensors().items():
        assert torch.equal(tensor.read(), on_disk[name].read())
        assert torch.equal(tensor.read(), written.adapter.tensors()[name].read())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_nothing_stays_on_the_disk_where_an_extraction_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = _pair(tmp_path, broken=True)
    seen: list[int] = []
    original = work.stored

    def watched(*given: object, **named: object) -> object:
        seen.append(1)
        return original(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "stored", watched)
    with pytest.raises(InputError, match="not finite"):
        extract(before, after, tmp_path / "new" / "out", rank=3, threads=1)

    assert seen, "nothing had been set aside when it failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_of_stacked_experts_one_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    name = "model.layers.0.mlp.experts.down_proj"
    weights = factories.base_weights(MODULES) | {name: torch.randn(3, 7, 9, generator=generator)}
    tuned = weights | {name: weights[name] + 0.1 * torch.randn(3, 7, 9, generator=generator)}
    before = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    after = factories.checkpoint_folder(tmp_path / "tuned", weights=tuned)
    together = extract(before, after, rank=2)
    sizes: list[tuple[int, ...]] = []
    original = delta.delta_of

    def watched(*given: object) -> Tensor:
        found = original(*given)  # type: ignore[arg-type]
        sizes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(delta, "delta_of", watched)
    monkeypatch.setattr(delta, "_BLOCK", 7 * 9)
    apart = extract(before, after, rank=2)

    assert set(sizes) == {(1, 7, 9)}
    assert together.adapter is not None
    assert apart.adapter is not None
    ours, theirs = (a.updates[name].parts for a in (together.adapter, apart.adapter))
    for part, tensor in ours.items():
        torch.testing.assert_close(tensor.read(), theirs[part].read(), rtol=1e-5, atol=1e-6)
    (one,), (other,) = together.modules, apart.modules
    change = (tuned[name] - weights[name]).double()
    best = torch.linalg.svdvals(change)[:, 2:].norm() / change.norm()
    assert one.error == pytest.approx(float(best), rel=1e-5)
    assert other.error == pytest.approx(float(best), rel=1e-5)
    assert (one.identical, one.noise_edge) == (other.identical, other.noise_edge)
