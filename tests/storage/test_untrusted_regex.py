"""Regular expressions of strangers: what they match is what Python's engine says, and nobody waits for one."""

import re

import pytest

from loratools.errors import FormatError
from loratools.storage.untrusted_regex import UntrustedRegexes

NAMES = ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "down_proj", "down_projection", "xdown_proj\n"]


@pytest.mark.parametrize(
    "pattern", [r".*\.mlp\.down_proj", "down_proj", "[d]own_proj", r"layers\.\d\..*", "(down|up)_proj", "a)|(.*"]
)
def test_a_pattern_alone_matches_whole_names(pattern: str) -> None:
    try:
        expected = {name for name in NAMES if re.fullmatch(pattern, name)}
    except re.error:
        expected = None

    if expected is None:
        with pytest.raises(FormatError, match=r"feedforward_modules: .* is no regular expression"):
            UntrustedRegexes(NAMES).match([pattern], subject="feedforward_modules")
    else:
        assert UntrustedRegexes(NAMES).match([pattern], subject="feedforward_modules") == [expected]


@pytest.mark.parametrize("pattern", ["down_.*", "[d]own_proj", "a)|(down", r"mlp\.down_proj", "down_proj$"])
def test_a_pattern_with_something_around_it_is_matched_from_the_beginning(pattern: str) -> None:
    wrapped = re.compile(rf"(.*\.)?({pattern})$")
    expected = {name for name in NAMES if wrapped.match(name)}

    (matched,) = UntrustedRegexes(NAMES).match([pattern], subject="rank_pattern", around=(r"(.*\.)?(", ")$"))

    assert matched == expected


def test_answers_come_in_the_order_of_the_patterns() -> None:
    regexes = UntrustedRegexes(["q", "kk"])

    assert regexes.match(["q*", "[k]k", "x+", "[q]"], subject="here") == [{"q"}, {"kk"}, set(), {"q"}]


def test_nothing_is_asked_of_no_patterns_and_of_no_names() -> None:
    assert UntrustedRegexes(["q"]).match([], subject="here") == []
    assert UntrustedRegexes([]).match(["q*", "q"], subject="here") == [set(), set()]
