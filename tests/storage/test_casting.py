"""Values are rounded to their stored dtype once, by every verb and format that stores any.

The number 1 + 2^-8 + 2^-30 tells: between 1 and 1 + 2^-7 of bfloat16 it is nearer to the latter. By way of float32 it
would become 1 + 2^-8 first, which lies halfway, and then 1. 1 + 2^-11 + 2^-30 does the same for float16.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import loratools
from loratools import formats, registry
from loratools.adapter import Adapter
from loratools.errors import UnsupportedError
from loratools.formats.image_parts.notes import NOTES
from loratools.storage.casting import cast, rounded
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

TELLING = {"bfloat16": 1 + 2.0**-8 + 2.0**-30, "float16": 1 + 2.0**-11 + 2.0**-30}
NEAREST = {"bfloat16": 1 + 2.0**-7, "float16": 1 + 2.0**-10}
WRITES = {n: f.WRITES for n in registry.names("formats") if hasattr(f := registry.load("formats", n), "WRITES")}
SAFE = {"bfloat16": "BF16", "float16": "F16"}

LANGUAGE = {"model.layers.0.self_attn.v_proj": (10, 6)}
FLUX = {f"transformer.transformer_blocks.0.attn.to_{part}": (12, 12) for part in "qkv"}


def telling(modules: dict[str, tuple[int, int]], value: float, rank: int = 4) -> dict[str, tuple[torch.Tensor, ...]]:
    """A and B of each module, all of whose entries are the telling number."""
    return {
        name: (torch.full((rank, i), value, dtype=torch.float64), torch.full((o, rank), value, dtype=torch.float64))
        for name, (o, i) in modules.items()
    }


# sam-lora holds queries and values of SAM alone.
@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"sam-lora"}))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_format_rounds_once(name: str, dtype: str, tmp_path: Path) -> None:
    language = name in ("peft", "mlx", "gguf")
    modules = LANGUAGE if language else FLUX
    value = TELLING[dtype]
    updates = {n: LoRA(from_torch(a), from_torch(b), 4.0, "test") for n, (a, b) in telling(modules, value).items()}
    adapter = Adapter(updates, notes={NOTES: {"family": "flux"}})
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    out = tmp_path / ("out" if WRITES[name] == "folder" else f"out{WRITES[name]}")
    base = formats.Base({}, config, tmp_path / "base") if language else None
    formats.save(adapter, out, format=name, dtype=SAFE[dtype], base=base)
    back = formats.load(out, from_format=name, base=base if name == "gguf" else None)
    stored = [t for u in back.updates.values() for t in (u.parts["A"], u.parts["B"])]
    assert {t.dtype for t in stored} == {SAFE[dtype]}
    assert {v for t in stored for v in t.read().double().unique().tolist()} - {0.0} == {NEAREST[dtype]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_combine_and_resize_round_once(dtype: str, tmp_path: Path) -> None:
    value = TELLING[dtype]
    formats.save(
        Adapter({n: LoRA(from_torch(a), from_torch(b), 4.0, "test") for n, (a, b) in telling(LANGUAGE, value).items()}),
        tmp_path / "wide",
    )
    loratools.combine([tmp_path / "wide"], tmp_path / "sum", dtype=dtype)
    loratools.resize(tmp_path / "wide", tmp_path / "same", rank=4, dtype=dtype)
    for out in ("sum", "same"):
        (update,) = loratools.load(tmp_path / out).updates.values()
        for tensor in update.parts.values():
            assert tensor.read().double().unique().tolist() == [NEAREST[dtype]], out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_to_the_nearest_number_of_all(dtype: str) -> None:
    # Every finite number of 16 bits, the middle between it and the next, and what lies a hair to either side.
    grid = torch.arange(0, 0x7F80 if dtype == "bfloat16" else 0x7C00, dtype=torch.int16).view(getattr(torch, dtype))
    exact = grid.double().numpy()
    middle = (exact[:-1] + exact[1:]) / 2
    below, above = np.nextafter(middle, 0.0), np.nextafter(middle, np.inf)
    even = np.where(np.arange(len(middle)) % 2 == 0, exact[:-1], exact[1:])
    for values, nearest in ((exact, exact), (middle, even), (below, exact[:-1]), (above, exact[1:])):
        for sign in (1.0, -1.0):
            stored = rounded(torch.from_numpy(sign * values), SAFE[dtype])
            np.testing.assert_array_equal(stored.double().numpy(), sign * nearest)


def test_what_is_not_finite_stays_so_and_overflow_is_refused() -> None:
    odd = torch.tensor([np.nan, np.inf, -np.inf, -0.0], dtype=torch.float64)
    stored = rounded(odd, "BF16")
    assert stored.isnan().tolist() == [True, False, False, False]
    assert stored[1:].tolist() == [np.inf, -np.inf, 0.0]
    assert bool(stored[3].signbit())
    with pytest.raises(UnsupportedError, match="'x' has values beyond the range of float16") as caught:
        cast("x", from_torch(torch.tensor([1.0, 65520.0])), "F16")
    assert caught.value.hint == "store it with --dtype float32 or bfloat16"
    assert cast("x", from_torch(torch.tensor([65519.0])), "F16").read().tolist() == [65504.0]
    whole = from_torch(torch.tensor([1, 2]))
    assert cast("x", whole, "F16") is whole
