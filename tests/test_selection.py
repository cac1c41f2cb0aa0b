"""Globs over names: what they select, in which order, and that none of them matches nothing."""

import pytest

from loratools.errors import UsageError
from loratools.selection import NameSelection, select_names

NAMES = ["b.q_proj", "a.q_proj", "a.v_proj"]


def test_include_and_exclude_keep_the_order_of_names() -> None:
    assert select_names(NAMES, ["*.q_proj"], []) == ["b.q_proj", "a.q_proj"]
    assert select_names(NAMES, [], ["b.*"]) == ["a.q_proj", "a.v_proj"]
    assert select_names(NAMES, ["a.*"], ["*.v_proj"]) == ["a.q_proj"]
    assert select_names(NAMES, [], []) == NAMES


def test_a_name_is_selected_by_any_of_its_spellings_and_by_case() -> None:
    assert select_names(NAMES, ["unet.*"], [], aliases={"a.v_proj": ("unet.a",)}) == ["a.v_proj"]
    with pytest.raises(UsageError, match=r"'\*Q_PROJ' matches none of 3 names"):
        select_names(NAMES, ["*Q_PROJ"], [])


def test_a_glob_that_matches_nothing_is_refused_and_one_of_unread_tensors_is_not() -> None:
    with pytest.raises(UsageError, match="matches none of 3 names") as refused:
        select_names(NAMES, [], ["c"])
    assert refused.value.hint == "names look like 'b.q_proj'; a glob may start with '*'"
    assert select_names(NAMES, [], ["c"], unread=["c.lora_A"]) == NAMES
    with pytest.raises(UsageError, match="leave none of 3 names"):
        select_names(NAMES, [], ["*"])


def test_of_many_sources_a_glob_must_match_in_one() -> None:
    selection = NameSelection(["a.*"], [])

    assert selection.of(["b.q_proj"]) == []
    assert selection.of(["a.q_proj"]) == ["a.q_proj"]
    selection.require_matches()
