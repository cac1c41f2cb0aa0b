"""Which rounding each weight of a merge gets, by what the caller chose and what the weight is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from loratools.errors import MismatchError
from loratools.naming.places import Alias
from loratools.ops.merge.moments import by_weight, read_moments
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import Output
from loratools.ops.merge.rounding import Rounding, default_penalty
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

# Stored dtypes that are coarser than the sums; the others are rounded to nearest, which loses nothing worth keeping.
_COARSE = ("BF16", "F16")
_NAMED = 5
# Of a block whose errors are fed back: its sums, its neighbours and their errors, transposed, four bytes each.
_FEEDBACK_BYTES = 40


def with_rounding(
    outputs: Mapping[str, Output],
    options: MergeOptions,
    *,
    packed: Collection[str] = (),
    aliases: Mapping[str, Alias] | None = None,
) -> tuple[dict[str, Output], list[str]]:
    """The outputs, each with its rounding, and warnings.

    Args:
        outputs: What is written, by the names that the base has for it.
        options: What the caller chose.
        packed: Names of weights that are quantised again.
        aliases: Other names of the base's weights, by which moments may be stored: those of the model in memory.

    Raises:
        UsageError: The file of moments does not exist.
        FormatError: The file of moments is not a valid one.
        MismatchError: Moments do not fit the weight that they belong to.
    """
    if options.rounding == "nearest":
        return dict(outputs), []
    coarse = [name for name, o in outputs.items() if o.updates and (o.dtype in _COARSE or name in packed)]
    if not coarse:
        dtypes = ", ".join(sorted({o.dtype for o in outputs.values() if o.updates}))
        return dict(outputs), [f"rounding '{options.rounding}' changes nothing: merged weights are stored in {dtypes}"]
    moments, warnings = _moments(outputs, coarse, options, aliases or {})
    rounded = {}
    for name in coarse:
        rounding = _rounding(outputs[name], options, moments, packed=name in packed)
        rounded[name] = replace(outputs[name], rounding=rounding)
    return {**outputs, **rounded}, warnings


def feedback_memory(output: Output) -> int:
    """Bytes that feeding errors back takes beside the blocks of a merge."""
    if not output.rounding.feeds_back:
        return 0
    moments = output.rounding.moments
    squares = 2 * 4 * moments.elements if moments is not None else 0
    return squares + _FEEDBACK_BYTES * output.rounding.block_rows(output.columns) * output.columns


def _rounding(output: Output, options: MergeOptions, moments: Mapping[str, LazyTensor], *, packed: bool) -> Rounding:
    mode = options.rounding
    # A vector has no inputs, and an embedding is looked up: each of its errors meets one token alone.
    if mode != "stochastic" and (output.columns == 1 or any(u.update.embedding for u in output.updates)):
        return Rounding()
    measured = moments.get(output.name)
    if mode == "calibrated" and measured is None:
        mode = "adapter"
    penalty = options.penalty if options.penalty is not None else default_penalty(mode, packed=packed)
    return Rounding(mode, options.seed, penalty, measured)


def _moments(
    outputs: Mapping[str, Output], coarse: list[str], options: MergeOptions, aliases: Mapping[str, Alias]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The moments of the weights that are merged, and warnings for those that have none."""
    if options.moments is None:
        return {}, []
    measured = read_moments(options.moments)
    inputs_of = {name: weight for name, alias in aliases.items() if (weight := _weight_of_inputs(alias)) is not None}
    # The names of the base itself go before those in memory.
    matched = {inputs_of[name]: tensor for name, tensor in by_weight(measured, inputs_of).items()}
    matched |= by_weight(measured, outputs)
    matched = {name: tensor for name, tensor in matched.items() if name in set(coarse)}
    wrong = [
        f"{name}   {shape_text(tensor.shape)} for {_inputs(outputs[name])} inputs"
        for name, tensor in matched.items()
        if tensor.shape[0] != _inputs(outputs[name])
    ]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} second moments in {quoted(options.moments)} do not fit the base",
            details=wrong,
            hint="were they gathered from this model?",
        )
    missing = [name for name in coarse if name not in matched and outputs[name].columns > 1]
    if not missing:
        return matched, []
    names = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
    return matched, [
        f"{quoted(options.moments)} has nothing for {len(missing)} merged weights, which are rounded for the inputs "
        f"that the adapters read: {names}"
    ]


def _weight_of_inputs(alias: Alias) -> str | None:
    """The weight whose inputs are those of a module in memory; None if it is cut, or has them along its rows."""
    weights = {place.weight for place in alias.places}
    straight = all(
        not place.transposed and place.at.expert is None and place.at.columns is None for place in alias.places
    )
    return weights.pop() if straight and len(weights) == 1 else None


def _inputs(output: Output) -> int:
    return output.rows if output.inputs_along_rows else output.columns
