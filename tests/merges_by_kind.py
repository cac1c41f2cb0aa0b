"""One merge of every kind of update in the registry, with weights that the kind's own peer computes, for the verifier.

The adapters are saved by PEFT and LyCORIS. Bases have values that bfloat16 holds, so that a base of any dtype is the
same model. `Merge.weights` are those of base and adapter, in float64.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

warnings.filterwarnings("ignore", category=DeprecationWarning)
pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft  # noqa: E402
from updates import test_lycoris_parity as lycoris_parity  # noqa: E402
from updates import test_parity_loha_to_kasa as loha_to_kasa  # noqa: E402
from updates import test_parity_vera_to_supertuning as vera_to_supertuning  # noqa: E402
from updates.test_lora_parity import Mixture  # noqa: E402

# Weights that no adapter changes.
UNTOUCHED = {"model.embed_tokens.weight": (37, 6), "model.norm.weight": (6,)}
SQUARE = "square.weight"


@dataclass(frozen=True)
class Merge:
    """A base, an adapter for it, and both together.

    Attributes:
        base: The weights of the base, in float64.
        weights: Those of them that the adapter changes, merged by the peer, in float64.
        adapter: The adapter.
        config: The config of the base.
    """

    base: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    adapter: Path
    config: Mapping[str, object]


def stored_exactly(values: Tensor) -> Tensor:
    """Values that bfloat16 holds."""
    return values.to(torch.bfloat16).to(values.dtype)


def untouched() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        name: stored_exactly(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in UNTOUCHED.items()
    }


class Layers(nn.Module):
    """Two layers whose sizes are multiples of 4, for kinds that work in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.square = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def base_layers(module: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    layers = module()
    for parameter in layers.parameters():
        parameter.data = stored_exactly(torch.randn_like(parameter))
    return layers


def by_peft(
    folder: Path,
    seed: int,
    config: Any,
    *,
    module: Callable[[], nn.Module] = Layers,
    in_float32: bool = False,
    model_type: str = "gpt2",
) -> Merge:
    """Let PEFT save an adapter whose tensors have all moved away from where they began, load it, and merge it."""
    model = base_layers(module)
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    trained = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(model, folder)
    merged = (loaded if in_float32 else loaded.double()).merge_and_unload().state_dict()
    weights = {n: t.detach().double() for n, t in merged.items() if not torch.equal(t.double(), base[n])}
    assert weights, "the adapter changes nothing"
    return Merge(base | untouched(), weights, folder, {"model_type": model_type})


def by_lycoris(folder: Path, seed: int, kind: str) -> Merge:
    """Let LyCORIS store a module, and read off the weight that it computes with."""
    cls, options = lycoris_parity.MODULES[kind]
    base, weights, stored = untouched(), {}, {}
    for name, (outputs, inputs) in {"linear": (20, 12), "square": (16, 16)}.items():
        layer = base_layers(functools.partial(nn.Linear, inputs, outputs, bias=False))
        base[f"{name}.weight"] = layer.get_parameter("weight").detach().double()
        module = lycoris_parity.module_of(cls, copy.deepcopy(layer), options["plain"], seed)
        weights[f"{name}.weight"] = lycoris_parity.rebuilt(module, base[f"{name}.weight"])
        own = {key: value for key, value in module.state_dict().items() if "org_module" not in key}
        # The one that a module adds to its weight is not among its parameters any more.
        stored |= {f"lycoris_{name}.{key}": value.detach().float().contiguous() for key, value in own.items()}
    folder.mkdir(parents=True)
    save_file(stored, folder / "style.safetensors")
    return Merge(base, weights, folder / "style.safetensors", {})


def qalora(folder: Path, seed: int) -> Merge:
    """PEFT merges none, as its bases are quantised: its forward pass is asked, on one input at a time."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    generator = torch.Generator().manual_seed(seed)
    base, weights, stored = untouched(), {}, {}
    for name, (outputs, inputs) in {"linear": (20, 12), "square": (16, 16)}.items():
        base[f"{name}.weight"] = stored_exactly(torch.randn(outputs, inputs, generator=generator)).double()
        a, b = torch.randn(3, inputs // 4, generator=generator), torch.randn(outputs, 3, generator=generator)
        layer = SimpleNamespace(
            lora_A={"x": SimpleNamespace(weight=a.double())}, lora_B={"x": SimpleNamespace(weight=b.double())},
            lora_dropout={"x": None}, scaling={"x": 5 / 3}, qalora_group_size={"x": 4}, in_features=inputs,
            training=False,
        )  # fmt: skip
        probes, zeros = torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, outputs, dtype=torch.float64)
        weights[f"{name}.weight"] = base[f"{name}.weight"] + QALoraLinearVariant.forward(layer, "x", probes, zeros).T
        stored[f"base_model.model.{name}.lora_A.weight"], stored[f"base_model.model.{name}.lora_B.weight"] = a, b
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Merge(base, weights, folder, {})


def of_first(case: str) -> Callable[[Path, int], Merge]:
    kind, _, options = loha_to_kasa.CASES[case]

    def build(folder: Path, seed: int) -> Merge:
        settings: dict[str, Any] = {"target_modules": ["linear", "square"], **copy.deepcopy(options)}
        if kind == "IA3Config":
            settings["feedforward_modules"] = ["square"]
        return by_peft(folder, seed, getattr(peft, kind)(**settings))

    return build


def of_second(case: str) -> Callable[[Path, int], Merge]:
    entry = vera_to_supertuning.CASES[case]

    def build(folder: Path, seed: int) -> Merge:
        fields = {"target_modules": ["linear", "square"], **entry.fields}
        fields["target_modules"] = ["linear"] if case == "beft" else fields["target_modules"]
        fields.pop("rank_pattern", None)
        return by_peft(folder, seed, entry.config(**fields), in_float32=entry.own_dtype)

    return build


def lora(**options: Any) -> Callable[[Path, int], Merge]:
    def build(folder: Path, seed: int) -> Merge:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["linear", "square"], "init_lora_weights": False}
        return by_peft(folder, seed, peft.LoraConfig(**{**settings, **options}))

    return build


def experts(folder: Path, seed: int) -> Merge:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=parameters, init_lora_weights=False
    )
    return by_peft(folder, seed, config, module=Mixture, model_type="qwen3_moe")


# A merge for every kind of the registry, and for the options of LoRA that have defects of their own.
KINDS: dict[str, Callable[[Path, int], Merge]] = {
    "lora": lora(),
    "lora rslora": lora(use_rslora=True),
    "lora dora": lora(use_dora=True),
    "lora-experts": experts,
    "qalora": qalora,
    "loha": of_first("LoHa flat linear"),
    "lokr": of_first("LoKr factor linear"),
    "adalora": of_first("AdaLora plain linear"),
    "ia3": of_first("IA3 outputs linear"),
    "oft": of_first("OFT exact linear"),
    "boft": of_first("BOFT size linear"),
    "hra": of_first("HRA product linear"),
    "miss": of_first("Miss even linear"),
    "glora": of_first("Glora lora lora vector linear"),
    "kasa": of_first("Lora kasa linear"),
    "bdlora": of_first("Lora blocks of a linear"),
    **{
        kind: of_second(kind)
        for kind in ("vera", "pvera", "vblora", "unilora", "fourierft", "waveft", "c3a", "randlora", "shira", "delora",
                     "gralora", "hira", "osf", "tinylora", "beft", "deft", "frod", "peanut", "supertuning")
    },
    "road": of_second("road-2"),
    "lycoris-glora": functools.partial(by_lycoris, kind="lycoris-glora"),
    "lycoris-oft": functools.partial(by_lycoris, kind="lycoris-oft"),
    "full": functools.partial(by_lycoris, kind="full"),
}  # fmt: skip


@functools.cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="merges-by-kind-")
    # Removed when the interpreter ends, with the object that holds it.
    _folders.append(folder)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def merge_of(kind: str, seed: int = 4) -> Merge:
    """The merge of that kind, made once for all tests."""
    return _merge_of(kind, seed)


@functools.cache
def _merge_of(kind: str, seed: int) -> Merge:
    return KINDS[kind](scratch() / f"{kind.replace(' ', '-')}-{seed}", seed)


def params(kinds: Mapping[str, object] | list[str] | None = None) -> list[Any]:
    """The names of the kinds as parameters of a test, those of LyCORIS with its mark."""
    return [
        pytest.param(
            kind, marks=[peers.needs("lycoris")] if kind in lycoris_parity.MODULES and kind not in _PEFT else []
        )
        for kind in (KINDS if kinds is None else kinds)
    ]


_PEFT = frozenset({"lora", "loha", "lokr", "ia3"})


def write(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, config: Mapping[str, object]) -> Path:
    """Write a checkpoint whose weights are rounded to float32 and then to `dtype`, as sums in float32 are."""
    folder.mkdir(parents=True)
    save_file({n: t.float().to(dtype).contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
