"""extract: take an adapter out of a fine-tuned checkpoint; each changed weight becomes a product of small rank.

    tuned - base  ~  B @ A          per tensor, streamed from both sides, by certified truncated SVD (`algebra.svd`)

Norms, biases and new heads are stored in full, as an adapter can hold them. Changes that the adapter cannot hold are
measured and listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from loratools.ops.common.device import ensure_device
from loratools.ops.common.fetching import fetch_values
from loratools.ops.common.opening import AdapterOutput
from loratools.ops.common.result_options import result_options
from loratools.ops.common.resumable_work import require_output, resumable_work
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
    """Return the adapter that turns `base` approximately into `tuned`; write it to `out` if that is given.

    At most one of `rank`, `energy`, `error` and `noise_edge` chooses the rank of each module; the rank never exceeds
    the smaller side of the matrix. `max_rank`, `max_size` and `max_params` limit that choice, or choose the ranks
    themselves. Tensors with equal bytes are not decoded. The result has scale 1, and its B and A have equal norms.

    Args:
        base: The model before fine-tuning: a path or an opened checkpoint.
        tuned: The fine-tuned model: a path or an opened checkpoint.
        out: Where to write the adapter; None writes nothing.
        rank: The rank of every module.
        energy: The smallest rank that keeps this share of the squared Frobenius norm of the module's change, in (0, 1].
        error: The smallest rank with at most this relative Frobenius error, in (0, 1).
        noise_edge: Keep the singular values above the noise that rounding to the dtype of `tuned`, and quantisation of
            either model, make.
        max_rank: The largest rank of any module.
        max_size: The largest size of the file of weights, in bytes or as "5GB". Ranks are distributed over the modules
            so that the total loss is smallest.
        max_params: The largest number of parameters, distributed in the same way.
        embeddings: How embedding tables are stored: as factors (`lora`), as the rows that changed or are new (`rows`),
            in full (`full`), not at all (`skip`), or as the smallest of these (`auto`). All but factors are exact.
        whole: Globs of modules that are stored in full, exactly as the fine-tuned model has them.
        dtype: The dtype of the stored factors: float32, bfloat16, float16 or float64.
        tolerance: The share of the captured energy that the approximate decomposition may miss, between 0 and 1.
            Smaller values need more passes over each delta.
        exact: Use exact decompositions only. They are slower by about the matrix size divided by the rank.
        seed: Random seed of the decomposition. Equal input and seed give equal bytes.
        threads: How many tensors are decomposed, and held in memory, at once; one per CPU if None.
        device: The device that computes: cpu, cuda, cuda:N, mps, or auto.
        include: Globs over module names; empty selects all.
        exclude: Globs of names to leave out.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        format: The format to write, one of `list_formats()`. Modules that it cannot hold are an error; `exclude` leaves
            them out.
        progress: Called with the number of bytes read since the last call.
        card: Write a model card (`README.md`) into an output folder.
        plan: List what would be extracted, from headers only, and write nothing.
        resume: Continue a killed run of the same plan. The result has the same bytes as an uninterrupted run. If
            inputs, options or versions differ, the call is refused. If no run was killed, the work starts from the
            beginning.

    Returns:
        A report of ranks, energies and errors. `report.adapter` is the result; it is None if `plan` is True.

    Raises:
        UsageError: Neither a rule nor a limit is given, the limit is too small even for rank 1 everywhere, or the
            killed run had another plan.
        ChangedInputError: An input changed during the run, or since the run was killed.
        InputError: Nothing changed, or values are NaN or infinite.
        MismatchError: Names or shapes of the two models do not match.
        UnsupportedError: A model is quantised in a way that loratools cannot read.
        OutputExistsError: `out` exists and may not be replaced, or is one of the inputs.

    Example:
        >>> import loratools
        >>> report = loratools.extract("fixtures/bert-tiny", "fixtures/bert-tiny-tuned", "extracted", rank=4)
        >>> 0 < report.energy <= 1
        True
    """
    options = result_options(extract, locals(), inputs=["base", "tuned"])
    limit = byte_size(max_size) if max_size is not None else None
    policy = RankPolicy(Limit(rank, energy, error, max_rank=max_rank), noise_edge, limit, max_params)
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is not between 0 and 1")
    require_output(out, resume=resume)
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
    options |= {"max_size": limit, "dtype": settings.dtype}
    return extraction.extracted(progress, options, resume=resume)


@dataclass(frozen=True)
class _Extraction:
    """Two checkpoints lined up, with the settings and the output of the extraction."""

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
        """Extract, write the adapter if an output is given, and report."""
        out = self.output.named_path
        # The factors of a large model are gigabytes: they are kept on the disk of the output.
        with resumable_work(out, lambda: run_plan(self.base, self.tuned, options), resume=resume) as work:
            fetch_values(self.base, self.tuned)
            results = outcomes(
                self.pairs.pairs,
                self.settings,
                threads=self.workers,
                other_bytes=sum(
                    unpaired.tensor.nbytes for unpaired in self.pairs.unpaired if unpaired.declared is not None
                ),
                progress=progress,
                # Checked first: otherwise hours of decomposing would end in the same error.
                on_changed=self._ensure_writable if out is not None else None,
                store=work.store,
            )
            remarks = work.remarks()
            adapter, report = self._assembled(results)
            warnings = [*self._input_warnings(), *tied_embedding_warnings(results, self.settings), *resized(results)]
            warnings += quality_warnings(report, _factored(results), self.settings)
            adapter = self._named(adapter)
            warnings += adapter.warnings
            model_card = self._card(report, adapter, options, warnings) if self.card else None
            warnings += self.output.save(adapter, card=model_card)
        if (written := self.output.named_path) is not None:
            # The temporary factors on the disk are gone: the adapter is read from the output.
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
            "energy of these modules that the factors keep": report.energy,
            "share of the squared norm of all changes that the adapter keeps": report.change_captured,
        }
        facts += [(word, f"{value:.4%}") for word, value in numbers.items() if value is not None]
        facts += [("relative error", f"{report.error:.4g}")] if report.error is not None else []
        if report.replacements:
            facts.append(("tensors in full", f"{len(report.replacements):,}"))
        if report.skipped:
            facts.append(("changed, but not in the adapter", f"{len(report.skipped):,} tensors"))
        base, tuned = card_input(self.base.path), card_input(self.tuned.path)
        names = [base.name, tuned.name]
        named = str(self.base.path) if "models--" in str(self.base.path) else adapter.base_model
        return AdapterCard(
            "extract", f"{tuned.name} as an adapter", named, [base, tuned], names, options, extract, facts, warnings
        )

    def _assembled(self, results: Mapping[Pair, Outcome]) -> tuple[Adapter, ExtractReport]:
        """The adapter of these results, and its measurements.

        Raises:
            InputError: Nothing changed, or no change can be stored in an adapter.
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
        """The adapter, with the module names that the format uses."""
        # PEFT and the formats of language models use the names of the base's own modules.
        if self.output.format not in IMAGE_FORMATS or self.output.base is None:
            return adapter
        return named_by_base(adapter, self.output.base)


def _factored(results: Mapping[Pair, Outcome]) -> dict[Pair, Factored]:
    return {pair: outcome for pair, outcome in results.items() if isinstance(outcome, Factored)}
