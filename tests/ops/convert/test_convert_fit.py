"""Fused projections split and joined as a base has them: the dense delta, row by row, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools import formats
from loratools.errors import MismatchError, UnsupportedError
from loratools.formats import peft
from loratools.ops.convert.verb import convert
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA
from loratools.updates.parts.row_blocks import rows_of, stacked_rows

# 3 heads of 4, of them 1 for keys and values; all sizes differ but k's and v's.
SIZES = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
LAYER = "model.layers.0"
CONFIG = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 12, "intermediate_size": 14}


def base(folder: Path, *, fused: bool) -> Path:
    shapes = (
        {"self_attn.qkv_proj": (20, 12), "mlp.gate_up_proj": (28, 12)}
        if fused
        else {
            **{f"self_attn.{n}": (rows, 12) for n, rows in SIZES.items()},
            "mlp.gate_proj": (14, 12),
            "mlp.up_proj": (14, 12),
        }
    )
    weights = {f"{LAYER}.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    return factories.checkpoint_folder(folder, weights=weights, config=CONFIG)


def dense(folder: Path) -> dict[str, Tensor]:
    """alpha / r * B A of every module, by PEFT's rules for its config, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
            b = tensors[key.replace("lora_A", "lora_B")].double()
            scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
            found[name.removeprefix(f"{LAYER}.")] = scale * b @ a.double()
    return found


@pytest.mark.parametrize("present", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"), ("k_proj",)])
def test_parts_are_joined_along_a_diagonal(present: tuple[str, ...], tmp_path: Path) -> None:
    modules = {f"{LAYER}.self_attn.{n}": (SIZES[n], 12) for n in present} | {f"{LAYER}.mlp.up_proj": (14, 12)}
    config = {"alpha_pattern": {f"{LAYER}.self_attn.{present[0]}": 3}}
    ranks = {f"{LAYER}.self_attn.{present[-1]}": 2}
    source = factories.adapter_folder(tmp_path / "in", modules=modules, ranks=ranks, config=config)

    report = convert(source, tmp_path / "out", format="peft", base=base(tmp_path / "base", fused=True))

    before, after = dense(source), dense(tmp_path / "out")
    assert set(after) == {"self_attn.qkv_proj", "mlp.gate_up_proj"}
    zeros = {n: torch.zeros(rows, 12, dtype=torch.float64) for n, rows in SIZES.items()}
    wanted = torch.cat([before.get(f"self_attn.{n}", zeros[n]) for n in SIZES])
    torch.testing.assert_close(after["self_attn.qkv_proj"], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        after["mlp.gate_up_proj"], torch.cat([torch.zeros_like(before["mlp.up_proj"]), before["mlp.up_proj"]])
    )
    assert any("split or joined" in w for w in report.warnings)
    ranks_out = {n.rpartition(".")[2]: u.rank for n, u in formats.load(tmp_path / "out").updates.items()}
    assert ranks_out == {"qkv_proj": 4 * len(present) - 2, "gate_up_proj": 4}


def test_what_was_joined_is_split_into_what_it_was(tmp_path: Path) -> None:
    modules = {f"{LAYER}.self_attn.{n}": (rows, 12) for n, rows in SIZES.items()}
    source = factories.adapter_folder(tmp_path / "in", modules=modules, alpha=4)

    convert(source, tmp_path / "fused", format="peft", base=base(tmp_path / "one", fused=True))
    report = convert(tmp_path / "fused", tmp_path / "back", format="peft", base=base(tmp_path / "three", fused=False))

    assert report.max_relative_error == 0.0
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "back"))
    # Each part has its own rank again: the other terms were zero there.
    assert {k: t.tolist() for k, t in before.items()} == {k: t.tolist() for k, t in after.items()}


def test_a_fused_module_is_split_by_sharing_a(tmp_path: Path) -> None:
    source = factories.adapter_folder(
        tmp_path / "in", modules={f"{LAYER}.mlp.gate_up_proj": (28, 12)}, dtype=torch.bfloat16
    )

    report = convert(source, tmp_path / "out", format="peft", base=base(tmp_path / "base", fused=False))

    before, after = dense(source)["mlp.gate_up_proj"], dense(tmp_path / "out")
    assert torch.equal(torch.cat([after["mlp.gate_proj"], after["mlp.up_proj"]]), before)
    assert (report.max_relative_error, report.tensors_in, report.tensors_out) == (0.0, 2, 4)


def test_rows_that_are_not_the_bases_are_refused(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={f"{LAYER}.self_attn.qkv_proj": (24, 12)})

    with pytest.raises(MismatchError, match=r"has 24 rows, and its parts in the base have \[12, 4, 4\]"):
        convert(source, tmp_path / "out", format="peft", base=base(tmp_path / "base", fused=False))


def test_equal_a_is_shared_and_no_rank_grows() -> None:
    a, q, v = torch.randn(4, 6), torch.randn(10, 4), torch.randn(7, 4)
    parts = [
        (0, LoRA(from_torch(a), from_torch(q), 8.0, "config")),
        (13, LoRA(from_torch(a.clone()), from_torch(v), 8.0, "config")),
    ]

    joined = stacked_rows(parts, 20)

    assert (joined.rank, joined.shape, joined.scale) == (4, (20, 6), 2.0)
    assert torch.equal(joined.b.read(), torch.cat([q, torch.zeros(3, 4), v]))
    with pytest.raises(ValueError, match="do not fit"):
        stacked_rows([(0, parts[0][1]), (9, parts[1][1])], 20)


def test_terms_that_are_zero_in_the_rows_are_left_out() -> None:
    b = torch.randn(9, 3)
    b[:5, 1] = 0
    update = LoRA(from_torch(torch.randn(3, 6)), from_torch(b), 6.0, "config", rslora=True)

    part = rows_of(update, 0, 5)

    assert (part.rank, part.rslora) == (2, False)
    whole, less = update.factors(), part.factors()
    torch.testing.assert_close(less.b @ less.a, (whole.b @ whole.a)[:5], rtol=1e-12, atol=1e-12)
    assert rows_of(update, 5, 9).rank == 3


def test_dora_is_split_and_joined_with_its_magnitudes(tmp_path: Path) -> None:
    modules = {f"{LAYER}.self_attn.{n}": (rows, 12) for n, rows in SIZES.items()}
    magnitudes = {f"{name}.lora_magnitude_vector": torch.rand(rows) + 1 for name, (rows, _) in modules.items()}
    source = factories.adapter_folder(
        tmp_path / "in",
        modules=modules,
        extra=magnitudes,
        config={"use_dora": True, "alpha_pattern": {f"{LAYER}.self_attn.q_proj": 3}},
    )

    convert(source, tmp_path / "fused", format="peft", base=base(tmp_path / "one", fused=True))
    report = convert(tmp_path / "fused", tmp_path / "back", format="peft", base=base(tmp_path / "three", fused=False))

    assert report.max_relative_error == 0.0
    (fused,) = formats.load(tmp_path / "fused").updates.values()
    order = [magnitudes[f"{LAYER}.self_attn.{n}.lora_magnitude_vector"] for n in SIZES]
    assert torch.equal(fused.parts["magnitude"].read(), torch.cat(order))
    back = formats.load(tmp_path / "back").updates
    for n, magnitude in zip(SIZES, order, strict=True):
        assert torch.equal(back[f"{LAYER}.self_attn.{n}"].parts["magnitude"].read(), magnitude)
    before, after = dense(source), dense(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, rtol=1e-5, atol=1e-6)


def test_dora_of_some_parts_has_no_fused_form(tmp_path: Path) -> None:
    source = factories.adapter_folder(
        tmp_path / "in",
        modules={f"{LAYER}.self_attn.q_proj": (12, 12)},
        extra={f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": torch.ones(12)},
        config={"use_dora": True},
    )

    with pytest.raises(UnsupportedError, match="cannot be made of q_proj: rows without a magnitude"):
        convert(source, tmp_path / "out", format="peft", base=base(tmp_path / "base", fused=True))


def test_parts_of_a_split_module_are_left_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={f"{LAYER}.self_attn.qkv_proj": (20, 12)})
    refused = f"{LAYER}.self_attn.k_proj"
    monkeypatch.setattr(
        peft, "unwritable", lambda adapter, base=None: dict.fromkeys({refused} & {*adapter.updates}, "x")
    )
    separate = base(tmp_path / "three", fused=False)

    report = convert(source, tmp_path / "out", format="peft", base=separate, allow_partial=True)

    assert [d.name for d in report.dropped if d.what == "module"] == [refused]
    before, after = dense(source)["self_attn.qkv_proj"], dense(tmp_path / "out")
    assert set(after) == {"self_attn.q_proj", "self_attn.v_proj"}
    torch.testing.assert_close(after["self_attn.q_proj"], before[:12])
    torch.testing.assert_close(after["self_attn.v_proj"], before[16:])
