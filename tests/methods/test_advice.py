"""Every method says when to choose it and when not, and its page shows both."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from loratools import registry
from loratools.cli import verbs


@pytest.mark.parametrize("name", registry.names("methods"))
def test_page_of_a_method_says_when_to_use_it_and_when_not(name: str) -> None:
    advice = registry.load("methods", name).ADVICE

    page = CliRunner().invoke(verbs, ["methods", name]).stdout

    words = " ".join(page.split())
    assert f"When to use it: {advice.use} {advice.avoid} Properties:" in words


@pytest.mark.parametrize("name", registry.names("methods"))
def test_advice_is_one_or_two_sentences_each_way(name: str) -> None:
    advice = registry.load("methods", name).ADVICE

    for text in (advice.use, advice.avoid):
        assert text[0].isupper()
        assert text.endswith(".")
        assert 1 <= text.count(". ") + 1 <= 2


def test_advice_is_in_the_document_of_methods() -> None:
    (ties,) = json.loads(CliRunner().invoke(verbs, ["methods", "ties", "--json"]).stdout)["methods"]

    assert ties["use"].startswith("Try it for adapters of different tasks")
    assert ties["avoid"].startswith("Avoid it if")
