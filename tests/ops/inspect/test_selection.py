"""inspect with include and exclude: which names have entries, and what the sums are then of."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest

import loratools
from loratools.errors import UsageError

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return factories.adapter_folder(tmp_path / "style", modules={Q: (10, 6), V: (7, 6), DOWN: (6, 9)})


def entry(*sources: Path, **options: object) -> loratools.AdapterEntry:
    (only,) = loratools.inspect(*sources, **options).sources  # type: ignore[arg-type]
    assert isinstance(only, loratools.AdapterEntry)
    return only


def test_modules_that_match_are_left_and_counted(style: Path) -> None:
    one = entry(style, include=("*.self_attn.*",), exclude=("*v_proj",))

    assert [m.name for m in one.modules] == [Q]
    assert (one.parameters, one.bytes, one.dtypes) == (4 * 16, 4 * 16 * 4, {"F32": 2})


def test_glob_need_not_match_in_every_source(style: Path, tmp_path: Path) -> None:
    other = factories.adapter_folder(tmp_path / "other", modules={DOWN: (6, 9)})

    first, second = loratools.inspect(style, other, include=("*q_proj",)).sources

    assert isinstance(first, loratools.AdapterEntry)
    assert isinstance(second, loratools.AdapterEntry)
    assert [m.name for m in first.modules] == [Q]
    assert second.modules == ()


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_glob_that_matches_nowhere_is_refused(style: Path, option: str) -> None:
    with pytest.raises(UsageError, match=r"'\*o_proj' matches none of 3 names"):
        loratools.inspect(style, **{option: ("*o_proj",)})  # type: ignore[arg-type]


def test_tensors_of_a_model_are_chosen_too(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    (all_of_it,) = loratools.inspect(base).sources
    assert isinstance(all_of_it, loratools.CheckpointEntry)

    (part,) = loratools.inspect(base, include=("*q_proj*",)).sources

    assert isinstance(part, loratools.CheckpointEntry)
    expected = [t for t in all_of_it.tensors if "q_proj" in t.name]
    assert 0 < len(expected) < len(all_of_it.tensors)
    assert list(part.tensors) == expected
    assert part.parameters == sum(t.parameters for t in expected)


def test_values_are_read_of_what_is_left_alone(style: Path) -> None:
    read: list[int] = []

    entry(style, values=True, include=("*q_proj",), progress=read.append)

    assert sum(read) == 4 * 16 * 4
