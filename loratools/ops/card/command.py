"""The command line that makes an output again, as its card shows it: no place of this machine is in it."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from loratools.arguments import byte_size
from loratools.errors import UsageError
from loratools.ops.card.inputs import repository_of
from loratools.storage.casting import stored_dtype

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# Parameters whose options are called otherwise.
_OPTIONS = {"penalty": "lambda", "from_format": "from", "options": "set"}
_PATHS = frozenset({"base", "moments", "initial", "recipe", "trained_on"})


def command_line(
    verb: str,
    inputs: Sequence[str],
    settings: Mapping[str, object],
    *,
    function: Callable[..., object],
    renamed: Mapping[str, str] | None = None,
) -> str:
    """Return a command line with the options that differ from what they are unasked.

    Args:
        verb: The verb.
        inputs: Its arguments.
        settings: Values of parameters of the verb's function that the result depends on.
        function: The verb's function, whose signature has the defaults.
        renamed: Options of this verb that are not called as their parameters.
    """
    defaults = inspect.signature(function).parameters
    names = {**_OPTIONS, **(renamed or {})}
    words = ["loratools", verb, *inputs, "-o", "OUTPUT"]
    for parameter, value in settings.items():
        plain = _plain(parameter, value)
        if plain != _plain(parameter, defaults[parameter].default):
            words += _words("--" + names.get(parameter, parameter).replace("_", "-"), plain)
    return shlex.join(words)


def weighted(name: str, weight: float) -> str:
    """Return an adapter argument: `style=0.7`."""
    return name if weight == 1 else f"{name}={weight:g}"


def _plain(parameter: str, value: object) -> object:
    """The value as the command line has it, so that a call and a command are the same."""
    if hasattr(value, "path"):  # an opened model, a loaded adapter
        return repository_of(value.path) if isinstance(value.path, Path) else "IN-MEMORY"
    if parameter == "rule" and isinstance(value, tuple):
        return f"{value[0]}={_spelled(value[1])}"
    if parameter == "dtype" and isinstance(value, str):
        return _DTYPES.get(stored_dtype(value), value)
    if parameter == "max_size" and isinstance(value, str):
        return byte_size(value)
    if parameter == "max_shard_size" and isinstance(value, int | str):
        try:
            return byte_size(value)
        except UsageError:
            return value
    if isinstance(value, Path) or (parameter in _PATHS and isinstance(value, str)):
        return repository_of(Path(value))
    if isinstance(value, Mapping):
        return [f"{key}={_spelled(each)}" for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(parameter, each) for each in value]
    return value


def _words(option: str, value: object) -> Iterator[str]:
    match value:
        case True:
            yield option
        case None | False:
            return
        case list():
            for each in value:
                yield from (option, _spelled(each))
        case _:
            yield from (option, _spelled(value))


def _spelled(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(map(_spelled, value))
    return str(value)
