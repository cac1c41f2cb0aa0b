"""The work of an extraction: pairs read, compared, decomposed and stored, on several threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from threading import BoundedSemaphore

from loratools.execution.local import run, single_threaded_torch
from loratools.ops.common.device import computed_on, device_named
from loratools.ops.extract.finished import FinishedWork
from loratools.ops.extract.outcomes import NotExtracted, Outcome, ReplacedTensor, Unchanged
from loratools.ops.extract.pending import Pending
from loratools.ops.extract.settings import Settings
from loratools.ops.extract.treatment import SKIPPED, declared_if_replaced, factor_bytes, gets_factors, rows_bytes
from loratools.ops.finetune.delta import Deltas, change, changed_rows, decomposed, stored
from loratools.ops.finetune.pairs import Pair
from loratools.storage.same import same_bytes
from loratools.storage.scratch import WorkStore
from loratools.tensors.dtypes import FLOAT_DTYPES

# How many times further a module is decomposed that takes all of the rank it was decomposed to.
_GROWTH = 4


def outcomes(
    pairs: Sequence[Pair],
    settings: Settings,
    *,
    threads: int,
    other_bytes: int,
    progress: Callable[[int], None] | None,
    on_changed: Callable[[Sequence[Pair]], None] | None,
    store: WorkStore,
) -> dict[Pair, Outcome]:
    """What becomes of each pair.

    Args:
        pairs: All that both checkpoints have.
        settings: How to extract.
        threads: Tensors decomposed at once.
        other_bytes: Bytes of what the adapter holds besides the pairs.
        progress: Called with the number of bytes read since the last call.
        on_changed: Called with the pairs that changed before anything is computed; it may raise.
        store: Where what is done is set aside, and where a killed run has done so.
    """
    changed, unchanged = _compared(pairs, threads, progress)
    if on_changed is not None:
        on_changed(changed)
    with single_threaded_torch():
        work = _Work(replace(settings, device=device_named(settings.device)), threads, store)
        search_rank = None
        if settings.policy.limits_all:
            costs = [count * (rows + columns) for count, rows, columns in (p.matrices for p in changed if p.layer)]
            search_rank = settings.policy.initial_search_rank(costs, settings.dtype)
        first = unchanged | work.on_all(changed, lambda pair: work.first(pair, search_rank), progress)
        final = work.within_limits(first, other_bytes) if settings.policy.limits_all else first
    return {pair: outcome for pair in pairs if not isinstance(outcome := final[pair], Pending)}


def _compared(
    pairs: Sequence[Pair], threads: int, progress: Callable[[int], None] | None
) -> tuple[list[Pair], dict[Pair, Outcome | Pending]]:
    """The pairs that changed, and the outcome of those that did not; torch is imported meanwhile, which takes as long
    as reading a gigabyte."""
    with ThreadPoolExecutor(1) as aside:
        importing = aside.submit(import_module, "torch")
        ordered = sorted(pairs, key=lambda p: (-p.nbytes, p.name))
        is_same = dict(zip(ordered, run(ordered, lambda p: same_bytes(p.base, p.tuned), threads=threads), strict=True))
        importing.result()
    unchanged = [pair for pair in pairs if is_same[pair]]
    if progress is not None:
        progress(sum(pair.nbytes for pair in unchanged))
    return [pair for pair in pairs if not is_same[pair]], {pair: Unchanged() for pair in unchanged}


class _Work:
    """The order of work on the pairs: a limited number of decompositions at once, and one pair being read."""

    def __init__(self, settings: Settings, threads: int, store: WorkStore) -> None:
        self.settings = settings
        self.finished = FinishedWork(store, computed_on(settings.device))
        self.threads = threads
        # One more worker than may compute: while all others do, it reads.
        self.computing = BoundedSemaphore(threads)

    def on_all(
        self,
        pairs: Sequence[Pair],
        work: Callable[[Pair], Outcome | Pending],
        progress: Callable[[int], None] | None = None,
    ) -> dict[Pair, Outcome | Pending]:
        """Do the work on all pairs, on several threads; the results are in the order of the pairs."""

        def with_progress(pair: Pair) -> Outcome | Pending:
            result = work(pair)
            if progress is not None:
                progress(pair.nbytes)
            return result

        # The largest first: one that is begun last would keep a single thread busy at the end.
        ordered = sorted(pairs, key=lambda p: (-p.nbytes, p.name))
        results = dict(zip(ordered, run(ordered, with_progress, threads=self.threads + 1), strict=True))
        return {pair: results[pair] for pair in pairs}

    def first(self, pair: Pair, search_rank: int | None) -> Outcome | Pending:
        """The outcome, where it needs no others; `search_rank`: the rank to decompose to where it does."""
        if gets_factors(pair, self.settings):
            return self._decomposed(pair, search_rank)
        size = self._change(pair)
        if size == 0:
            return Unchanged()
        if (declared := declared_if_replaced(pair, self.settings)) is not None:
            return self._replaced_tensor(pair, size, declared, self._rows(pair))
        if pair.layer == "embedding":
            return NotExtracted(size, SKIPPED)
        return NotExtracted(size, pair.why or "values that have no difference")

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

    def _replaced_tensor(
        self, pair: Pair, size: float | None, declared: str, rows: tuple[int, ...] | None
    ) -> ReplacedTensor:
        """The tensor, or those rows of it where they are less."""
        if rows is not None and (self.settings.embeddings == "rows" or rows_bytes(pair, rows) < pair.tuned.nbytes):
            return ReplacedTensor(size, "tokens", rows)
        return ReplacedTensor(size, declared)

    def _decomposed(self, pair: Pair, search_rank: int | None) -> Outcome | Pending:
        rows = self._rows(pair) if pair.layer == "embedding" and self.settings.embeddings == "auto" else None
        if rows is not None and self._no_more_than_factors(pair, rows):
            # They are exact.
            return ReplacedTensor(self._change(pair), "tokens", rows) if rows else Unchanged()
        settings = self.settings
        earlier = (
            self.finished.factored(pair, None) if search_rank is None else self.finished.pending(pair, search_rank)
        )
        if earlier is not None:
            return earlier
        may_be_whole = search_rank is None and pair.layer == "embedding" and settings.embeddings == "auto"
        if may_be_whole and (norm := self.finished.norm_of_whole(pair)) is not None:
            return self._replaced_tensor(pair, norm, pair.declared_whole, rows)
        deltas = Deltas(pair.name, pair.base, pair.tuned, pair.matrices)
        with self.computing:
            decomposition = decomposed(
                deltas,
                settings.policy.rule(min(pair.matrices[1:]), deltas.edge, search_rank),
                tolerance=settings.tolerance,
                seed=settings.seed,
                exact=settings.exact,
                device=settings.device,
            )
            if decomposition is None:
                return Unchanged()
            if search_rank is not None:
                return self.finished.keep_pending(pair, decomposition, search_rank)
            rank = len(decomposition.spectrum)
            if may_be_whole and factor_bytes(pair, rank, settings.dtype) >= pair.tuned.nbytes:
                self.finished.keep_norm_of_whole(pair, decomposition.norm)
                return self._replaced_tensor(pair, decomposition.norm, pair.declared_whole, rows)
            extracted = stored(deltas, decomposition, rank, settings.dtype)
            return self.finished.keep_factored(pair, extracted, None)

    def _no_more_than_factors(self, pair: Pair, rows: tuple[int, ...]) -> bool:
        rank = self.settings.policy.planned(min(pair.matrices[1:])) or 1
        return rows_bytes(pair, rows) <= factor_bytes(pair, rank, self.settings.dtype)

    def within_limits(self, first: Mapping[Pair, Outcome | Pending], other_bytes: int) -> dict[Pair, Outcome]:
        """The outcomes, with ranks shared out over the decompositions among them."""
        pending = {pair: outcome for pair, outcome in first.items() if isinstance(outcome, Pending)}
        replaced = {p: outcome.part_of(p.tuned) for p, outcome in first.items() if isinstance(outcome, ReplacedTensor)}
        replaced_bytes = other_bytes + sum(tensor.nbytes for tensor in replaced.values())
        while True:
            ranks = self.settings.policy.shared_out(
                [pair.target for pair in pending],
                [p.decomposition.spectrum for p in pending.values()],
                [count * (rows + columns) for count, rows, columns in (pair.matrices for pair in pending)],
                {pair.name: tensor.elements for pair, tensor in replaced.items()},
                self.settings.dtype,
                replaced_bytes,
            )
            rank_of = dict(zip(pending, ranks, strict=True))
            search_ranks = {
                pair: p.search_rank * _GROWTH
                for pair, p in pending.items()
                if self._may_take_more(pair, p, rank_of[pair])
            }
            if not search_ranks:
                break
            deeper = self.on_all(list(search_ranks), lambda pair, to=search_ranks: self._decomposed(pair, to[pair]))  # type: ignore[misc]
            pending |= {pair: outcome for pair, outcome in deeper.items() if isinstance(outcome, Pending)}

        def factored(pair: Pair) -> Outcome:
            rank = rank_of[pair]
            if (earlier := self.finished.factored(pair, rank)) is not None:
                return earlier
            deltas = Deltas(pair.name, pair.base, pair.tuned, pair.matrices)
            with self.computing:
                decomposition = pending[pair].with_vectors()
                extracted = stored(deltas, decomposition, rank, self.settings.dtype)
                return self.finished.keep_factored(pair, extracted, rank)

        final = self.on_all(list(pending), factored)
        return {pair: final.get(pair, outcome) for pair, outcome in first.items()}  # type: ignore[misc]

    def _may_take_more(self, pair: Pair, pending: Pending, rank: int) -> bool:
        """Whether it takes all of the rank it was decomposed to, and might take more of what was not looked at."""
        return rank >= pending.search_rank and pending.search_rank < self.settings.policy.most(min(pair.matrices[1:]))
