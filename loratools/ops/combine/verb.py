"""Combine weighted adapters into one, target by target, in core coordinates.

    dW = method([(w_1, dW_1), (w_2, dW_2), ...])        `linear`: the exact weighted sum

A method (`methods/`) sees what the adapters say of one target. Everything else is here: targets that only some
adapters have, weights by module, what may follow a method, truncation, storing, what each adapter still says in the
result, and what of the source's notes stays true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from loratools import formats, methods, registry
from loratools._version import __version__
from loratools.adapter import Adapter, Replacement, select_names
from loratools.arguments import Globs, Positive, checked
from loratools.errors import MismatchError, UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.notes import agreed_notes, lora_notes
from loratools.formats.common.opened_base import known_base
from loratools.methods import Method, Terms, Value
from loratools.ops.combine.heads import combined_replacements
from loratools.ops.combine.recipe import Calibration, HeadsRule, Recipe, ingredients, overridden, read_recipe
from loratools.ops.combine.shares import CombinedModule, Part, Share, parts_of, share_of
from loratools.ops.common.arguments import AdapterArgument, AdapterSource, RankFrom, load_weighted, stored_dtype
from loratools.ops.common.output import output_format, refuse_unrelated, share_names
from loratools.ops.common.same_layers import require_same_layers
from loratools.ops.lowrank.experts import Experts, apart, ensure_alike, together, zeros_like
from loratools.ops.lowrank.factors import (
    Layout,
    exact_factors,
    is_vector,
    layout_of,
    reason_against,
    refuse_together,
)
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import Reduced, overall_error, passed_through, reduced, update_dtype, widest
from loratools.short_repr import few_lines
from loratools.storage.commit import check_output
from loratools.storage.held_inputs import holding_inputs
from loratools.tensors.lazy import held
from loratools.tensors.shapes import without_ones
from loratools.updates.full import Full
from loratools.updates.parts.protocol import Update, flow

if TYPE_CHECKING:
    from loratools.algebra.lowrank import Factors
    from loratools.checkpoints import Checkpoint
    from loratools.methods import Combination

_T = TypeVar("_T")


@dataclass(frozen=True)
class CombineReport:
    """What a combination did, or of a plan what it would do: all is computed, and nothing written.

    `output` and `residual` are None where nothing was written, `adapter` of a plan. `recipe` is what was asked for, in
    full, and is in the metadata of what was written.
    """

    modules: tuple[CombinedModule, ...]
    adapters: tuple[Share, ...]
    error: float
    output: Path | None
    adapter: Adapter | None
    bytes: int
    warnings: tuple[str, ...] = ()
    recipe: Mapping[str, object] = field(default_factory=dict)
    residual: Path | None = None

    def __repr__(self) -> str:
        return few_lines(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module and adapter, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [
            {**module.without_adapters(), **share.to_dict()} for module in self.modules for share in module.adapters
        ]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools combine --json`, without its head."""
        return {
            "modules": [m.to_dict() for m in self.modules],
            "adapters": [a.to_dict() for a in self.adapters],
            "error": self.error,
            "bytes": self.bytes,
            "recipe": dict(self.recipe),
            "warnings": list(self.warnings),
            "residual": str(self.residual) if self.residual is not None else None,
            "output": str(self.output) if self.output is not None else None,
        }


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def combine(
    adapters: Sequence[AdapterArgument] | AdapterSource = (),
    out: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    module_weights: Mapping[str, float | Sequence[float]] | None = None,
    block_weights: Sequence[Sequence[float]] = (),
    heads: HeadsRule | None = None,
    calibrate: Calibration | None = None,
    norm_match: bool = False,
    residual: str | Path | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> CombineReport:
    """Return one adapter that does what several do together, written to `out` where that is given.

    Computed in float64 and stored at scale 1. A module that only one adapter has, with weight 1, keeps its tensors byte
    for byte, unless it is truncated or cast, or the method changes it. Errors are those of the stored values.

    Args:
        adapters: Paths, loaded adapters, or pairs of one of these and a weight (1 where none is given). The weight
            multiplies the delta; 0 means that the adapter takes no part.
        out: Where to write the result; nothing is written where it is None.
        recipe: A YAML file that says any of the following; what is given here goes before it.
        method: One of `list_methods()`; linear where nothing is said.
        options: Options of the method by name, as `list_methods()` lists them.
        rank: Truncate each module to this rank. Without it and `energy`, ranks add up.
        energy: Truncate each module to this share of its squared Frobenius norm, in (0, 1].
        max_rank: With `energy`: no rank is above this.
        module_weights: For each glob, a further factor for modules that match it: one number for all adapters, or one
            for each. Where several globs match, the last one counts.
        block_weights: kohya's lists of 12, 17, 20 or 26 numbers: one for all adapters, or one for each.
        heads: What to do with replaced weights that differ: refuse (where nothing is said), first, or average.
        calibrate: `svc`: rescale singular values that several adapters share.
        norm_match: Then scale each module to the norm `sum of |weight| |delta|` over the adapters.
        residual: Also write there, as another adapter, what the truncation lost: the two together are exact.
        seed: Random seed of a method that draws numbers; 0 where nothing is said.
        dtype: The dtype of the stored factors; each module keeps the widest of its sources where it is None.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        include: Globs over the names of modules of all adapters together; all are taken where there is none.
        exclude: Globs of what is left out.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        from_format: The format of the adapters, where it is not to be found from the content.
        format: The format to write, one of `list_formats()`; where it is None, that of the adapters where they agree,
            otherwise peft.
        base: The model that they are for, where names alone do not tell: its path, opened, or its names and config.
        threads: Workers; one per CPU where it is None. The result does not depend on it.
        progress: Called with the number of bytes just read.
        plan: Compute everything, and write nothing.

    Returns:
        A report: ranks and errors of modules, and for each adapter how much of it is in the result. `report.adapter` is
        the result, and None of a plan.

    Raises:
        UsageError: An option, weight or method that does not exist or does not apply.
        MismatchError: Adapters that differ in the shape of a module, or in a replaced weight.
        UnsupportedError: The scale of an adapter is uncertain, or an update has no factors.
        InputError: Values that are not finite, or that do not fit the dtype.
        FormatError: A recipe that cannot be followed.
        OutputExistsError: `out` exists, or is one of the inputs.

    Example:
        >>> import loratools
        >>> pair = [("fixtures/llama-tiny-science", 0.7), ("fixtures/llama-tiny-shakespeare", 0.3)]
        >>> report = loratools.combine(pair, "both", rank=16)
        >>> [share.weight for share in report.adapters]
        [0.7, 0.3]
    """
    asked = {
        "adapters": ingredients(adapters, module_weights or {}, block_weights),
        "method": method,
        "set": options,
        "rank": rank,
        "energy": energy,
        "max_rank": max_rank,
        "heads": heads,
        "calibrate": calibrate,
        "norm_match": norm_match,
        "seed": seed,
        "dtype": dtype,
        "include": tuple(include),
        "exclude": tuple(exclude),
    }
    followed = overridden(read_recipe(recipe) if recipe is not None else Recipe(), asked)
    chosen = _Chosen.by(followed)
    known = known_base(base)
    arguments = [(i.adapter, i.weight) for i in followed.adapters]
    sources = load_weighted(arguments, rank_from=rank_from, from_format=from_format, base=known)
    taking_part = [i for i, (_, weight) in enumerate(sources) if weight]
    require_same_layers([sources[i][0] for i in taking_part], hint="merge them one at a time")
    written_as = output_format([sources[i][0] for i in taking_part], out, format)
    format = written_as.name
    if known is None and _keep_names([a for a, _ in sources], format, out):
        stored = load_weighted(arguments, rank_from=rank_from, from_format=from_format, stored_names=True)
        sources = stored if share_names([a for a, _ in stored]) else sources
    refuse_unrelated([sources[i][0] for i in taking_part])
    inputs = [a.path for a, _ in sources if a.path is not None]
    outputs = [formats.named(Path(path), format) for path in (out, residual) if path is not None]
    for i, path in enumerate(outputs):
        check_output(path, overwrite=overwrite, inputs=inputs)
        if _together(path, outputs[:i]):
            raise UsageError(
                f"the residual '{path}' would be written over the combination, or inside of it",
                hint="give --residual a place of its own",
            )

    selected = _selected(sources, followed.include, followed.exclude)
    targets, layers, silent = _targets(sources, followed, selected, taking_part, chosen)
    replacements, warnings = combined_replacements(sources, selected, taking_part, followed.heads)
    warnings = [*written_as.warnings, *_base_warnings(sources, taking_part), *warnings]
    if silent:
        warnings.append(f"{len(silent)} modules have weight 0 everywhere and are left out: {silent[0]}, ...")
    warnings += [f"'{a.name}': {text}" for a, _ in sources for text in a.warnings]

    def work(item: tuple[str, Sequence[_Term]]) -> _Combined:
        combined = _combined(*item, chosen, rest=residual is not None)
        if progress is not None:
            progress(sum(t.nbytes for term in item[1] for t in term.update.parts.values()))
        return combined

    with single_threaded_torch():
        results = run(list(targets.items()), work, threads=worker_count(threads))
    updates = together({name: r.update for name, r in zip(targets, results, strict=True)}, layers)
    told = followed.to_dict()
    result = _adapter([sources[i][0] for i in taking_part], updates, replacements, told)
    if plan:
        formats.ensure_writable(result, format, base=known)
    elif out is not None:
        warnings += formats.save(result, Path(out), format=format, overwrite=overwrite, inputs=inputs, base=known)
    rest = {name: r.rest for name, r in zip(targets, results, strict=True) if r.rest is not None}
    if residual is not None and not rest:
        warnings.append("nothing was lost, so that there is no residual to write")
    elif residual is not None and not plan:
        left_over = replace(result, updates=_filled(rest, updates, layers), replacements={})
        warnings += formats.save(
            left_over, Path(residual), format=format, overwrite=overwrite, inputs=inputs, base=known
        )
    modules = tuple(r.module for r in results)
    return CombineReport(
        modules=modules,
        adapters=tuple(share_of(i, a, w, [r.parts for r in results]) for i, (a, w) in enumerate(sources)),
        error=overall_error(modules),
        output=Path(out) if out is not None and not plan else None,
        adapter=None if plan else result,
        bytes=sum(t.nbytes for t in result.tensors().values()),
        warnings=tuple(warnings),
        recipe=told,
        residual=Path(residual) if residual is not None and rest and not plan else None,
    )


@dataclass(frozen=True)
class _Chosen:
    """Settings shared by all modules of a combination."""

    method: Method
    name: str
    options: Mapping[str, Value]
    limit: Limit
    seed: int
    dtype: str | None
    calibrate: str | None
    norm_match: bool
    kinds_stay: bool = False

    @classmethod
    def by(cls, recipe: Recipe) -> _Chosen:
        limit = Limit(rank=recipe.rank, energy=recipe.energy, max_rank=recipe.max_rank)
        only = recipe.adapters[0] if len(recipe.adapters) == 1 else None
        return cls(
            method=cast(Method, registry.load("methods", recipe.method)),
            name=recipe.method,
            options=methods.settings(recipe.method, recipe.set),
            limit=limit,
            seed=recipe.seed,
            dtype=stored_dtype(recipe.dtype) if recipe.dtype is not None else None,
            calibrate=recipe.calibrate,
            norm_match=recipe.norm_match,
            # Formats hold adapters of one kind: only an adapter that comes back whole keeps another than LoRA.
            kinds_stay=only is not None and only.weight == 1 and not (only.modules or only.blocks or limit.given),
        )


@dataclass(frozen=True)
class _Term:
    """What one adapter, the one at `index`, says of a target."""

    index: int
    weight: float
    update: Update
    whose: str


@dataclass(frozen=True, eq=False)
class _Combined:
    """A target of the result. `rest` is what it lost, where that is wanted and not nothing."""

    update: Update
    module: CombinedModule
    parts: tuple[Part, ...]
    rest: Update | None


def _together(path: Path, others: Sequence[Path]) -> bool:
    """Whether it is one of the others, or lies in one, or one in it."""
    own = path.resolve()
    return any(own == o or own in o.parents or o in own.parents for o in (p.resolve() for p in others))


def _keep_names(sources: Sequence[Adapter], format: str, out: str | Path | None) -> bool:
    """Whether the result may have the names of the inputs' files, as none of them changes its format."""
    return out is not None and formats.keeps_names(format) and all(source.format == format for source in sources)


def _selected(sources: Sequence[tuple[Adapter, float]], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Names that --include and --exclude leave, of all adapters together: a glob need not match in each of them."""
    every = sorted({name for a, _ in sources for name in (*a.updates, *a.replacements)})
    aliases = {name: meant for a, _ in sources for name, meant in a.aliases.items()}
    return set(select_names(every, include, exclude, aliases=aliases) if include or exclude else every)


def _targets(
    sources: Sequence[tuple[Adapter, float]],
    recipe: Recipe,
    selected: set[str],
    taking_part: Sequence[int],
    chosen: _Chosen,
) -> tuple[dict[str, list[_Term]], dict[str, Experts], list[str]]:
    """The union of targets, sorted, each with the terms of the adapters that have it; layers of fused experts, whose
    experts are targets; and the targets that none weighs."""
    targets: dict[str, list[_Term]] = {}
    layers: dict[str, Experts] = {}
    for i in taking_part:
        adapter, _ = sources[i]
        weights = recipe.adapters[i].weights(adapter)
        for name, update in adapter.updates.items():
            if name not in selected:
                continue
            parts, fused = apart({name: update})
            if fused:
                ensure_alike(name, layers.setdefault(name, fused[name]), fused[name])
            for part, own in parts.items():
                terms = targets.setdefault(part, [])
                if weights[name]:
                    terms.append(_Term(i, weights[name], own, adapter.name))
    silent = sorted(name for name, terms in targets.items() if not terms)
    targets = {name: terms for name, terms in sorted(targets.items()) if terms}
    every = [(name, t) for name, terms in targets.items() for t in terms]
    refuse_together(
        [f"{n} of '{t.whose}'   {why}" for n, t in every if (why := reason_against(t.update)) is not None], len(every)
    )
    misfits = [
        f"{name}   " + ", ".join(f"'{t.whose}' {flow(t.update.shape)}" for t in terms)
        for name, terms in targets.items()
        if len({(without_ones(t.update.shape), layout_of(t.update).embedding) for t in terms}) > 1
    ]
    if misfits:
        raise MismatchError(
            f"the adapters differ in the shape of {len(misfits)} of {len(targets)} modules",
            details=misfits,
            hint="they were trained on different models; leave such modules out with --exclude",
        )
    below = sorted({t.whose for terms in targets.values() for t in terms if t.weight < 0})
    if below and not chosen.method.LAWS.negative:
        raise UsageError(
            f"the method '{chosen.name}' takes no negative weights, as that of '{below[0]}'",
            hint="linear and most others do",
        )
    return targets, layers, silent


def _base_warnings(sources: Sequence[tuple[Adapter, float]], taking_part: Sequence[int]) -> list[str]:
    bases = {sources[i][0].base_model for i in taking_part} - {None}
    if len(bases) < 2:
        return []
    return [f"the adapters name different base models: {', '.join(sorted(map(repr, bases)))}"]


def _combined(name: str, terms: Sequence[_Term], chosen: _Chosen, *, rest: bool) -> _Combined:
    factors = tuple(exact_factors(t.update, name, t.whose) for t in terms)
    dtype = chosen.dtype or widest([update_dtype(t.update) for t in terms])
    if is_vector(terms[0].update):
        return _added(name, terms, factors, chosen, dtype)
    said = Terms(name, factors, tuple(t.weight for t in terms), tuple(_scale(t.update) for t in terms), chosen.seed)
    wanted = _finished(chosen.method.combine(said, **chosen.options), said, chosen)
    source = next((t.update for t, f in zip(terms, factors, strict=True) if f is wanted), None)
    found = reduced(
        wanted,
        chosen.limit,
        name,
        dtype,
        unchanged=source if chosen.kinds_stay or (source is not None and source.as_lora() is not None) else None,
        unchanged_dtype=chosen.dtype,
        layout=_common_layout([t.update for t in terms]),
    )
    parts = parts_of([(t.index, t.weight, f) for t, f in zip(terms, factors, strict=True)], found)
    line = found.stored.module(name, sum(f.rank for f in factors), found.factors.rank)
    module = CombinedModule(**vars(line), adapters=tuple(p.share() for p in parts))
    left = _rest(found, said, chosen, name, dtype) if rest else None
    return _Combined(found.stored.update, module, parts, left)


def _added(name: str, terms: Sequence[_Term], factors: Sequence[Factors], chosen: _Chosen, dtype: str) -> _Combined:
    """Differences of a bias or a norm: there is nothing but to add them up, whatever the method."""
    import torch

    if len(terms) == 1 and terms[0].weight == 1:
        found = passed_through(terms[0].update, factors[0], name, chosen.dtype)
    else:
        columns = torch.stack([t.weight * (f.b @ f.a) for t, f in zip(terms, factors, strict=True)])
        wanted = replace(factors[0], b=columns.sum(dim=0), a=torch.ones(1, 1, dtype=torch.float64))
        found = passed_through(Full(held(wanted.b.reshape(-1))), wanted, name, dtype)
    parts = parts_of([(t.index, t.weight, f) for t, f in zip(terms, factors, strict=True)], found)
    parts = tuple(replace(p, overlaps=()) for p in parts)
    module = CombinedModule(**vars(found.stored.module(name, None, None)), adapters=tuple(p.share() for p in parts))
    return _Combined(found.stored.update, module, parts, None)


def _scale(update: Update) -> float | None:
    """The scale of a plain pair of factors; None of any other kind."""
    lora = update.as_lora()
    return None if lora is None or lora.mid is not None or lora.embedding else lora.scale


def _common_layout(updates: Sequence[Update]) -> Layout:
    return max((layout_of(u) for u in updates), key=lambda layout: len(layout.shape))


def _finished(found: Combination, terms: Terms, chosen: _Chosen) -> Combination:
    """What a method made, calibrated and brought to its size, where that is asked for."""
    from loratools.algebra.calibration import calibrated, dense_svd
    from loratools.algebra.lowrank import Factors, Framed, decompose, norm, truncate

    if chosen.calibrate == "svc":
        if isinstance(found, (Factors, Framed)):
            core = decompose(found)
            own = core.leading(len(core.s))
        else:
            own = dense_svd(found)
        found = truncate(calibrated(own, terms.factors), len(own.s))
    if chosen.norm_match:
        size = math.fsum(abs(w) * norm(f) for w, f in zip(terms.weights, terms.factors, strict=True))
        if isinstance(found, Framed):
            now = float(found.core.norm())
            return replace(found, core=found.core * (size / now)) if now else found
        if isinstance(found, Factors):
            now = norm(found)
            return Factors(found.b * (size / now), found.a) if now and now != size else found
        now = float(found.norm())
        return found * (size / now) if now else found
    return found


def _rest(found: Reduced, terms: Terms, chosen: _Chosen, name: str, dtype: str) -> Update | None:
    """What is to be added to the stored values to have all of it; None where that is rounding."""
    from loratools.algebra.lowrank import EPS, Factors, concatenate, decompose, numerical_rank, truncate

    approximates = getattr(chosen.method, "approximates", None)
    whole = found.wanted if approximates is None else approximates(terms)
    if not isinstance(whole, Factors):
        raise UsageError(
            f"what is lost of '{name}' has no low rank, and makes no adapter",
            hint="work in small coordinates: --set space=core; or leave out --residual",
        )
    difference = concatenate([(1.0, whole), (-1.0, found.factors)])
    core = decompose(difference)
    rank = numerical_rank(core.s, (difference.out_features, difference.in_features), EPS)
    if not rank or float(core.s[0]) <= 1e-12 * found.stored.norm:
        return None
    # Cancelled terms leave directions that are rounding: as large as the values that were subtracted, times epsilon.
    rank = max(1, int((core.s > 1e-12 * max(found.stored.norm, float(core.s[0]))).sum()))
    kept = truncate(core.leading(rank), rank)
    layout = layout_of(found.stored.update)
    return reduced(kept, Limit(), name, dtype, unchanged=None, unchanged_dtype=None, layout=layout).stored.update


def _filled(
    rest: Mapping[str, Update], updates: Mapping[str, Update], layers: Mapping[str, Experts]
) -> dict[str, Update]:
    """What was lost, with experts as one parameter; an expert that lost nothing has zeros there."""
    found = dict(rest)
    for name in layers:
        whole = updates.get(name)
        if whole is not None and whole.as_experts() is not None:
            lost = [n for n in apart({name: whole})[0] if n in rest]
            for part, own in apart({name: whole})[0].items() if lost else ():
                found.setdefault(part, zeros_like(own))
    return together(found, layers)


def _adapter(
    sources: Sequence[Adapter],
    updates: Mapping[str, Update],
    replacements: Mapping[str, Replacement],
    recipe: Mapping[str, object],
) -> Adapter:
    """The result as an adapter, with those notes of the sources that still hold, and with its recipe."""
    notes = agreed_notes([lora_notes(a.notes, updates) for a in sources])
    text = json.dumps({"loratools": __version__, "verb": "combine", "recipe": recipe}, default=str)
    return replace(
        sources[0],
        updates=updates,
        replacements=replacements,
        path=None,
        base_model=next((a.base_model for a in sources if a.base_model is not None), None),
        fan_in_fan_out=_same(a.fan_in_fan_out for a in sources),
        layer_replication=_same(a.layer_replication for a in sources) or (),
        base_class=_same(a.base_class for a in sources),
        task_type=_same(a.task_type for a in sources),
        notes={**notes, "loratools": {"metadata": {"loratools": text}}},
        warnings=(),
    )


def _same(values: Iterable[_T]) -> _T | None:
    """What all the sources say alike; None where they disagree."""
    first, *others = values
    return first if all(value == first for value in others) else None
