"""Every kind of adapter that stores something else than A and B merges to what PEFT's own merge gives.

Generated: all of these kinds x all kinds of layers x dtypes of the base; what PEFT does not wrap, it must refuse.
PEFT merges in float64 here, so that what is compared is the formula, except where it forces float32 itself.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

warnings.filterwarnings("ignore", category=DeprecationWarning)
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import loratools  # noqa: E402
from loratools.errors import InputError, UnsupportedError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

# All sizes are multiples of 4, for kinds that work in blocks, and two are equal in `square` only.
LAYERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "linear": lambda: {"wide": nn.Linear(12, 20), "tall": nn.Linear(24, 8), "square": nn.Linear(16, 16, bias=False)},
    # By GPT-2's names, which tell of a square weight how it is stored.
    "conv1d": lambda: {"c_attn": Conv1D(20, 12), "c_fc": Conv1D(8, 24), "c_proj": Conv1D(16, 16)},
    "embedding": lambda: {"wide": nn.Embedding(28, 12)},
    "convolution": lambda: {
        "wide": nn.Conv1d(8, 12, 3),
        "tall": nn.Conv2d(12, 8, 1),
        "square": nn.Conv2d(16, 16, (2, 3)),
        "deep": nn.Conv3d(4, 8, (1, 2, 3)),
    },
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """layers: what PEFT wraps. single: PEFT computes in float32. own_dtype: in the base's dtype, as does the kind.

    amplified: by how much its arithmetic enlarges the rounding of float32. Singular vectors of a float32 SVD move by
    the rounding of the largest singular value over the gap to the next, in a direction that depends on the machine.
    """

    config: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("linear",)
    single: bool = False
    own_dtype: bool = False
    amplified: int = 1


BOTH = ("linear", "conv1d")
CASES: dict[str, Case] = {
    "vera": Case(peft.VeraConfig, {"r": 3}, BOTH),
    "pvera": Case(peft.PveraConfig, {"r": 3}, BOTH),
    "vblora": Case(peft.VBLoRAConfig, {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 3}, BOTH),
    "vblora-topk": Case(
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 300, "vector_length": 2, "topk": 3, "save_only_topk_weights": True},
        BOTH,
        single=True,
    ),
    "unilora": Case(peft.UniLoraConfig, {"r": 3, "theta_d_length": 37, "save_indices": True}, BOTH),
    "fourierft": Case(peft.FourierFTConfig, {"n_frequency": 29, "random_loc_seed": 5}, BOTH, single=True),
    "waveft": Case(peft.WaveFTConfig, {"n_frequency": 29, "random_loc_seed": 5}, BOTH),
    "waveft-db3": Case(peft.WaveFTConfig, {"n_frequency": 29, "wavelet_family": "db3"}, BOTH),
    "waveft-sym4": Case(peft.WaveFTConfig, {"n_frequency": 29, "wavelet_family": "sym4"}, BOTH),
    "waveft-coif2": Case(peft.WaveFTConfig, {"n_frequency": 29, "wavelet_family": "coif2"}, BOTH),
    "waveft-plain": Case(peft.WaveFTConfig, {"n_frequency": 29, "use_idwt": False}, BOTH),
    "waveft-shared": Case(peft.WaveFTConfig, {"n_frequency": 40, "proportional_parameters": True}, BOTH),
    "c3a": Case(peft.C3AConfig, {"block_size": 4}, single=True),
    "c3a-pattern": Case(peft.C3AConfig, {"block_size": 4, "block_size_pattern": {"tall": 8}}, single=True),
    "randlora": Case(peft.RandLoraConfig, {"r": 5, "randlora_alpha": 7}, BOTH),
    "randlora-sparse": Case(peft.RandLoraConfig, {"r": 3, "sparse": True}, BOTH),
    "shira": Case(peft.ShiraConfig, {"r": 2}),
    "delora": Case(peft.DeloraConfig, {"r": 3, "rank_pattern": {"tall": 5}}),
    "gralora": Case(peft.GraloraConfig, {"r": 8, "gralora_k": 4, "alpha": 9}, BOTH),
    "gralora-hybrid": Case(peft.GraloraConfig, {"r": 6, "gralora_k": 2, "hybrid_r": 3}, BOTH),
    "road-1": Case(peft.RoadConfig, {"variant": "road_1", "group_size": 4}),
    "road-2": Case(peft.RoadConfig, {"variant": "road_2", "group_size": 4}),
    "road-4": Case(peft.RoadConfig, {"variant": "road_4", "group_size": 4}),
    "hira": Case(peft.HiraConfig, {"r": 3, "rank_pattern": {"tall": 5}}, tuple(LAYERS)),
    "osf": Case(peft.OSFConfig, {"effective_rank": 3}, single=True, own_dtype=True),
    "osf-half": Case(peft.OSFConfig, {}, single=True, own_dtype=True, amplified=16),
    "tinylora": Case(peft.TinyLoraConfig, {"r": 3, "u": 5, "weight_tying": 0.0}, (*BOTH, "embedding")),
    "tinylora-tied": Case(peft.TinyLoraConfig, {"r": 3, "u": 5, "weight_tying": 0.34}, (*BOTH, "embedding")),
    "beft": Case(peft.BeftConfig, {"target_modules": ["wide", "tall"]}),
    "deft": Case(peft.DeftConfig, {"r": 3}, BOTH, single=True),
    "deft-qr": Case(peft.DeftConfig, {"r": 3, "decomposition_method": "qr", "alpha": 5}, BOTH, single=True),
    "deft-para": Case(peft.DeftConfig, {"r": 3, "para": True, "decomposition_method": "qr"}, BOTH, single=True),
    "frod": Case(peft.FrodConfig, {"sparse_rate": 0.1, "progressbar": False}, BOTH, single=True),
    "peanut": Case(peft.PeanutConfig, {"r": 3, "scaling": 0.5}),
    "peanut-deep": Case(peft.PeanutConfig, {"r": 3, "depth": 2, "act_fn": "gelu"}),
    "supertuning": Case(peft.SupertuningConfig, {"sparsity": 0.9}),
    "supertuning-lora": Case(peft.SupertuningConfig, {"sparsity": 0.9, "r": 3, "lora_alpha": 7}),
}


class Model(nn.Module):
    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def base_model(layers: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(3)
    model = Model(LAYERS[layers]())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    # Values that every dtype holds, so that a model of any dtype is the same model.
    return model.to(torch.bfloat16).to(dtype)


def wrapped(case: Case, model: nn.Module) -> Any:
    names = [name for name, _ in model.named_children()]
    return peft.get_peft_model(model, case.config(**{"target_modules": names, **case.fields}))


def wraps_nothing(case: Case, layers: str) -> bool:
    try:
        model = wrapped(case, base_model(layers))
    except Exception:  # each tuner has its own
        return True
    # OSF passes over what it cannot wrap.
    return not any(parameter.requires_grad for parameter in model.parameters())


def trained(case: Case, layers: str, folder: Path, seed: int = 4) -> Path:
    """The folder of an adapter, all of whose trained tensors have moved away from where they started."""
    model = wrapped(case, base_model(layers))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def checkpoint(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def merged_by_peft(case: Case, base: nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(base, folder)
    if not case.own_dtype:
        model = model.double()
    return {name: t.double() for name, t in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_peft(name: str, layers: str, tmp_path: Path) -> None:
    case = CASES[name]
    if layers not in case.layers:
        assert wraps_nothing(case, layers)
        return
    adapter = trained(case, layers, tmp_path / "adapter")
    for dtype_name, dtype in DTYPES.items():
        base = base_model(layers, dtype)
        before = {key: t.double() for key, t in base.state_dict().items()}
        folder = checkpoint(base, tmp_path / dtype_name)
        # Kinds that compute in the base's dtype follow it into rounding; all others are held to float64.
        start = base if case.own_dtype else base_model(layers, torch.float64)
        expected = merged_by_peft(case, start, adapter, dtype)

        loratools.merge(folder, [adapter], tmp_path / f"out-{dtype_name}")

        found = load_file(tmp_path / f"out-{dtype_name}" / "model.safetensors")
        assert found.keys() == expected.keys()
        changed = [key for key in found if not torch.equal(before[key], expected[key])]
        assert changed
        for key, values in found.items():
            assert values.dtype == dtype
            within = torch.finfo(dtype).eps * (16 if case.own_dtype else 2)
            within = max(within, torch.finfo(torch.float32).eps * 32 * case.amplified if case.single else 1e-13)
            # Forward errors of a sum are relative to the largest that was added.
            bound = within * (expected[key].abs() + (expected[key] - before[key]).abs().max() + before[key].abs().max())
            if dtype != torch.float64 and not case.own_dtype:
                bound = within * expected[key].abs() + 2e-6 * (1 + (expected[key] - before[key]).abs().max())
            excess = ((values.double() - expected[key]).abs() - bound).max()
            assert excess <= 0, f"{key} of {dtype_name}: {excess:.2e} beyond {within:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_deltas_of_two_adapters_add_each_with_its_weight(name: str, tmp_path: Path) -> None:
    """Against the unmodified base, whatever the kind does with it: in PEFT the second would work on the first's."""
    case = CASES[name]
    base = base_model("linear", torch.float64)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    folder = checkpoint(base, tmp_path / "base")
    adapters = [trained(case, "linear", tmp_path / f"adapter-{seed}", seed) for seed in (4, 5)]
    alone = []
    for i, adapter in enumerate(adapters):
        loratools.merge(folder, [adapter], tmp_path / f"alone-{i}")
        alone.append(load_file(tmp_path / f"alone-{i}" / "model.safetensors"))

    loratools.merge(folder, [(adapters[0], 0.5), (adapters[1], -2.0)], tmp_path / "both")

    found = load_file(tmp_path / "both" / "model.safetensors")
    for key, start in before.items():
        expected = start + 0.5 * (alone[0][key] - start) - 2.0 * (alone[1][key] - start)
        torch.testing.assert_close(found[key], expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_factors_where_a_kind_has_them_are_its_delta(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = base_model("linear", torch.float64)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    adapter = trained(case, "linear", tmp_path / "adapter")
    loratools.merge(checkpoint(base, tmp_path / "base"), [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")

    updates = loratools.load(adapter).updates

    for target, update in updates.items():
        factors = update.factors()
        if factors is not None:
            delta = merged[f"{target}.weight"] - before[f"{target}.weight"]
            torch.testing.assert_close(factors.b @ factors.a, delta, rtol=0, atol=1e-12 * float(1 + delta.abs().max()))
        known = None not in update.shape and not update.needs_base
        assert (factors is not None) == (known and name.split("-")[0] in LOW_RANK), target


LOW_RANK = ("vblora", "unilora", "delora", "gralora", "tinylora")
UNSAVED: dict[str, tuple[Case, str]] = {
    "vera": (Case(peft.VeraConfig, {"r": 3, "save_projection": False}), "without vera_A"),
    "pvera": (Case(peft.PveraConfig, {"r": 3, "save_projection": False}), "without pvera_A"),
    "unilora": (
        Case(peft.UniLoraConfig, {"r": 3, "theta_d_length": 37, "save_indices": False}),
        "nothing of a module",
    ),
    "randlora": (Case(peft.RandLoraConfig, {"r": 3, "save_projection": False}), "without randlora_A"),
    "tinylora": (Case(peft.TinyLoraConfig, {"r": 3, "u": 5, "save_projection": False}), "without its P"),
    "frod": (Case(peft.FrodConfig, {"save_projection": False, "progressbar": False}), "without frod_V"),
    "supertuning": (
        Case(peft.SupertuningConfig, {"sparsity": 0.9, "save_precomputed_indices": False}),
        "without its indices",
    ),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_an_adapter_saved_without_what_its_file_does_not_determine_is_refused(name: str, tmp_path: Path) -> None:
    case, why = UNSAVED[name]
    adapter = trained(case, "linear", tmp_path / "adapter")

    with pytest.raises(UnsupportedError, match=why) as caught:
        loratools.load(adapter)

    assert "=True" in str(caught.value.hint)


def edited(adapter: Path, key: str, values: torch.Tensor | None, config: dict[str, object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if values is not None:
        assert key in tensors
        save_file(tensors | {key: values}, file)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(fields | config))


DAMAGED: dict[str, tuple[str, str, torch.Tensor | None, dict[str, object], str]] = {
    "vera": ("vera", "base_model.vera_A", torch.zeros(4, 24), {}, "do not fit"),
    "vblora": ("vblora", "base_model.model.wide.vblora_logits_A", torch.zeros(3, 3, 6), {}, "do not fit"),
    "vblora-chosen": (
        "vblora-topk",
        "base_model.model.wide.vblora_logits_A_topk_indices",
        torch.full((3, 6, 3), 300),
        {},
        "indices from 300 to 300",
    ),
    "unilora": ("unilora", "base_model.model.wide.unilora_indices_A", torch.full((3, 12), -1), {}, "indices from -1"),
    "shira": ("shira", "base_model.model.wide.shira_indices", torch.full((2, 64), 20), {}, "indices from 20"),
    "supertuning": (
        "supertuning",
        "base_model.model.wide.supertuning_indices",
        torch.full((23,), 240),
        {},
        "indices from 240 to 240",
    ),
    "delora": ("delora", "base_model.model.wide.delora_w_norm", torch.ones(11), {}, "do not fit"),
    "road": ("road-2", "base_model.model.wide.road_theta", torch.ones(21), {}, "do not fit"),
    "road-group": ("road-2", "", None, {"group_size": 6}, "no groups of 6"),
    "road-variant": ("road-2", "", None, {"variant": "road_3"}, "'road_3'; known here are"),
    "waveft-wavelet": ("waveft", "", None, {"wavelet_family": "bior2.2"}, "'bior2.2'; known here are"),
    "fourierft-scale": ("fourierft", "", None, {"scaling": None}, "no number for scaling"),
    "peanut-activation": ("peanut", "", None, {"act_fn": "prelu"}, "'prelu'; known here are"),
    "peanut-depth": ("peanut-deep", "", None, {"depth": 1}, "a depth of 1"),
    "deft-method": ("deft", "", None, {"decomposition_method": "svd"}, "'svd'; known here are"),
    "tinylora-groups": ("tinylora", "", None, {"weight_tying": 1.0}, "share 1 vectors"),
    "tinylora-seed": ("tinylora", "", None, {"projection_seed": 9}, "none that the seed 9 gives"),
    "osf": ("osf", "base_model.model.wide.osf_svd_params.S_low", torch.ones(5), {}, "do not fit"),
    "randlora": ("randlora", "base_model.model.wide.randlora_gamma", torch.ones(2, 12), {}, "do not fit"),
    "gralora": ("gralora", "base_model.model.wide.gralora_B", torch.ones(2, 8, 5), {}, "do not fit"),
    "frod": ("frod", "base_model.model.wide.frod_lambda_l", torch.ones(11), {}, "do not fit"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    case, key, values, config, why = DAMAGED[name]
    adapter = trained(CASES[case], "linear", tmp_path / "adapter")
    edited(adapter, key, values, config)

    with pytest.raises(InputError, match=why):
        loratools.merge(checkpoint(base_model("linear"), tmp_path / "base"), [adapter], tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_bias_to_add_to_must_be_there(tmp_path: Path) -> None:
    adapter = trained(CASES["beft"], "linear", tmp_path / "adapter")
    base = base_model("linear")
    base.wide.bias = None

    with pytest.raises(InputError, match="wide"):
        loratools.merge(checkpoint(base, tmp_path / "base"), [adapter], tmp_path / "out")


def test_the_signs_that_psoft_needs_are_the_decompositions_own(tmp_path: Path, monkeypatch: Any) -> None:
    """Why PSOFT is refused: PEFT's own merge changes with the signs of singular vectors, which nothing determines."""
    case = Case(peft.PsoftConfig, {"r": 3, "ab_svd_init": "psoft_init"})
    adapter = trained(case, "linear", tmp_path / "adapter")
    first = merged_by_peft(case, base_model("linear"), adapter, torch.float32)
    decomposed = torch.linalg.svd

    def turned(w: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, s, v = decomposed(w, **options)
        signs = torch.ones_like(s)
        signs[1] = -1
        return u * signs, s, signs[:, None] * v

    monkeypatch.setattr(torch.linalg, "svd", turned)
    second = merged_by_peft(case, base_model("linear"), adapter, torch.float32)

    assert not torch.allclose(first["wide.weight"], second["wide.weight"], atol=0.1)
    with pytest.raises(UnsupportedError, match="PSOFT") as caught:
        loratools.load(adapter)
    assert "signs" in str(caught.value)


@pytest.mark.parametrize("name", ["vera", "road-2", "vblora-topk", "frod"])
def test_inspect_counts_what_modules_share_once(name: str, tmp_path: Path) -> None:
    adapter = trained(CASES[name], "linear", tmp_path / "adapter")
    stored = load_file(adapter / "adapter_model.safetensors")
    # FRoD's sizes of S are those of V as well.
    counted = {key: t for key, t in stored.items() if ".frod_s_size." not in key}

    (entry,) = loratools.inspect(adapter).sources

    assert entry.parameters == sum(t.numel() for t in counted.values())
    assert sum(entry.dtypes.values()) == len(counted)


def test_what_peft_writes_has_no_errors_and_no_warnings_of_check(tmp_path: Path) -> None:
    complaints: dict[str, list[str]] = {}
    for number, (name, case) in enumerate(CASES.items()):
        if not wraps_nothing(case, "linear"):
            report = loratools.check(trained(case, "linear", tmp_path / f"{number}"), threads=1)
            if report.exit_code:
                complaints[name] = [finding.id for finding in report.findings]

    assert complaints == {}
