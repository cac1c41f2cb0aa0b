"""How several adapters become one: one file per method.

A method sees one target at a time, as `Terms`: what each adapter says of it, weighted. Reading, targets that only some
adapters have, ranks, storing and the report are `ops.combine`'s, so that a new method is one file:

    "First line: what `loratools methods` prints. Then the formula, and the paper."

    ADVICE = Advice(use="...", avoid="...")       when to choose it, and when not
    LAWS = Laws(...)                              what holds of it, which the tests of the registry hold it to
    OPTIONS = (Option("density", 0.2, ...),)      what `--set density=0.3` may set; may be left out
    def combine(terms, *, density): ...

Files import torch, and what needs it, inside functions: `loratools methods` lists them without it.
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

    # A product, one in coordinates in which it is small, or (out, in) in float64 where the result is not low rank.
    Combination: TypeAlias = Factors | Framed | Tensor

Value: TypeAlias = float | int | str


@dataclass(frozen=True, eq=False)
class Terms:
    """What the adapters that have a target say of it, in their order.

    name: of the target. factors: the deltas at weight 1, float64, all of one shape, scales folded into b. weights: none
    is zero. scales: what is folded into b; None if an update is no product of one A and one B. seed: of what is random.
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
        """Random numbers of this target and adapter: the same whatever else is combined, and in whatever order."""
        import torch

        text = f"{self.seed} {index} {self.name}".encode("utf-8", "surrogatepass")
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


class Laws(NamedTuple):
    """The properties of a method that hold whatever its options are.

    Attributes:
        order_free: The order of the adapters does not matter.
        ignores_split: Only the deltas matter, not how each is split into A and B.
        rotation_equivariant: It commutes with rotations of inputs and outputs, so that in core coordinates it gives
            what it gives on whole weights.
        keeps_one: One adapter alone, at weight 1, is unchanged.
        negative_weights: Weights may be negative.
    """

    order_free: bool
    ignores_split: bool
    rotation_equivariant: bool
    keeps_one: bool
    negative_weights: bool = True


@dataclass(frozen=True)
class Advice:
    """When a method is worth trying and when another one is better, for people who choose.

    Attributes:
        use: What speaks for it, in one or two sentences.
        avoid: What speaks against it, and what to take instead.
    """

    use: str
    avoid: str


@dataclass(frozen=True)
class Option:
    """Something that `--set name=value` sets. The type of `default` is that of the value.

    low, high: the least and the greatest number; `open_low` where the least is not itself allowed.
    choices: the words that there are.
    """

    name: str
    default: Value
    about: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def parsed(self, setting: object) -> Value:
        """The value as the method takes it.

        Raises:
            UsageError: It is none of the choices, no number, or out of range.
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
    """What a file of this folder provides; `OPTIONS` may be missing."""

    ADVICE: Advice
    LAWS: Laws

    def combine(self, terms: Terms, /, **options: Value) -> Combination:
        """Return the combination of the terms, at least one.

        The result has the rank that the method gives it; `--rank` and `--energy` are applied afterwards. A method that
        leaves a delta alone returns the very object that it was given: that module then keeps its tensors' bytes.
        """


def options_of(name: str) -> Sequence[Option]:
    """What can be set of the method `name`."""
    options: Sequence[Option] = getattr(registry.load("methods", name), "OPTIONS", ())
    return options


def settings(name: str, values: Mapping[str, object]) -> dict[str, Value]:
    """Every option of the method `name`: as given, else its default.

    Raises:
        UsageError: There is no such option, or it cannot have that value.
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
