"""A base whose weights are quantised, or some of them: what a merge leaves as it is, refuses, or writes as floats.

What is decided is decided for each weight. Weights that no adapter changes keep their stored tensors, byte for byte;
one that an adapter would change is refused by name, since a delta cannot be added to packed numbers. A merge that
dequantises writes all of them as floats, and the result is a model that is not quantised. One that quantises again
(`requantise.py`) brings the sums onto the grid of the base's scheme.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loratools.checkpoints import Checkpoint, Component
from loratools.errors import UnsupportedError
from loratools.matching import Matches
from loratools.ops.merge.outputs import Output, Requantised
from loratools.quantization import Quantisation
from loratools.quantization.common.config import model_dtype
from loratools.quantization.common.dequantised import Dequantised
from loratools.quantization.common.protocol import PackedWeight, Part, Writable
from loratools.quantization.gguf import Unwritten, blocks_of, packed_shape
from loratools.skipped import Skipped
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor

_HINT = "merge into the model that it was quantised from, or leave these out with --exclude"
_HINT_READABLE = (
    "write the quantised weights as floats with --dequantize, or quantise the changed ones again with --requantize; "
    "or merge into the model that it was quantised from, or leave these out with --exclude"
)
# Files beside the weights that say how they are quantised: of AutoGPTQ, AutoAWQ and ModelOpt. A runtime that finds one
# takes the weights for packed ones.
_DESCRIPTIONS = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})
# Of the numbers that a scheme works with while it unpacks a block: codes, scales and values, four bytes each.
_UNPACKING_BYTES = 12


def with_dequantised(base: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The base with some of its quantised weights as plain ones, and the others as they are stored."""
    assert base.quantisation is not None, "others have no such weights"
    packed = base.quantisation.weights
    chosen = Quantisation({name: packed[name] for name in packed if name in names})
    still_packed = replace(base.quantisation, weights={name: packed[name] for name in packed if name not in names})
    return replace(
        base,
        components=tuple(_plain(component, chosen, base.weights) for component in base.components),
        stored=chosen.logical(base.stored),
        quantisation=still_packed if still_packed.weights or still_packed.unreadable else None,
    )


def dequantised_base(base: Checkpoint) -> Checkpoint:
    """The base as a model with plain weights: their values are the dequantised ones, and no packed part is stored.

    Its config is still the one that the base has, since the schemes' settings are in it.

    Raises:
        UnsupportedError: A weight is packed in a way that is not read, so that it cannot be written as floats.
    """
    base.require_readable()
    quantisation = base.quantisation
    if quantisation is None:
        return base
    descriptions = [file for file in base.side_files if file.name.rpartition("/")[2] in _DESCRIPTIONS]
    why = "it describes the quantisation, which the result has not"
    return replace(
        base,
        components=tuple(_plain(component, quantisation, base.weights) for component in base.components),
        stored=base.weights,
        quantisation=None,
        side_files=tuple(file for file in base.side_files if file not in descriptions),
        left_out=(*base.left_out, *(Skipped(file.name, why, "file") for file in descriptions)),
    )


def _plain(component: Component, quantisation: Quantisation, weights: Mapping[str, LazyTensor]) -> Component:
    """The component with each packed weight in the file and at the place of its first part."""
    prefix = component.prefix
    files = []
    for file in component.files:
        logical = quantisation.logical({prefix + name: tensor for name, tensor in file.tensors.items()})
        tensors = {
            name.removeprefix(prefix): weights[name] if name in quantisation.weights else tensor
            for name, tensor in logical.items()
        }
        files.append(replace(file, tensors=tensors))
    return replace(component, files=tuple(files))


def is_dequantised(tensor: LazyTensor) -> bool:
    """Whether the values of the tensor are those of a packed weight."""
    return isinstance(tensor.source, Dequantised)


def in_dtype_of_model(base: Checkpoint, outputs: Mapping[str, Output], dtype: str | None) -> dict[str, Output]:
    """The outputs of a merge into a dequantised base, with packed weights stored in `dtype`.

    Where that is None, they are stored in the dtype that the model's config names, and else in the one that the scheme
    computes with.
    """
    stored: dict[str, Output] = {}
    for name, output in outputs.items():
        weight = base.weights.get(base.tied.get(name, name))
        if weight is not None and is_dequantised(weight):
            output = replace(output, dtype=dtype or model_dtype(_config_of(base, name)) or weight.dtype)
        stored[name] = output
    return stored


def _config_of(base: Checkpoint, name: str) -> Mapping[str, object]:
    """The config of the component that has the weight of that name."""
    if base.config_file is not None:
        return base.config
    config = base.config.get(next(c.prefix for c in base.components if name.startswith(c.prefix)).removesuffix("."))
    return config if isinstance(config, Mapping) else {}


def unpacking_memory(outputs: Sequence[Output]) -> int:
    """Bytes that unpacking takes at most: some schemes give many rows at once, or none."""
    packed = [o.values.source.weight for o in outputs if isinstance(o.values.source, Dequantised)]
    blocks = [min(weight.row_block, weight.shape[0]) * math.prod(weight.shape[1:]) for weight in packed]
    return _UNPACKING_BYTES * max(blocks, default=0)


def changed_and_packed(base: Checkpoint, matches: Sequence[Matches]) -> set[str]:
    """The quantised weights that adapters add to or replace; of tied ones, those that they follow."""
    packed = base.quantisation.weights if base.quantisation is not None else {}
    names = {
        place.weight
        for match in matches
        for places in (*match.updates.values(), *match.replacements.values())
        for place in places
    }
    return {base.tied.get(name, name) for name in names} & packed.keys()


def refuse_quantised(
    base: Checkpoint, matches: Sequence[Matches], *, requantize: bool = False, retype: str | None = None
) -> None:
    """Raise UnsupportedError where a weight that an adapter changes is quantised, naming every one.

    With `requantize`, where it cannot be stored in its scheme again; `retype`: in that ggml type.
    """
    packed = base.quantisation.weights if base.quantisation is not None else {}
    updated = {place.weight for each in matches for places in each.updates.values() for place in places}
    replaced = {place.weight for each in matches for places in each.replacements.values() for place in places}
    changed = changed_and_packed(base, matches)
    if changed and not requantize:
        raise UnsupportedError(
            f"{len(changed)} weights that the adapters change are quantised in {quoted(base.path)}",
            details=[f"{name}   {_scheme(packed[name])}" for name in sorted(changed)],
            hint=_HINT_READABLE,
        )
    reasons = {name: reason for name in changed if (reason := _not_written(packed[name], retype)) is not None}
    types = ", or in another type with --requantize q8_0" if base.layout == "gguf" and retype is None else ""
    reasons |= dict.fromkeys(changed & replaced, "it is replaced, and not added to")
    reasons |= {
        name: f"it follows {base.tied[name]}, and would have to be stored on its own"
        for name in updated | replaced
        if base.tied.get(name) in packed
    }
    if reasons:
        raise UnsupportedError(
            f"{len(reasons)} weights that the adapters change cannot be quantised again as in {quoted(base.path)}",
            details=[f"{name}   {reason}" for name, reason in sorted(reasons.items())],
            hint=f"write the quantised weights as floats with --dequantize{types}, or leave these out with --exclude",
        )


def _not_written(weight: PackedWeight, retype: str | None) -> str | None:
    """Why the numbers of a packed weight cannot be stored again; None if they can."""
    if retype is not None:
        fits_blocks = packed_shape(retype, weight.shape) is not None
        return (
            None if fits_blocks else f"its rows of {weight.shape[-1]} values are no whole number of blocks of {retype}"
        )
    if isinstance(weight.parameters, Writable):
        return None
    return f"{_scheme(weight)}, which is read and not written"


def _scheme(weight: PackedWeight) -> str:
    return f"{weight.scheme}: {weight.parameters.format}"


def refuse_unreadable(base: Checkpoint, matches: Sequence[Matches]) -> None:
    """Raise UnsupportedError where names of an adapter found no place, and weights of the base are packed in a way that
    is not read: their names and shapes are not known, so that these may be the places."""
    if base.quantisation is None or not base.quantisation.refused:
        return
    if base.quantisation.declared is not None or any(each.leftovers for each in matches):
        raise UnsupportedError(
            f"the base {quoted(base.path)} is quantised in a way that is not read ({base.quantisation.name})",
            details=base.quantisation.refused,
            hint=_HINT,
        )


def with_stored_parts(
    base: Checkpoint, outputs: Mapping[str, Output], *, retype: str | None = None
) -> dict[str, Output]:
    """The outputs of a merge as they are stored: a packed weight as its parts, of which the first changes where
    something is added to the weight, and with the stored tensors that are no weights themselves.

    `retype`: the ggml type that changed weights get in place of their own.
    """
    if base.quantisation is None:
        return dict(outputs)
    packed = base.quantisation.weights
    stored: dict[str, Output] = {}
    for name, output in outputs.items():
        if name not in packed:
            stored[name] = output
            continue
        weight = packed[name]
        for part in weight.parts:
            tensor = part.tensor
            stored[part.name] = Output(part.name, tensor.dtype, tensor.shape, tensor)
        if output.updates:
            first = weight.stored_names[0]
            merged = replace(output, dtype=weight.dtype)
            if retype is not None and retype != weight.parameters.format:
                part = Part("blocks", first, _unwritten(retype, weight.shape))
                stored[first] = Output(first, part.tensor.dtype, part.tensor.shape, part.tensor)
                weight = replace(weight, parts=(part,), parameters=blocks_of(retype))
                stored[first] = replace(stored[first], requantised=Requantised(merged, weight, retyped=True))
            else:
                stored[first] = replace(stored[first], requantised=Requantised(merged, weight))
    unreadable_parts = [part for weight in base.quantisation.unreadable.values() for part in weight.stored]
    for name in [*unreadable_parts, *base.quantisation.markers]:
        tensor = base.stored[name]
        stored[name] = Output(name, tensor.dtype, tensor.shape, tensor)
    return stored


def _unwritten(kind: str, shape: tuple[int, ...]) -> LazyTensor:
    """The bytes of a weight in a ggml type, before there are any."""
    stored = packed_shape(kind, shape)
    assert stored is not None, "others are refused before anything is planned"
    return LazyTensor(stored, "U8", Unwritten())
