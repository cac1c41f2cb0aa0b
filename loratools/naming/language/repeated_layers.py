"""Names of a model whose layers are repeated: each copy of a layer has a number of its own, and its names with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from loratools.errors import MismatchError

Value = TypeVar("Value")
_IN_LAYER = re.compile(r"((?:.+\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..+)")


def layer_stack(names: Iterable[str]) -> tuple[str, frozenset[int]]:
    """What stands before the numbers of most layers (`model.layers.`), and these numbers."""
    layers = [layer for name in names if (layer := _IN_LAYER.fullmatch(name)) is not None]
    stacks = Counter(layer[1] for layer in layers)
    stack = stacks.most_common(1)[0][0] if stacks else ""
    return stack, frozenset(int(layer[2]) for layer in layers if layer[1] == stack)


def with_repeated_layers(values: Mapping[str, Value], stack: str, order: Sequence[int]) -> dict[str, Value]:
    """The values by the names of the deeper model, whose layer `j` is a copy of layer `order[j]` of `stack`."""
    copies: dict[int, list[int]] = {}
    for number, original in enumerate(order):
        copies.setdefault(original, []).append(number)
    repeated: dict[str, Value] = {}
    for name, value in values.items():
        layer = _IN_LAYER.fullmatch(name)
        if layer is None or layer[1] != stack:
            repeated[name] = value
        else:
            repeated |= {f"{stack}{j}{layer[3]}": value for j in copies.get(int(layer[2]), ())}
    return repeated


def stack_to_repeat(names: Iterable[str], order: Sequence[int], base: str) -> str:
    """The stack of a base that has every layer of `order`.

    Raises:
        MismatchError: The base has no such layers.
    """
    stack, numbers = layer_stack(names)
    if missing := sorted(set(order) - numbers):
        raise MismatchError(f"the adapter repeats layer {missing[0]}, and '{base}' has {len(numbers)} layers")
    return stack
