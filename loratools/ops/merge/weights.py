"""Every weight of a merged model: what each is made from and what is added to it, before anything is laid out in files.

Built from headers and configs; no values are read, save to compare two adapters that replace the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError, UnsupportedError
from loratools.matching import Matches, match
from loratools.naming.language.aliases import aliases
from loratools.ops.merge.base_identity import different_base_warning
from loratools.ops.merge.chosen_rounding import with_rounding
from loratools.ops.merge.into_gguf import dequantised_where_changed, in_types_of_gguf, is_gguf, refuse_options
from loratools.ops.merge.layer_replication import Replication, replicated, replication
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import Output
from loratools.ops.merge.quantised import dequantised_base, in_dtype_of_model, refuse_quantised, refuse_unreadable
from loratools.ops.merge.resolve import resolve
from loratools.ops.merge.trained_on import TrainingScheme, training_scheme, with_training_values
from loratools.storage.files import quoted


@dataclass(frozen=True)
class MergedWeights:
    """The weights of a merged model, as the model has them.

    Attributes:
        base: The base as its weights are merged: where they are dequantised, a checkpoint of plain weights.
        matches: Where the names of each adapter go, which is nowhere for an adapter of weight 0.
        outputs: Every weight by name, rounded as the options say.
        shaped: The same before dtypes and rounding were decided, with the shapes of the result.
        added: Names of weights that the base does not have.
        untied: Names that were tied in the base and are stored on their own now.
        deeper: How layers of the base are repeated; None if they are not.
        scheme: How the base was quantised in training, where the adapters are added to the values that training saw.
        warnings: Warnings about the result, as sentences.
        rounding_warnings: The same of its rounding, which come after those of configs.
    """

    base: Checkpoint
    matches: tuple[Matches, ...]
    outputs: Mapping[str, Output]
    shaped: Mapping[str, Output]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    deeper: Replication | None
    scheme: TrainingScheme | None
    warnings: tuple[str, ...]
    rounding_warnings: tuple[str, ...]


def merged_weights(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions) -> MergedWeights:
    """Work out every weight of the merge of weighted adapters into `base`.

    Raises:
        UnsupportedError: An adapter would change a weight that the base stores quantised, and it is not dequantised.
        MismatchError: Something of an adapter finds no place (unless `allow_partial`), or two contradict each other.
    """
    _refuse_all_fixed(base)
    refuse_options(base, options)
    dtype, dequantize = options.stored_dtype, options.dequantize
    nothing_packed = (dequantize or options.requantize) and base.quantisation is None
    base = dequantised_base(base) if dequantize and not is_gguf(base) else base
    active = [(a, w) for a, w in adapters if w]
    deeper = replication([a for a, _ in active])
    if deeper is not None and base.quantisation is not None:
        raise UnsupportedError(
            f"an adapter repeats layers of its base, and the weights of {quoted(base.path)} are quantised "
            f"({base.quantisation.name})",
            hint="write them as floats with --dequantize, or merge into the model that it was quantised from",
        )
    if deeper is not None and is_gguf(base):
        raise UnsupportedError(
            f"an adapter repeats layers of its base, and {quoted(base.path)} says in its header how many there are",
            hint="merge into the model that it was converted from, and convert the result",
        )
    base = base if deeper is None else replicated(base, deeper)
    shapes = _shapes(base)
    # An adapter of weight 0 takes no part, but keeps its place in the list, since reports give positions.
    matches = [match(a, shapes, config=base.config) if w else Matches({}, {}, {}, ()) for a, w in adapters]
    refuse_unreadable(base, matches)
    _refuse_leftovers(adapters, matches, allow_partial=options.allow_partial, base=base)
    _refuse_fixed(base, matches)
    base = dequantised_where_changed(base, matches) if dequantize and is_gguf(base) else base
    refuse_quantised(base, matches, requantize=bool(options.requantize), retype=options.retype)
    result = resolve(base, adapters, matches, dtype=dtype)
    if result.untied and base.config_file is None:
        raise UnsupportedError(
            f"{', '.join(result.untied)} would no longer be tied, which the config of a component of '{base.name}' "
            "would have to say",
            hint="merge into the folder of that component",
        )
    logical = result.outputs
    if is_gguf(base):
        logical = in_types_of_gguf(base, logical, dtype)
    elif dequantize:
        logical = in_dtype_of_model(base, logical, dtype)
    scheme = training_scheme(options.trained_on) if options.trained_on is not None else None
    training_warnings: list[str] = []
    if scheme is not None:
        logical, training_warnings = with_training_values(base, logical, scheme)
    packed = base.quantisation.weights if base.quantisation is not None else {}
    in_memory = aliases(base.config, _shapes(base)) if options.moments is not None else {}
    logical, rounding_warnings = with_rounding(logical, options, packed=packed, aliases=in_memory)
    warnings = [
        *base.warnings,
        *([_nothing_quantised(base, options)] if nothing_packed else []),
        *(w for a, _ in active for w in a.warnings),
        *(w for m in matches for w in m.warnings),
        *(different_base_warning(a, base, m) for (a, w), m in zip(adapters, matches, strict=True) if w),
        *(f"'{a.name}' has weight 0 and is left out" for a, w in adapters if w == 0),
        *(
            f"the weight {w:g} of '{a.name}' does not apply to its {len(a.replacements)} replaced tensors"
            for a, w in active
            if w != 1 and a.replacements
        ),
        *result.warnings,
    ]
    return MergedWeights(
        base,
        tuple(matches),
        logical,
        result.outputs,
        result.added,
        result.untied,
        deeper,
        scheme,
        tuple(w for w in warnings if w),
        (*training_warnings, *rounding_warnings),
    )


def _nothing_quantised(base: Checkpoint, options: MergeOptions) -> str:
    option = "--dequantize" if options.dequantize else "--requantize"
    return f"{option} changes nothing: no weight of {quoted(base.path)} is quantised"


def _shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {name: t.shape for name, t in base.weights.items()}
    return shapes | {name: shapes[source] for name, source in base.tied.items()}


def _refuse_leftovers(
    adapters: Sequence[tuple[Adapter, float]], matches: Sequence[Matches], *, allow_partial: bool, base: Checkpoint
) -> None:
    for (adapter, _), adapter_matches in zip(adapters, matches, strict=True):
        total = len(adapter.updates) + len(adapter.replacements)
        if total == 0:
            raise MismatchError(f"'{adapter.name}' holds no updates and no replaced tensors")
        if adapter.unread_companions and not allow_partial:
            raise UnsupportedError(
                f"'{adapter.name}' has {len(adapter.unread_companions)} files beside it with tensors that are not read",
                details=list(adapter.unread_companions),
                hint="to merge the adapter without them, give --allow-partial, or move them away",
            )
        leftovers = adapter_matches.leftovers
        nothing_fits = not adapter_matches.updates and not adapter_matches.replacements
        if not leftovers or (allow_partial and not nothing_fits):
            continue
        hints = [f"the adapter names its base as '{adapter.base_model}'"] if adapter.base_model else []
        if nothing_fits:
            hints.append(f"names of this base look like: {', '.join(list(base.weights)[:3])}")
        else:
            hints.append("what does not fit can be left out with --allow-partial")
        raise MismatchError(
            f"{len(leftovers)} of {total} names in '{adapter.name}' do not fit '{base.name}'",
            details=[str(leftover) for leftover in leftovers],
            hint="; ".join(hints),
        )


def _refuse_all_fixed(base: Checkpoint) -> None:
    """Before names are matched: where no weight can be changed, it does not matter whether they fit."""
    if base.weights.keys() <= base.fixed.keys():
        raise UnsupportedError(
            f"nothing can be added to the weights of {quoted(base.path)}: {next(iter(base.fixed.values()))}",
            hint="merge into the model as it was before its conversion, and convert the result",
        )


def _refuse_fixed(base: Checkpoint, matches: Sequence[Matches]) -> None:
    fixed = {
        place.weight: base.fixed[place.weight]
        for m in matches
        for places in (*m.updates.values(), *m.replacements.values())
        for place in places
        if place.weight in base.fixed
    }
    if fixed:
        raise UnsupportedError(
            f"{len(fixed)} weights of '{base.name}' are stored in a way that nothing can be added to",
            details=[f"{name}   {why}" for name, why in sorted(fixed.items())],
            hint="leave them out with --exclude, or merge into the model as it was before its conversion",
        )
