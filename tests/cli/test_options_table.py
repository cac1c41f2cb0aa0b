"""Every option of the command line is written once: its name is a parameter of the verb's function in Python."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import click
import pytest
from cli_runner import CliRunner

import loratools
from loratools import registry
from loratools.cli import verbs
from loratools.cli.common.grouped_help import GROUPS, GroupedOption

TWINS = ("inspect", "merge", "extract", "combine", "resize", "convert", "spectrum", "compare")
# What is said of the output of the program itself, and of its use of the network (HF_HUB_OFFLINE in Python).
PRINTING = {"json", "quiet", "verbose", "debug", "offline"}
# A page is written by `loratools.write_page`, which takes the report of any verb; a picture is its `plot()`.
ONLY_HERE = {
    "combine": {"html", "plot"},
    "compare": {"fail_below", "html", "plot", "overwrite"},
    "extract": {"html"},
    "inspect": {"modules", "html", "plot", "overwrite"},
    "merge": {"no_verify", "html"},
    "spectrum": {"modules", "html", "plot", "overwrite"},
}


def command_of(verb: str) -> click.Command:
    found: Any = import_module(f"loratools.cli.{verb}").command
    assert isinstance(found, click.Command)
    return found


@pytest.mark.parametrize("verb", TWINS)
def test_every_option_is_a_parameter_of_the_function_of_the_verb(verb: str) -> None:
    options = {p.name for p in command_of(verb).params if isinstance(p, click.Option)}
    parameters = set(inspect.signature(getattr(loratools, verb)).parameters)

    assert options - parameters == PRINTING | ONLY_HERE.get(verb, set())


@pytest.mark.parametrize("verb", registry.names("cli"))
def test_every_option_has_a_group(verb: str) -> None:
    options = [p for p in command_of(verb).params if isinstance(p, click.Option)]

    assert [p.name for p in options if not isinstance(p, GroupedOption) or p.group not in GROUPS] == []


@pytest.mark.parametrize("verb", registry.names("cli"))
def test_help_shows_examples_before_groups_in_their_order(verb: str) -> None:
    text = CliRunner().invoke(verbs, [verb, "--help"]).stdout

    headings = [line.removesuffix(":") for line in text.splitlines() if line.removesuffix(":") in GROUPS]
    assert headings == [group for group in GROUPS if group in headings]
    assert 0 < text.index("Example") < text.index(f"\n{headings[0]}:")


@pytest.mark.parametrize("verb", registry.names("cli"))
def test_help_verb_prints_what_the_flag_prints(verb: str) -> None:
    by_verb = CliRunner().invoke(verbs, ["help", verb])
    by_flag = CliRunner().invoke(verbs, [verb, "--help"])

    assert (by_verb.exit_code, by_verb.stdout, by_verb.stderr) == (0, by_flag.stdout, "")


def test_help_of_an_unknown_verb_names_the_nearest() -> None:
    done = CliRunner().invoke(verbs, ["help", "merg"])

    assert done.exit_code == 2
    assert "hint: did you mean 'merge'?" in done.stderr


def test_short_flag_prints_the_version() -> None:
    assert CliRunner().invoke(verbs, ["-V"]).stdout == CliRunner().invoke(verbs, ["--version"]).stdout


@pytest.mark.parametrize("name", registry.names("methods"))
def test_page_of_a_method_has_its_description_and_its_options(name: str) -> None:
    from loratools.methods import options_of

    done = CliRunner().invoke(verbs, ["methods", name])

    assert (done.exit_code, done.stderr) == (0, "")
    assert registry.description("methods", name) in done.stdout
    assert [o.name for o in options_of(name) if f"--set {o.name}={o.default}\n" not in done.stdout] == []


def test_page_of_an_unknown_method_is_refused_with_the_nearest() -> None:
    done = CliRunner().invoke(verbs, ["methods", "tie"])

    assert done.exit_code == 2
    assert "hint: did you mean 'ties'?" in done.stderr
