"""A command that opens inputs in several steps holds them to what they were from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def holds_inputs(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The command, within `holding_inputs`, which is imported when it is called."""

    @wraps(command)
    def held(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        from loratools.storage.held_inputs import holding_inputs

        with holding_inputs():
            return command(*args, **kwargs)

    return held
