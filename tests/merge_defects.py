"""Merged models with one defect each, made on purpose by float64 arithmetic: for the verifier, and for its peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import factories
import torch
from torch import Tensor

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
