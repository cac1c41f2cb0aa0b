"""What becomes of each pair of an extraction: read, compared, decomposed, stored, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from threading import BoundedSemaphore
from typing import ClassVar, Literal, TypeAlias

from loratools.execution.local import run, single_threaded_torch
from loratools.ops.common.device import device_named
from loratools.ops.extract.adapter import Keep, update_of
from loratools.ops.extract.rank_policy import RankPolicy
from loratools.ops.finetune.delta import (
    Decomposed,
    Deltas,
    Extracted,
    Rounding,
    change,
    changed_rows,
    decomposed,
    stored,
)
from loratools.ops.finetune.pairs import Pair
from loratools.storage.same import same_bytes
from loratools.tensors.dtypes import DTYPE_BITS, FLOAT_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reordered
from loratools.updates.parts.protocol import Update

Embeddings = Literal["auto", "lora", "rows", "full", "skip"]

SKIPPED = "left out by --embeddings skip"
# How many times further a module is looked into that takes all of the rank it was decomposed to.
_FURTHER = 4


@dataclass(frozen=True)
class Settings:
    """How to extract; `dtype` of the factors, `device` as it was asked for. See `ops.extract`."""

    policy: RankPolicy
    embeddings: Embeddings
    dtype: str
    tolerance: float | None
    exact: bool
    seed: int
    device: str


@dataclass(frozen=True)
class Unchanged:
    """The bytes or the values are the same."""

    norm: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Whole:
    """Replaced by the fine-tuned tensor, or by those `rows` of it. `norm` of the change; None where shapes differ."""

    norm: float | None
    declared: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Left:
    """Changed and left out. `norm` of the change; None where it has none."""

    norm: float | None
    why: str


@dataclass(frozen=True, eq=False)
class Factored:
    """Became an update, and what was measured on it; see `_delta.Extracted`."""

    update: Update
    rank: int
    norm: float
    error: float
    gap_bound: float
    gap_estimate: float
    rounding: Rounding


Outcome: TypeAlias = Factored | Whole | Left | Unchanged


@dataclass(frozen=True, eq=False)
class _Seen:
    """A decomposition that has its rank only once all others are known; its vectors are kept as factors are."""

    found: Decomposed
    vectors: Mapping[str, LazyTensor]
    look: int

    @property
    def norm(self) -> float:
        return self.found.norm

    def whole(self) -> Decomposed:
        """The decomposition with its vectors."""
        parts = tuple(
            replace(p, u=self.vectors[f"u{i}"].read(), vt=self.vectors[f"vt{i}"].read()) if p is not None else None
            for i, p in enumerate(self.found.parts)
        )
        return replace(self.found, parts=parts)


def _seen(found: Decomposed, look: int, keep: Keep) -> _Seen:
    parts = {i: p for i, p in enumerate(found.parts) if p is not None}
    vectors = keep({f"u{i}": p.u for i, p in parts.items()} | {f"vt{i}": p.vt for i, p in parts.items()})
    # Not a slice: that would hold all of it.
    bare = tuple(replace(p, u=p.u.new_empty(0), vt=p.vt.new_empty(0)) if p is not None else None for p in found.parts)
    return _Seen(replace(found, parts=bare), vectors, look)


def gets_factors(pair: Pair, settings: Settings) -> bool:
    """Whether it is decomposed, should it have changed."""
    return pair.layer is not None and not no_factors(pair, settings)


def taken_whole(pair: Pair, settings: Settings) -> str | None:
    """How it is declared, where it is known beforehand to be taken whole, should it have changed; None elsewhere."""
    whole = no_factors(pair, settings) and settings.embeddings != "skip"
    return pair.declared or (embedding_declared(pair) if whole else None)


def no_factors(pair: Pair, settings: Settings) -> bool:
    """Whether a layer is known beforehand not to become factors: an embedding that is skipped, or taken whole.

    An embedding that a head is tied to is always whole: PEFT adds factors of it to the embedding alone, or, asked to
    tie them (`ensure_weight_tying`), merges them into the one weight twice.
    """
    if pair.layer != "embedding":
        return False
    if settings.embeddings in ("rows", "full", "skip") or pair.followed:
        return True
    rank = settings.policy.planned(min(pair.base.shape)) if settings.embeddings == "auto" else None
    return rank is not None and factor_bytes(pair, rank, settings.dtype) >= pair.tuned.nbytes


def embedding_declared(pair: Pair) -> str:
    """How an embedding that is taken whole is declared: PEFT trains a copy of a module to save, which nothing would
    follow, but writes an embedding into the base."""
    return "embedding" if pair.followed else "modules_to_save"


def factor_bytes(pair: Pair, rank: int, dtype: str) -> int:
    """Bytes of factors of this rank."""
    count, rows, columns = pair.matrices
    return rank * count * (rows + columns) * DTYPE_BITS[dtype] // 8


def rows_bytes(pair: Pair, rows: Sequence[int]) -> int:
    """Bytes of these rows, and of their numbers in the config."""
    return len(rows) * (pair.tuned.nbytes // max(1, pair.tuned.shape[0]) + len(str(pair.tuned.shape[0])) + 2)


def whole_of(pair: Pair, outcome: Whole) -> LazyTensor:
    """What of the fine-tuned tensor replaces the base's."""
    return pair.tuned if outcome.rows is None else reordered(pair.tuned, outcome.rows)


def outcomes(
    pairs: Sequence[Pair],
    settings: Settings,
    threads: int,
    other_bytes: int,
    progress: Callable[[int], None] | None,
    look_at: Callable[[Sequence[Pair]], None] | None,
    keep: Keep,
) -> dict[Pair, Outcome]:
    """What becomes of each pair. `other_bytes`: of what the adapter holds besides them. `look_at` is told which pairs
    changed before anything is computed, and may raise. `keep`: where factors go."""
    changed, found = _compared(pairs, threads, progress)
    if look_at is not None:
        look_at(changed)
    with single_threaded_torch():
        work = _Work(replace(settings, device=device_named(settings.device)), threads, keep)
        look = None
        if settings.policy.limits_all:
            costs = [count * (rows + columns) for count, rows, columns in (p.matrices for p in changed if p.layer)]
            look = settings.policy.first_look(costs, settings.dtype)
        found |= work.on(changed, lambda pair: work.first(pair, look), progress)
        finished = work.within_limits(found, other_bytes) if settings.policy.limits_all else found
    return {pair: outcome for pair in pairs if not isinstance(outcome := finished[pair], _Seen)}


def _compared(
    pairs: Sequence[Pair], threads: int, progress: Callable[[int], None] | None
) -> tuple[list[Pair], dict[Pair, Outcome | _Seen]]:
    """The pairs that changed, and the outcome of those that did not; torch is imported meanwhile, which takes as long
    as reading a gigabyte."""
    with ThreadPoolExecutor(1) as aside:
        importing = aside.submit(import_module, "torch")
        ordered = sorted(pairs, key=lambda p: (-p.nbytes, p.name))
        same = dict(zip(ordered, run(ordered, lambda p: same_bytes(p.base, p.tuned), threads=threads), strict=True))
        importing.result()
    unchanged = [pair for pair in pairs if same[pair]]
    if progress is not None:
        progress(sum(pair.nbytes for pair in unchanged))
    return [pair for pair in pairs if not same[pair]], {pair: Unchanged() for pair in unchanged}


class _Work:
    def __init__(self, settings: Settings, threads: int, keep: Keep) -> None:
        self.settings = settings
        self.keep = keep
        self.threads = threads
        # One more worker than may compute: while all others do, it reads.
        self.computing = BoundedSemaphore(threads)

    def on(
        self,
        pairs: Sequence[Pair],
        work: Callable[[Pair], Outcome | _Seen],
        progress: Callable[[int], None] | None = None,
    ) -> dict[Pair, Outcome | _Seen]:
        def one(pair: Pair) -> Outcome | _Seen:
            found = work(pair)
            if progress is not None:
                progress(pair.nbytes)
            return found

        # The largest first: one that is begun last would keep a single thread busy at the end.
        ordered = sorted(pairs, key=lambda p: (-p.nbytes, p.name))
        found = dict(zip(ordered, run(ordered, one, threads=self.threads + 1), strict=True))
        return {pair: found[pair] for pair in pairs}

    def first(self, pair: Pair, look: int | None) -> Outcome | _Seen:
        """The outcome, where it needs no others; `look`: the rank to decompose to where it does."""
        if gets_factors(pair, self.settings):
            return self._decomposed(pair, look)
        size = self._change(pair)
        if size == 0:
            return Unchanged()
        if (declared := taken_whole(pair, self.settings)) is not None:
            return self._whole(pair, size, declared, self._rows(pair))
        if pair.layer == "embedding":
            return Left(size, SKIPPED)
        return Left(size, pair.why or "values that have no difference")

    @staticmethod
    def _change(pair: Pair) -> float | None:
        if not {pair.base.dtype, pair.tuned.dtype} <= set(FLOAT_DTYPES):
            return None
        # A vocabulary that grew keeps its rows; a head of other labels has nothing in common with the old one.
        if pair.base.shape != pair.tuned.shape and not pair.grown:
            return None
        return change(pair.name, pair.base, pair.tuned)

    def _rows(self, pair: Pair) -> tuple[int, ...] | None:
        """The rows that changed or are new, where they may be stored in place of the tensor."""
        table = pair.by_rows and (pair.layer == "embedding" or pair.grown)
        return changed_rows(pair.base, pair.tuned) if table and self.settings.embeddings != "full" else None

    def _whole(self, pair: Pair, size: float | None, declared: str, rows: tuple[int, ...] | None) -> Whole:
        """The tensor, or those rows of it where they are less."""
        if rows is not None and (self.settings.embeddings == "rows" or rows_bytes(pair, rows) < pair.tuned.nbytes):
            return Whole(size, "tokens", rows)
        return Whole(size, declared)

    def _decomposed(self, pair: Pair, look: int | None) -> Outcome | _Seen:
        rows = self._rows(pair) if pair.layer == "embedding" and self.settings.embeddings == "auto" else None
        if rows is not None and self._no_more_than_factors(pair, rows):
            # They are exact.
            return Whole(self._change(pair), "tokens", rows) if rows else Unchanged()
        deltas = Deltas(pair.name, pair.base, pair.tuned, pair.matrices)
        with self.computing:
            rule = self.settings.policy.rule(min(pair.matrices[1:]), deltas.edge, look)
            s = self.settings
            found = decomposed(deltas, rule, tolerance=s.tolerance, seed=s.seed, exact=s.exact, device=s.device)
            if found is None:
                return Unchanged()
            if look is not None:
                return _seen(found, look, self.keep)
            rank = len(found.spectrum)
            small = s.embeddings == "auto" and factor_bytes(pair, rank, s.dtype) >= pair.tuned.nbytes
            if pair.layer == "embedding" and small:
                return self._whole(pair, found.norm, embedding_declared(pair), rows)
            return self._factored(pair, stored(deltas, found, rank, s.dtype))

    def _factored(self, pair: Pair, e: Extracted) -> Factored:
        update = update_of(pair, e.left, e.right, self.keep)
        return Factored(update, e.rank, e.norm, e.error, e.gap_bound, e.gap_estimate, e.rounding)

    def _no_more_than_factors(self, pair: Pair, rows: tuple[int, ...]) -> bool:
        rank = self.settings.policy.planned(min(pair.matrices[1:])) or 1
        return rows_bytes(pair, rows) <= factor_bytes(pair, rank, self.settings.dtype)

    def within_limits(self, found: Mapping[Pair, Outcome | _Seen], other_bytes: int) -> dict[Pair, Outcome]:
        """The outcomes, with ranks shared out over what is only decomposed yet."""
        seen = {pair: r for pair, r in found.items() if isinstance(r, _Seen)}
        whole = {pair: whole_of(pair, r) for pair, r in found.items() if isinstance(r, Whole)}
        replaced = {pair.name: tensor.elements for pair, tensor in whole.items()}
        taken = other_bytes + sum(tensor.nbytes for tensor in whole.values())
        while True:
            ranks = self.settings.policy.shared_out(
                [pair.target for pair in seen],
                [r.found.spectrum for r in seen.values()],
                [count * (rows + columns) for count, rows, columns in (pair.matrices for pair in seen)],
                replaced,
                self.settings.dtype,
                taken,
            )
            given = dict(zip(seen, ranks, strict=True))
            # Whoever takes all that was looked at might take more of what was not.
            short = [
                pair
                for pair, r in seen.items()
                if given[pair] >= r.look and r.look < self.settings.policy.most(min(pair.matrices[1:]))
            ]
            if not short:
                break
            looks = {pair: seen[pair].look * _FURTHER for pair in short}
            more = self.on(short, lambda pair, looks=looks: self._decomposed(pair, looks[pair]))  # type: ignore[misc]
            seen |= {pair: r for pair, r in more.items() if isinstance(r, _Seen)}

        def kept(pair: Pair) -> Outcome:
            deltas = Deltas(pair.name, pair.base, pair.tuned, pair.matrices)
            with self.computing:
                return self._factored(pair, stored(deltas, seen[pair].whole(), given[pair], self.settings.dtype))

        finished = self.on(list(seen), kept)
        return {pair: finished.get(pair, r) for pair, r in found.items()}  # type: ignore[misc]
