"""Weights that adapters replace as a whole, such as trained heads: deltas add, these do not.

Equal replacements are kept once. Different ones are refused (`refuse`), or the first adapter's is taken (`first`), or
their mean, weighted by the adapters' weights (`average`); the report names them. If all adapters replace rows of a
weight, this is decided row by row (`_combine_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.adapter import Adapter, Replacement
from loratools.errors import MismatchError
from loratools.ops.combine.rows import united, weighted_mean
from loratools.ops.lowrank.reduce import widest
from loratools.storage.casting import narrowed
from loratools.storage.same import same_bytes
from loratools.tensors.dtypes import parse_float_dtype
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.shapes import shape_text


def combined_replacements(
    sources: Sequence[tuple[Adapter, float]], selected: set[str], taking_part: Sequence[int], policy: str
) -> tuple[dict[str, Replacement], list[str]]:
    """Replaced weights of the result, and what a person should know about them.

    Raises:
        MismatchError: Adapters replace a weight with different values and `refuse` is the policy, or their mean means
            nothing.
    """
    owners: dict[str, list[int]] = {}
    for i in taking_part:
        for name in sources[i][0].replacements:
            if name in selected:
                owners.setdefault(name, []).append(i)
    replacements = {name: sources[indices[0]][0].replacements[name] for name, indices in sorted(owners.items())}
    differing = [
        name
        for name in replacements
        if not all(_alike(replacements[name], sources[i][0].replacements[name]) for i in owners[name][1:])
    ]
    by_rows: dict[str, int] = {}
    differing_owners = {
        name: [(sources[i][1], sources[i][0].replacements[name]) for i in owners[name]] for name in differing
    }
    for name, pairs in differing_owners.items():
        if all(r.rows is not None for _, r in pairs):
            replacements[name], by_rows[name] = united(name, pairs, policy)
    together = [name for name, count in by_rows.items() if not count]
    differing = [name for name in differing if name not in together]

    def disagreement(name: str) -> str:
        return f"{name} ({by_rows[name]} of {len(replacements[name].rows or ())} rows)" if name in by_rows else name

    if differing and policy == "refuse":
        raise MismatchError(
            f"{len(differing)} weights are replaced with different values, and a sum of those means nothing",
            details=[
                f"{disagreement(n)}   " + ", ".join(f"'{sources[i][0].name}'" for i in owners[n]) for n in differing
            ],
            hint=f"take one with --heads first, their mean with --heads average, or leave them out with "
            f"--exclude '{differing[0]}'",
        )
    warnings = [f"rows that only some adapters replace are put together: {_listed(together)}"] if together else []
    if differing and policy == "average":
        for name in differing:
            if name not in by_rows:
                replacements[name] = replace(replacements[name], tensor=_weighted_mean(name, differing_owners[name]))
        warnings.append(f"replaced weights that differ are averaged: {_listed([disagreement(n) for n in differing])}")
    elif differing:
        warnings += [
            f"replaced weights that differ are those of '{sources[i][0].name}': {_listed(names)}"
            for i in taking_part
            if (names := [disagreement(n) for n in differing if owners[n][0] == i])
        ]
    lonely = [name for name in replacements if len(owners[name]) < len(taking_part)]
    if lonely:
        warnings.append(f"replaced weights that not all adapters have are kept: {_listed(lonely)}")
    not_averaged = [name for name in replacements if name not in differing or policy != "average"]
    if any(sources[i][1] != 1 for name in not_averaged for i in owners[name]):
        warnings.append(f"weights do not apply to replaced weights: {len(not_averaged)} are kept as they are")
    return replacements, warnings


def _alike(first: Replacement, second: Replacement) -> bool:
    return first.rows == second.rows and same_bytes(first.tensor, second.tensor)


def _weighted_mean(name: str, owners: Sequence[tuple[float, Replacement]]) -> LazyTensor:
    if len({r.rows for _, r in owners}) > 1:
        raise MismatchError(
            f"one adapter replaces all of '{name}' and another some of its rows", hint="use --heads first"
        )
    pairs = [(w, r.tensor) for w, r in owners]
    shapes = {t.shape for _, t in pairs}
    if len(shapes) > 1:
        shape_list = " and ".join(map(shape_text, sorted(shapes)))
        raise MismatchError(
            f"'{name}' is replaced with weights of different shapes: {shape_list}", hint="use --heads first"
        )
    if any(parse_float_dtype(t.dtype) is None for _, t in pairs):
        raise MismatchError(
            f"'{name}' is replaced with values that are no weights to average", hint="use --heads first"
        )
    mean = weighted_mean(f"'{name}'", [w for w, _ in pairs], (t.read().double() for _, t in pairs))
    return from_torch(narrowed(name, mean, widest([t.dtype for _, t in pairs])))


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
