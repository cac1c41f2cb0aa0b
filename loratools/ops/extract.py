"""Extract an adapter from a fine-tuned checkpoint: each changed weight as the best product of small rank.

    tuned - base  ~  B @ A          per tensor, streamed from both sides, by certified truncated SVD (`algebra.svd`)

Norms, biases and new heads are taken whole, as an adapter can hold them. What changed and is in neither is measured and
listed: an adapter that leaves out a part of a fine-tune must say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError, UsageError
from loratools.execution.local import worker_count
from loratools.formats._base import Base
from loratools.ops._arguments import stored_dtype
from loratools.ops._delta import norm
from loratools.ops._extract_adapter import adapter_of
from loratools.ops._extract_cost import Cost, cost_of
from loratools.ops._extract_fit import outline
from loratools.ops._extract_work import (
    SKIPPED,
    Embeddings,
    Factored,
    Left,
    Outcome,
    Settings,
    Unchanged,
    Whole,
    embedding_declared,
    held_all,
    no_factors,
    outcomes,
    whole_of,
)
from loratools.ops._pairs import Alone, Pair, Pairs, line_up
from loratools.ops._ranks import RankPolicy
from loratools.storage.commit import check_output
from loratools.storage.scratch import scratch_beside
from loratools.tensors import DTYPE_BITS, FLOAT_DTYPES

# From this share of unchanged weights on, rounding has taken away much of the update.
_MOSTLY_IDENTICAL = 0.5
# An adapter that captures less of the change is no good stand-in for it.
_LITTLE_ENERGY = 0.5
# ... unless it was not given the rank.
_FAIR_RANK = 16


@dataclass(frozen=True)
class ExtractedModule:
    """A line of the report. `energy` is the captured share of `norm` squared, `error` the relative Frobenius error,
    both of the factors as stored; the gaps say how much of the energy a better decomposition of this rank could still
    capture: at most, and probably. `identical` is the share of weights that are bit for bit the base's, `noise_edge`
    the singular value that rounding to the tuned dtype may have made up. None in a plan; the rank too, where values
    decide."""

    name: str
    rank: int | None
    shape: tuple[int, ...] = ()
    energy: float | None = None
    error: float | None = None
    gap_bound: float | None = None
    gap_estimate: float | None = None
    norm: float | None = None
    identical: float | None = None
    noise_edge: float | None = None


@dataclass(frozen=True)
class Replaced:
    """A tensor that the adapter holds whole: how it is declared (`adapter.Replacement`), its shape, the `norm` of its
    change and its `share` of the squared norm of all changes; None of what the base does not have."""

    name: str
    declared: str
    shape: tuple[int, ...]
    bytes: int
    norm: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A tensor that changed and is not in the adapter: why, how large the change is, and its `share` of the squared
    norm of all changes. None where that is not known: numbers that are not weights, or a tensor that only one has."""

    name: str
    why: str
    norm: float | None
    share: float | None


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did. `energy` and `error` are over the extracted modules, `change_captured` is the share of
    all that changed. `identical` is the share of the weights of changed modules that are bit for bit the base's.
    `output` is None where nothing was written, `adapter` where it was only planned, `cost` where it was not."""

    modules: tuple[ExtractedModule, ...]
    energy: float | None
    error: float | None
    change_captured: float | None
    identical: float | None
    skipped: tuple[Skipped, ...]
    replacements: tuple[Replaced, ...]
    unchanged: int | None
    output: Path | None
    adapter: Adapter | None
    bytes: int | None
    warnings: tuple[str, ...] = ()
    cost: Cost | None = None

    def as_json(self) -> dict[str, object]:
        """The document of `loratools extract --json`, without its head."""
        fields = ("name", "rank", "shape", "energy", "error", "gap_bound", "gap_estimate", "norm", "identical")
        plan = {} if self.cost is None else {"memory": self.cost.memory, "seconds_estimate": self.cost.seconds}
        return {
            "modules": [{f: getattr(m, f) for f in (*fields, "noise_edge")} for m in self.modules],
            "energy": self.energy,
            "error": self.error,
            "change_captured": self.change_captured,
            "identical": self.identical,
            "skipped": [{"name": s.name, "why": s.why, "norm": s.norm, "share": s.share} for s in self.skipped],
            "unchanged": self.unchanged,
            "replacements": [
                {f: getattr(r, f) for f in ("name", "declared", "shape", "bytes", "norm", "share")}
                for r in self.replacements
            ],
            "bytes": self.bytes,
            **plan,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


def extract(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    noise_edge: bool = False,
    max_rank: int | None = None,
    max_size: int | None = None,
    max_params: int | None = None,
    embeddings: Embeddings = "auto",
    whole: Sequence[str] = (),
    dtype: str = "F32",
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    format: str = "peft",
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> ExtractReport:
    """Return the adapter that turns `base` into nearly `tuned`, written to `out` where that is given.

    At most one rule chooses the rank of each module, clipped to the smaller side of a matrix:

    rank        this rank.
    energy      the smallest that keeps this share of the squared Frobenius norm of the module's change.
    error       the smallest with at most this relative Frobenius error.
    noise_edge  as many directions as rise above what rounding to the dtype of `tuned` does to every weight.

    Limits go together with a rule, or stand alone:

    max_rank    no module gets a higher one.
    max_size    bytes of the file of weights; ranks are shared out so that all modules together lose least.
    max_params  the same, for the number of parameters.

    embeddings  tables of vectors as factors (lora), as the rows that changed or are new (rows), whole (full), not at
                all (skip), or as what is smallest (auto). All but factors are exact.
    whole       globs: modules that are stored as the fine-tune has them, which is exact; where no low rank will do.
    tolerance   share of the captured energy that a better decomposition may probably still find (default: that of
                `algebra.svd`). Smaller takes more passes over each delta.
    exact       no randomised method: slower by the size of the matrix over the rank.
    seed        of the random start. Equal inputs and seed give equal bytes, whatever the number of threads.
    threads     tensors worked on at once, and so held in memory; one per CPU by default.
    device      what decomposes: cpu, cuda, cuda:N, or auto.
    format      to write; what it cannot hold is an error, and can be left out with `exclude`.
    plan        list what would be extracted, from headers alone: of tables of vectors all rows, since values decide.

    A tensor whose bytes are the same on both sides is not decoded. Scale is 1, and B and A have equal norms.

    Raises:
        UsageError: no rule and no limit, or a limit that rank 1 everywhere exceeds.
        InputError: nothing changed, or values that are not finite.
        MismatchError: names or shapes of the two checkpoints do not line up.
        UnsupportedError: one of them is quantised.
        OutputExistsError: `out` exists, or is one of the inputs.
    """
    policy = RankPolicy(rank, energy, error, noise_edge, max_rank, max_size, max_params)
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is not between 0 and 1")
    settings = Settings(policy, embeddings, stored_dtype(dtype), tolerance, exact, seed, device)
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, tuned))
    inputs = [before.path, after.path]
    if out is not None:
        check_output(formats.named(Path(out), format), overwrite=overwrite, inputs=inputs)
    pairs = line_up(before, after, include=include, exclude=exclude, whole=whole)
    warnings = [*pairs.warnings, *(f"'{c.name}': {text}" for c in (before, after) for text in c.warnings)]
    workers = worker_count(threads)
    known = Base({name: w.shape for name, w in before.weights.items()}, before.config, before.path)
    if plan:
        adapter = outline(before, after, pairs, pairs.pairs, settings)
        warnings += _unwritable(formats.writer(format).unwritable(adapter, base=known), format)
        return _planned(pairs, settings, workers, warnings)

    new = [a for a in pairs.alone if a.declared is not None]
    new_bytes = sum(a.tensor.nbytes for a in new)

    def ensure_writable(changed: Sequence[Pair]) -> None:
        # Hours of decomposing would end in the same error.
        formats.ensure_writable(outline(before, after, pairs, changed, settings), format, base=known)

    look_at = ensure_writable if out is not None else lambda changed: None
    with ExitStack() as stack:
        # Of a large model the factors are gigabytes: they wait on the disk that they go to.
        keep = stack.enter_context(scratch_beside(Path(out))).keep if out is not None else held_all
        results = outcomes(pairs.pairs, settings, workers, new_bytes, progress, look_at, keep)
        factors = {p: r for p, r in results.items() if isinstance(r, Factored)}
        replaced = _replacements(pairs, results)
        everything = math.fsum(_square(r) for r in results.values())
        skipped = _skipped(pairs, results, everything)
        if not factors and not replaced:
            raise _nothing(before, after, skipped)
        updates = {p: r.update for p, r in factors.items()}
        adapter = adapter_of(before, pairs, updates, {name: r for name, (r, _) in replaced.items()})
        report = _report(pairs, results, factors, replaced, skipped, everything, adapter)
        if settings.embeddings == "lora" and (tied := [p.name for p, r in results.items() if p.followed and r.norm]):
            warnings.append(
                f"'{tied[0]}' is taken whole: a tied head follows it, and PEFT would add factors to one of the two only"
            )
        warnings += _resized(results)
        warnings += _doubts(report, factors, settings)
        if out is not None:
            warnings += formats.save(adapter, out, format=format, overwrite=overwrite, inputs=inputs, base=known)
    if out is not None:
        written = formats.named(Path(out), format)
        adapter = formats.load(written, format=format, base=known)
        report = replace(report, output=written)
    return replace(report, adapter=adapter, warnings=tuple(warnings))


def _planned(pairs: Pairs, settings: Settings, workers: int, warnings: Sequence[str]) -> ExtractReport:
    whole = {p for p in pairs.pairs if p.declared or (no_factors(p, settings) and settings.embeddings != "skip")}
    chosen = [p for p in pairs.pairs if p.layer is not None and not no_factors(p, settings)]
    ranks = [settings.policy.planned(min(p.matrices[1:])) for p in chosen]
    modules = [ExtractedModule(p.target, rank, p.base.shape) for p, rank in zip(chosen, ranks, strict=True)]
    replaced = [Replaced(p.name, p.declared or embedding_declared(p), p.tuned.shape, p.tuned.nbytes) for p in whole]
    replaced += [Replaced(a.name, a.declared, a.tensor.shape, a.tensor.nbytes) for a in pairs.alone if a.declared]
    nbytes = None
    if all(rank is not None for rank in ranks):
        per_rank = [count * (rows + columns) for count, rows, columns in (p.matrices for p in chosen)]
        stored = sum((rank or 0) * cost for rank, cost in zip(ranks, per_rank, strict=True))
        nbytes = stored * DTYPE_BITS[settings.dtype] // 8 + sum(r.bytes for r in replaced)
    skipped = [Skipped(p.name, p.why, None, None) for p in pairs.pairs if p.why is not None]
    skipped += [Skipped(p.name, SKIPPED, None, None) for p in pairs.pairs if p not in whole and no_factors(p, settings)]
    skipped += [Skipped(a.name, a.why, None, None) for a in pairs.alone if a.declared is None]
    return ExtractReport(
        modules=tuple(modules),
        energy=None,
        error=None,
        change_captured=None,
        identical=None,
        skipped=tuple(sorted(skipped, key=_name)),
        replacements=tuple(sorted(replaced, key=_name)),
        unchanged=None,
        output=None,
        adapter=None,
        bytes=nbytes,
        warnings=tuple(warnings),
        cost=cost_of(pairs.pairs, settings.policy, workers),
    )


def _name(entry: Skipped | Replaced | ExtractedModule) -> str:
    return entry.name


def _replacements(pairs: Pairs, results: Mapping[Pair, Outcome]) -> dict[str, tuple[Replacement, float | None]]:
    """Name of a weight -> what replaces it, and the norm of its change.

    Of a module to save all tensors are stored, changed or not: PEFT loads such modules as a whole.
    """
    found: dict[str, tuple[Replacement, float | None]] = {}
    for pair, result in results.items():
        if isinstance(result, Whole):
            found[_told(pair)] = Replacement(whole_of(pair, result), result.declared, result.rows), result.norm
    for alone in pairs.alone:
        if alone.declared is not None:
            found[alone.name] = Replacement(alone.tensor, alone.declared), None
    modules = {name.rpartition(".")[0] for name, (r, _) in found.items() if r.declared == "modules_to_save"}
    for pair in results:
        name = _told(pair)
        if name.rpartition(".")[0] in modules:
            found[name] = Replacement(pair.tuned, "modules_to_save"), found[name][1] if name in found else 0.0
    return found


def _told(pair: Pair) -> str:
    """The name of its weight as an adapter has it: by the name of its module there."""
    leaf = pair.name.rpartition(".")[2]
    return f"{pair.target}.{leaf}" if leaf in ("weight", "bias") else pair.target


def _skipped(pairs: Pairs, results: Mapping[Pair, Outcome], everything: float) -> list[Skipped]:
    """What changed and was not extracted, with its share of all that changed."""
    found = [
        Skipped(p.name, r.why, r.norm, r.norm**2 / everything if r.norm is not None else None)
        for p, r in results.items()
        if isinstance(r, Left)
    ]
    found += [Skipped(a.name, a.why, _norm_of(a), None) for a in pairs.alone if a.declared is None]
    return sorted(found, key=_name)


def _square(result: Outcome) -> float:
    return (result.norm or 0.0) ** 2


def _norm_of(alone: Alone) -> float | None:
    return norm(alone.name, alone.tensor) if alone.tensor.dtype in FLOAT_DTYPES else None


def _nothing(base: Checkpoint, tuned: Checkpoint, skipped: Sequence[Skipped]) -> InputError:
    changed = [f"{s.name}   {s.why}" for s in skipped if s.share is not None]
    if not changed:
        return InputError(
            f"'{tuned.name}' has the weights of '{base.name}': nothing changed, so there is nothing to extract",
            hint="give the base first and the fine-tuned model second; has it been saved after training?",
        )
    return InputError(
        f"nothing of '{tuned.name}' that an adapter can hold and that was to be extracted differs from '{base.name}'",
        details=changed,
        hint="choose other modules with --include and --exclude",
    )


def _report(
    pairs: Pairs,
    results: Mapping[Pair, Outcome],
    factors: Mapping[Pair, Factored],
    replaced: Mapping[str, tuple[Replacement, float | None]],
    skipped: Sequence[Skipped],
    everything: float,
    adapter: Adapter,
) -> ExtractReport:
    modules = [
        ExtractedModule(
            name=p.target,
            rank=e.rank,
            shape=p.base.shape,
            energy=max(0.0, 1 - e.error**2),
            error=e.error,
            gap_bound=e.gap_bound,
            gap_estimate=e.gap_estimate,
            norm=e.norm,
            identical=e.rounding.identical / max(1, e.rounding.elements),
            noise_edge=e.rounding.edge(p.matrices[1:]),
        )
        for p, e in factors.items()
    ]
    total = math.fsum(e.norm**2 for e in factors.values())
    lost = math.fsum((e.norm * e.error) ** 2 for e in factors.values())
    whole = math.fsum(n**2 for _, n in replaced.values() if n is not None)
    elements = sum(e.rounding.elements for e in factors.values())
    taken = [
        Replaced(name, r.declared, r.tensor.shape, r.tensor.nbytes, n, n**2 / everything if n is not None else None)
        for name, (r, n) in replaced.items()
    ]
    return ExtractReport(
        modules=tuple(sorted(modules, key=_name)),
        energy=max(0.0, 1 - lost / total) if total else None,
        error=math.sqrt(lost / total) if total else None,
        change_captured=max(0.0, (total - lost + whole) / everything) if everything else None,
        identical=sum(e.rounding.identical for e in factors.values()) / elements if elements else None,
        skipped=tuple(skipped),
        replacements=tuple(sorted(taken, key=_name)),
        unchanged=sum(isinstance(r, Unchanged) for r in results.values()),
        output=None,
        adapter=None,
        bytes=sum(t.nbytes for t in adapter.tensors().values()),
    )


def _resized(results: Mapping[Pair, Outcome]) -> list[str]:
    """What PEFT must be told before it can load the adapter."""
    sizes = sorted(
        {(p.base.shape[0], p.tuned.shape[0]) for p, r in results.items() if p.grown and isinstance(r, Whole)}
    )
    return [
        f"the vocabulary goes from {old} to {new} tokens: before PEFT loads the adapter, "
        f"base.resize_token_embeddings({new}); loratools merge does it by itself"
        for old, new in sizes
    ]


def _unwritable(lost: Mapping[str, str], format: str) -> list[str]:
    """What the format cannot hold, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in sorted(lost.items()):
        by_reason.setdefault(why, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} cannot be written as {format}, should it "
        f"have changed: {why}; leave such modules out with --exclude"
        for why, names in by_reason.items()
    ]


def _doubts(report: ExtractReport, factors: Mapping[Pair, Factored], settings: Settings) -> list[str]:
    """What speaks against taking the adapter for the fine-tune."""
    found = []
    narrow = [e.rounding for p, e in factors.items() if p.tuned.dtype in ("BF16", "F16")]
    elements, identical = sum(r.elements for r in narrow), sum(r.identical for r in narrow)
    if elements and identical > _MOSTLY_IDENTICAL * elements:
        found.append(
            f"{identical / elements:.0%} of the weights of changed modules are bit for bit the base's: the update is "
            "smaller than the rounding of the fine-tuned checkpoint, which stored it attenuated and in part only"
        )
    ranks = max(((m.rank or 0) for m in report.modules), default=0)
    if report.energy is not None and report.energy < _LITTLE_ENERGY and ranks >= _FAIR_RANK:
        changed = sum(e.rounding.elements - e.rounding.identical for e in factors.values())
        whole = sum(p.tuned.nbytes for p in factors)
        width = sum(p.tuned.nbytes for p in factors) / max(1, sum(e.rounding.elements for e in factors.values()))
        found.append(
            f"the adapter holds {report.energy:.1%} of the change, at ranks up to {ranks}: it is spread over nearly "
            "all directions, as reinforcement learning and noise leave it, and is not of low rank. The whole "
            f"difference takes {whole / 1e6:,.0f} MB, and the {changed:,} weights that changed with their places "
            f"{changed * (width + 4) / 1e6:,.0f} MB: take modules whole with --whole"
        )
    policy = settings.policy
    asked = policy.error if policy.error is not None else None
    if policy.energy is not None:
        asked = math.sqrt(max(0.0, 1 - policy.energy))
    if asked is not None:
        # Above what float32 sums can tell.
        short = [m for m in report.modules if (m.error or 0.0) > asked + 1e-6]
        if short:
            reason = "limits on size" if policy.limits_all or policy.max_rank else f"storing as {settings.dtype}"
            found.append(f"{len(short)} modules keep less than asked for, for {reason}: {short[0].name} and others")
    return found
