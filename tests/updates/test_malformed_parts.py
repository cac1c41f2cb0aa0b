"""Every kind of update x every part that it stores x every way to damage it: an error of ours, and nothing written.

The adapters are those that the peers themselves save, one of every kind; the parts are what their files hold.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

warnings.filterwarnings("ignore", category=DeprecationWarning)
pytest.importorskip("peft")
pytest.importorskip("transformers")

import peers  # noqa: E402
from updates import test_lycoris_parity as third  # noqa: E402
from updates import test_parity_loha_to_kasa as loha_to_kasa  # noqa: E402
from updates import test_parity_vera_to_supertuning as vera_to_supertuning  # noqa: E402

import loratools  # noqa: E402
from loratools import registry  # noqa: E402
from loratools.errors import InputError  # noqa: E402
from loratools.formats.image_parts.kinds import NotReadError  # noqa: E402
from loratools.tensors.lazy import from_torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

# Stored by PEFT and read by nobody: bases of RandLoRA beside those of its modules, zeros of paths that GLoRA does not
# have, and sizes that FRoD's other tensors have as well.
UNREAD = re.compile(r"^base_model\.randlora_[AB]$|^base_model\.frod_s_size\.|\.zeros$")
WEIGHTS = "adapter_model.safetensors"
ALWAYS_REFUSED = ("no axes", "no columns", "not a number")
# The first and the last leave nothing to compute with, whatever the part means; what the others leave may be another
# adapter that is as good.
DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "no axes": lambda t: t.new_zeros(()),
    "no columns": lambda t: t.new_zeros((*t.shape[:-1], 0)),
    "an extra axis": lambda t: t[None].contiguous(),
    "whole numbers": lambda t: t.to(torch.int32) if t.is_floating_point() else t.to(torch.float32),
    "one row more": lambda t: torch.cat([t, t[-1:]]).contiguous(),
    "one column more": lambda t: torch.cat([t, t[..., -1:]], -1).contiguous(),
    "not a number": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 1000,
}


# One case of every kind, and of every set of parts that a kind has.
FIRST = {
    "loha": ("LoHa flat linear", "LoHa core conv2"),
    "lokr": ("LoKr whole linear", "LoKr factor linear", "LoKr core conv2"),
    "adalora": ("AdaLora plain linear",),
    "ia3": ("IA3 outputs linear",),
    "oft": ("OFT series linear", "OFT shared linear"),
    "boft": ("BOFT size linear",),
    "hra": ("HRA product linear",),
    "miss": ("Miss std linear", "Miss bat square", "Miss mini linear"),
    "glora": ("Glora lora lora vector linear", "Glora vector lora constant linear", "Glora vector bare"),
    "kasa": ("Lora kasa linear",),
    "bdlora": ("Lora blocks of a linear", "Lora blocks of b linear"),
}
OTHER_PARTS = ("vblora-topk", "gralora-hybrid", "peanut-deep", "supertuning-lora")
SECOND = [case for case in vera_to_supertuning.CASES if "-" not in case or case in OTHER_PARTS or case == "road-1"]
# In other tests: tensors of experts have three axes, and QALoRA needs a quantised base.
ELSEWHERE = {"lora-experts", "qalora"}


def test_no_kind_is_left_out() -> None:
    kinds = set(FIRST) | {case.split("-")[0] for case in SECOND} | set(third.MODULES) | ELSEWHERE

    assert kinds == set(registry.names("updates"))


def outcome(adapter: Path, base: Path, out: Path) -> str:
    """ "refused", or "merged" where what the damage left is an adapter; anything else is raised."""
    with suppress(InputError):
        loratools.inspect(adapter)
    try:
        loratools.merge(base, [adapter], out)
    except InputError:
        assert not out.exists()
        return "refused"
    merged = load_file(out / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in merged.values())
    return "merged"


def every_damage(adapter: Path, base: Path, layers: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """What became of each damage to each part; of modules that have the same parts, those of one."""
    file = adapter / WEIGHTS
    tensors = load_file(file)
    one_of_each = {tuple(word for word in name.split(".") if word not in layers): name for name in tensors}
    outcomes = {}
    for name in one_of_each.values():
        for damage, apply in DAMAGES.items():
            if tensors[name].dim() or damage not in ("no columns", "one row more", "one column more"):
                save_file(tensors | {name: apply(tensors[name])}, file)
                outcomes[name, damage] = outcome(adapter, base, adapter.parent / f"out-{len(outcomes)}")
    return outcomes


def assert_what_cannot_be_meant_is_refused(outcomes: dict[tuple[str, str], str]) -> None:
    merged = [key for key, became in outcomes.items() if became == "merged" and not UNREAD.search(key[0])]
    assert not [key for key in merged if key[1] in ALWAYS_REFUSED]


@pytest.mark.parametrize("case", [case for cases in FIRST.values() for case in cases])
def test_a_damaged_part_of_one_of_the_first_kinds_is_refused_or_merged(tmp_path: Path, case: str) -> None:
    adapter = loha_to_kasa.trained(tmp_path / "adapter", case)
    base = loha_to_kasa.saved_base(loha_to_kasa.base_model(), tmp_path / "base")

    assert_what_cannot_be_meant_is_refused(every_damage(adapter, base, loha_to_kasa.CASES[case][1:2]))


@pytest.mark.parametrize("name", SECOND)
def test_a_damaged_part_of_one_of_the_second_kinds_is_refused_or_merged(tmp_path: Path, name: str) -> None:
    case = vera_to_supertuning.CASES[name]
    adapter = vera_to_supertuning.trained(case, case.layers[0], tmp_path / "adapter")
    base = vera_to_supertuning.checkpoint(vera_to_supertuning.base_model(case.layers[0]), tmp_path / "base")

    assert_what_cannot_be_meant_is_refused(
        every_damage(adapter, base, tuple(vera_to_supertuning.LAYERS[case.layers[0]]()))
    )


@peers.needs("lycoris")
@pytest.mark.parametrize(("kind", "option", "layer"), [c for c in third.CASES if c[2] in ("linear", "conv1", "conv2")])
def test_a_damaged_part_of_lycoris_is_no_update_or_one_that_can_be_computed(kind: str, option: str, layer: str) -> None:
    cls, options = third.MODULES[kind]
    base = third.layer_of(layer)
    weight = third.weight_of(base)
    parts, alpha = third.parts_of(third.module_of(cls, base, options[option]))
    for part, tensor in parts.items():
        for damage, apply in DAMAGES.items():
            if tensor.shape or damage not in ("no columns", "one row more", "one column more"):
                damaged = from_torch(apply(tensor.read()).contiguous())
                with suppress(NotReadError, InputError):
                    update = third.read_as_a_file({**parts, part: damaged}, alpha)[""]
                    if update.fits(tuple(weight.shape)):
                        assert third.merged(update, weight).shape == weight.shape
