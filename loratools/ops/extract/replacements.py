"""What of an extraction takes the place of the base's weights: by names, whole or by rows."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Replacement
from loratools.ops.extract.outcomes import Outcome, ReplacedTensor
from loratools.ops.finetune.pairs import Pair, Pairs


def replacements(pairs: Pairs, results: Mapping[Pair, Outcome]) -> dict[str, tuple[Replacement, float | None]]:
    """Name of a weight -> what replaces it, and the norm of its change.

    Of a module to save all tensors are stored, changed or not: PEFT loads such modules as a whole.
    """
    replaced: dict[str, tuple[Replacement, float | None]] = {}
    for pair, result in results.items():
        if isinstance(result, ReplacedTensor):
            replaced[_weight_name(pair)] = (
                Replacement(result.part_of(pair.tuned), result.declared, result.rows),
                result.norm,
            )
    for unpaired in pairs.unpaired:
        if unpaired.declared is not None:
            replaced[unpaired.name] = Replacement(unpaired.tensor, unpaired.declared), None
    modules = {name.rpartition(".")[0] for name, (r, _) in replaced.items() if r.declared == "modules_to_save"}
    for pair in results:
        name = _weight_name(pair)
        if name.rpartition(".")[0] in modules:
            replaced[name] = Replacement(pair.tuned, "modules_to_save"), replaced[name][1] if name in replaced else 0.0
    return replaced


def _weight_name(pair: Pair) -> str:
    """The name of its weight as an adapter has it: by the name of its module there."""
    leaf = pair.name.rpartition(".")[2]
    return f"{pair.target}.{leaf}" if leaf in ("weight", "bias") else pair.target
