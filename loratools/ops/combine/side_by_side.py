"""Comparison of several methods on the same adapters: what each would do to each adapter. Nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools import registry
from loratools.arguments import checked
from loratools.charts.of_report import report_charts, report_figure
from loratools.errors import InputError, LoraToolsError, UndecidedError, UsageError
from loratools.methods import options_of, settings
from loratools.notebook_html import notebook_html
from loratools.ops.combine.report import CombineReport
from loratools.ops.combine.shares import Share
from loratools.ops.combine.verb import combine
from loratools.ops.common.arguments import AdapterArgument, AdapterSource
from loratools.short_repr import few_lines, one_line

if TYPE_CHECKING:
    pass

ALL = "all"


@dataclass(frozen=True)
class MethodOutcome:
    """The result that one method would have.

    Attributes:
        method: The name of the method.
        rank: The largest rank of any module of the result; None if the method was refused.
        error: The relative Frobenius error of the values that would be stored, against the exact result of the method.
        bytes: Size of the result in bytes.
        seconds: Wall-clock time of the computation, in seconds.
        adapters: How much of each adapter would be in the result, in the order given.
        refused: Why the method cannot combine these adapters; None if it can.
    """

    method: str
    rank: int | None = None
    error: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    adapters: tuple[Share, ...] = ()
    refused: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def interference(self) -> float | None:
        """The largest interference of any adapter; None if no adapter has one."""
        return max((s.interference for s in self.adapters if s.interference is not None), default=None)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `methods` in the document of `loratools combine --method all --plan --json`."""
        return {
            "method": self.method,
            "rank": self.rank,
            "error": self.error,
            "interference": self.interference,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "refused": self.refused,
            "adapters": [share.to_dict() for share in self.adapters],
        }


@dataclass(frozen=True)
class MethodsReport:
    """Several methods on the same adapters, side by side.

    Attributes:
        methods: One entry per method, the one with the smallest interference first and refused ones last.
        warnings: Warnings about the adapters, as sentences.

    Example:
        >>> import loratools
        >>> pair = ["fixtures/llama-tiny-science", "fixtures/llama-tiny-shakespeare"]
        >>> report = loratools.compare_methods(pair, "linear", rank=4)
        >>> report.methods[0].method, report.methods[0].rank
        ('linear', 4)
    """

    methods: tuple[MethodOutcome, ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html
    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per method and adapter, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {**{k: v for k, v in outcome.to_dict().items() if k != "adapters"}, **share.to_dict()}
            for outcome in self.methods
            for share in outcome.adapters
        ]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools combine --method all --plan --json`, without the fields common to all
        verbs.
        """
        return {"methods": [outcome.to_dict() for outcome in self.methods], "warnings": list(self.warnings)}


@checked
def compare_methods(
    adapters: Sequence[AdapterArgument] | AdapterSource = (),
    methods: str | Sequence[str] = ALL,
    *,
    options: Mapping[str, object] | None = None,
    **arguments: Any,
) -> MethodsReport:
    """Compare what several methods would make of the same adapters. Nothing is written.

    Args:
        adapters: As for `combine`: paths, loaded adapters, or pairs of one of these and a weight.
        methods: Names of methods, or `all` for every one of `list_methods()`.
        options: Options of methods by name. Each is passed to the methods that have it; the others keep their defaults.
        **arguments: Every other argument of `combine`, such as `rank`, `recipe` or `include`.

    Returns:
        A report with one entry per method: gains and interferences of the adapters, error, rank, size in bytes and time
        in seconds. The entry of a method that cannot combine these adapters has the reason instead.

    Raises:
        UsageError: A method does not exist, or no method has one of the options.
        LoraToolsError: No method can combine the adapters. The error is the one that `combine` raises.

    Example:
        >>> import loratools
        >>> pair = ["fixtures/llama-tiny-science", "fixtures/llama-tiny-shakespeare"]
        >>> report = loratools.compare_methods(pair, ["ties", "linear"], rank=8)
        >>> sorted(outcome.method for outcome in report.methods)
        ['linear', 'ties']
    """
    if arguments.get("residual") is not None:
        raise UsageError("methods side by side write no residual", hint="name one method")
    names = _names(methods)
    by_method = _options_by_method(names, options or {})
    # Imported beforehand, so that the time is not counted for the first method.
    import torch  # noqa: F401

    outcomes: list[MethodOutcome] = []
    refusals: list[LoraToolsError] = []
    warnings: dict[str, None] = {}
    for name in names:
        begun = time.perf_counter()
        try:
            report = combine(adapters, method=name, options=by_method[name], plan=True, **arguments)
        except (UsageError, InputError, UndecidedError) as error:
            # There are two kinds of refusal: one by a method becomes its row; one of the adapters ends the comparison.
            refusals.append(error)
            outcomes.append(MethodOutcome(name, refused=error.message))
            continue
        outcomes.append(_outcome(name, report, time.perf_counter() - begun))
        warnings.update(dict.fromkeys(report.warnings))
    if len(refusals) == len(names):
        raise refusals[0]
    return MethodsReport(tuple(sorted(outcomes, key=_order)), tuple(warnings))


def _names(methods: str | Sequence[str]) -> list[str]:
    """The requested methods, each once.

    Raises:
        UsageError: There is no such method.
    """
    asked = [methods] if isinstance(methods, str) else list(methods)
    names = list(registry.names("methods")) if ALL in asked else list(dict.fromkeys(asked))
    if not names:
        raise UsageError("no method is named", hint=f"name methods, or '{ALL}'")
    for name in names:
        registry.load("methods", name)
    return names


def _options_by_method(names: Sequence[str], options: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The options of each method, from those that were given.

    Raises:
        UsageError: None of the methods has an option, or the value is invalid.
    """
    known = {name: {option.name for option in options_of(name)} for name in names}
    for option in options:
        if not any(option in of_method for of_method in known.values()):
            available = sorted(set().union(*known.values()))
            raise UsageError(f"none of the methods has an option '{option}'; there are: {', '.join(available)}")
    chosen = {name: {k: v for k, v in options.items() if k in known[name]} for name in names}
    for name, of_method in chosen.items():
        settings(name, of_method)
    return chosen


def _outcome(name: str, report: CombineReport, seconds: float) -> MethodOutcome:
    ranks = [module.rank for module in report.modules if module.rank is not None]
    return MethodOutcome(name, max(ranks, default=None), report.error, report.bytes, seconds, report.adapters)


def _order(outcome: MethodOutcome) -> tuple[bool, float, float, str]:
    interference = outcome.interference
    return (
        outcome.refused is not None,
        math.inf if interference is None else interference,
        outcome.error or 0.0,
        outcome.method,
    )
