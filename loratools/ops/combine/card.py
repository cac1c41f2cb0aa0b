"""The model card of a combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loratools.adapter import Adapter
from loratools.ops.card.adapter_card import AdapterCard, rank_text
from loratools.ops.card.command import weighted
from loratools.ops.card.inputs import card_input
from loratools.ops.combine.shares import CombinedModule, Share
from loratools.ops.lowrank.reduce import overall_error


def combine_card(
    sources: Sequence[tuple[Adapter, float]],
    shares: Sequence[Share],
    modules: Sequence[CombinedModule],
    options: Mapping[str, object],
    function: Callable[..., object],
    base_model: str | None,
    warnings: Sequence[str],
) -> AdapterCard:
    """Return the card of a combination, with the gain and the interference of each adapter."""
    inputs = [card_input(adapter.path) for adapter, _ in sources]
    facts = [
        ("modules", f"{len(modules):,}"),
        ("rank", rank_text([module.rank for module in modules])),
        ("relative error of what is stored", f"{overall_error(modules):.4g}"),
    ]
    for source, share in zip(inputs, shares, strict=True):
        numbers = {"gain": share.gain, "interference": share.interference}
        measured = [f"{word} {value:.4g}" for word, value in numbers.items() if value is not None]
        facts.append((source.name, ", ".join([f"weight {share.weight:g}", *measured])))
    # A recipe has the adapters in it, unless others are named beside it.
    arguments = [weighted(source.name, weight) for source, (_, weight) in zip(inputs, sources, strict=True)]
    return AdapterCard(
        "combine",
        " and ".join(source.name for source in inputs),
        base_model,
        inputs,
        [] if options.get("recipe") is not None else arguments,
        options,
        function,
        facts,
        warnings,
        renamed={"module_weights": "module-weight"},
    )
