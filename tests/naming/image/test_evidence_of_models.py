"""Adapters of every published model against all families: the right one or a question, never another."""

from __future__ import annotations

import peers
import pytest
from naming.image import published

from loratools.errors import LoraToolsError, UndecidedError
from loratools.naming.image.evidence import Sizes, decide, denoisers
from loratools.naming.image.family import Place

pytestmark = peers.needs("diffusers")


def meanings(name: str, names: Sizes, *, flat: bool) -> dict[str, Place | None]:
    table = published.family(name)
    return {n: table.find(n, flat=flat) for n in names}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", published.KINDS)
@pytest.mark.parametrize("name", published.MODELS)
def test_a_sample_is_of_its_family_or_a_question(name: str, kind: str, flat: bool) -> None:
    for spelling, shapes in published.samples(name, kind):
        names = {n.replace(".", "_") if flat else n: shape for n, shape in shapes.items()}
        assert names, spelling
        try:
            decision = decide(names, denoisers(), flat=flat)
        except UndecidedError:
            # A whole adapter says enough of its model in every spelling.
            assert kind not in ("full", "LoKr only"), spelling
            continue
        assert name in [family.name for family in decision.families], spelling
        for family in decision.families:
            assert meanings(family.name, names, flat=flat) == meanings(name, names, flat=flat), spelling


@pytest.mark.parametrize("kind", published.KINDS)
@pytest.mark.parametrize("name", published.MODELS)
def test_without_its_table_a_sample_gets_no_other_meaning(name: str, kind: str) -> None:
    others = [family for family in denoisers() if family.name != name]
    for spelling, names in published.samples(name, kind):
        try:
            decision = decide(names, others)
        except LoraToolsError:
            continue
        # Modules that several models call the same are the same modules, whichever of them is left.
        assert dict(decision.places) == meanings(name, names, flat=False), spelling


def test_every_family_is_tried() -> None:
    assert {family.name for family in denoisers()} == set(published.MODELS)


SIZES = [(name, size) for name, (_, sizes) in published.PUBLISHED.items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_published_size_is_in_the_table_of_its_family(name: str, size: str) -> None:
    table, shapes = published.family(name), published.modules(name, size)
    assert {target: n for target, (_, n) in shapes.items() if n not in (table.inputs(target) or {n})} == {}
    for block, depths in table.depths.items():
        numbers = {int(target.split(".")[1]) for target in shapes if target.startswith(f"{block}.")}
        assert not numbers or max(numbers) + 1 in depths, block
    # LTX of 13B has the blocks of LTX-2 under the same names.
    assert name in {family.name for family in decide(shapes, denoisers()).families}
    assert published.PUBLISHED[name][1][size].source
