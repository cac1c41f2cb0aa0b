"""What parity with PEFT's own merge does not show: what it cannot merge, factors, cuts, weights, files gone wrong."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

warnings.filterwarnings("ignore", category=DeprecationWarning)
import peft  # noqa: E402
import peft.tuners.boft.layer as boft_layer  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.variants import QALoraLinearVariant  # noqa: E402
from updates.test_parity_loha_to_kasa import (  # noqa: E402
    CASES,
    assert_equal_weights,
    base_model,
    merged_by_peft,
    saved_base,
    tolerance,
    trained,
)

import loratools  # noqa: E402
from loratools import formats, registry  # noqa: E402
from loratools.errors import FormatError, UnsupportedError  # noqa: E402
from loratools.tensors.lazy import LazyTensor, from_torch  # noqa: E402
from loratools.updates.parts.deltas import KroneckerDelta  # noqa: E402
from loratools.updates.parts.peft_module import PeftModule  # noqa: E402
from loratools.updates.parts.protocol import Update  # noqa: E402

# One of each kind, on a layer that has a bias and no two sizes alike.
ONE_OF_EACH = (
    "LoHa flat linear",
    "LoKr half linear",
    "AdaLora plain linear",
    "IA3 outputs linear",
    "OFT exact linear",
    "BOFT size linear",
    "HRA product linear",
    "Miss std linear",
    "Miss bat linear",
    "Glora lora lora vector linear",
    "Glora vector lora constant linear",
    "Lora kasa linear",
    "Lora blocks of a linear",
)


def module(parts: Mapping[str, Tensor], *, rank: int | None = None, alpha: float = 5.0, **config: Any) -> PeftModule:
    stored = {name: from_torch(tensor) for name, tensor in parts.items()}
    return PeftModule("layer", stored, config, rank, alpha, "config")


def made(kind: str, parts: Mapping[str, Tensor], **settings: Any) -> Update:
    found: Mapping[str, Update] = registry.load("updates", kind).from_peft(module(parts, **settings))
    return found[""]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.4


def delta_of(update: Update, base: Tensor, *, weight: float = 1.0) -> Tensor:
    whole = base.reshape(base.shape[0], -1).numpy()
    delta = update.prepare(from_torch(base), weight=weight, dtype="F64")
    return torch.from_numpy(delta.rows(0, len(whole), whole))


# What PEFT 0.21 does not merge here


@pytest.mark.parametrize("rslora", [False, True])
def test_qalora_is_the_weight_that_its_forward_pass_computes_with(tmp_path: Path, rslora: bool) -> None:
    """PEFT refuses to merge it, as its bases are quantised; its forward pass is asked, on one input at a time."""
    a, b, group = random(3, 4, seed=1), random(18, 3, seed=2), 3
    scale = 5 / 3**0.5 if rslora else 5 / 3
    layer = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=a)},
        lora_B={"x": SimpleNamespace(weight=b)},
        lora_dropout={"x": None},
        scaling={"x": scale},
        qalora_group_size={"x": group},
        in_features=12,
        training=False,
    )
    answers = QALoraLinearVariant.forward(layer, "x", torch.eye(12, dtype=torch.float64), torch.zeros(12, 18))  # type: ignore[arg-type]
    adapter = written(
        tmp_path / "adapter",
        {"linear.lora_A.weight": a, "linear.lora_B.weight": b},
        {
            "peft_type": "LORA",
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": rslora,
            "use_qalora": True,
            "qalora_group_size": 3,
        },
    )
    base = saved_base(base_model(), tmp_path / "base")

    loratools.merge(base, [adapter], tmp_path / "merged")

    found = load_file(tmp_path / "merged" / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(found, base_model().state_dict()["linear.weight"] + answers.T)


def written(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_groups_of_one_input_are_refused_since_their_shapes_are_those_of_lora() -> None:
    with pytest.raises(UnsupportedError, match="'layer' has groups of one input"):
        made("qalora", {"lora_A": random(3, 12), "lora_B": random(18, 3)}, qalora_group_size=1)


@pytest.mark.parametrize(
    ("layer", "butterflies", "blocks"),
    [
        ("linear", 2, {"boft_block_size": 2}),
        ("linear", 2, {"boft_block_num": 2}),
        ("linear", 2, {"boft_block_size": 6}),
        ("square", 3, {"boft_block_size": 2}),
        ("conv2_even", 2, {"boft_block_size": 4}),
        ("conv2_even", 4, {"boft_block_num": 8}),
    ],
)
def test_a_product_of_butterflies_equals_pefts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, butterflies: int, blocks: dict[str, int]
) -> None:
    """PEFT multiplies several only with its CUDA extension, for which a product of its blocks stands in here."""

    class BlockDiagonal:
        @staticmethod
        def apply(values: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in values])

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    sizes = {"boft_block_size": 0, "boft_block_num": 0, **blocks}
    config = peft.BOFTConfig(target_modules=[layer], boft_n_butterfly_factor=butterflies, **sizes)
    wrapped = get_peft_model(base_model(), config, autocast_adapter_dtype=False).double()
    for i, parameter in enumerate(p for p in wrapped.parameters() if p.requires_grad):
        parameter.data += random(*parameter.shape, seed=i)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = saved_base(base_model(), tmp_path / "base")

    loratools.merge(base, [tmp_path / "adapter"], tmp_path / "merged")

    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert_equal_weights(found, merged_by_peft(tmp_path / "adapter"), 1e-11)


@pytest.mark.parametrize("case", ["Miss std linear", "Miss even bare", "Miss bat linear"])
def test_bone_is_miss_under_its_former_name(tmp_path: Path, case: str) -> None:
    """As PEFT's own script converts it; PEFT no longer reads the former one."""
    adapter = trained(tmp_path / "adapter", case)
    expected = merged_by_peft(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("miss_block", "bone_block"): t for name, t in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))

    loratools.merge(saved_base(base_model(), tmp_path / "base"), [adapter], tmp_path / "merged")

    assert_equal_weights(load_file(tmp_path / "merged" / "model.safetensors"), expected, 1e-11)


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0", "0.18.0.dev0@abc", "1.0.0"])
def test_the_series_of_oft_is_the_one_of_the_peft_that_trained_it(version: str | None) -> None:
    """The last of five terms counted twice before 0.18, as the others do, and once since then."""
    entries = random(1, 3)
    skew = torch.tensor([[0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=torch.float64)
    for sign, entry in zip((1, 2, 3), entries[0], strict=True):
        skew[skew == sign], skew[skew == -sign] = entry, -entry
    last = 2.0 if version in (None, "0.17.1") else 1.0
    powers = [torch.linalg.matrix_power(skew, n) for n in range(5)]
    rotation = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + last * powers[4]
    base = random(4, 3, seed=1)

    found = delta_of(made("oft", {"oft_R": entries}, use_cayley_neumann=True, peft_version=version), base)

    torch.testing.assert_close(found, base @ rotation.T - base, rtol=1e-12, atol=1e-12)


# Factors, cuts and weights

FACTORED = [
    case
    for case in CASES
    if case.startswith(("LoHa", "AdaLora", "Lora blocks")) or (case.startswith("LoKr") and "whole" not in case)
]


def update_of(folder: Path, case: str, suffix: str = "") -> Update:
    adapter = formats.load(trained(folder, case))
    return adapter.updates[CASES[case][1] + suffix]


def base_of(case: str) -> Tensor:
    """The weight of the case's layer, as it computes with it."""
    weight = base_model().state_dict()[f"{CASES[case][1]}.weight"]
    return weight.T.contiguous() if CASES[case][1] == "conv1d_gpt2" else weight


@pytest.mark.parametrize("case", FACTORED)
def test_factors_multiply_to_the_delta(tmp_path: Path, case: str) -> None:
    update = update_of(tmp_path, case)
    factors = update.factors()
    if factors is None:
        # Both matrices of LoKr are whole in small layers, or are multiplied in PEFT's way of a Conv1d.
        assert case.startswith("LoKr")
        assert {"w1", "w2"} <= set(update.parts) or len(update.parts["w2"].shape) == 3
        return

    torch.testing.assert_close(factors.b @ factors.a, delta_of(update, base_of(case)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("LoHa", "AdaLora", "Lora blocks", "LoKr"))])
def test_what_depends_on_the_base_has_no_factors(tmp_path: Path, case: str) -> None:
    update = update_of(tmp_path, case)

    assert update.needs_base != isinstance(update, registry.load("updates", "miss").MiSS) or update.needs_base
    assert update.factors() is None


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_weight_multiplies_the_delta(tmp_path: Path, case: str) -> None:
    update, base = update_of(tmp_path, case), base_of(case)

    half = delta_of(update, base, weight=-0.5)

    torch.testing.assert_close(half, delta_of(update, base) * -0.5, rtol=1e-12, atol=1e-14)


def test_a_kronecker_product_is_transposed_and_cut_as_its_matrix_is() -> None:
    first, second = random(2, 3, seed=1).numpy(), random(4, 5, seed=2).numpy()
    whole = np.kron(first, second)
    delta = KroneckerDelta(first, second)
    rows, columns = np.array([6, 1, 3]), slice(2, 11)

    assert delta.shape == whole.shape
    np.testing.assert_allclose(delta.rows(3, 7), whole[3:7])
    np.testing.assert_allclose(delta.transposed().rows(0, 15), whole.T)
    np.testing.assert_allclose(delta.part(rows, columns).rows(0, 3), whole[rows][:, columns])
    np.testing.assert_allclose(delta.magnitude(1, 6), abs(whole[1:6]))
    assert delta.energy(1, 6) == pytest.approx((whole[1:6] ** 2).sum())


def test_adapters_of_several_kinds_add_up_in_any_order(tmp_path: Path) -> None:
    base = saved_base(base_model(), tmp_path / "base")
    adapters = [trained(tmp_path / f"{i}", case, seed=i) for i, case in enumerate(ONE_OF_EACH)]
    weights = base_model().state_dict()
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for adapter in adapters:
        for name, tensor in merged_by_peft(adapter).items():
            expected[name] += tensor - weights[name]

    for order in (adapters, adapters[::-1]):
        loratools.merge(base, order, tmp_path / f"merged {order[0].name}")
        assert_equal_weights(load_file(tmp_path / f"merged {order[0].name}" / "model.safetensors"), expected, 1e-5)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_of_other_dtypes_are_the_float64_result_rounded(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    rounded = base_model().to(dtype)
    base = saved_base(rounded, tmp_path / "base")
    adapter = trained(tmp_path / "adapter", case)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(rounded).double(), adapter, autocast_adapter_dtype=False)
    exact = {n: t.detach() for n, t in wrapped.double().merge_and_unload().state_dict().items()}

    report = loratools.merge(base, [adapter], tmp_path / "merged")

    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, expected in exact.items():
        spacing = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny) + 1e-5
        assert ((found[name].double() - expected).abs() <= spacing).all(), name
    assert report.verified


# Files gone wrong, and comparisons that can fail

MUTATIONS: dict[str, tuple[str, str, Any]] = {
    "a reflection after the other": ("HRA product square", "hra_u", lambda t: t.flip(1)),
    "the inverse rotation": ("OFT exact square", "oft_R", lambda t: -t),
    "the inverse rotation of a butterfly": ("BOFT size square", "boft_R", lambda t: t.mT),
    "scales of other outputs": ("BOFT size square", "boft_s", lambda t: t.roll(1, 0)),
    "singular values of other columns": ("AdaLora plain square", "lora_E", lambda t: t.roll(1, 0)),
    "a diagonal of other columns": ("Lora kasa square", "lora_diag", lambda t: t.roll(1)),
    "inputs for outputs": ("IA3 outputs square", "ia3_l", lambda t: t.T),
    "a block transposed": ("Miss bat square", "miss_block", lambda t: t.mT),
    "a factor transposed": ("LoKr whole square", "lokr_w1", lambda t: t.T),
    "factors exchanged": ("LoHa flat square", "hada_w1_a", lambda t: t.flip(0)),
    "added and multiplied with others": ("Glora vector none none square", "glora_A.X", lambda t: t.roll(1, 0)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_part_transposed_or_exchanged_would_be_seen(tmp_path: Path, mutation: str) -> None:
    """Of a square layer, where no shape gives a mistake away."""
    case, part, change = MUTATIONS[mutation]
    adapter = trained(tmp_path / "adapter", case)
    expected = merged_by_peft(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert any(part in name for name in tensors)
    changed = {name: change(t).contiguous() if part in name else t for name, t in tensors.items()}
    save_file(changed, adapter / "adapter_model.safetensors")

    loratools.merge(saved_base(base_model(), tmp_path / "base"), [adapter], tmp_path / "merged")

    with pytest.raises(AssertionError, match="square"):
        assert_equal_weights(load_file(tmp_path / "merged" / "model.safetensors"), expected, tolerance(case))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_missing_part_is_named_with_its_module(tmp_path: Path, case: str) -> None:
    adapter = trained(tmp_path / "adapter", case)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if len(tensors) < 2:
        pytest.skip("it has one part only")
    gone = sorted(tensors)[-1] if "kasa" not in case else next(name for name in tensors if "lora_diag" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, adapter / "adapter_model.safetensors")

    with pytest.raises(FormatError, match=r"'linear' has .* without "):
        formats.load(adapter)


_NO_BIAS = {"glora_C.zeros": (7, 1), "glora_D.zeros": (9,), "glora_E.zeros": (9,)}
WRONG: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "ranks of LoHa": (
        "loha",
        {"hada_w1_a": (9, 3), "hada_w1_b": (2, 7), "hada_w2_a": (9, 3), "hada_w2_b": (3, 7)},
        {},
        "parts that make no product: hada_w1_a",
    ),
    "one core of LoHa": (
        "loha",
        {"hada_w1_a": (3, 9), "hada_w1_b": (3, 7), "hada_w2_a": (3, 9), "hada_w2_b": (3, 7), "hada_t1": (3, 3, 2, 2)},
        {},
        "parts that make no product",
    ),
    "ranks of LoKr": ("lokr", {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 5)}, {}, "w2_a .4, 2. and"),
    "both forms of LoKr": ("lokr", {"lokr_w1": (2, 3), "lokr_w1_a": (2, 1), "lokr_w2": (4, 5)}, {}, "w1_a, which is"),
    "ranks of AdaLoRA": ("adalora", {"lora_A": (3, 7), "lora_B": (9, 3), "lora_E": (2, 1)}, {}, "different ranks"),
    "two axes of IA3": ("ia3", {"ia3_l": (9, 7)}, {}, "a number for each output or each input"),
    "a triangle of OFT": ("oft", {"oft_R": (4, 5)}, {}, "above the diagonal of no block"),
    "blocks of BOFT": ("boft", {"boft_R": (1, 4, 2, 3), "boft_s": (9, 1)}, {}, "boft_R .1, 4, 2, 3."),
    "odd blocks of BOFT": ("boft", {"boft_R": (2, 3, 2, 2), "boft_s": (9, 1)}, {}, "too odd for 2 butterflies"),
    "axes of HRA": ("hra", {"hra_u": (7,)}, {}, "hra_u .7."),
    "bat without its blocks": ("miss", {"miss_block": (2, 9)}, {"init_weights": "bat"}, "init_weights is 'bat'"),
    "blocks without bat": ("miss", {"miss_block": (4, 2, 2)}, {"init_weights": True}, "init_weights is True"),
    "a path of GLoRA": ("glora", {"glora_A.Xd": (9, 3), "glora_B.X": (1,), **_NO_BIAS}, {}, "make no path: glora_A"),
    "another path of GLoRA": (
        "glora",
        {"glora_A.W": (9, 3), "glora_B.X": (1,), **_NO_BIAS},
        {},
        "glora_A.W, which is no part",
    ),
    "rank of KaSA": ("kasa", {"lora_A": (3, 3), "lora_B": (9, 3), "lora_diag": (3,)}, {}, "drop all of the base"),
    "blocks of BD-LoRA": (
        "bdlora",
        {"lora_A": (4, 3), "lora_B": (9, 3)},
        {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}},
        "no product with 2 blocks in A",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_parts_that_do_not_fit_each_other_are_refused_by_name(fault: str) -> None:
    kind, shapes, config, message = WRONG[fault]

    with pytest.raises(FormatError, match=f"'layer' has .*{message}"):
        made(kind, {name: random(*shape) for name, shape in shapes.items()}, **config)


def test_a_bias_that_depends_on_a_weight_left_out_is_refused(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", "Glora lora lora vector linear")
    base = saved_base(base_model(), tmp_path / "base")

    with pytest.raises(UnsupportedError, match=r"linear\.bias depends on the weight of its layer, which is left out"):
        loratools.merge(base, [adapter], tmp_path / "merged", include=["linear.bias"])


def test_a_bias_that_is_scaled_may_be_absent_and_no_other(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", "IA3 outputs bare")

    assert getattr(formats.load(adapter).updates["bare.bias"], "optional", False)
    report = loratools.merge(saved_base(base_model(), tmp_path / "base"), [adapter], tmp_path / "merged")
    assert report.verified


def test_every_tensor_is_a_part(tmp_path: Path) -> None:
    """Or a path of GLoRA that is nothing, which PEFT stores as zeros."""
    for i, case in enumerate(CASES):
        if CASES[case][1] != "linear":
            continue
        folder = trained(tmp_path / str(i), case)
        stored = [name for name in load_file(folder / "adapter_model.safetensors") if not name.endswith(".zeros")]
        parts: list[LazyTensor] = []
        for update in formats.load(folder).updates.values():
            parts += [p for p in update.parts.values() if p not in parts]
        assert len(parts) == len(stored), case


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_magnitude_of_neither_outputs_nor_inputs_is_refused_by_name(kind: str) -> None:
    shapes = {
        "loha": {"hada_w1_a": (9, 3), "hada_w1_b": (3, 7), "hada_w2_a": (9, 3), "hada_w2_b": (3, 7)},
        "lokr": {"lokr_w1": (3, 1), "lokr_w2": (3, 7)},
    }[kind]
    parts = {name: from_torch(random(*shape)) for name, shape in {**shapes, "dora_scale": (9, 7)}.items()}

    with pytest.raises(FormatError, match=r"'layer' has dora_scale \[9, 7\]: one number for each of 9 outputs"):
        registry.load("updates", kind).from_lycoris(parts, 5.0, name="layer")
