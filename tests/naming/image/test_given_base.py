"""A given base answers what names leave open, and is refused where the adapter is of another model."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest
from naming.image import published, spellings

import loratools
from loratools.errors import MismatchError
from loratools.formats import Base
from loratools.naming.image.evidence import denoisers, family_named, has_other_ratios, is_too_deep, width_vote
from loratools.naming.image.family import Family
from loratools.naming.image.given_base import GivenBase, decide_for

pytestmark = peers.needs("diffusers")


def is_possible(names: published.Shapes, family: Family) -> bool:
    """Whether the adapter may be of this family: it has all names, and published models of it have these sizes."""
    return (
        all(family.find(name) is not None for name in names)
        and not has_other_ratios(names, family, False)
        and not is_too_deep(names, family, False)
        and width_vote(names, family, False) >= 0
    )


@pytest.mark.parametrize("kind", published.KINDS)
@pytest.mark.parametrize("name", published.MODELS)
def test_the_right_base_is_never_refused(name: str, kind: str) -> None:
    table = published.family(name)
    for spelling, names in published.samples(name, kind):
        decision = decide_for(GivenBase(table), names, denoisers())
        assert decision.families == (table,), spelling
        assert dict(decision.places) == {n: table.find(n) for n in names}, spelling


@pytest.mark.parametrize("name", published.MODELS)
def test_the_model_itself_is_never_refused_however_it_names_its_modules(name: str) -> None:
    table = published.family(name)
    for spelling, modules in published.samples(name, "full"):
        for kind in ("one block", "LoKr only"):
            for _, names in published.samples(name, kind):
                decision = decide_for(GivenBase(table, modules), names, denoisers())
                assert decision.families == (table,), spelling


@pytest.mark.parametrize("kind", published.KINDS)
@pytest.mark.parametrize("name", published.MODELS)
def test_a_base_of_another_family_is_refused_and_both_are_named(name: str, kind: str) -> None:
    refused = 0
    for spelling, names in published.samples(name, kind):
        for other in denoisers():
            if other.name == name or is_possible(names, other):
                continue
            with pytest.raises(MismatchError) as caught:
                decide_for(GivenBase(other), names, denoisers())
            assert other.name in caught.value.message, spelling
            assert name in caught.value.message, spelling
            assert caught.value.exit_code == 4
            refused += 1
    # Of an adapter of all layers, no other family is possible.
    others, sample = len(denoisers()) - 1, list(published.samples(name, kind))
    assert refused == others * len(sample) if kind == "full" else refused > 0


@pytest.mark.parametrize("name", published.MODELS)
def test_a_base_of_the_same_family_and_another_size_is_refused(name: str) -> None:
    table = published.family(name)
    modules = published.modules(name)
    known = {n: shape for n, shape in modules.items() if table.inputs(n)}
    wider = {n: (2 * rows, 2 * columns) for n, (rows, columns) in modules.items()}
    with pytest.raises(MismatchError, match=f"another model than the given base, which is of {name} too") as caught:
        decide_for(GivenBase(table, wider), known, denoisers())
    columns = known[next(iter(known))][1]
    assert f"has {columns} inputs, and the base {2 * columns}" in caught.value.details[0]
    if table.depths:
        block = next(iter(table.depths))
        last = max(int(n.split(".")[1]) for n in modules if n.startswith(f"{block}."))
        shallow = {n: shape for n, shape in modules.items() if not n.startswith(f"{block}.{last}.")}
        with pytest.raises(MismatchError, match="another model") as caught:
            decide_for(GivenBase(table, shallow), modules, denoisers())
        assert f"the base has {last} of these blocks" in caught.value.details[0]


def test_a_model_of_a_size_that_nobody_has_published_is_not_refused() -> None:
    table = family_named("krea2")
    assert table is not None
    # Two heads of keys and values for four of queries, and 48 inputs: no published model has either.
    names = {"transformer_blocks.40.attn.to_q": (48, 48), "transformer_blocks.40.attn.to_k": (24, 48)}
    assert decide_for(GivenBase(table), names, denoisers()).family is table
    assert decide_for(GivenBase(table, names), names, denoisers()).family is table


def nearest(names: published.Shapes, family: str) -> str:
    """The family that has most of these names and, by names or sizes, cannot be the one that they are of."""
    others = [other for other in denoisers() if other.name != family and not is_possible(names, other)]
    return max(others, key=lambda other: sum(other.find(name) is not None for name in names)).name


@pytest.mark.parametrize("family", sorted(published.MODELS))
def test_files_and_folders_in_every_spelling_are_refused_with_the_base_of_another_family(
    tmp_path: Path, family: str
) -> None:
    for number, spelling in enumerate(spellings.SPELLINGS):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, modules = spellings.write(folder, family, spelling, only=r"[^.]+\.0\..*")
        other = nearest(published.spelled(family, spelling.naming, modules), family)
        with pytest.raises(MismatchError) as caught:
            loratools.load(path, base=other)
        assert other in caught.value.message, spelling.title
        assert family in caught.value.message, spelling.title


@pytest.mark.parametrize("spelling", [s for s in spellings.SPELLINGS if not s.folder], ids=lambda s: s.title)
def test_a_language_model_is_no_base_of_an_image_adapter(tmp_path: Path, spelling: spellings.Spelling) -> None:
    path, _ = spellings.write(tmp_path, "flux", spelling)
    with pytest.raises(MismatchError, match="the adapter is of flux, and the given base is a llama"):
        loratools.load(path, base=Base(config={"model_type": "llama"}))
