"""The help of every verb: it is there, it has an example, and it shows each option once."""

from __future__ import annotations

import re

import pytest
from cli_runner import CliRunner

from loratools import registry
from loratools._version import __version__
from loratools.cli import verbs

VERBS = registry.names("cli")


def test_help_lists_every_verb_with_a_summary() -> None:
    done = CliRunner().invoke(verbs, ["--help"])

    assert (done.exit_code, done.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z]+)  +(\S.*)$", done.stdout.partition("Verbs:")[2], re.MULTILINE)
    assert sorted(name for name, _ in listed) == list(VERBS)
    assert [name for name, summary in listed if summary.endswith("...")] == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_the_common_options(verb: str, flag: str) -> None:
    done = CliRunner().invoke(verbs, [verb, flag])

    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(rf"Examples?:\n    loratools {verb}\b", done.stdout)
    for option in ("--json", "-q, --quiet", "-v, --verbose", "--debug", "-h, --help"):
        assert len(re.findall(rf"^  {option}\b", done.stdout, re.MULTILINE)) == 1


def test_version_is_the_package_version() -> None:
    done = CliRunner().invoke(verbs, ["--version"])

    assert (done.exit_code, done.stdout) == (0, f"loratools, version {__version__}\n")


@pytest.mark.parametrize("verb", ["formats", "methods"])
def test_lists_of_entries_name_every_entry(verb: str) -> None:
    plain = CliRunner().invoke(verbs, [verb])

    assert (plain.exit_code, plain.stderr) == (0, "")
    for name in registry.names(verb):
        assert f"{name} " in plain.stdout
        assert registry.summary(verb, name) in plain.stdout
