"""Names and numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.report.text import ascii_only, interval, number, plural, safe, shape, size


@given(st.text())
def test_safe_text_is_printable_and_harmless_text_is_unchanged(text: str) -> None:
    assert safe(text).isprintable()
    assert not text.isprintable() or safe(text) == text


def test_safe_spells_what_a_terminal_would_obey() -> None:
    assert safe("a\x1b[31m\u202eb\n\ud800é日") == "a\\x1b[31m\\u202eb\\n\\ud800é日"


@given(st.text())
def test_ascii_only_keeps_the_length(text: str) -> None:
    assert len(ascii_only(text)) == len(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_999, "1 MB"),
        (35_600, "35.6 kB"),
        (167_832_240, "168 MB"),
        (4_480_000, "4.48 MB"),
        (16_060_000_000, "16.1 GB"),
        (5_000_000_000_000_000, "5,000 TB"),
    ],
)
def test_size_has_three_digits(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2"),
        (0.5, "0.5"),
        (5.65685424949238, "5.657"),
        (1e-5, "1e-05"),
        (1234567.0, "1,234,567"),
        (None, "not finite"),
        (float("nan"), "not finite"),
    ],
)
def test_number_has_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 3.0, 2.0], "1–3"),
        ([1.001, 1.002], "1"),
        ([], "–"),
        ([None, 2.5, float("nan")], "2.5"),
        ([8, 128], "8–128"),
    ],
)
def test_interval_spans_what_is_finite(values: list[float | None], text: str) -> None:
    assert interval(values) == text


def test_shape_and_plural() -> None:
    assert (shape((4096, 11008)), shape((7,)), shape(())) == ("4096×11008", "7", "scalar")
    assert (plural(1, "module"), plural(0, "module"), plural(1224, "module")) == (
        "1 module",
        "0 modules",
        "1,224 modules",
    )
