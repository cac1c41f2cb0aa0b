import os
import time

import pytest
from peft_folders import Stored, factors

from loratools import formats
from loratools.errors import FormatError
from loratools.formats.peft_parts import patterns
from loratools.formats.peft_parts.patterns import matches
from loratools.storage import untrusted_regex
from loratools.storage.untrusted_regex import UntrustedRegexes

NAMES = ["layers.0.q_proj", "layers.1.q_proj", "layers.11.q_proj", "q_proj", "layers.0.q_projection"]


@pytest.mark.parametrize(
    ("key", "matched"),
    [
        ("q_proj", [0, 1, 2, 3]),
        ("layers.0.q_proj", [0]),
        ("1.q_proj", [1]),  # not layer 11: a key begins the name, or follows a dot
        ("layers.1..q_proj", [2]),  # a dot is any character
        ("^q_proj", [3]),
        ("^layers\\.0\\.q_proj", [0]),
        ("layers\\.\\d\\.q_proj", [0, 1]),
        ("layers\\.\\d+\\.q_proj", [0, 1, 2]),
        ("(0|11)\\.q_proj", [0, 2]),
        ("q_pro", []),
        ("", []),
        (".*", [0, 1, 2, 3, 4]),
    ],
)
def test_a_key_is_matched_from_the_end_and_by_whole_segments(key: str, matched: list[int]) -> None:
    found = matches([key], UntrustedRegexes(NAMES), subject="rank_pattern")

    assert [i for i, name in enumerate(NAMES) if found[name]] == matched


def test_keys_that_match_come_in_the_order_of_the_file() -> None:
    found = matches(
        ["q_.*", "q_proj", "layers.0.q_proj", "(q|k)_proj"], UntrustedRegexes(NAMES), subject="rank_pattern"
    )

    assert found["layers.0.q_proj"] == ("q_.*", "q_proj", "layers.0.q_proj", "(q|k)_proj")
    assert found["layers.0.q_projection"] == ("q_.*",)


def test_a_name_that_is_no_regex_for_itself_is_still_found() -> None:
    assert matches(["a+b"], UntrustedRegexes(["a+b", "aab"]), subject="rank_pattern") == {
        "a+b": ("a+b",),
        "aab": ("a+b",),
    }


@pytest.mark.parametrize("key", ["(", "(q", "q)", "[", "*q", "q{2}{3}", "(?P<a", "(" * 5000, "q\\"])
def test_a_key_that_is_no_regex_is_refused_by_name(key: str, stored: Stored) -> None:
    with pytest.raises(FormatError, match=r"rank_pattern: '.*' is no regular expression"):
        formats.load(stored(rank_pattern={"v_proj": 4, key: 4}))


@pytest.mark.parametrize("key", ["(a+)+$", "(a|a)*b", "(.*)*(.*)*(.*)*x", "((a?){25})a{25}b"])
def test_a_regex_that_takes_years_is_stopped_and_named(
    key: str, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_regex, "BUDGET_SECONDS", 0.5)
    folder = stored(factors("a" * 60 + "!"), alpha_pattern={".*fine": 3, key: 4, ".*fine_too": 3})

    with pytest.raises(FormatError) as raised:
        formats.load(folder)

    assert raised.value.message == (
        f"alpha_pattern: the regular expression '{key}' takes more than 0.5 seconds on 1 module name"
    )


def test_alternatives_that_take_years_are_stopped_within_five_seconds_of_computing(stored: Stored) -> None:
    started = _computed()

    with pytest.raises(FormatError, match=r"takes more than 1\.5 seconds"):
        formats.load(stored(factors("a" * 40 + "!"), alpha_pattern={"(a|a)" * 40: 3}))

    # Not by the clock on the wall, which a busy machine makes longer than any limit.
    assert _computed() - started < 5


def _computed() -> float:
    """Seconds of computing by this process and the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_a_pattern_that_names_every_module_is_looked_up_and_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{n}.{m}_proj" for n in range(80) for m in "qkvogud"]
    searched: list[str] = []
    looked_up: list[str] = []
    original = patterns._masked

    def no_search(_: UntrustedRegexes, keys: list[str], **__: object) -> list[list[str]]:
        searched.extend(keys)
        return [[] for _ in keys]

    def counted(text: str, anywhere: tuple[int, ...]) -> str:
        looked_up.append(text)
        return original(text, anywhere)

    monkeypatch.setattr(UntrustedRegexes, "match", no_search)
    monkeypatch.setattr(patterns, "_masked", counted)
    keys_by_name = matches(names, UntrustedRegexes(names), subject="rank_pattern")

    assert all(name in keys for name, keys in keys_by_name.items())
    assert searched == []
    # A name is looked up once from its start and once behind each of its dots, and not once for each of 560 keys.
    assert len(looked_up) <= 4 * len(names)


def test_patterns_that_are_many_share_one_budget_and_are_refused(stored: Stored) -> None:
    # Each alone is harmless; together they would be tried 80 million times.
    modules = {key: tensor for i in range(2000) for key, tensor in factors(f"layers.{i}.q_proj").items()}
    folder = stored(modules, rank_pattern={f"[q]{i}": 3 for i in range(40_000)})
    started = time.thread_time()

    with pytest.raises(FormatError) as raised:
        formats.load(folder)

    assert raised.value.message == "rank_pattern: 40000 patterns take more than 1.7 seconds on 2000 module names"
    assert time.thread_time() - started < 10


def test_what_rank_pattern_used_of_the_budget_is_not_there_for_alpha_pattern() -> None:
    regexes = UntrustedRegexes(NAMES)
    matches(["q_.*", "[q]_proj"], regexes, subject="rank_pattern")
    left = regexes.seconds - regexes.spent

    with pytest.raises(FormatError, match="alpha_pattern: 1 patterns take more than"):
        regexes.charge(left + 0.01, subject="alpha_pattern", count=1)

    assert left < regexes.seconds


def test_a_file_of_more_names_may_take_longer_in_proportion() -> None:
    few, many = UntrustedRegexes(["a"] * 1000), UntrustedRegexes(["a"] * 3000)

    assert many.seconds - few.seconds == pytest.approx(2000 * untrusted_regex.SECONDS_PER_NAME)
