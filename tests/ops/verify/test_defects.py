"""Each defect that `verify` claims to tell, made on purpose by float64 arithmetic, is told by its name and no other."""

import math
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

import loratools

SQUARE = "model.layers.0.self_attn.o_proj"
MODULES = {"model.layers.0.self_attn.q_proj": (40, 24), SQUARE: (24, 24), "model.layers.0.mlp.down_proj": (24, 56)}
RANK, ALPHA = 5, 7.0
SCALE = ALPHA / RANK

Merge = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return w + SCALE * (b @ a)


def dora(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    total = w + SCALE * (b @ a)
    return m[:, None] * total / total.norm(dim=1, keepdim=True)


# How a kind is merged rightly.
KINDS: dict[str, Merge] = {"lora": plain, "dora": dora}


def some_ranks(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return w + SCALE * (b[:, :3] @ a[:3])


def changed_by_something_else(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return w + 0.05 * noise


def times(factor: float) -> Merge:
    return lambda w, a, b, m: w + factor * SCALE * (b @ a)


DEFECTS: dict[str, tuple[str, Merge]] = {
    "not-applied": ("lora", lambda w, a, b, m: w),
    "not-applied, dora": ("dora", lambda w, a, b, m: w),
    "subtracted": ("lora", times(-1)),
    "applied-twice": ("lora", times(2)),
    "scale-ignored": ("lora", times(1 / SCALE)),
    "scale-twice": ("lora", times(SCALE)),
    "rslora-assumed": ("lora", times(math.sqrt(RANK))),
    "adapter-weight": ("lora", times(0.8)),
    "ranks-missing": ("lora", some_ranks),
    "other-change": ("lora", changed_by_something_else),
    "magnitude-dropped": ("dora", plain),
    "unexplained-change": ("lora", lambda w, a, b, m: plain(w, a, b, m) + 0.2 * plain(w, a, b, m).flip(0)),
}  # fmt: skip


def inputs(tmp_path: Path, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """Write base and adapter; the base's weights, and A, B and magnitude of each module in float64."""
    weights = {n: (t * 0.05).to(dtype) for n, t in factories.base_weights(MODULES).items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    pairs = {n: (a * 0.1, b * 0.1) for n, (a, b) in factories.factors(MODULES, rank=RANK, seed=4).items()}
    magnitudes = {n: 1.3 * weights[f"{n}.weight"].float().norm(dim=1) for n in MODULES}
    extra = {f"{n}.lora_magnitude_vector": m for n, m in magnitudes.items()} if kind == "dora" else {}
    config = {"use_dora": True} if kind == "dora" else {}
    factories.adapter_folder(tmp_path / "style", values=pairs, rank=RANK, alpha=ALPHA, extra=extra, config=config)
    return weights, {n: (*(t.double() for t in pairs[n]), magnitudes[n].double()) for n in MODULES}


def write(tmp_path: Path, weights: dict[str, Tensor], parts: dict[str, tuple[Tensor, ...]], merge: Merge) -> None:
    merged = {
        name: merge(t.double(), *parts[name.removesuffix(".weight")]).to(t.dtype)
        if name.removesuffix(".weight") in parts
        else t
        for name, t in weights.items()
    }
    factories.checkpoint_folder(tmp_path / "merged", weights=merged)


def codes(tmp_path: Path) -> list[str]:
    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")
    assert report.exit_code == {"same": 0, "different": 1, "undecided": 3}[report.verdict]
    return [finding.code for finding in report.diagnosis]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_told_by_its_name(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kind, merge = DEFECTS[name]
    weights, parts = inputs(tmp_path, kind, dtype)
    write(tmp_path, weights, parts, merge)

    assert codes(tmp_path) == [name.partition(",")[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_right_merge_has_no_defect(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    weights, parts = inputs(tmp_path, kind, dtype)
    write(tmp_path, weights, parts, KINDS[kind])

    assert codes(tmp_path) == []


def test_delta_that_was_transposed_is_told_for_the_square_weight_alone(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    a, b, _ = parts[SQUARE]
    merged = {f"{n}.weight": plain(weights[f"{n}.weight"].double(), *parts[n]).float() for n in MODULES}
    merged[f"{SQUARE}.weight"] = (weights[f"{SQUARE}.weight"].double() + SCALE * (b @ a).T).float()
    factories.checkpoint_folder(tmp_path / "merged", weights={**weights, **merged})

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert [(f.code, f.names) for f in report.diagnosis] == [("transposed", (f"{SQUARE}.weight",))]


def test_rslora_that_was_ignored_is_told(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    pairs = {n: (a.float(), b.float()) for n, (a, b, _) in parts.items()}
    factories.adapter_folder(tmp_path / "style", values=pairs, rank=RANK, alpha=ALPHA, config={"use_rslora": True})
    write(tmp_path, weights, parts, plain)

    assert codes(tmp_path) == ["rslora-ignored"]


def test_of_two_adapters_the_one_that_is_missing_is_named(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    factories.adapter_folder(
        tmp_path / "facts", values={n: (a * 0.1, b * 0.1) for n, (a, b) in factories.factors(MODULES, seed=8).items()}
    )

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", [tmp_path / "style", tmp_path / "facts"])

    assert [finding.code for finding in report.diagnosis] == ["adapter-weight"]
    assert "facts' has not been applied" in report.diagnosis[0].message
    assert all(t.weights == pytest.approx((1, 0), abs=1e-4) for t in report.tensors)


def test_change_below_the_spacing_of_the_dtype_is_undecided(tmp_path: Path) -> None:
    # All between 1 and 2, where numbers are 2^-7 apart.
    weights = {n: (1 + t.abs() % 1).bfloat16() for n, t in factories.base_weights(MODULES).items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    tiny = {n: (a * 1e-4, b * 1e-4) for n, (a, b) in factories.factors(MODULES, rank=RANK, seed=4).items()}
    factories.adapter_folder(tmp_path / "style", values=tiny, rank=RANK, alpha=ALPHA)
    factories.checkpoint_folder(tmp_path / "merged", weights=weights)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert (report.verdict, [f.code for f in report.diagnosis]) == ("undecided", ["nothing-survived"])


def test_sample_of_a_right_merge_is_undecided_and_of_a_wrong_one_different(tmp_path: Path) -> None:
    weights, parts = inputs(tmp_path, "lora", torch.float32)
    write(tmp_path, weights, parts, plain)
    arguments = tmp_path / "merged", tmp_path / "base", tmp_path / "style"

    right = loratools.verify(*arguments, sample=0.2)
    write(tmp_path, weights, parts, times(2))
    wrong = loratools.verify(*arguments, sample=0.2)

    assert (right.verdict, [f.code for f in right.diagnosis]) == ("undecided", ["sampled"])
    assert (wrong.verdict, wrong.diagnosis[0].code) == ("different", "applied-twice")
