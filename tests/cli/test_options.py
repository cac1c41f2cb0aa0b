"""Sizes, shares, weights: what people type, and what it is refused with."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from loratools.arguments import parse_size
from loratools.cli import verbs
from loratools.cli.common.options import Weighted, parse_share, parse_weighted
from loratools.errors import UsageError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("5 gb", 5 * 10**9),
        ("1.5kB", 1500),
        ("0.3GB", 300_000_000),
        (".5MiB", 2**19),
        ("4096", 4096),
        ("1B", 1),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_size_is_number_times_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * UNITS[unit]


@given(st.decimals(min_value="0.001", max_value=10**6, places=3))
def test_size_with_decimals_is_exact(number: object) -> None:
    assert parse_size(f"{number}KB") == int(number * 1000)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "'' is no size", "500MB, 5GB, 5GiB"),
        ("GB", "'GB' is no size", "500MB, 5GB, 5GiB"),
        ("-5GB", "'-5GB' is no size", "500MB, 5GB, 5GiB"),
        ("5iB", "'5iB' is no size", "500MB, 5GB, 5GiB"),
        ("1e9", "'1e9' is no size", "500MB, 5GB, 5GiB"),
        ("nan", "'nan' is no size", "500MB, 5GB, 5GiB"),
        ("5G", "the unit of '5G' can be read in two ways", "write 5GB (10^n) or 5GiB (2^n)"),
        ("0GB", "'0GB' is less than a byte", None),
    ],
)
def test_size_is_refused(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text)

    assert refused.value.message == message
    assert (refused.value.hint or "").endswith(hint or "")


@given(st.floats(0, 1, exclude_min=True))
def test_share_in_range_is_read_as_it_is(share: float) -> None:
    assert parse_share(repr(share)) == share


@given(st.one_of(st.floats(max_value=0), st.floats(1, exclude_min=True), st.just(float("nan"))))
def test_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="is no share, a number above 0 and at most 1"):
        parse_share(repr(share))


@pytest.mark.parametrize(("text", "hint"), [("95", "0.95"), ("95%", "0.95"), ("99.5", "0.995"), ("100", "1")])
def test_share_given_as_percent_has_the_share_as_hint(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_share(text)

    assert refused.value.hint == f"did you mean {hint}?"


@pytest.mark.parametrize("text", ["0", "-0.5", "101", "abc", "", "inf"])
def test_share_without_a_likely_meaning_has_no_hint(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_share(text)

    assert refused.value.hint is None


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("style", "style", 1.0),
        ("style=0.7", "style", 0.7),
        ("style=-1", "style", -1.0),
        ("style=+.5", "style", 0.5),
        ("style=1e-2", "style", 0.01),
        ("style=0", "style", 0.0),
        ("a=b=2", "a=b", 2.0),
        ("a=b", "a=b", 1.0),
        ("a=1_0", "a=1_0", 1.0),
        ("a=０", "a=０", 1.0),
        ("run=3/adapter", "run=3/adapter", 1.0),
        ("style=", "style=", 1.0),
    ],
)
def test_weight_is_split_at_the_last_equals_sign_before_a_number(text: str, source: str, weight: float) -> None:
    assert parse_weighted(text) == Weighted(source, weight)


@given(st.text(alphabet="ab/._-", min_size=1), st.floats(allow_nan=False, allow_infinity=False))
def test_weight_that_is_finite_is_read_as_it_is(source: str, weight: float) -> None:
    assert parse_weighted(f"{source}={weight!r}") == Weighted(source, weight)


@pytest.mark.parametrize("number", ["nan", "NaN", "inf", "-Infinity", "1e999"])
def test_weight_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_weighted(f"style={number}")

    assert refused.value.message == f"the weight of 'style' is {number}, which is not finite"


def test_weight_without_an_adapter_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'=0\.7' has a weight and no adapter"):
        parse_weighted("=0.7")


def test_path_that_exists_has_no_weight_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.001"
    folder.mkdir()

    assert parse_weighted(str(folder)) == Weighted(str(folder), 1.0)
    assert parse_weighted(f"{folder}=2") == Weighted(str(folder), 2.0)


PATHS = [
    (verb, parameter.opts[0])
    for verb in verbs.list_commands(click.Context(verbs))
    if (command := verbs.get_command(click.Context(verbs), verb)) is not None
    for parameter in command.params
    if isinstance(parameter, click.Option)
    and parameter.opts[-1] in ("--out", "--base", "--residual", "--recipe", "--initial")
]


def test_paths_among_the_options_are_known() -> None:
    assert {("merge", "-o"), ("merge", "--initial"), ("combine", "--residual"), ("convert", "--base")} <= set(PATHS)


@pytest.mark.parametrize(("verb", "option"), PATHS)
def test_an_empty_path_is_refused_and_nothing_is_touched(
    verb: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a path, the empty string is the working folder, which --overwrite would replace.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.txt").write_text("a day's work")
    others = ["-o", "out"] if (verb, "-o") in PATHS and option != "-o" else []

    done = CliRunner().invoke(verbs, [verb, "a", "b", option, "", *others])

    assert done.exit_code == 2
    assert "an empty" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["work.txt"]


@pytest.mark.parametrize("verb", ["spectrum", "extract"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("quantum", "there is no device of that name"),
        ("cuda:x", "there is no device of that name"),
        ("cuda:4321", "CUDA device"),
        ("mps", "there is no MPS device here|it has no float64"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(verb: str, device: str, message: str) -> None:
    pytest.importorskip("torch", reason="it says which devices there are")
    more = [] if verb == "spectrum" else ["b", "-o", "out", "--rank", "1", "--plan"]

    done = CliRunner().invoke(verbs, [verb, "no-such-adapter", *more, "--device", device])

    assert done.exit_code == 2
    assert re.search(message, done.output)


@pytest.mark.parametrize(
    ("text", "corrected"),
    [("style=0,7", "style=0.7"), ("style:0.7", "style=0.7"), ("style:-,5", "style=-.5"), ("style:2", "style=2")],
)
def test_weight_in_another_spelling_is_refused_with_the_right_one(
    text: str, corrected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style").mkdir()

    with pytest.raises(UsageError) as refused:
        parse_weighted(text)

    assert refused.value.message == f"'{text}' does not exist, and 'style' does"
    assert refused.value.hint == f"a weight is written {corrected}"


@pytest.mark.parametrize("text", ["absent=0,7", "absent:0.7"])
def test_misspelt_weight_of_an_adapter_that_does_not_exist_is_hinted_at_too(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_weighted(text)

    assert refused.value.message == f"'{text}' does not exist"
    assert refused.value.hint == "a weight is written absent=0.7"


def test_names_that_look_like_a_misspelt_weight_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:0.7").mkdir()

    assert parse_weighted("style:0.7") == Weighted("style:0.7")
    # Nothing of that name is there: an address of a server, say.
    assert parse_weighted("server:8000") == Weighted("server:8000")
