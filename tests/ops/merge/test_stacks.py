"""Many small weights merged together: the same bytes as one by one, the same check of each, the same errors by name."""

import math
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import InputError, LoraToolsError
from loratools.ops.merge import plan, stacks, writing
from loratools.ops.merge.outputs import CopyUnit
from loratools.ops.merge.verb import plan_from_headers

# More experts than a stack needs, with sides that differ.
MODULES = {
    f"model.layers.0.mlp.experts.{i}.{name}": shape
    for i in range(20)
    for name, shape in {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10)}.items()
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _base(folder: Path, dtype: torch.dtype) -> Path:
    return factories.checkpoint_folder(folder, weights=factories.base_weights(MODULES, dtype=dtype))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _count_stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lengths: list[int] = []
    merge_stack = stacks.merge_stack

    def counted(outputs, offsets, fd, **options):  # type: ignore[no-untyped-def]
        lengths.append(len(outputs))
        return merge_stack(outputs, offsets, fd, **options)

    monkeypatch.setattr(writing, "merge_stack", counted)
    return lengths


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16"])
def test_a_stack_has_the_bytes_and_the_gains_of_its_weights_merged_alone(
    base_dtype: str, factor_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _base(tmp_path / "base", DTYPES[base_dtype])
    adapters = [
        (factories.adapter_folder(tmp_path / "a", modules=MODULES, rank=3, dtype=DTYPES[factor_dtype]), 0.7),
        (factories.adapter_folder(tmp_path / "b", modules=MODULES, rank=2, alpha=5, seed=4), -0.3),
    ]
    lengths = _count_stacks(monkeypatch)
    together = loratools.merge(base, adapters, tmp_path / "together")
    assert sum(lengths) == len(MODULES)
    monkeypatch.setattr(stacks, "_LARGEST", 0)

    alone = loratools.merge(base, adapters, tmp_path / "alone")

    assert sum(lengths) == len(MODULES)
    for file in sorted((tmp_path / "alone").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "together" / file.name).read_bytes()
    assert together.gain == pytest.approx(alone.gain, rel=1e-5)
    assert together.max_error_ratio == pytest.approx(alone.max_error_ratio, rel=1e-6)


def test_a_stack_is_base_and_delta_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _base(tmp_path / "base", torch.float64)
    values = factories.factors(MODULES, rank=3)
    adapter = factories.adapter_folder(tmp_path / "a", values=values, rank=3, alpha=6)
    lengths = _count_stacks(monkeypatch)

    loratools.merge(base, [(adapter, 0.5)], tmp_path / "out")

    merged, before = _weights(tmp_path / "out"), _weights(base)
    assert sum(lengths) == len(MODULES)
    for name, (a, b) in values.items():
        wanted = before[f"{name}.weight"] + 0.5 * 2.0 * b.double() @ a.double()
        torch.testing.assert_close(merged[f"{name}.weight"], wanted, rtol=1e-14, atol=1e-14)


def test_what_is_not_finite_in_a_stack_is_named(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", torch.float32)
    values = factories.factors(MODULES)
    bad = "model.layers.0.mlp.experts.7.up_proj"
    values[bad][1][4, 2] = math.nan
    adapter = factories.adapter_folder(tmp_path / "a", values=values)

    with pytest.raises(InputError, match=r"1 tensor of .* has values that are not finite") as raised:
        loratools.merge(base, [adapter], tmp_path / "out")

    assert raised.value.details == (f"{bad}.B",)
    assert not (tmp_path / "out").exists()


def test_the_check_of_a_stack_notices_sums_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _base(tmp_path / "base", torch.float32)
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES)
    factors_of = stacks._factors

    def slightly_wrong(outputs, dtype):  # type: ignore[no-untyped-def]
        b, a = factors_of(outputs, dtype)
        return (b * (1 + 1e-5), a) if dtype == "F32" else (b, a)

    monkeypatch.setattr(stacks, "_factors", slightly_wrong)

    with pytest.raises(LoraToolsError, match="self-check found 60 merged weights"):
        loratools.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_do_not_change_the_bytes_of_stacks(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", torch.bfloat16)
    adapter = factories.adapter_folder(tmp_path / "a", modules=MODULES)

    for name, threads, execution in (("one", 1, "local"), ("two", 2, "local"), ("forked", 2, "forked")):
        loratools.merge(base, [adapter], tmp_path / name, threads=threads, execution=execution)

    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        for name in ("two", "forked"):
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()


def test_tensors_that_lie_side_by_side_are_copied_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"model.layers.{i}.mlp.{name}": (10, 6) for i in range(3) for name in ("a", "b", "c")}
    weights = {name: weight for name, weight in factories.base_weights(modules).items() if ".mlp." in name}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    changed = {"model.layers.1.mlp.b": (10, 6)}
    adapter = factories.adapter_folder(tmp_path / "adapter", modules=changed, rank=3)

    made = plan.work_units(plan_from_headers(base, [adapter], tmp_path / "out"))
    monkeypatch.setattr(plan, "_UNIT_BYTES", 500)
    cut = plan.work_units(plan_from_headers(base, [adapter], tmp_path / "out"))

    # Four tensors of 10 x 6 float32 numbers before the one that changes, and four behind it.
    assert [unit.source.nbytes if isinstance(unit, CopyUnit) else "rows" for unit in made] == [960, "rows", 960]
    assert [unit.source.nbytes for unit in cut if isinstance(unit, CopyUnit)] == [500, 460, 500, 460]
    loratools.merge(base, [adapter], tmp_path / "out")
    before, after = _weights(base), _weights(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.layers.1.mlp.b.weight"]


def test_weights_that_lie_far_apart_are_not_read_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A large weight that nobody changes between any two small ones.
    small = {f"model.layers.{i}.mlp.gate": (10, 6) for i in range(20)}
    weights = {}
    for i, (name, weight) in enumerate(factories.base_weights(small).items()):
        weights |= {name: weight, f"{name.removesuffix('.weight')}.large.weight": torch.full((200, 70), float(i))}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = factories.adapter_folder(tmp_path / "adapter", modules=small, rank=3)
    lengths = _count_stacks(monkeypatch)
    largest: list[int] = []
    read_back = stacks.read_back
    monkeypatch.setattr(
        stacks, "read_back", lambda fd, buffer, offset: largest.append(len(buffer)) or read_back(fd, buffer, offset)
    )

    loratools.merge(base, adapter, tmp_path / "together", threads=1)
    monkeypatch.setattr(stacks, "_LARGEST", 0)
    loratools.merge(base, adapter, tmp_path / "alone", threads=1)

    assert lengths == [20]
    assert max(largest) == 10 * 6 * 4
    one, other = _weights(tmp_path / "together"), _weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in other)
