"""Merge weighted adapters into a checkpoint, file to file, in the memory of a few blocks.

    W' = round(W + sum of weight * dW)

The sum is formed in float32 (float64 for float64 weights) and rounded once, however many adapters there are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from loratools.checkpoints import open_checkpoint
from loratools.errors import InputError
from loratools.execution import local
from loratools.ops._arguments import AdapterArgument, RankFrom, load_weighted, stored_dtype
from loratools.ops._merge_check import Check, check_files
from loratools.ops._merge_plan import MergePlan, index_text, plan_merge, specs, work_units
from loratools.ops._merge_provenance import provenance_text
from loratools.ops._merge_rows import Gain, merge_rows
from loratools.plan import CopyUnit, WorkUnit
from loratools.storage.commit import check_output, staged_folder
from loratools.storage.files import copy_range, ensure_unchanged, identify, start_writeback
from loratools.storage.safetensors_writer import SafetensorsWriter
from loratools.tensors import ByteRange


@dataclass(frozen=True)
class MergedTensor:
    """`adapters`: positions of those that changed it, in the order given."""

    name: str
    adapters: tuple[int, ...]
    gain: float | None
    max_error_ratio: float | None


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Shares and ratios are over touched weights; None where there was nothing to measure."""

    output: Path
    tensors: tuple[MergedTensor, ...]
    targets: int
    untouched: int
    replaced: int
    added: tuple[str, ...]
    bytes: int
    seconds: float
    gain: float | None
    unchanged_share: float | None
    max_error_ratio: float | None
    verified: bool
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """The document of `loratools merge --json`, without its head."""
        return {
            "targets": self.targets,
            "untouched": self.untouched,
            "replaced": self.replaced,
            "added": list(self.added),
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gain": self.gain,
            "unchanged_share": self.unchanged_share,
            "max_error_ratio": self.max_error_ratio,
            "verified": self.verified,
            "tensors": [
                {"name": t.name, "adapters": list(t.adapters), "gain": t.gain, "max_error_ratio": t.max_error_ratio}
                for t in self.tensors
            ],
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
            "output": str(self.output),
        }


def merge(
    base: str | Path,
    adapters: Sequence[AdapterArgument],
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Write `base` with the weighted sum of `adapters` added, as a checkpoint of the same layout at `out`.

    adapters         paths, loaded adapters, or pairs of one of these and a weight (1 where none is given).
    dtype            what weights are stored in; the base's own where it is None.
    max_shard_bytes  start a new weight file before one grows beyond this; the base's own files where it is None.
    allow_partial    leave out what finds no place in the base, and report it, in place of failing.
    verify           read rows of every merged tensor back and compare them with float64 arithmetic.
    include, exclude globs on the names of the adapters' targets and replaced weights.
    rank_from        tensors or config: which rank scales, where the two disagree.
    threads          workers; as many as there are CPUs where it is None. The result does not depend on it.
    progress         called with the number of bytes just written, by one thread at a time.

    Weights that no adapter touches keep their bytes. Nothing appears at `out` before all of it is there.

    Raises:
        UsageError: an argument cannot be meant; the output exists; an input does not.
        InputError: an input is damaged, unsafe or not supported, or the inputs do not fit each other.
        MachineError: disk full, no permission, or an input that changed meanwhile.
    """
    made = plan(
        base,
        adapters,
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        allow_partial=allow_partial,
        overwrite=overwrite,
        include=include,
        exclude=exclude,
        rank_from=rank_from,
        from_format=from_format,
    )
    return run(made, out, overwrite=overwrite, verify=verify, threads=threads, progress=progress)


def plan(
    base: str | Path,
    adapters: Sequence[AdapterArgument],
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank_from: RankFrom = None,
    from_format: str | None = None,
) -> MergePlan:
    """Work out from headers what `merge` would do, writing nothing; arguments and errors as there."""
    base, out = Path(base), Path(out)
    stored = stored_dtype(dtype) if dtype is not None else None
    checkpoint = open_checkpoint(base)
    loaded = load_weighted(adapters, rank_from=rank_from, from_format=from_format)
    inputs = [base, *(a.path for a, _ in loaded if a.path is not None)]
    check_output(out, overwrite=overwrite, inputs=inputs)
    return plan_merge(
        checkpoint,
        [(a.selected(include, exclude), w) for a, w in loaded],
        dtype=stored,
        max_shard_bytes=max_shard_bytes,
        allow_partial=allow_partial,
    )


def run(
    made: MergePlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Do what the plan says; arguments and errors as of `merge`."""
    began = time.monotonic()
    out = Path(out)
    inputs = [made.base.path, *(a.path for a in made.adapters if a.path is not None)]
    check_output(out, overwrite=overwrite, inputs=inputs)
    made.require_space(out)
    _refuse_not_finite(made)
    with staged_folder(out, overwrite=overwrite, inputs=inputs) as staging:
        workers = local.worker_count(threads)
        gains = _write_weights(made, staging, workers, progress or (lambda _: None))
        checks = check_files(staging, made.files, threads=workers) if verify else []
        report = _report(made, out, gains, checks, verify)
        _write_side_files(made, staging, report)
        for file in {f.header.file for f in made.base.files}:
            ensure_unchanged(file)
        # Last of all: whoever sees an index may rely on every shard that it names.
        if made.with_index:
            (staging / "model.safetensors.index.json").write_text(index_text(made), encoding="utf-8")
    return replace(report, seconds=round(time.monotonic() - began, 3))


def _refuse_not_finite(made: MergePlan) -> None:
    """Read every tensor of the adapters once: a nan would spread over whole rows, and is better named at its source."""
    bad = [
        f"'{adapter.name}'   {name}"
        for adapter in made.adapters
        for name, tensor in adapter.tensors().items()
        if not tensor.read().isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{len(bad)} tensors of the adapters hold values that are not finite",
            details=bad,
            hint="the training run diverged; take an earlier checkpoint, or leave these out with --exclude",
        )


def _write_weights(made: MergePlan, folder: Path, threads: int, progress: Callable[[int], None]) -> Mapping[str, Gain]:
    units = work_units(made)
    left = Counter(u.file for u in units)
    gains: dict[str, Gain] = {}
    lock = Lock()

    def advance(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    with ExitStack() as stack:
        # Files are flushed by a thread of their own, so that the disk works on one while the next is computed.
        finisher = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="loratools-flush"))
        writers = [stack.enter_context(SafetensorsWriter(folder / f.name, specs(f), f.metadata)) for f in made.files]
        finished: list[Future[None]] = [finisher.submit(w.finish) for i, w in enumerate(writers) if not left[i]]

        def work(unit: WorkUnit) -> None:
            writer, output = writers[unit.file], unit.output
            offset = writer.offset(output.name)
            gain = Gain()
            if isinstance(unit, CopyUnit):
                start, nbytes = unit.start, unit.stop - unit.start
                piece = ByteRange(unit.source.file, unit.source.offset + start, nbytes)
                copy_range(piece, writer.fd, offset + start, path=writer.path)
                advance(nbytes)
            else:
                start, nbytes = unit.start * output.row_bytes, (unit.stop - unit.start) * output.row_bytes
                gain = merge_rows(unit, writer.fd, offset, progress=advance)
            start_writeback(writer.fd, offset + start, nbytes)
            with lock:
                writer.account(output.name, start, nbytes)
                gains[output.name] = gains.get(output.name, Gain()) + gain
                left[unit.file] -= 1
                if not left[unit.file]:
                    finished.append(finisher.submit(writer.finish))

        local.run(units, work, threads=threads)
        for future in finished:
            future.result()
    return gains


def _write_side_files(made: MergePlan, staging: Path, report: MergeReport) -> None:
    for file in made.side_files:
        path = staging / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.text is not None:
            path.write_text(file.text, encoding="utf-8")
        elif file.source is not None:
            found = identify(file.source)
            with path.open("xb") as opened:
                copy_range(ByteRange(found, 0, found.size), opened.fileno(), 0, path=path)
    (staging / "loratools.json").write_text(provenance_text(made, report.as_json()), encoding="utf-8")


def _report(
    made: MergePlan, out: Path, gains: Mapping[str, Gain], checks: Sequence[Check], verified: bool
) -> MergeReport:
    ratios = {c.name: c.ratio for c in checks}
    touched = [o for o in made.outputs if o.touched]
    updated = [o for o in touched if o.updates]
    total = Gain()
    for output in updated:
        total += gains.get(output.name, Gain())
    tensors = []
    for o in touched:
        who = {u.adapter for u in o.updates} | ({o.replaced_by} if o.replaced_by is not None else set())
        gain = gains.get(o.name, Gain()).gain if o.updates else None
        tensors.append(MergedTensor(o.name, tuple(sorted(who)), gain, ratios.get(o.name)))
    warnings = list(made.warnings)
    if updated and total.energy == 0:
        warnings.append("every delta is zero: the adapters are untrained, and the result equals the base")
    elif total.gain is not None and total.gain < 0.99:
        warnings.append(
            f"{1 - total.gain:.1%} of the update is lost to rounding, being small against the spacing of the stored "
            "dtype; --dtype float32 keeps it"
        )
    return MergeReport(
        output=out,
        tensors=tuple(tensors),
        targets=len(updated),
        untouched=len(made.outputs) - len(touched),
        replaced=len([o for o in touched if o.replaced_by is not None and o.name not in made.added]),
        added=made.added,
        bytes=made.bytes_written,
        seconds=0.0,
        gain=total.gain,
        unchanged_share=total.unchanged_share,
        max_error_ratio=max(ratios.values(), default=None),
        verified=verified,
        left_out=tuple(left.name for left in made.leftovers),
        warnings=tuple(warnings),
    )
