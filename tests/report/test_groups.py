"""Grouping names: few rows, and each stands for exactly the names that it spells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.report.groups import grouped


def names_of(*names: str) -> list[str]:
    return [group.name for group in grouped((n, None, n) for n in names)]


def spelled(name: str) -> Iterator[str]:
    """Every name that a group's name stands for: the reverse of what is tested."""
    pieces = re.split(r"\{(.*?)\}", name)
    axes = []
    for ranges in pieces[1::2]:
        numbers: list[int] = []
        for each in ranges.split(","):
            first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?: step (\d+))?", each).groups()  # type: ignore[union-attr]
            numbers += range(int(first), int(last or first) + 1, int(step or 1))
        axes.append(numbers)
    for place in product(*axes):
        yield "".join(t + str(n) for t, n in zip(pieces[::2], [*place, ""], strict=True))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "l.3.q"),
        ([0, 1], "l.{0,1}.q"),
        ([0, 1, 2], "l.{0-2}.q"),
        (range(32), "l.{0-31}.q"),
        ([0, 1, 2, 5, 7, 8, 9], "l.{0-2,5,7-9}.q"),
        ([3, 7, 11, 15], "l.{3-15 step 4}.q"),
        ([0, 2, 4], "l.{0,2,4}.q"),
        ([0, 2, 3, 4], "l.{0,2-4}.q"),
    ],
)
def test_numbers_are_spelled_as_ranges(numbers: list[int], text: str) -> None:
    assert names_of(*(f"l.{i}.q" for i in numbers)) == [text]


def test_unlike_items_are_not_joined_and_stay_together() -> None:
    items = [(f"l.{i}.{n}", 64 if (n, i) == ("a", 1) else 16, i) for i in range(4) for n in ("b", "a")]

    groups = grouped(items)

    assert [(g.name, g.items) for g in groups] == [
        ("l.{0,2,3}.a", (0, 2, 3)),
        ("l.1.a", (1,)),
        ("l.{0-3}.b", (0, 1, 2, 3)),
    ]


def test_experts_in_layers_are_a_grid() -> None:
    names = [f"l.{i}.experts.{j}.w1" for i in range(3) for j in range(8)]

    assert names_of(*names) == ["l.{0-2}.experts.{0-7}.w1"]
    assert names_of(*names[:-1]) == ["l.{0,1}.experts.{0-7}.w1", "l.2.experts.{0-6}.w1"]


def test_flattened_names_are_grouped_too() -> None:
    assert names_of("lora_unet_blocks_0_q", "lora_unet_blocks_1_q") == ["lora_unet_blocks_{0,1}_q"]
    assert names_of("text_encoder:0:up", "text_encoder:1:up") == ["text_encoder:{0,1}:up"]


@pytest.mark.parametrize("names", [("l.01.q", "l.1.q"), ("l.a1.q", "l.a2.q"), ("l." + "9" * 5000 + ".q", "l.1.q")])
def test_what_is_no_index_is_left_alone(names: tuple[str, str]) -> None:
    assert sorted(names_of(*names)) == sorted(names)


def test_layers_come_in_natural_order() -> None:
    assert names_of("l.10.b", "l.2.a", "norm", "embed") == ["embed", "l.2.a", "l.10.b", "norm"]


def test_names_are_safe_to_print() -> None:
    assert names_of("a\x1b.0", "a\x1b.1") == ["a\\x1b.{0,1}"]


_NAMES = st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.sampled_from("qv"), st.integers(0, 3))


@given(st.lists(_NAMES, unique=True))
def test_groups_stand_for_exactly_the_names_given(parts: list[tuple[str, int, str, int]]) -> None:
    names = [f"{a}.{i}.{b}.{j}" for a, i, b, j in parts]

    groups = grouped((n, None, n) for n in names)

    assert sorted(n for g in groups for n in g.items) == sorted(names)
    for group in groups:
        assert sorted(spelled(group.name)) == sorted(group.items)
