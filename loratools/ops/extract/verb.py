"""Extract an adapter from a fine-tuned checkpoint: each changed weight as the best product of small rank.

    tuned - base  ~  B @ A          per tensor, streamed from both sides, by certified truncated SVD (`algebra.svd`)

Norms, biases and new heads are taken whole, as an adapter can hold them. What changed and is in neither is measured and
listed: an adapter that leaves out a part of a fine-tune must say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loratools import formats
from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, Size, byte_size, checked
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import UsageError
from loratools.execution.local import worker_count
from loratools.formats.common.base import Base
from loratools.formats.image_parts.from_base import IMAGE_FORMATS, named_by_base
from loratools.ops.common.arguments import stored_dtype
from loratools.ops.common.device import ensure_device
from loratools.ops.extract.adapter import adapter_of, held_all
from loratools.ops.extract.outcomes import Embeddings, Factored, Left, Outcome, Settings, outcomes
from loratools.ops.extract.outline import outline
from loratools.ops.extract.rank_policy import RankPolicy
from loratools.ops.extract.replacements import replacements
from loratools.ops.extract.report import ExtractReport, Skipped, planned, reported
from loratools.ops.extract.warnings import nothing_error, quality_warnings, resized, unwritable_lines
from loratools.ops.finetune.delta import norm
from loratools.ops.finetune.pairs import Alone, Pair, Pairs, line_up
from loratools.ops.lowrank.limit import Limit
from loratools.storage.commit import check_output
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.scratch import scratch_beside
from loratools.tensors.dtypes import FLOAT_DTYPES

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
    plan: bool = False,
) -> ExtractReport:
    """Return the adapter that turns `base` into nearly `tuned`, written to `out` where that is given.

    At most one of `rank`, `energy`, `error` and `noise_edge` chooses the rank of each module, clipped to the smaller
    side
    of its matrix. `max_rank`, `max_size` and `max_params` go together with it, or stand alone. Tensors with equal bytes
    are not decoded. The result has scale 1, and its B and A have equal norms.

    Args:
        base: The model before fine-tuning, by its path or opened.
        tuned: The fine-tuned model.
        out: Where to write the adapter; nothing is written where it is None.
        rank: This rank for every module.
        energy: The smallest rank that keeps this share of the squared Frobenius norm of the module's change, in (0, 1].
        error: The smallest rank with at most this relative Frobenius error, in (0, 1).
        noise_edge: As many directions as rise above what rounding to the dtype of `tuned` does to every weight.
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
        threads: Tensors worked on at once, and so held in memory; one per CPU where it is None.
        device: What decomposes: cpu, cuda, cuda:N, or auto.
        include: Globs over the names of modules; all are taken where there is none.
        exclude: Globs of what is left out.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        format: The format to write, one of `list_formats()`. What it cannot hold is an error, and can be excluded.
        progress: Called with the number of bytes just read.
        plan: List what would be extracted, from headers alone, and write nothing.

    Returns:
        A report of ranks, energies and errors; `report.adapter` is the result, and None of a plan.

    Raises:
        UsageError: No rule and no limit, or a limit that rank 1 everywhere exceeds.
        InputError: Nothing changed, or values that are not finite.
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
    ensure_device(device)
    settings = Settings(policy, embeddings, stored_dtype(dtype), tolerance, exact, seed, device)
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, tuned))
    inputs = [before.path, after.path]
    if out is not None:
        check_output(formats.named(Path(out), format), overwrite=overwrite, inputs=inputs)
    pairs = line_up(before, after, include=include, exclude=exclude, whole=whole, as_files=format != "peft")
    warnings = [*pairs.warnings, *(f"'{c.name}': {text}" for c in (before, after) for text in c.warnings)]
    workers = worker_count(threads)
    known = Base({name: w.shape for name, w in before.weights.items()}, before.config, before.path)

    def named(adapter: Adapter) -> Adapter:
        # PEFT has the names of the base's own modules, and so have the formats of language models.
        return named_by_base(adapter, known) if format in IMAGE_FORMATS else adapter

    if plan:
        adapter = named(outline(before, after, pairs, pairs.pairs, settings))
        warnings += adapter.warnings
        warnings += unwritable_lines(formats.writer(format).unwritable(adapter, base=known), format)
        return planned(pairs, settings, workers, warnings)

    new = [a for a in pairs.alone if a.declared is not None]
    new_bytes = sum(a.tensor.nbytes for a in new)

    def ensure_writable(changed: Sequence[Pair]) -> None:
        # Hours of decomposing would end in the same error.
        formats.ensure_writable(named(outline(before, after, pairs, changed, settings)), format, base=known)

    look_at = ensure_writable if out is not None else None
    with ExitStack() as stack:
        # Of a large model the factors are gigabytes: they wait on the disk that they go to.
        keep = stack.enter_context(scratch_beside(Path(out))).keep if out is not None else held_all
        results = outcomes(pairs.pairs, settings, workers, new_bytes, progress, look_at, keep)
        factors = {p: r for p, r in results.items() if isinstance(r, Factored)}
        replaced = replacements(pairs, results)
        everything = math.fsum(_square(r) for r in results.values())
        skipped = _skipped(pairs, results, everything)
        if not factors and not replaced:
            raise nothing_error(before, after, skipped)
        updates = {p: r.update for p, r in factors.items()}
        adapter = adapter_of(before, pairs, updates, {name: r for name, (r, _) in replaced.items()})
        report = reported(pairs, results, factors, replaced, skipped, everything, adapter)
        if settings.embeddings == "lora" and (tied := [p.name for p, r in results.items() if p.followed and r.norm]):
            warnings.append(
                f"'{tied[0]}' is taken whole: a tied head follows it, and PEFT would add factors to one of the two only"
            )
        warnings += resized(results)
        warnings += quality_warnings(report, factors, settings)
        adapter = named(adapter)
        warnings += adapter.warnings
        if out is not None:
            warnings += formats.save(adapter, out, format=format, overwrite=overwrite, inputs=inputs, base=known)
    if out is not None:
        written = formats.named(Path(out), format)
        adapter = formats.load(written, from_format=format, base=known)
        report = replace(report, output=written)
    return replace(report, adapter=adapter, warnings=tuple(warnings))


def _skipped(pairs: Pairs, results: Mapping[Pair, Outcome], everything: float) -> list[Skipped]:
    """What changed and was not extracted, with its share of all that changed."""
    found = [
        Skipped(p.name, r.why, r.norm, r.norm**2 / everything if r.norm is not None else None)
        for p, r in results.items()
        if isinstance(r, Left)
    ]
    found += [Skipped(a.name, a.why, _norm_of(a), None) for a in pairs.alone if a.declared is None]
    return sorted(found, key=lambda s: s.name)


def _square(result: Outcome) -> float:
    return (result.norm or 0.0) ** 2


def _norm_of(alone: Alone) -> float | None:
    return norm(alone.name, alone.tensor) if alone.tensor.dtype in FLOAT_DTYPES else None
