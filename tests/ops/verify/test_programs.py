"""Merges by other programs are called the same, and the program is among those that are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import peers
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loratools

UP, O = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"  # noqa: E741
MODULES = {UP: (56, 24), O: (24, 24)}
RANK, ALPHA = 5, 7.0
SCALE = ALPHA / RANK


def inputs(
    tmp_path: Path, dtype: torch.dtype, *, adapter_dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Write base and adapter; the weights of the base, and A and B of each module."""
    weights = {n: (t * 0.05).to(dtype) for n, t in factories.base_weights(MODULES).items()}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    pairs = factories.factors(MODULES, rank=RANK, seed=4)
    pairs = {n: ((a * 0.1).to(adapter_dtype), (b * 0.1).to(adapter_dtype)) for n, (a, b) in pairs.items()}
    factories.adapter_folder(
        tmp_path / "style", values=pairs, rank=RANK, alpha=ALPHA, config={"task_type": None, **config}
    )
    return weights, pairs


def told(tmp_path: Path, merged: dict[str, Tensor], weights: dict[str, Tensor], weight: float = 1.0) -> tuple[str, ...]:
    """Write the merged weights, and give the programs that are told of a merge that is the same."""
    factories.checkpoint_folder(tmp_path / "merged", weights={**weights, **merged})
    report = loratools.verify(tmp_path / "merged", tmp_path / "base", [(tmp_path / "style", weight)])
    assert (report.verdict, report.diagnosis) == ("same", ())
    return report.merged_by


def is_named(program: str, programs: tuple[str, ...]) -> bool:
    return any(name.startswith(program) for name in programs)


@peers.needs("lycoris.modules.locon")
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lycoris_is_told(tmp_path: Path, dtype: torch.dtype, weight: float) -> None:
    from lycoris.modules.locon import LoConModule

    weights, pairs = inputs(tmp_path, dtype)
    merged = {}
    for name, (a, b) in pairs.items():
        base = weights[f"{name}.weight"]
        linear = nn.Linear(base.shape[1], base.shape[0], bias=False, dtype=dtype)
        linear.weight.data = base.clone()
        module = LoConModule("m", linear, lora_dim=RANK, alpha=ALPHA)
        module.lora_up.weight.data, module.lora_down.weight.data = b.clone(), a.clone()
        module.eval()
        module.merge_to(weight)
        merged[f"{name}.weight"] = linear.weight.data.contiguous()

    assert is_named("LyCORIS", told(tmp_path, merged, weights, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formula_of_comfyui_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    # The weight in float32, the product in float32 times strength and alpha / rank, and cast to the dtype at the end.
    weights, pairs = inputs(tmp_path, dtype)
    strength = 0.8
    merged = {}
    for name, (a, b) in pairs.items():
        total = weights[f"{name}.weight"].float()
        total += (strength * (ALPHA / RANK)) * torch.mm(b, a)
        merged[f"{name}.weight"] = total.to(dtype)

    assert is_named("ComfyUI", told(tmp_path, merged, weights, strength))


@pytest.mark.parametrize("ratio", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formula_of_sd_scripts_in_the_dtype_of_the_base_is_told(
    tmp_path: Path, dtype: torch.dtype, ratio: float
) -> None:
    weights, pairs = inputs(tmp_path, dtype)
    merged = {}
    for name, (a, b) in pairs.items():
        up, down = b.to(dtype), a.to(dtype)
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + ratio * (up @ down) * SCALE

    assert is_named("sd-scripts", told(tmp_path, merged, weights, ratio))


@peers.needs("mlx_lm", "mlx.core")
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_mlx_lm_fuse_is_told(tmp_path: Path, adapter_dtype: str) -> None:
    import mlx.core as mx
    import mlx.nn as mlx_nn
    import numpy as np
    from mlx_lm.tuner.lora import LoRALinear

    weights, pairs = inputs(tmp_path, torch.bfloat16)
    merged = {}
    for name, (a, b) in pairs.items():
        base = weights[f"{name}.weight"]
        linear = mlx_nn.Linear(base.shape[1], base.shape[0], bias=False)
        linear.weight = mx.array(base.float().numpy()).astype(mx.bfloat16)
        layer = LoRALinear.from_base(linear, r=RANK, scale=SCALE)
        layer.lora_a = mx.array(a.T.contiguous().numpy()).astype(getattr(mx, adapter_dtype))
        layer.lora_b = mx.array(b.T.contiguous().numpy()).astype(getattr(mx, adapter_dtype))
        fused = np.array(layer.fuse().weight.astype(mx.float32))
        merged[f"{name}.weight"] = torch.from_numpy(fused).bfloat16()

    assert is_named("mlx-lm", told(tmp_path, merged, weights))


class Block(nn.Module):
    """Modules of the given shapes, linear ones and convolutions, that PEFT can merge into."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            parent: nn.Module = self
            *parts, last = name.removesuffix(".weight").split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            outputs, width, *kernel = weight.shape
            layer: nn.Module = (
                nn.Conv2d(width, outputs, kernel, bias=False, dtype=weight.dtype)  # type: ignore[arg-type]
                if kernel
                else nn.Linear(width, outputs, bias=False, dtype=weight.dtype)
            )
            layer.weight.data = weight.clone()  # type: ignore[union-attr]
            parent.add_module(last, layer)

    def forward(self) -> None:
        raise NotImplementedError


def merged_by_peft(weights: dict[str, Tensor], adapter: Path, *, autocast: bool = True) -> dict[str, Tensor]:
    """What PEFT merges with the adapter in float32, or in the dtype of the weights where `autocast` is False."""
    model = peft.PeftModel.from_pretrained(Block(weights), str(adapter), autocast_adapter_dtype=autocast)
    merged = model.merge_and_unload()
    return {n: t.contiguous() for n, t in merged.state_dict().items()}


def dora_inputs(tmp_path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write base and DoRA adapter; all weights, and those that it changes."""
    weights, pairs = inputs(tmp_path, dtype)
    extra = {f"{n}.lora_magnitude_vector": 1.3 * weights[f"{n}.weight"].float().norm(dim=1) for n in MODULES}
    factories.adapter_folder(
        tmp_path / "style", values=pairs, rank=RANK, alpha=ALPHA, extra=extra,
        config={"use_dora": True, "task_type": None},
    )  # fmt: skip
    return weights, {f"{n}.weight": weights[f"{n}.weight"] for n in MODULES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_that_peft_merges_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, linear = dora_inputs(tmp_path, dtype)

    assert is_named("PEFT", told(tmp_path, merged_by_peft(linear, tmp_path / "style"), weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_that_peft_merges_in_the_dtype_of_the_base_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, linear = dora_inputs(tmp_path, dtype)
    merged = merged_by_peft(linear, tmp_path / "style", autocast=False)
    in_float32 = merged_by_peft(linear, tmp_path / "style")
    assert any(not torch.equal(merged[name], in_float32[name]) for name in linear)

    assert told(tmp_path, merged, weights) == ("PEFT on a CPU with an adapter in that dtype",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_in_the_dtype_of_the_base_with_one_wrong_row_is_not_told(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, linear = dora_inputs(tmp_path, dtype)
    merged = merged_by_peft(linear, tmp_path / "style", autocast=False)
    # Two numbers of the dtype further: no norm of this row gives them together with the others.
    merged[f"{UP}.weight"][7] *= 1 + 3 * torch.finfo(dtype).eps
    factories.checkpoint_folder(tmp_path / "merged", weights={**weights, **merged})

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert report.verdict != "same"
    assert report.recipes[0][1] == len(MODULES) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_that_loratools_merges_is_told_as_such(tmp_path: Path, dtype: torch.dtype) -> None:
    dora_inputs(tmp_path, dtype)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert is_named("loratools", report.merged_by)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_that_peft_merges_is_the_same(
    tmp_path: Path, dtype: torch.dtype, kernel: tuple[int, int], dora: bool
) -> None:
    name = "down_blocks.0.resnets.0.conv1"
    generator = torch.Generator().manual_seed(2)
    weights = {f"{name}.weight": (torch.randn(12, 7, *kernel, generator=generator) * 0.05).to(dtype)}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    a, b = torch.randn(RANK, 7, *kernel, generator=generator), torch.randn(12, RANK, 1, 1, generator=generator)
    norms = weights[f"{name}.weight"].float().flatten(1).norm(dim=1).reshape(1, 12, 1, 1)
    factories.adapter_folder(
        tmp_path / "style", values={name: (a * 0.1, b * 0.1)}, rank=RANK, alpha=ALPHA,
        extra={f"{name}.lora_magnitude_vector": 1.2 * norms} if dora else {},
        config={"task_type": None, "use_dora": dora},
    )  # fmt: skip

    assert is_named("PEFT", told(tmp_path, merged_by_peft(weights, tmp_path / "style"), weights))


@peers.needs("mergekit")
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_arithmetic_of_mergekit_is_told(tmp_path: Path, dtype: torch.dtype, weight: float) -> None:
    weights, _ = inputs(tmp_path, dtype)
    linear = {f"{n}.weight": weights[f"{n}.weight"] for n in MODULES}
    models = merged_by_peft(linear, tmp_path / "style")
    merged = {n: task_arithmetic(weights[n], models[n], weight) for n in linear}

    programs = told(tmp_path, merged, weights, weight)

    # In float32, and with a weight of 1, the sum of the difference and the base may well be the model itself.
    assert programs
    if dtype == torch.bfloat16 and weight != 1:
        assert is_named("mergekit", programs)


def task_arithmetic(base: Tensor, model: Tensor, weight: float) -> Tensor:
    """What mergekit makes of one model and its base."""
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

    group = TensorGroup.from_tensors([base, model], base_index=0)
    method = GeneralizedTaskArithmeticMerge(
        consensus_method=None, sparsification_method=None, default_normalize=False, default_rescale=False,
        method_name="task_arithmetic", method_pretty_name=None, method_reference_url=None,
    )  # fmt: skip
    settings = {"weight": {1: weight}, "density": {1: 1.0}, "normalize": False, "rescale": False, "int8_mask": False}
    merged: Tensor = method.merge_group(group, **settings, **{"lambda": 1.0})
    return merged


def test_program_of_two_ways_is_named_once_for_all(tmp_path: Path) -> None:
    weights, pairs = inputs(tmp_path, torch.bfloat16)
    deltas = {n: SCALE * (b.double() @ a.double()) for n, (a, b) in pairs.items()}
    merged = {f"{n}.weight": (weights[f"{n}.weight"].double() + d).float().bfloat16() for n, d in deltas.items()}
    mixed = {**merged, f"{UP}.weight": weights[f"{UP}.weight"] + deltas[UP].float().bfloat16()}

    assert "loratools" in told(tmp_path, merged, weights)
    assert told(tmp_path, mixed, weights) == ()


def test_record_of_loratools_names_it_alone_where_only_it_rounds_so(tmp_path: Path) -> None:
    inputs(tmp_path, torch.bfloat16)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged", rounding="stochastic")

    report = loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")

    assert report.merged_by == ("loratools",)


def merged_by_lycoris(
    tmp_path: Path,
    kind: str,
    *,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (56, 24),
    weight: float = 1.0,
    **settings: Any,
) -> loratools.VerifyReport:
    """Let LyCORIS merge a module of that kind and rank 3 into a weight of that dtype, and verify the result."""
    import importlib

    torch.manual_seed(3)
    weights = {f"{UP}.weight": (torch.randn(shape) * 0.05).to(dtype)}
    factories.checkpoint_folder(tmp_path / "base", weights=weights)
    outputs, inputs, *kernel = shape
    layer = nn.Conv2d(inputs, outputs, kernel, bias=False) if kernel else nn.Linear(inputs, outputs, bias=False)  # type: ignore[arg-type]
    layer.weight.data = weights[f"{UP}.weight"].clone()
    cls = getattr(
        importlib.import_module(f"lycoris.modules.{kind}"), {"loha": "LohaModule", "lokr": "LokrModule"}[kind]
    )
    module = cls("m", layer, lora_dim=3, alpha=alpha, **settings)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    module.eval()
    state = {k: torch.as_tensor(v).detach().float().contiguous() for k, v in module.custom_state_dict().items()}
    save_file({f"lycoris_{UP.replace('.', '_')}.{k}": v for k, v in state.items()}, tmp_path / "style.safetensors")
    module.merge_to(weight)
    factories.checkpoint_folder(tmp_path / "merged", weights={f"{UP}.weight": layer.weight.data.contiguous()})
    return loratools.verify(tmp_path / "merged", tmp_path / "base", [(tmp_path / "style.safetensors", weight)])


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@peers.needs("lycoris.modules.loha", "lycoris.modules.lokr")
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_that_lycoris_merges_are_the_same(
    tmp_path: Path, kind: str, dtype: torch.dtype, weight: float
) -> None:
    report = merged_by_lycoris(tmp_path, kind, alpha=3, dtype=dtype, weight=weight)

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert is_named("LyCORIS", report.merged_by)
    assert is_named("loratools", report.merged_by) == (dtype == torch.float32)


@peers.needs("lycoris.modules.loha", "lycoris.modules.lokr")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        ("loha", (40, 14, 3, 3), {}),
        ("lokr", (40, 14, 3, 3), {}),
        ("lokr", (56, 24), {"full_matrix": True}),
        ("lokr", (56, 24), {"decompose_both": True}),
        # Sums that cancel are rounded to more than two neighbours.
        ("loha", (160, 96), {}),
    ],
)
def test_layouts_of_lycoris_in_the_dtype_of_the_base_are_told(
    tmp_path: Path, kind: str, shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    report = merged_by_lycoris(tmp_path, kind, alpha=3, dtype=dtype, shape=shape, **settings)

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert is_named("LyCORIS", report.merged_by)


@peers.needs("lycoris.modules.loha", "lycoris.modules.lokr")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_scale_that_this_lycoris_applies_twice_when_it_merges_is_told(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    # Its rebuilt weight has the scale already, and its difference multiplies with it once more.
    report = merged_by_lycoris(tmp_path, kind, alpha=2, dtype=dtype)

    assert (report.verdict, [finding.code for finding in report.diagnosis]) == ("different", ["scale-twice"])


@peers.needs("lycoris.modules.loha", "lycoris.modules.lokr")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_that_loratools_merges_are_told_as_such(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    merged_by_lycoris(tmp_path, kind, alpha=2, dtype=dtype)
    loratools.merge(tmp_path / "base", tmp_path / "style.safetensors", tmp_path / "right")

    report = loratools.verify(tmp_path / "right", tmp_path / "base", tmp_path / "style.safetensors")

    assert (report.verdict, report.diagnosis) == ("same", ())
    assert is_named("loratools", report.merged_by)
    assert "LyCORIS into a model in that dtype" not in report.merged_by
