"""Which tensors the result of a merge has: those of the base, replaced and updated, and those that it has not got yet.

Here it is decided what happens to tied weights and to a resized vocabulary, and that two adapters which contradict
each other are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.errors import MismatchError, UnsupportedError
from loratools.matching import Matches
from loratools.naming.places import Place
from loratools.ops.common.vocabulary import vocabulary_size
from loratools.ops.merge.outputs import Output, RowsReplaced, WeightedUpdate
from loratools.ops.merge.views import as_stored, as_updated
from loratools.storage.same import same_bytes
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.joined import block_matrix
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.shapes import shape_text

_PER_TOKEN = {
    "embed_tokens", "word_embeddings", "wte", "lm_head", "shared", "embed_in", "embed_out", "predictions",
    "final_logits_bias",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """All tensors of a merged model, before they are laid out in files.

    `outputs`: every tensor of the result by name, the base's first, in their order.

    untied   names that were tied in the base and are stored on their own now
    added    names that the base has no weight for
    """

    outputs: Mapping[str, Output]
    untied: tuple[str, ...]
    added: tuple[str, ...]
    warnings: tuple[str, ...]


def resolve(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], matches: Sequence[Matches], *, dtype: str | None
) -> Result:
    """Bring weighted adapters and their matches together, tensor by tensor; `dtype`: what floats are stored in.

    Raises:
        MismatchError: Two adapters contradict each other, or a replaced tensor does not fit.
        UnsupportedError: A delta would be added to a weight that is not stored in floating point.
    """
    replaced = _replacements(adapters, matches)
    updates = _updates(base, adapters, matches, replaced)
    patches = _patches(adapters, matches, replaced)
    untied, following = _untied(base, replaced, updates, patches)
    replaced = {name: new for name, new in replaced.items() if name not in following}
    replaced |= _carried(base, replaced, untied)
    patches |= {name: _followed(base, patches, name) for name in untied if name not in replaced}
    added = tuple(n for n in replaced if n not in base.weights and n not in base.tied)
    outputs = {
        name: _output(base, name, replaced.get(name), updates.get(name, ()), patches.get(name, ()), dtype)
        for name in [*base.weights, *untied, *added]
    }
    _refuse_misfits(base, outputs, replaced)
    warnings = [f"no longer tied, and stored on their own: {', '.join(untied)}"] if untied else []
    return Result(outputs, untied, added, tuple(warnings))


@dataclass(frozen=True)
class _Replaced:
    adapter: int
    replacement: Replacement


def _replacements(adapters: Sequence[tuple[Adapter, float]], matches: Sequence[Matches]) -> dict[str, _Replaced]:
    """Stored name -> what takes its place; two adapters may agree, never differ."""
    replaced: dict[str, _Replaced] = {}
    differ: list[str] = []
    for i, ((adapter, _), m) in enumerate(zip(adapters, matches, strict=True)):
        for name, places in {**m.replacements, **{n: (Place(s),) for n, s in m.added.items()}}.items():
            if adapter.replacements[name].rows is not None:
                continue
            for place in places:
                new, stored = _cut(adapter.replacements[name], place), place.weight
                if stored in replaced and not same_bytes(replaced[stored].replacement.tensor, new.tensor):
                    differ.append(f"{stored}   '{adapters[replaced[stored].adapter][0].name}' and '{adapter.name}'")
                replaced.setdefault(stored, _Replaced(i, new))
    if differ:
        raise MismatchError(
            f"{len(differ)} weights are replaced by more than one adapter, with different values",
            details=differ,
            hint="leave one of them out with --exclude, or merge the adapters one at a time",
        )
    return replaced


def _cut(replacement: Replacement, place: Place) -> Replacement:
    """What of a replaced weight goes to one of its places, as the base stores it."""
    if place.is_whole and not place.transposed:
        return replacement
    return replace(replacement, tensor=as_stored(replacement.tensor, place))


def _patches(
    adapters: Sequence[tuple[Adapter, float]], matches: Sequence[Matches], replaced: Mapping[str, _Replaced]
) -> dict[str, tuple[RowsReplaced, ...]]:
    """Stored name -> its rows that are replaced; two adapters may replace different rows, or agree."""
    patches: dict[str, tuple[RowsReplaced, ...]] = {}
    wrong: list[str] = []
    for i, ((adapter, _), m) in enumerate(zip(adapters, matches, strict=True)):
        for name, (place, *_) in m.replacements.items():
            new = adapter.replacements[name]
            if new.rows is None:
                continue
            for earlier in patches.get(place.weight, ()):
                if not _agree(earlier, new):
                    wrong.append(f"{place.weight}   '{adapters[earlier.adapter][0].name}' and '{adapter.name}'")
            if place.weight in replaced:
                wrong.append(f"{place.weight}   '{adapter.name}' replaces rows of what is replaced as a whole")
            patches[place.weight] = (*patches.get(place.weight, ()), RowsReplaced(i, new.rows, new.tensor))
    if wrong:
        raise MismatchError(
            f"{len(wrong)} weights have rows that are replaced more than once, with different values",
            details=wrong,
            hint="leave one of them out with --exclude, or merge the adapters one at a time",
        )
    return patches


def _agree(first: RowsReplaced, second: Replacement) -> bool:
    """Whether the rows that both replace get the same values."""
    first_values, second_values = dict(zip(first.rows, first.values.read(), strict=True)), second.tensor.read()
    pairs = zip(second.rows or (), second_values, strict=True)
    return all(row not in first_values or bool((first_values[row] == values).all()) for row, values in pairs)


def _updates(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    matches: Sequence[Matches],
    replaced: Mapping[str, _Replaced],
) -> dict[str, tuple[WeightedUpdate, ...]]:
    """Stored name -> the updates added to it."""
    by_weight: dict[str, list[WeightedUpdate]] = {}
    clashes: list[str] = []
    for i, ((adapter, weight), m) in enumerate(zip(adapters, matches, strict=True)):
        for target, place in ((target, place) for target, places in m.updates.items() for place in places):
            # An adapter may update a weight that it replaces itself (a resized embedding); the delta of another adapter
            # was trained against the replaced weight.
            if place.weight in replaced and replaced[place.weight].adapter != i:
                clashes.append(f"{place.weight}   updated by '{adapter.name}'")
            update = adapter.updates[target]
            if update.reads_layer_weight:
                update = update.with_layer_weight(_weight_beside(base, target, m))
            by_weight.setdefault(place.weight, []).append(WeightedUpdate(i, update, weight, place))
    if clashes:
        raise MismatchError(
            f"{len(clashes)} weights are replaced by one adapter and updated by another",
            details=clashes,
            hint="leave one of them out with --exclude",
        )
    return {name: tuple(updates) for name, updates in by_weight.items()}


def _weight_beside(base: Checkpoint, bias: str, m: Matches) -> LazyTensor:
    """The weight of the layer whose bias an update of that name means, as the layer computes with it.

    Raises:
        UnsupportedError: It is left out of the merge, or the base does not store it on its own.
    """
    places = m.updates.get(bias.removesuffix(".bias"), ())
    if len(places) != 1 or not places[0].is_whole:
        raise UnsupportedError(
            f"{bias} depends on the weight of its layer, which is {'in parts' if places else 'left out'}",
            hint="choose both, or leave both out, with --include or --exclude",
        )
    name = places[0].weight
    return as_updated(base.weights[base.tied.get(name, name)], places[0])


def _untied(
    base: Checkpoint,
    replaced: Mapping[str, _Replaced],
    updates: Mapping[str, tuple[WeightedUpdate, ...]],
    patches: Mapping[str, tuple[RowsReplaced, ...]],
) -> tuple[tuple[str, ...], set[str]]:
    """Tied names that no longer equal the weight they follow, with all that are tied to the same one;
    and replaced names that go on following, since both were saved equal."""
    untied, following = set(), set()
    for name, source in base.tied.items():
        if name in updates:
            untied.add(source)
        elif name in replaced:
            tensor = replaced[name].replacement.tensor
            if source in replaced and same_bytes(tensor, replaced[source].replacement.tensor):
                following.add(name)
            else:
                untied.add(source)
        elif (
            source in updates
            or _trained_alone(base, replaced.get(source), source)
            or (name in patches and (source in replaced or not _same_rows(patches[name], patches.get(source, ()))))
        ):
            untied.add(source)
    return tuple(name for name, source in base.tied.items() if source in untied), following


def _carried(base: Checkpoint, replaced: Mapping[str, _Replaced], untied: Sequence[str]) -> dict[str, _Replaced]:
    """What replaces tied names that are stored on their own now: what replaces the weight that they followed in
    training. Of another size it is not taken, so that it is found to be missing."""
    carried = {}
    for name in untied:
        source = base.tied[name]
        new = replaced.get(source)
        if name in replaced or new is None or new.replacement.declared == "modules_to_save":
            continue
        if new.replacement.tensor.shape == base.weights[source].shape:
            carried[name] = new
    return carried


def _followed(base: Checkpoint, patches: Mapping[str, tuple[RowsReplaced, ...]], name: str) -> tuple[RowsReplaced, ...]:
    """Rows replaced in a tied name that is now stored on its own: those of the weight that it was tied to in training,
    except for adapters that replace rows of it separately.

    Raises:
        MismatchError: One adapter's rows differ from another's.
    """
    own_patches = patches.get(name, ())
    own_adapters = {patch.adapter for patch in own_patches}
    followed = [patch for patch in patches.get(base.tied[name], ()) if patch.adapter not in own_adapters]
    for patch in followed:
        for own_patch in own_patches:
            if not _agree(patch, Replacement(own_patch.values, "tokens", own_patch.rows)):
                raise MismatchError(
                    f"'{name}' has rows that two adapters replace with different values, one of them through "
                    f"'{base.tied[name]}', which it is tied to",
                    hint="leave one of them out with --exclude, or merge the adapters one at a time",
                )
    return (*followed, *own_patches)


def _same_rows(first: Sequence[RowsReplaced], second: Sequence[RowsReplaced]) -> bool:
    """Whether the same rows get the same values."""
    first_values, second_values = (
        {row: values for p in patches for row, values in zip(p.rows, p.values.read(), strict=True)}
        for patches in (first, second)
    )
    return first_values.keys() == second_values.keys() and all(
        bool((first_values[row] == second_values[row]).all()) for row in first_values
    )


def _trained_alone(base: Checkpoint, new: _Replaced | None, source: str) -> bool:
    """Whether a tied weight was trained as a copy of its own, while those tied to it stayed with the base.

    That is what `modules_to_save` does. A resized or saved embedding carries its tied partners along.
    """
    if new is None or new.replacement.declared != "modules_to_save":
        return False
    return new.replacement.tensor.shape == base.weights[source].shape


def _output(
    base: Checkpoint,
    name: str,
    new: _Replaced | None,
    updates: tuple[WeightedUpdate, ...],
    patches: tuple[RowsReplaced, ...],
    dtype: str | None,
) -> Output:
    stored = base.weights.get(base.tied.get(name, name))
    values = new.replacement.tensor if new is not None else stored
    assert values is not None  # a name is the base's, tied to one of the base's, or replaced
    stored_dtype = stored.dtype if stored is not None else _usual_float(base)
    if updates and stored_dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"'{name}' of '{base.name}' is stored as {stored_dtype}, which a delta cannot be added to",
            hint="merge into a checkpoint stored in floating point",
        )
    to = dtype if dtype is not None and stored_dtype in FLOAT_DTYPES else stored_dtype
    if to != values.dtype and values.dtype not in FLOAT_DTYPES:
        raise MismatchError(f"'{name}' is {values.dtype} in the adapter and {stored_dtype} in the base")
    if patches:
        values = _long_enough(name, values, patches)
    return Output(name, to, values.shape, values, updates, patches, new.adapter if new is not None else None)


def _long_enough(name: str, values: LazyTensor, patches: Sequence[RowsReplaced]) -> LazyTensor:
    """The values with as many rows as are replaced: new tokens must follow the existing ones.

    Raises:
        MismatchError: Rows of another width, or new ones with a gap before them.
    """
    count, *inner = values.shape
    rows = {row for patch in patches for row in patch.rows}
    size = max([count, *(row + 1 for row in rows)])
    missing = [row for row in range(count, size) if row not in rows]
    if missing or any(p.values.shape[1:] != values.shape[1:] for p in patches) or (size > count and len(inner) != 1):
        raise MismatchError(
            f"the rows that an adapter replaces do not fit '{name}'",
            details=[f"the base has {count}, the adapter has row {size - 1} and not row {missing[0]}"]
            if missing
            else [f"{shape_text(p.values.shape)} into {shape_text(values.shape)}" for p in patches],
            hint="is it the adapter of this model? new tokens must follow the existing ones, without a gap"
            if missing
            else None,
        )
    return values if size == count else block_matrix((size, inner[0]), [(0, 0, values)])


def _refuse_misfits(base: Checkpoint, outputs: Mapping[str, Output], replaced: Mapping[str, _Replaced]) -> None:
    """A replaced tensor has the base's shape, except for a head with other labels, and for a vocabulary that is resized
    everywhere.
    """
    tokens = vocabulary_size(base)
    shapes = {
        name: (stored.shape, output.shape)
        for name, output in outputs.items()
        if (stored := base.weights.get(base.tied.get(name, name))) is not None
    }
    resized = {n: (old, new) for n, (old, new) in shapes.items() if old != new}

    def fits(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
        head = name in replaced and replaced[name].replacement.declared == "modules_to_save"
        return len(old) == len(new) and old[1:] == new[1:] and (old[0] == tokens or head)

    wrong = [
        f"{n}   base {shape_text(old)}, adapter {shape_text(new)}"
        for n, (old, new) in resized.items()
        if not fits(n, old, new)
    ]
    if wrong:
        raise MismatchError(f"{len(wrong)} replaced tensors do not fit '{base.name}'", details=wrong)
    sizes = {new[0] for old, new in resized.values() if old[0] == tokens}
    if len(sizes) > 1:
        raise MismatchError(
            f"the adapters resize the vocabulary to {len(sizes)} different sizes",
            details=[f"{n}   {old[0]} -> {new[0]}" for n, (old, new) in resized.items()],
        )
    for size in sizes:
        not_resized = [
            n for n, (old, new) in shapes.items() if old == new and tokens in (old[:1] + old[-1:]) and _per_token(n)
        ]
        if not_resized:
            raise MismatchError(
                f"the vocabulary is resized from {tokens} to {size}, and {len(not_resized)} weights stay as they are",
                details=not_resized,
                hint="save the adapter with its embeddings and its output head (save_embedding_layers=True)",
            )


def _per_token(name: str) -> bool:
    """Whether a weight of as many rows or columns as there are tokens has one for each token, by its name."""
    return not _PER_TOKEN.isdisjoint(name.split("."))


def _usual_float(base: Checkpoint) -> str:
    counts: Counter[str] = Counter()
    for tensor in base.weights.values():
        if tensor.dtype in FLOAT_DTYPES:
            counts[tensor.dtype] += tensor.elements
    return counts.most_common(1)[0][0] if counts else "F32"
