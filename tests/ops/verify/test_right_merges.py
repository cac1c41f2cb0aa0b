"""A right merge is called the same, whoever made it and however it rounded, and the rounding is told."""

import math
import random
from pathlib import Path

import factories
import peft
import pytest
import torch
from torch import Tensor, nn

import loratools

MODULES = factories.layered(
    2, {"self_attn.q_proj": (40, 24), "self_attn.o_proj": (24, 24), "mlp.down_proj": (24, 56), "mlp.up_proj": (56, 24)}
)
ONCE = "deltas in float32, the sum rounded once"
BFLOAT16 = "A and B rounded to bfloat16, deltas rounded to bfloat16, the sum rounded once"


def base_in(folder: Path, dtype: torch.dtype, *, seed: int = 1) -> dict[str, Tensor]:
    weights = {n: (t * 0.05).to(dtype) for n, t in factories.base_weights(MODULES, seed=seed).items()}
    factories.checkpoint_folder(folder, weights=weights)
    return weights


def adapter_at(folder: Path, *, seed: int, rank: int = 4, size: float = 0.03, alpha: float = 8) -> dict[str, Tensor]:
    """Write an adapter and return the deltas of its weights, in float64."""
    pairs = {n: (a * size, b * size) for n, (a, b) in factories.factors(MODULES, rank=rank, seed=seed).items()}
    factories.adapter_folder(folder, values=pairs, rank=rank, alpha=alpha, config={"task_type": None})
    return {f"{name}.weight": alpha / rank * (b.double() @ a.double()) for name, (a, b) in pairs.items()}


class Block(nn.Module):
    """The modules of the base, so that PEFT can merge into them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name in MODULES:
            parent: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            weight = weights[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight.data = weight.clone()
            parent.add_module(last, layer)

    def forward(self) -> None:
        raise NotImplementedError


def merged_by_peft(weights: dict[str, Tensor], adapters: list[Path], *, in_bfloat16: bool = False) -> dict[str, Tensor]:
    model: nn.Module = Block(weights)
    for adapter in adapters:
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=not in_bfloat16)
        if in_bfloat16:
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.bfloat16()
        model = wrapped.merge_and_unload()
    return {**weights, **{n: t.contiguous() for n, t in model.state_dict().items()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_by_peft_with_a_float32_adapter_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = base_in(tmp_path / "base", dtype)
    adapter_at(tmp_path / "style", seed=3)
    factories.checkpoint_folder(tmp_path / "merged", weights=merged_by_peft(weights, [tmp_path / "style"]))

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert (report.verdict, report.recipes) == ("same", ((ONCE, len(MODULES)),))
    assert report.same == len(weights) - len(MODULES)
    assert all(t.max_error_ratio is not None and t.max_error_ratio <= 1 for t in report.tensors)


def test_merge_by_peft_with_a_bfloat16_adapter_is_told(tmp_path: Path) -> None:
    weights = base_in(tmp_path / "base", torch.bfloat16)
    adapter_at(tmp_path / "style", seed=3)
    merged = merged_by_peft(weights, [tmp_path / "style"], in_bfloat16=True)
    factories.checkpoint_folder(tmp_path / "merged", weights=merged)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert (report.verdict, report.recipes) == ("same", ((BFLOAT16, len(MODULES)),))


def test_sum_in_the_dtype_of_the_base_is_told(tmp_path: Path) -> None:
    weights = base_in(tmp_path / "base", torch.bfloat16)
    deltas = adapter_at(tmp_path / "style", seed=3)
    merged = {n: t + deltas[n].bfloat16() if n in deltas else t for n, t in weights.items()}
    factories.checkpoint_folder(tmp_path / "merged", weights=merged)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert report.recipes == (("deltas rounded to bfloat16, the sum rounded once", len(MODULES)),)
    assert report.verdict == "same"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_merged_one_after_the_other_are_told_with_their_order(tmp_path: Path, order: tuple[int, int]) -> None:
    weights = base_in(tmp_path / "base", torch.bfloat16)
    paths = [tmp_path / "style", tmp_path / "facts"]
    for seed, path in enumerate(paths):
        adapter_at(path, seed=3 + seed)
    factories.checkpoint_folder(tmp_path / "merged", weights=merged_by_peft(weights, [paths[i] for i in order]))

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", paths)

    shown = ", ".join(str(i + 1) for i in order)
    assert report.verdict == "same"
    assert report.recipes[0][0] == f"deltas in float32, adapters one after the other ({shown}), each sum rounded"


@pytest.mark.parametrize("rounding", ["stochastic", "adapter"])
def test_roundings_of_loratools_are_told_bit_by_bit(tmp_path: Path, rounding: str) -> None:
    base_in(tmp_path / "base", torch.bfloat16)
    adapter_at(tmp_path / "style", seed=3)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged", rounding=rounding, seed=5)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    how = "stochastic (seed 5)" if rounding == "stochastic" else "adapter (penalty 0.25)"
    assert report.verdict == "same"
    assert report.recipes == ((f"deltas in float32, loratools with --rounding {how}", len(MODULES)),)


def test_another_seed_than_the_recorded_one_is_not_called_the_same(tmp_path: Path) -> None:
    base_in(tmp_path / "base", torch.bfloat16)
    adapter_at(tmp_path / "style", seed=3)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged", rounding="stochastic", seed=5)
    record = tmp_path / "merged" / "loratools.json"
    record.write_text(record.read_text().replace('"seed": 5', '"seed": 6'))

    assert loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style").verdict == "undecided"


def test_dora_merged_here_is_the_same(tmp_path: Path) -> None:
    weights = base_in(tmp_path / "base", torch.bfloat16)
    adapter_at(tmp_path / "style", seed=3)
    make_dora(tmp_path / "style", weights)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")

    assert loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style").verdict == "same"


def make_dora(folder: Path, weights: dict[str, Tensor], *, stretch: float = 1.3) -> None:
    """Give the adapter in `folder` magnitudes that differ from the norms of the base's rows."""
    pairs = {n: (a * 0.03, b * 0.03) for n, (a, b) in factories.factors(MODULES, seed=3).items()}
    extra = {
        f"{name}.lora_magnitude_vector": stretch * weights[f"{name}.weight"].float().norm(dim=1) for name in MODULES
    }
    factories.adapter_folder(folder, values=pairs, extra=extra, config={"use_dora": True})


def test_two_hundred_right_merges_give_no_false_alarm(tmp_path: Path) -> None:
    # Made with torch: a float64 sum, rounded to float32 as a float32 sum may be, and then to the stored dtype.
    told = set()
    for seed in range(200):
        chosen = random.Random(seed)
        torch.manual_seed(seed)
        rows, columns, rank = chosen.randint(3, 70), chosen.randint(2, 60), chosen.randint(1, 9)
        dtype = chosen.choice([torch.bfloat16, torch.float16, torch.float32])
        alpha, size = chosen.choice([1.0, 8.0, 16.0]), 10 ** chosen.uniform(-3.0, -0.5)
        weight = (torch.randn(rows, columns) * 0.05).to(dtype)
        a, b = torch.randn(rank, columns) * size, torch.randn(rows, rank) * size
        times = chosen.choice([1.0, 0.7, -0.5])
        exact = weight.double() + times * alpha / rank * (b.double() @ a.double())
        base, merged, style = (tmp_path / f"{kind}{seed}" for kind in ("base", "merged", "style"))
        name = "model.layers.0.self_attn.q_proj"
        factories.checkpoint_folder(base, weights={f"{name}.weight": weight})
        factories.checkpoint_folder(merged, weights={f"{name}.weight": exact.float().to(dtype)})
        factories.adapter_folder(style, values={name: (a, b)}, rank=rank, alpha=alpha)

        report = loratools.verify(merged, base, [(style, times)])

        told.add(report.verdict)
        lost = [finding.code for finding in report.diagnosis] == ["nothing-survived"]
        assert report.verdict == "same" or lost, (seed, report)
        assert report.gain is not None
        assert math.isfinite(report.gain)
    assert "same" in told


def test_gain_of_all_weights_counts_large_and_small_ones_by_their_size(tmp_path: Path) -> None:
    # In the small weight rounding loses all of the change, in the large one none; both changes are as long.
    large, small = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    weights = {
        f"{large}.weight": (torch.randn(900, 1000, generator=torch.Generator().manual_seed(1)) * 1e-4).bfloat16(),
        f"{small}.weight": torch.full((40, 24), 1.5).bfloat16(),
    }
    pairs = factories.factors({large: (900, 1000), small: (40, 24)}, rank=4, seed=2)
    lengths = {name: float((b.double() @ a.double()).norm()) for name, (a, b) in pairs.items()}
    pairs = {name: (a, b * (0.02 / lengths[name])) for name, (a, b) in pairs.items()}
    deltas = {f"{name}.weight": b.double() @ a.double() for name, (a, b) in pairs.items()}
    merged = {n: (t.double() + deltas[n]).float().bfloat16() for n, t in weights.items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    factories.checkpoint_folder(tmp_path / "merged", weights=merged)
    factories.adapter_folder(tmp_path / "style", values=pairs, rank=4, alpha=4)

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    moved = sum(float(((merged[n].double() - t.double()) * deltas[n]).sum()) for n, t in weights.items())
    assert report.verdict == "same"
    assert report.gain == pytest.approx(moved / sum(float((d**2).sum()) for d in deltas.values()), rel=0.02)
    assert 0.4 < report.gain < 0.6


def test_seed_is_read_from_the_header_of_a_merge_that_is_one_file(tmp_path: Path) -> None:
    base_in(tmp_path / "base", torch.bfloat16)
    adapter_at(tmp_path / "style", seed=3)
    base, merged = tmp_path / "base" / "model.safetensors", tmp_path / "merged.safetensors"
    (tmp_path / "base" / "config.json").unlink()
    loratools.merge(base, tmp_path / "style", merged, rounding="stochastic", seed=5)

    report = loratools.verify(merged, base, tmp_path / "style")

    how = "deltas in float32, loratools with --rounding stochastic (seed 5)"
    assert (report.verdict, report.recipes) == ("same", ((how, len(MODULES)),))
