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
from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, byte_size, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import UsageError
from loratools.execution.local import worker_count
from loratools.formats.common.base import Base
from loratools.formats.image_parts.from_base import IMAGE_FORMATS, named_by_base
from loratools.ops.card.adapter_card import AdapterCard, rank_text
from loratools.ops.card.inputs import card_input
from loratools.ops.common.abandoned import abandoned_warnings, resumed_remarks
from loratools.ops.common.device import ensure_device
from loratools.ops.common.opening import AdapterOutput
from loratools.ops.extract.adapter import adapter_of
from loratools.ops.extract.outcomes import Factored, Outcome
from loratools.ops.extract.outline import outline
from loratools.ops.extract.rank_policy import RankPolicy
from loratools.ops.extract.replacements import replacements
from loratools.ops.extract.report import ExtractReport, planned, reported
from loratools.ops.extract.resuming import run_plan
from loratools.ops.extract.settings import Embeddings, Settings
from loratools.ops.extract.skipped import skipped_tensors
from loratools.ops.extract.warnings import (
    nothing_error,
    quality_warnings,
    resized,
    tied_embedding_warnings,
    unwritable_lines,
)
from loratools.ops.extract.work import outcomes
from loratools.ops.finetune.line_up import line_up
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.ops.lowrank.limit import Limit
from loratools.storage.casting import stored_dtype
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.resumption import Resumable
from loratools.storage.scratch import MemoryStore, Scratch, WorkStore, scratch_beside

__all__ = ["ExtractReport", "extract"]


@checked
@holding_inputs()
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
    max_size: Size | None = None,
    max_params: int | None = None,
    embeddings: Embeddings = "auto",
    whole: Globs = (),
    dtype: str = "F32",
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: Positive | None = None,
    device: str = "auto",
    include: Globs = (),
    exclude: Globs = (),
    overwrite: bool = False,
    format: str = "peft",
    progress: Callable[[int], None] | None = None,
    card: bool = True,
    plan: bool = False,
    resume: bool = False,
) -> ExtractReport:
    """Return the adapter that turns `base` into nearly `tuned`, written to `out` where that is given.

    At most one of `rank`, `energy`, `error` and `noise_edge` chooses the rank of each module, clipped to the smaller
    side
    of its matrix. `max_rank`, `max_size` and `max_params` go together with it, or stand alone. Tensors with equal bytes
    are not decoded. The result has scale 1, and its B and A have equal norms.

    Args:
        base: The model before fine-tuning, by its path or opened.
        tuned: The fine-tuned model.
        out: Where to write the adapter; nothing is written if None.
        rank: This rank for every module.
        energy: The smallest rank that keeps this share of the squared Frobenius norm of the module's change, in (0, 1].
        error: The smallest rank with at most this relative Frobenius error, in (0, 1).
        noise_edge: As many directions as rise above what rounding to the dtype of `tuned`, and quantisation of either
            side, do to every weight.
        max_rank: No module gets a higher rank.
        max_size: Bytes of the file of weights, as a number or as "5GB". Ranks are shared out over the modules so that
            all together lose least.
        max_params: The same for the number of parameters.
        embeddings: How tables of vectors are stored: as factors (`lora`), as the rows that changed or are new (`rows`),
            whole (`full`), not at all (`skip`), or as what is smallest (`auto`). All but factors are exact.
        whole: Globs of modules that are stored as the fine-tuned model has them, which is exact.
        dtype: The dtype of the stored factors: float32, bfloat16, float16 or float64.
        tolerance: Share of the captured energy that a better decomposition may probably still find, between 0 and 1.
            Smaller takes more passes over each change.
        exact: No randomised method: slower by the size of the matrix over the rank.
        seed: Random seed of the decomposition. Equal input and seed give equal bytes.
        threads: Tensors worked on at once, and so held in memory; one per CPU if None.
        device: What decomposes: cpu, cuda, cuda:N, or auto.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        format: The format to write, one of `list_formats()`. What it cannot hold is an error, and can be excluded.
        progress: Called with the number of bytes read since the last call.
        card: Write a model card (`README.md`) into an output folder.
        plan: List what would be extracted, from headers alone, and write nothing.
        resume: Go on with a killed run of the same plan, which gives the bytes of an undisturbed run. With other
            inputs, options or versions it is refused; where no run was killed, the work begins anew.

    Returns:
        A report of ranks, energies and errors; `report.adapter` is the result, and None of a plan.

    Raises:
        UsageError: No rule and no limit, or a limit that rank 1 everywhere exceeds; or a killed run that had something
            else to do.
        ChangedInputError: An input changed meanwhile, or since the run was killed.
        InputError: Nothing changed, or values are NaN or infinite.
        MismatchError: Names or shapes of the two models do not fit each other.
        UnsupportedError: A model is quantised in a way that is not read.
        OutputExistsError: `out` exists, or is one of the inputs.

    Example:
        >>> import loratools
        >>> report = loratools.extract("fixtures/bert-tiny", "fixtures/bert-tiny-tuned", "extracted", rank=4)
        >>> 0 < report.energy <= 1
        True
    """
    limit = byte_size(max_size) if max_size is not None else None
    policy = RankPolicy(Limit(rank, energy, error, max_rank=max_rank), noise_edge, limit, max_params)
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is not between 0 and 1")
    if resume and out is None:
        raise UsageError("there is nothing to resume where nothing is written", hint="name the output")
    ensure_device(device)
    settings = Settings(policy, embeddings, stored_dtype(dtype), tolerance, exact, seed, device)
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, tuned))
    output = AdapterOutput(
        path=Path(out) if out is not None else None,
        format=format,
        overwrite=overwrite,
        inputs=(before.path, after.path),
        base=Base({name: w.shape for name, w in before.weights.items()}, before.config, before.path),
    )
    output.check()
    pairs = line_up(before, after, include=include, exclude=exclude, replaced_whole=whole, as_files=format != "peft")
    extraction = _Extraction(before, after, pairs, settings, output, worker_count(threads), card)
    if plan:
        return extraction.planned()
    options = {
        "rank": rank,
        "energy": energy,
        "error": error,
        "noise_edge": noise_edge,
        "max_rank": max_rank,
        "max_size": limit,
        "max_params": max_params,
        "embeddings": embeddings,
        "whole": whole,
        "dtype": settings.dtype,
        "tolerance": tolerance,
        "exact": exact,
        "seed": seed,
        "device": device,
        "include": include,
        "exclude": exclude,
        "format": format,
    }
    return extraction.extracted(progress, options, resume=resume)


@dataclass(frozen=True)
class _Extraction:
    """Two checkpoints that are lined up, how the change between them is extracted, and where to."""

    base: Checkpoint
    tuned: Checkpoint
    pairs: Pairs
    settings: Settings
    output: AdapterOutput
    workers: int
    card: bool

    def planned(self) -> ExtractReport:
        """What would be extracted, from headers alone."""
        adapter = self._outline(self.pairs.pairs)
        unwritable = formats.writer(self.output.format).unwritable(adapter, base=self.output.base)
        warnings = [*self._input_warnings(), *adapter.warnings, *unwritable_lines(unwritable, self.output.format)]
        return planned(self.pairs, self.settings, self.workers, warnings)

    def extracted(
        self, progress: Callable[[int], None] | None, options: Mapping[str, object], *, resume: bool
    ) -> ExtractReport:
        """Extract, write the adapter where it is to be written, and report."""
        out = self.output.named_path
        remarks = [] if out is None or resume else abandoned_warnings(out)
        with ExitStack() as stack:
            store: WorkStore = MemoryStore()
            if out is not None:
                # Of a large model the factors are gigabytes: they wait on the disk that they go to.
                resumable = Resumable(run_plan(self.base, self.tuned, options), resume)
                store = stack.enter_context(scratch_beside(out, resumable))
            results = outcomes(
                self.pairs.pairs,
                self.settings,
                threads=self.workers,
                other_bytes=sum(
                    unpaired.tensor.nbytes for unpaired in self.pairs.unpaired if unpaired.declared is not None
                ),
                progress=progress,
                # Hours of decomposing would end in the same error.
                on_changed=self._ensure_writable if out is not None else None,
                store=store,
            )
            if resume and out is not None and isinstance(store, Scratch):
                remarks = resumed_remarks(out, store.resumed, *store.counts)
            adapter, report = self._assembled(results)
            warnings = [*self._input_warnings(), *tied_embedding_warnings(results, self.settings), *resized(results)]
            warnings += quality_warnings(report, _factored(results), self.settings)
            adapter = self._named(adapter)
            warnings += adapter.warnings
            model_card = self._card(report, adapter, options, warnings) if self.card else None
            warnings += self.output.save(adapter, card=model_card)
        if (written := self.output.named_path) is not None:
            # The factors that waited on the disk are gone: the adapter is what was written.
            adapter = formats.load(written, from_format=self.output.format, base=self.output.base)
        return replace(report, adapter=adapter, output=written, warnings=(*warnings, *remarks))

    def _card(
        self, report: ExtractReport, adapter: Adapter, options: Mapping[str, object], warnings: Sequence[str]
    ) -> AdapterCard:
        """The model card, with what was measured."""
        facts = [
            ("modules", f"{len(report.modules):,}"),
            ("rank", rank_text([module.rank for module in report.modules])),
        ]
        numbers = {
            "energy of these modules that the factors hold": report.energy,
            "share of all that changed which the adapter holds": report.change_captured,
        }
        facts += [(word, f"{value:.4%}") for word, value in numbers.items() if value is not None]
        facts += [("relative error", f"{report.error:.4g}")] if report.error is not None else []
        if report.replacements:
            facts.append(("tensors in full", f"{len(report.replacements):,}"))
        if report.skipped:
            facts.append(("changed, and not in the adapter", f"{len(report.skipped):,} tensors"))
        base, tuned = card_input(self.base.path), card_input(self.tuned.path)
        names = [base.name, tuned.name]
        named = str(self.base.path) if "models--" in str(self.base.path) else adapter.base_model
        return AdapterCard(
            "extract", f"{tuned.name} as an adapter", named, [base, tuned], names, options, extract, facts, warnings
        )

    def _assembled(self, results: Mapping[Pair, Outcome]) -> tuple[Adapter, ExtractReport]:
        """The adapter of these results, and what was measured on them.

        Raises:
            InputError: nothing changed, or nothing that an adapter can hold.
        """
        factored = _factored(results)
        replaced = replacements(self.pairs, results)
        total_change = math.fsum((outcome.norm or 0.0) ** 2 for outcome in results.values())
        skipped = skipped_tensors(self.pairs, results, total_change)
        if not factored and not replaced:
            raise nothing_error(self.base, self.tuned, skipped)
        updates = {pair: outcome.update for pair, outcome in factored.items()}
        adapter = adapter_of(self.base, self.pairs, updates, {name: r for name, (r, _) in replaced.items()})
        return adapter, reported(self.pairs, results, factored, replaced, skipped, total_change, adapter)

    def _input_warnings(self) -> list[str]:
        of_models = [f"'{c.name}': {text}" for c in (self.base, self.tuned) for text in c.warnings]
        return [*self.pairs.warnings, *of_models]

    def _outline(self, changed: Sequence[Pair]) -> Adapter:
        return self._named(outline(self.base, self.tuned, self.pairs, changed, self.settings))

    def _ensure_writable(self, changed: Sequence[Pair]) -> None:
        formats.ensure_writable(self._outline(changed), self.output.format, base=self.output.base)

    def _named(self, adapter: Adapter) -> Adapter:
        """The adapter by the names that its format has for the base's modules."""
        # PEFT has the names of the base's own modules, and so have the formats of language models.
        if self.output.format not in IMAGE_FORMATS or self.output.base is None:
            return adapter
        return named_by_base(adapter, self.output.base)


def _factored(results: Mapping[Pair, Outcome]) -> dict[Pair, Factored]:
    return {pair: outcome for pair, outcome in results.items() if isinstance(outcome, Factored)}
