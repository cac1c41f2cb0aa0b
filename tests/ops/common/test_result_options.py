"""The options of a call that its result depends on are read off the signature, so that none is forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import loratools
from loratools.ops.common.result_options import result_options

INPUTS: dict[Callable[..., object], set[str]] = {
    loratools.combine: {"adapters"},
    loratools.convert: {"adapter"},
    loratools.extract: {"base", "tuned"},
    loratools.resize: {"adapter"},
}
# What these verbs have besides inputs and options of the result: where it goes, how the work is done.
WORK = {"out", "overwrite", "threads", "progress", "card", "plan", "resume", "residual"}


@pytest.mark.parametrize("function", INPUTS, ids=lambda function: str(function.__name__))
def test_every_parameter_is_an_input_an_option_or_about_the_work(function: Callable[..., object]) -> None:
    parameters = inspect.signature(function).parameters

    options = result_options(function, dict.fromkeys(parameters, 1), inputs=INPUTS[function])

    assert set(options) == set(parameters) - INPUTS[function] - WORK
    assert list(options) == [name for name in parameters if name in options]


def test_a_new_option_is_in_without_being_listed() -> None:
    def verb(source: str, out: Path, *, rank: int, new_option: bool, threads: int) -> None: ...

    arguments = {"source": "a", "out": Path("b"), "rank": 4, "new_option": True, "threads": 2, "later": "no parameter"}

    assert result_options(verb, arguments, inputs=["source"]) == {"rank": 4, "new_option": True}
