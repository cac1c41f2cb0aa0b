"""A base whose weights are quantised, or some of them: which of them a merge may leave as they are.

What is decided is decided for each weight. Weights that no adapter changes keep their stored tensors, byte for byte;
one that an adapter would change is refused by name, since a delta cannot be added to packed numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools.checkpoints import Checkpoint
from loratools.errors import UnsupportedError
from loratools.matching import Matches
from loratools.ops.merge.outputs import Output
from loratools.storage.files import quoted

_HINT = "merge into the model that it was quantised from, or leave these out with --exclude"


def refuse_quantised(base: Checkpoint, matches: Sequence[Matches]) -> None:
    """Raise UnsupportedError where a weight that an adapter changes is quantised, naming every one."""
    packed = base.quantisation.weights if base.quantisation is not None else {}
    changed = {
        base.tied.get(place.weight, place.weight)
        for found in matches
        for places in (*found.updates.values(), *found.replacements.values())
        for place in places
    }
    if touched := sorted(changed & packed.keys()):
        raise UnsupportedError(
            f"{len(touched)} weights that the adapters change are quantised in {quoted(base.path)}",
            details=[f"{name}   {packed[name].scheme}: {packed[name].parameters.format}" for name in touched],
            hint=_HINT,
        )


def refuse_unreadable(base: Checkpoint, matches: Sequence[Matches]) -> None:
    """Raise UnsupportedError where names of an adapter found no place, and weights of the base are packed in a way that
    is not read: their names and shapes are not known, so that these may be the places."""
    if base.quantisation is None or not base.quantisation.refused:
        return
    if base.quantisation.declared is not None or any(found.leftovers for found in matches):
        raise UnsupportedError(
            f"the base {quoted(base.path)} is quantised in a way that is not read ({base.quantisation.name})",
            details=base.quantisation.refused,
            hint=_HINT,
        )


def with_stored_parts(base: Checkpoint, outputs: Mapping[str, Output]) -> dict[str, Output]:
    """The outputs of a merge as they are stored: a packed weight, which nothing changes, as its parts, and with the
    stored tensors that are no weights themselves."""
    if base.quantisation is None:
        return dict(outputs)
    packed = base.quantisation.weights
    stored: dict[str, Output] = {}
    for name, output in outputs.items():
        if name not in packed:
            stored[name] = output
            continue
        for part in packed[name].parts:
            tensor = part.tensor
            stored[part.name] = Output(part.name, tensor.dtype, tensor.shape, tensor)
    others = [part for weight in base.quantisation.unreadable.values() for part in weight.stored]
    for name in [*others, *base.quantisation.markers]:
        tensor = base.stored[name]
        stored[name] = Output(name, tensor.dtype, tensor.shape, tensor)
    return stored
