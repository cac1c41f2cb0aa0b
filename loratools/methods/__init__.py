"""How several adapters become one: one file per method of combining.

A method sees one target at a time, as `Terms`: the weighted updates of all adapters for it. Reading, targets that only
some adapters have, ranks, storing and the report are the task of `ops.combine`, so that a new method is one file:

    "First line: what `loratools methods` prints. Then the formula, and the paper."

    ADVICE = Advice(use="...", avoid="...")       when to choose it, and when not
    LAWS = Laws(...)                              what holds of it, which the tests of the registry hold it to
    OPTIONS = (Option("density", 0.2, ...),)      what `--set density=0.3` may set; may be left out
    def combine(terms, *, density): ...

Files import torch, and modules that need it, inside functions: `loratools methods` lists them without torch.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from loratools import registry
from loratools.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from loratools.algebra.lowrank import Factors, Framed
    from loratools.algebra.shared import Shared

    # A product of factors, one in small coordinates, or (out, in) in float64 if the result is not low rank.
    Combination: TypeAlias = Factors | Framed | Tensor

Value: TypeAlias = float | int | str


@dataclass(frozen=True, eq=False)
class Terms:
    """The updates of all adapters that have a target, in the order of the adapters.

    name: the target's name. factors: the deltas at weight 1, float64, all of one shape, with scales folded into b.
    weights: none of them is zero. scales: the scales in b; None if an update is not a product of one A and one B. seed:
    the random seed.
    """

    name: str
    factors: tuple[Factors, ...]
    weights: tuple[float, ...]
    scales: tuple[float | None, ...]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.factors)

    @cached_property
    def weighted(self) -> tuple[Factors, ...]:
        """The deltas times their weights."""
        from loratools.algebra.lowrank import Factors

        pairs = zip(self.factors, self.weights, strict=True)
        return tuple(f if w == 1 else Factors(f.b * w, f.a) for f, w in pairs)

    @cached_property
    def shared(self) -> Shared:
        """The weighted deltas in common coordinates."""
        from loratools.algebra.shared import shared

        return shared(self.weighted)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the deltas at weight 1, (adapters, adapters)."""
        import torch

        from loratools.algebra.lowrank import inner

        return torch.tensor([[inner(f, g) for g in self.factors] for f in self.factors], dtype=torch.float64)

    def generator(self, index: int) -> Generator:
        """Random numbers for this target and adapter. They depend neither on the other adapters nor on the order."""
        import torch

        text = f"{self.seed} {index} {self.name}".encode("utf-8", "surrogatepass")
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


class Laws(NamedTuple):
    """The properties of a method that hold for all values of its options.

    Attributes:
        order_free: The order of the adapters does not matter.
        ignores_split: Only the deltas matter, not how each is split into A and B.
        rotation_equivariant: It commutes with rotations of inputs and outputs, so that it gives the same result in core
            coordinates as on whole weights.
        keeps_one: A single adapter at weight 1 is unchanged.
        negative_weights: Weights may be negative.
    """

    order_free: bool
    ignores_split: bool
    rotation_equivariant: bool
    keeps_one: bool
    negative_weights: bool = True


@dataclass(frozen=True)
class Advice:
    """When to use a method, and when another one is better.

    Attributes:
        use: Reasons for it, in one or two sentences.
        avoid: Reasons against it, and what to use instead.
    """

    use: str
    avoid: str


@dataclass(frozen=True)
class Option:
    """An option of a method, set by `--set name=value`. The value has the type of `default`.

    low, high: the smallest and the largest number; `open_low` if the smallest is not itself allowed. choices: the
    allowed texts.
    """

    name: str
    default: Value
    about: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def parsed(self, setting: object) -> Value:
        """The value in the type that the method takes.

        Raises:
            UsageError: It is not one of the choices, not a number, or out of range.
        """
        if isinstance(self.default, str):
            if setting in self.choices:
                return str(setting)
            near = difflib.get_close_matches(str(setting), self.choices, n=1)
            raise UsageError(
                f"{self.name} cannot be '{setting}'; there are: {', '.join(self.choices)}",
                hint=f"did you mean '{near[0]}'?" if near else None,
            )
        value = self._number(setting)
        low = value > self.low if self.open_low else value >= self.low
        if not (low and value <= self.high):
            raise UsageError(f"{self.name} cannot be {setting}; it is a {self.range}")
        return value

    @property
    def range(self) -> str:
        """The allowed values in words.

        `number above 0 and at most 1`, `whole number of at least 1`, or the choices.
        """
        if self.choices:
            return " or ".join(self.choices)
        number_kind = "whole number" if isinstance(self.default, int) else "number"
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"above {self.low:g}" if self.open_low else f"of at least {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"at most {self.high:g}")
        return " ".join([number_kind, " and ".join(bounds)]).strip()

    def _number(self, setting: object) -> float | int:
        kind = int if isinstance(self.default, int) else float
        try:
            if isinstance(setting, bool) or not isinstance(setting, (int, float, str)):
                raise ValueError
            value = kind(setting)
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or (isinstance(setting, float) and value != setting):
            raise UsageError(f"{self.name} cannot be '{setting}'; it is a {self.range}")
        return value


class Method(Protocol):
    """The contents of a method's file; `OPTIONS` is optional."""

    ADVICE: Advice
    LAWS: Laws

    def combine(self, terms: Terms, /, **options: Value) -> Combination:
        """Return the combination of the terms, at least one.

        The result has the rank that the method gives it; `--rank` and `--energy` are applied afterwards. A method that
        leaves a delta unchanged returns the same object that it was given: the module then keeps the bytes of its
        tensors.
        """


def options_of(name: str) -> Sequence[Option]:
    """The options of the method `name`."""
    options: Sequence[Option] = getattr(registry.load("methods", name), "OPTIONS", ())
    return options


def settings(name: str, values: Mapping[str, object]) -> dict[str, Value]:
    """The values of all options of the method `name`: as given, else the default.

    Raises:
        UsageError: There is no such option, or the value is invalid.
    """
    options = {o.name: o for o in options_of(name)}
    for key in values:
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            available = f"there are: {', '.join(options)}" if options else "it has none"
            raise UsageError(
                f"the method '{name}' has no option '{key}'; {available}",
                hint=f"did you mean '{near[0]}'?" if near else None,
            )
    return {key: o.parsed(values[key]) if key in values else o.default for key, o in options.items()}
