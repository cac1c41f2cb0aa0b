"""Extract an adapter from a fine-tuned checkpoint: each changed linear weight as the best product of small rank.

    tuned - base  ~  B @ A          per tensor, streamed from both sides, by certified truncated SVD (`algebra.svd`)

What changed and is not the weight of a linear layer (embeddings, norms, biases, convolutions) is measured and listed:
an adapter that leaves out a part of a fine-tune must say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BoundedSemaphore

from loratools import formats
from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint, open_checkpoint
from loratools.errors import InputError, UsageError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats._peft_written import names_digest
from loratools.ops._arguments import stored_dtype
from loratools.ops._delta import Extracted, change, delta_of, extracted, norm
from loratools.ops._pairs import Alone, Pair, Pairs, line_up
from loratools.ops._same import same_bytes
from loratools.storage.commit import check_output
from loratools.tensors import DTYPE_BITS, FLOAT_DTYPES, held
from loratools.updates.lora import LoRA


@dataclass(frozen=True)
class ExtractedModule:
    """A line of the report. `energy` is the captured share of `norm` squared, `error` the relative Frobenius error,
    both of the factors as stored; the gaps say how much of the energy a better decomposition of this rank could still
    capture: at most, and probably. None in a plan."""

    name: str
    rank: int
    energy: float | None = None
    error: float | None = None
    gap_bound: float | None = None
    gap_estimate: float | None = None
    norm: float | None = None


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
    all that changed. `output` is None where nothing was written, `adapter` where it was only planned."""

    modules: tuple[ExtractedModule, ...]
    energy: float | None
    error: float | None
    change_captured: float | None
    skipped: tuple[Skipped, ...]
    unchanged: int | None
    output: Path | None
    adapter: Adapter | None
    bytes: int
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The document of `loratools extract --json`, without its head."""
        fields = ("name", "rank", "energy", "error", "gap_bound", "gap_estimate", "norm")
        return {
            "modules": [{field: getattr(m, field) for field in fields} for m in self.modules],
            "energy": self.energy,
            "error": self.error,
            "change_captured": self.change_captured,
            "skipped": [{"name": s.name, "why": s.why, "norm": s.norm, "share": s.share} for s in self.skipped],
            "unchanged": self.unchanged,
            "replacements": [],
            "bytes": self.bytes,
            "warnings": list(self.warnings),
            "output": str(self.output) if self.output is not None else None,
        }


def extract(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    out: str | Path | None = None,
    *,
    rank: int,
    dtype: str = "F32",
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    format: str = "peft",
    progress: Callable[[int], None] | None = None,
    plan: bool = False,
) -> ExtractReport:
    """Return the adapter that turns `base` into nearly `tuned`, written to `out` where that is given.

    rank       of each module; clipped to the smaller side of a matrix.
    tolerance  share of the captured energy that a better decomposition may probably still find (default: that of
               `algebra.svd`). Smaller takes more passes over each delta.
    exact      no randomised method: slower by the size of the matrix over the rank.
    seed       of the random start. Equal inputs and seed give equal bytes, whatever the number of threads.
    threads    tensors worked on at once, and so held in memory; one per CPU by default.
    plan       list what would be extracted, from headers alone.

    A tensor whose bytes are the same on both sides is not decoded. Scale is 1, and B and A have equal norms.

    Raises:
        InputError: nothing changed, or values that are not finite.
        MismatchError: names or shapes of the two checkpoints do not line up.
        UnsupportedError: one of them is quantised.
        OutputExistsError: `out` exists, or is one of the inputs.
    """
    stored = stored_dtype(dtype)
    if rank < 1:
        raise UsageError(f"rank {rank} is not positive")
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is not between 0 and 1")
    before, after = (c if isinstance(c, Checkpoint) else open_checkpoint(Path(c)) for c in (base, tuned))
    inputs = [before.path, after.path]
    if out is not None:
        check_output(Path(out), overwrite=overwrite, inputs=inputs)
    pairs = line_up(before, after, include=include, exclude=exclude)
    warnings = [*pairs.warnings, *(f"'{c.name}': {text}" for c in (before, after) for text in c.warnings)]
    if plan:
        return _planned(pairs, rank, stored, warnings)

    results = _results(pairs.pairs, rank, stored, tolerance, exact, seed, worker_count(threads), progress)
    factors = {p: r for p, r in results.items() if isinstance(r, Extracted)}
    skipped = _skipped(pairs, results)
    if not factors:
        raise _nothing(before, after, skipped)
    adapter = _adapter(before, pairs, factors)
    if out is not None:
        warnings += formats.save(adapter, Path(out), format=format, overwrite=overwrite, inputs=inputs)
    return _report(adapter, factors, skipped, results, Path(out) if out is not None else None, warnings)


# What became of a pair: factors; the norm of a change that is not extracted, None where it has none; or no change.
_Result = Extracted | float | None


@dataclass(frozen=True)
class _Unchanged:
    """The bytes or the values are the same."""


def _results(
    pairs: Sequence[Pair],
    rank: int,
    dtype: str,
    tolerance: float | None,
    exact: bool,
    seed: int,
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[Pair, _Result | _Unchanged]:
    # One more worker than may compute: while all others do, it reads.
    computing = BoundedSemaphore(threads)

    def work(pair: Pair) -> _Result | _Unchanged:
        found = _Unchanged() if same_bytes(pair.base, pair.tuned) else changed(pair)
        if progress is not None:
            progress(pair.nbytes)
        return found

    def changed(pair: Pair) -> _Result | _Unchanged:
        if not {pair.base.dtype, pair.tuned.dtype} <= set(FLOAT_DTYPES):
            return None
        if pair.base.shape[1:] != pair.tuned.shape[1:] or len(pair.base.shape) != len(pair.tuned.shape):
            return None
        if pair.why is not None:
            return change(pair.name, pair.base, pair.tuned) or _Unchanged()
        delta = delta_of(pair.name, pair.base, pair.tuned)
        with computing:
            found = extracted(
                delta, rank, transposed=pair.transposed, dtype=dtype, tolerance=tolerance, seed=seed, exact=exact
            )
        return found or _Unchanged()

    # The largest first: one that is begun last would keep a single thread busy at the end.
    ordered = sorted(pairs, key=lambda p: (-p.nbytes, p.name))
    with single_threaded_torch():
        found = dict(zip(ordered, run(ordered, work, threads=threads + 1), strict=True))
    return {pair: found[pair] for pair in pairs}


def _planned(pairs: Pairs, rank: int, dtype: str, warnings: Sequence[str]) -> ExtractReport:
    chosen = [p for p in pairs.pairs if p.why is None]
    modules = [ExtractedModule(p.target, min(rank, *p.base.shape)) for p in chosen]
    nbytes = sum(m.rank * sum(p.base.shape) for m, p in zip(modules, chosen, strict=True)) * DTYPE_BITS[dtype] // 8
    skipped = [Skipped(p.name, p.why, None, None) for p in pairs.pairs if p.why is not None]
    skipped += [Skipped(a.name, a.why, None, None) for a in pairs.alone]
    return ExtractReport(
        tuple(modules), None, None, None, tuple(sorted(skipped, key=_name)), None, None, None, nbytes, tuple(warnings)
    )


def _name(entry: Skipped) -> str:
    return entry.name


def _skipped(pairs: Pairs, results: Mapping[Pair, _Result | _Unchanged]) -> list[Skipped]:
    """What changed and was not extracted; shares are filled in here, of all that changed."""
    total = math.fsum(_square(r) for r in results.values())
    found = [
        Skipped(p.name, p.why or "values that have no difference", r, r * r / total if r is not None else None)
        for p, r in results.items()
        if not isinstance(r, Extracted | _Unchanged)
    ]
    found += [Skipped(a.name, a.why, _norm_of(a), None) for a in pairs.alone]
    return sorted(found, key=_name)


def _square(result: _Result | _Unchanged) -> float:
    if isinstance(result, Extracted):
        return result.norm**2
    return result**2 if isinstance(result, float) else 0.0


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
        f"no linear weight of '{tuned.name}' that was to be extracted differs from '{base.name}'",
        details=changed,
        hint="only linear weights are extracted",
    )


def _adapter(base: Checkpoint, pairs: Pairs, factors: Mapping[Pair, Extracted]) -> Adapter:
    updates = {p.target: LoRA(held(e.a), held(e.b), float(e.a.shape[0]), "config") for p, e in factors.items()}
    own = base.config.get("_name_or_path")
    config: dict[str, object] = {
        "bias": "none",
        # Of all modules or of none: PEFT corrects it by the class of each layer, and warns where it must.
        "fan_in_fan_out": all(p.transposed for p in factors),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(set(updates), pairs.linear),
        "task_type": _task_type(base, updates),
    }
    return Adapter(
        updates=updates,
        format="peft",
        base_model=own if isinstance(own, str) and own else base.path.absolute().name,
        # The list of modules holds as long as the names are these.
        notes={"peft": {"config": config, "metadata": {}, "names": names_digest(updates, ())}},
    )


def _target_modules(targets: set[str], linear: frozenset[str]) -> list[str]:
    """Last parts of names where those name all linear layers so called; whole names of all modules where one does not.

    PEFT also accepts a mixture, and takes a short name for every module that ends so.
    """
    leaves = {t.rpartition(".")[2] for t in targets}
    others = {t.rpartition(".")[2] for t in linear - targets}
    return sorted(targets) if leaves & others else sorted(leaves)


# What an architecture's name ends in -> the class that PEFT wraps it in. It adds a trained copy of the head to the last
# three.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"classifier", "score", "qa_outputs"}
# Encoder-decoders of text; those of speech and images take other inputs than PEFT's wrapper passes on.
_SEQ_2_SEQ = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart",
    "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "switch_transformers", "t5", "umt5",
}  # fmt: skip


def _task_type(base: Checkpoint, updates: Mapping[str, LoRA]) -> str | None:
    architectures = base.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task is None and base.config.get("model_type") in _SEQ_2_SEQ and not name.endswith(("Model", "Classification")):
        task = "SEQ_2_SEQ_LM"
    # PEFT would take the head's own weights for trained ones and ignore its factors.
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and _HEADS & {t.rpartition(".")[2] for t in updates}:
        return None
    return task


def _report(
    adapter: Adapter,
    factors: Mapping[Pair, Extracted],
    skipped: Sequence[Skipped],
    results: Mapping[Pair, _Result | _Unchanged],
    out: Path | None,
    warnings: Sequence[str],
) -> ExtractReport:
    modules = [
        ExtractedModule(p.target, e.a.shape[0], max(0.0, 1 - e.error**2), e.error, e.gap_bound, e.gap_estimate, e.norm)
        for p, e in factors.items()
    ]
    total = math.fsum(e.norm**2 for e in factors.values())
    lost = math.fsum((e.norm * e.error) ** 2 for e in factors.values())
    everything = math.fsum(_square(r) for r in results.values())
    return ExtractReport(
        modules=tuple(sorted(modules, key=lambda m: m.name)),
        energy=max(0.0, 1 - lost / total),
        error=math.sqrt(lost / total),
        change_captured=max(0.0, (total - lost) / everything),
        skipped=tuple(skipped),
        unchanged=sum(isinstance(r, _Unchanged) for r in results.values()),
        output=out,
        adapter=replace(adapter, path=out),
        bytes=sum(t.nbytes for t in adapter.tensors().values()),
        warnings=tuple(warnings),
    )
