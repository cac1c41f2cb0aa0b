"""What every file in `updates/` provides, held by the types (mypy reads the tuples) and by asking at run time."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from loratools import registry
from loratools.updates import (
    adalora,
    bdlora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    full,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    loha,
    lokr,
    lora,
    lora_experts,
    lycoris_glora,
    lycoris_oft,
    miss,
    oft,
    osf,
    peanut,
    pvera,
    qalora,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)  # fmt: skip
from loratools.updates.parts.kind_files import LycorisKind, PeftKind, PeftVariant, lycoris_kind, peft_kind
from loratools.updates.parts.protocol import Update

PACKAGE = Path(__file__).parents[2] / "loratools"

KINDS: tuple[PeftKind, ...] = (
    adalora, beft, boft, c3a, deft, delora, fourierft, frod, glora, gralora, hira, hra, ia3, loha, lokr, miss, oft,
    osf, peanut, pvera, randlora, road, shira, supertuning, tinylora, unilora, vblora, vera, waveft,
)  # fmt: skip
VARIANTS: tuple[PeftVariant, ...] = (bdlora, kasa, lora, qalora)
OF_LYCORIS: tuple[LycorisKind, ...] = (ia3, loha, lokr, lycoris_glora, lycoris_oft, oft)
CLASSES: tuple[type[Update], ...] = (
    adalora.AdaLoRA, bdlora.BDLoRA, boft.BOFT, c3a.C3A, deft.DEFT, delora.DeLoRA, fourierft.FourierFT, frod.FRoD,
    full.Full, glora.GLoRA, glora.GLoRABias, gralora.GraLoRA, hira.HiRA, hra.HRA, ia3.IA3, kasa.KaSA, loha.LoHa,
    lokr.LoKr, lora.LoRA, lora_experts.LoRAExperts, lycoris_glora.LycorisGLoRA, lycoris_oft.LycorisOFT, miss.MiSS,
    oft.OFT, osf.OSF, peanut.PEANuT, pvera.PVeRA, qalora.QALoRA, randlora.RandLoRA, road.RoAd, shira.SHiRA,
    supertuning.SuperTuning, tinylora.TinyLoRA, unilora.UniLoRA, vblora.VBLoRA, vera.VeRA, waveft.WaveFT,
)  # fmt: skip


def classes_of(name: str) -> set[str]:
    """Classes that the file of a kind defines and that are kinds themselves."""
    module = import_module(f"loratools.updates.{name.replace('-', '_')}")
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return {c.__name__ for c in own if hasattr(c, "kind")}


def test_every_file_with_a_reader_of_peft_or_lycoris_is_held_by_the_types() -> None:
    files = {name: registry.load("updates", name) for name in registry.names("updates")}
    assert {id(m) for m in files.values() if hasattr(m, "PEFT_FIELDS")} == {id(kind) for kind in KINDS}
    assert {id(m) for m in files.values() if hasattr(m, "from_peft")} == {id(kind) for kind in (*KINDS, *VARIANTS)}
    assert {id(m) for m in files.values() if hasattr(m, "from_lycoris")} == {id(kind) for kind in OF_LYCORIS}
    assert {c for name in files for c in classes_of(name)} == {c.__name__ for c in CLASSES}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_kind_answers_all_that_is_asked_of_an_update(kind: type[Update]) -> None:
    members = {name for name in vars(Update) if not name.startswith("_")}
    assert {"embedding", "optional", "whole_delta", "as_lora", "as_experts", "prepare"} <= members
    fields = getattr(kind, "__dataclass_fields__", {})
    assert [name for name in members if not hasattr(kind, name) and name not in fields] == []


def test_a_look_up_of_a_file_tells_apart_what_it_provides() -> None:
    for name in registry.names("updates"):
        entry = registry.load("updates", name)
        assert peft_kind(name) is (entry if any(entry is kind for kind in KINDS) else None), name
        assert lycoris_kind(name) is (entry if any(entry is kind for kind in OF_LYCORIS) else None), name
    assert lycoris_kind("no-such-kind") is None


def isinstance_calls(tree: ast.AST, names: set[str]) -> list[str]:
    """Every `isinstance` of one of the classes of these names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            asked |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            found += [ast.unparse(node)] if asked & names else []
    return found


def test_the_search_for_isinstance_calls_notices_each_spelling() -> None:
    calls = "isinstance(a, LoRA); isinstance(b, int | LoRA); isinstance(c, (str, lora.LoRA)); isinstance(d, int)"
    assert len(isinstance_calls(ast.parse(calls), {"LoRA"})) == 3


def test_no_file_outside_updates_asks_an_update_for_its_class() -> None:
    names = {kind.__name__ for kind in CLASSES}
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] != "updates" and (
            calls := isinstance_calls(ast.parse(path.read_text(encoding="utf-8")), names)
        ):
            found[str(place)] = calls
    assert found == {}
