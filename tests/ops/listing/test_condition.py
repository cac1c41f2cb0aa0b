"""Conditions on rows: what they mean, written out by hand, and what is refused with its place."""

from __future__ import annotations

import pytest

from loratools.errors import UsageError
from loratools.ops.listing.condition import condition

COLUMNS = {"name": str, "family": str, "rank": float, "bytes": float, "trigger_words": tuple}
ROWS = [
    {"name": "Ink", "family": "flux", "rank": 16, "bytes": 5_000_000, "trigger_words": ("inkw", "wash style")},
    {"name": "bold ink", "family": "sdxl", "rank": 64, "bytes": 300_000_000, "trigger_words": ()},
    {"name": "Chat", "family": None, "rank": None, "bytes": 40_000, "trigger_words": ()},
]


def chosen(text: str) -> list[object]:
    meets = condition(text, COLUMNS)
    return [row["name"] for row in ROWS if meets(row)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rank >= 64", ["bold ink"]),
        ("rank < 64", ["Ink"]),
        ("rank != 16", ["bold ink", "Chat"]),
        ("family = FLUX", ["Ink"]),
        ("family != flux", ["bold ink", "Chat"]),
        ("name ~ *ink", ["Ink", "bold ink"]),
        ("name = 'bold ink'", ["bold ink"]),
        ("bytes > 1MB", ["Ink", "bold ink"]),
        ("bytes > 1MB and not name ~ bold*", ["Ink"]),
        ("rank = 64 or family = flux and bytes < 1MB", ["bold ink"]),
        ("(rank = 64 or family = flux) and bytes < 10MB", ["Ink"]),
        ("not (rank = 64 or family = flux)", ["Chat"]),
        ("not not rank = 64", ["bold ink"]),
        ("trigger_words = 'wash style'", ["Ink"]),
        ("trigger_words ~ inkw", ["Ink"]),
        ("trigger_words", ["Ink"]),
        ("not family", ["Chat"]),
        ("name = and or name = Chat", ["Chat"]),
    ],
)
def test_a_condition_chooses_these_rows(text: str, names: list[str]) -> None:
    assert chosen(text) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing"),
        ("rank >", "at its end"),
        ("rank > many", "at 'many'"),
        ("(rank > 3", "closing parenthesis"),
        ("rank > 3)", "at ')'"),
        ("rank > 3 family = flux", "at 'family = flux'"),
        ("name = 'ink", "cannot be read"),
        ("> 3", "name of a column"),
        ("__import__('os')", "no column"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        condition(text, COLUMNS)
    assert words in str(refused.value)
    assert refused.value.hint


def test_a_misspelt_column_gets_a_hint() -> None:
    with pytest.raises(UsageError) as refused:
        condition("famly = flux", COLUMNS)
    assert refused.value.hint == "did you mean 'family'?"


def test_a_long_chain_costs_no_stack() -> None:
    assert chosen("not " * 20_000 + "rank = 64") == ["bold ink"]
    assert chosen(" or ".join(["rank = 64"] * 20_000)) == ["bold ink"]


def test_parentheses_without_end_are_refused() -> None:
    with pytest.raises(UsageError):
        condition("(" * 100_000 + "rank = 1" + ")" * 100_000, COLUMNS)
