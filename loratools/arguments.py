"""Arguments of the public functions: the types that several of them share, and one check of what a caller gives.

`checked` reads the annotations of a function and compares every argument with them, so that a wrong one is a
UsageError which names the parameter and not an AttributeError from the middle of the work.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, overload

from loratools.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kmgtp]i?b?|b)?", re.ASCII | re.IGNORECASE)
_MOST_CHARACTERS = 60


class AtLeast(NamedTuple):
    """The least value that a number may have."""

    least: int


Positive: TypeAlias = Annotated[int, AtLeast(1)]
"""A whole number of at least 1."""

Globs: TypeAlias = str | Sequence[str]
"""One glob, or several: `"*.q_proj"` is the same as `["*.q_proj"]`."""

Size: TypeAlias = int | str
"""A number of bytes, or a text with a unit: `5_000_000_000`, `"5GB"` (10^9) and `"5GiB"` (2^30)."""


def byte_size(size: Size) -> int:
    """The number of bytes that a size stands for.

    Raises:
        UsageError: It is no size, its unit is ambiguous, or it is less than a byte.
    """
    if isinstance(size, str):
        return parse_size(size)
    if size < 1:
        raise UsageError(f"{size} is no size in bytes", hint='give a number of at least 1, or a text like "5GB"')
    return size


def parse_size(text: str) -> int:
    """Return a number of bytes from a text.

    `5GB` -> 5 x 10^9, `5GiB` -> 5 x 2^30, `4096` -> 4096 bytes.
    """
    size_match = _SIZE.fullmatch(text.strip())
    if size_match is None:
        raise UsageError(f"'{text}' is no size", hint="write a number and a unit: 500MB, 5GB, 5GiB")
    unit = (size_match[2] or "B").upper()
    if not unit.endswith("B"):
        big = f"{size_match[1]}{unit[0]}"
        raise UsageError(f"the unit of '{text}' can be read in two ways", hint=f"write {big}B (10^n) or {big}iB (2^n)")
    power = "BKMGTP".index(unit[0])
    # Exact for decimals, which floats are not: 0.3GB is 300,000,000 bytes.
    integer_digits, _, fraction_digits = size_match[1].partition(".")
    scale: int = (1024 if "I" in unit else 1000) ** power
    size = int((integer_digits or "0") + fraction_digits) * scale // int("1" + "0" * len(fraction_digits))
    if size < 1:
        raise UsageError(f"'{text}' is less than a byte")
    return size


@overload
def checked(function: _Function, /) -> _Function: ...
@overload
def checked(**later: str) -> Callable[[_Function], _Function]: ...
def checked(function: Any = None, /, **later: str) -> Any:
    """Decorate a public function: its arguments are compared with its annotations before it is called.

    Args:
        function: What is decorated. A single glob is given to it as a sequence of one, and a number of another library
            (numpy's) as the built-in one.
        later: Names in the annotations that the module imports for type checkers only, and the modules that have them.
            They are imported when an argument is given that no other type allows.
    """
    if function is None:
        return functools.partial(checked, **later)
    signature = inspect.signature(function)
    parameters = signature.parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(function)
    def call(*positional: object, **named: object) -> object:
        unknown = [name for name in named if name not in parameters and not passes_on]
        if unknown:
            near = difflib.get_close_matches(unknown[0], parameters, n=1)
            raise UsageError(
                f"{function.__name__} has no parameter '{unknown[0]}'",
                hint=f"did you mean {near[0]}?" if near else f"its parameters: {', '.join(parameters)}",
            )
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:
            raise UsageError(
                f"{function.__name__}: {error}", hint=f"help(loratools.{function.__name__}) lists its parameters"
            ) from None
        for name, value in bound.arguments.items():
            parameter = parameters[name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(_argument(function, parameter, v, later) for v in value)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue  # they are for another checked function, which refuses what it does not know
            elif value is not parameter.default:
                bound.arguments[name] = _argument(function, parameter, value, later)
        return function(*bound.args, **bound.kwargs)

    call.__loratools_names__ = later  # type: ignore[attr-defined]
    return call


def annotation_of(function: Callable[..., Any], name: str) -> Any:
    """The type of a parameter of a `checked` function, or of its result under the name `return`."""
    inner = inspect.unwrap(function)
    later: Mapping[str, str] = getattr(function, "__loratools_names__", {})
    return _resolved(inner, str(inner.__annotations__[name]), later)


def _resolved(function: Callable[..., Any], text: str, later: Mapping[str, str]) -> Any:
    names = {name: getattr(import_module(module), name) for name, module in later.items()}
    return eval(text, vars(sys.modules[function.__module__]), names)  # the text is our own source


def _argument(
    function: Callable[..., Any], parameter: inspect.Parameter, value: Any, later: Mapping[str, str]
) -> object:
    text = str(parameter.annotation)
    if value == "" and "Path" in text:
        # pathlib reads it as the working folder; the caller probably passed an unset variable.
        raise UsageError(f"{function.__name__}: {parameter.name} is empty", hint="give a path; '.' is the folder here")
    if type(value).__name__ in text.split(" | ") and type(value).__module__ == "builtins":
        return value  # nothing has to be imported to see that a str is one
    if text == "Globs" and isinstance(value, str):
        return (value,)
    hint = _resolved(function, text, later)
    fault = _fault(value, hint)
    if fault is None:
        return _plain(value, hint)
    expected, advice = fault
    raise UsageError(
        f"{function.__name__}: {parameter.name} is {_shown(value)}, and {expected} is expected", hint=advice
    )


def _fault(value: object, hint: Any) -> tuple[str, str | None] | None:
    """What is expected in place of the value, and advice; None if it is of the type."""
    if _fits(value, hint):
        return None
    choices = [choice for part in _alternatives(hint) if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        return f"one of {', '.join(choices)}", f"did you mean '{near[0]}'?" if near else f"for example '{choices[0]}'"
    type_names = [_spelled(part) for part in _alternatives(hint) if part is not type(None)]
    return " or ".join(dict.fromkeys(type_names)), _advice(value, hint)


def _advice(value: object, hint: Any) -> str:
    parts = _alternatives(hint)
    needs_number = any(part in (int, float) or get_origin(part) is Annotated for part in parts)
    if isinstance(value, str) and needs_number:
        return "give the number itself, without quotation marks"
    if isinstance(value, Iterable) and not isinstance(value, Sequence) and any(_is_sequence(p) for p in parts):
        return "give a list: list(...) makes one of an iterator"
    if any(_is_sequence(part) for part in parts):
        return "give a list, even of a single one: [...]"
    return f"give {_spelled(parts[0])}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for alternative in get_args(hint) for part in _alternatives(alternative))
    return (hint,)


def _is_sequence(hint: Any) -> bool:
    return get_origin(hint) in (Sequence, Iterable)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is Annotated:
        limits = [note for note in inner[1:] if isinstance(note, AtLeast)]
        return _fits(value, inner[0]) and all(value >= limit.least for limit in limits)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (Sequence, Iterable):
        allowed = list if origin is Iterable else Sequence
        listed = isinstance(value, (allowed, tuple, set, dict) if origin is Iterable else allowed)
        return listed and not isinstance(value, (str, bytes)) and all(_fits(v, inner[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is Callable:
        return callable(value)
    if hint is int:
        return not isinstance(value, bool) and hasattr(value, "__index__")
    if hint is float:
        return not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__")
    return isinstance(value, hint)


def _plain(value: Any, hint: Any) -> object:
    """Whole numbers and fractions of other libraries as the built-in ones."""
    if isinstance(value, (int, float, str, Sequence, Mapping)) or value is None:
        return value
    for part in _alternatives(hint):
        kind = get_args(part)[0] if get_origin(part) is Annotated else part
        if kind is int and hasattr(value, "__index__"):
            return operator.index(value)
        if kind is float and hasattr(value, "__float__"):
            return float(value)
    return value


def _spelled(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"a whole number of at least {inner[1].least}"
    if origin in (Sequence, Iterable):
        return "a list of " + " or ".join(dict.fromkeys(_plural(part) for part in _alternatives(inner[0])))
    if origin is tuple:
        return f"a tuple of {len(inner)}"
    if origin is Mapping:
        return "a dict"
    if origin is Callable:
        return "a function"
    type_names = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}
    return type_names.get(hint, f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}")


def _plural(hint: Any) -> str:
    if get_origin(hint) is not None:
        return "lists" if _is_sequence(hint) else "tuples"
    return {str: "texts", int: "whole numbers", float: "numbers"}.get(hint, f"{hint.__name__}s")


def _shown(value: object) -> str:
    if isinstance(value, (str, int, float, bool, type(None))):
        text = repr(value)
        return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
    return f"of type {type(value).__name__}"
