"""How a merge was made, as far as its own record says: rounding, seed, penalty, moments, and what training saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.provenance import recorded_inputs
from loratools.ops.merge.rounding import RoundingMode
from loratools.ops.merge.trained_on import TrainingScheme
from loratools.storage.files import quoted, sha256


@dataclass(frozen=True)
class RecordedMerge:
    """The settings in the record of a merged model.

    Attributes:
        present: Whether loratools wrote a record of the merge beside the model, or into its one file.
        rounding: How sums were rounded.
        seed: Of stochastic rounding.
        penalty: Of the roundings that feed errors back; None if each weight had the usual one.
        moments: The name of the file of second moments; None if there was none.
        moments_sha256: The hash of that file.
        trained_on: How the base was quantised in training; None if that was not given.
    """

    present: bool
    rounding: RoundingMode = "nearest"
    seed: int = 0
    penalty: float | None = None
    moments: str | None = None
    moments_sha256: str | None = None
    trained_on: TrainingScheme | None = None


def recorded_merge(path: Path) -> RecordedMerge:
    """Read the record of the model at `path`; what it does not say, or says wrongly, has the usual value."""
    record = recorded_inputs(path)
    if not record:
        return RecordedMerge(present=False)
    rounding, seed, penalty = record.get("rounding"), record.get("seed"), record.get("penalty")
    moments = record.get("moments")
    described = moments if isinstance(moments, Mapping) else {}
    return RecordedMerge(
        present=True,
        rounding=next((mode for mode in get_args(RoundingMode) if mode == rounding), "nearest"),
        seed=seed if isinstance(seed, int) else 0,
        penalty=float(penalty) if isinstance(penalty, int | float) else None,
        moments=_text(described.get("name")),
        moments_sha256=_text(described.get("sha256")),
        trained_on=_scheme(record.get("trained_on")),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _scheme(value: object) -> TrainingScheme | None:
    if not isinstance(value, Mapping):
        return None
    codes, blocksize, nested = value.get("codes"), value.get("blocksize"), value.get("nested")
    if codes not in ("nf4", "fp4", "int8") or not isinstance(blocksize, int) or blocksize < 1:
        return None
    return TrainingScheme(str(codes), blocksize, nested is True)


@dataclass(frozen=True)
class Reconstruction:
    """The options of the merge that a model is held against.

    Attributes:
        options: The options, as they are recorded or given.
        moments_absent: The name of the file of moments that the merge read and that was not given; None otherwise.
        warnings: What a person should know about them.
    """

    options: MergeOptions
    moments_absent: str | None = None
    warnings: tuple[str, ...] = ()


def reconstruct(
    options: MergeOptions, recorded: RecordedMerge, *, trained_on: str | Path | None, moments: str | Path | None
) -> Reconstruction:
    """The options with what the record says; what the caller gives goes before it.

    Args:
        options: Options about how the adapters are read, and whether the base is dequantised.
        recorded: What the record of the merged model says.
        trained_on: How the base was quantised in training; None for what is recorded.
        moments: The file of second moments that the merge read; None if it is not at hand.
    """
    scheme = trained_on if trained_on is not None else recorded.trained_on
    # The values of a quantised base are what training saw already.
    options = replace(options, trained_on=None if options.dequantize else scheme)
    if moments is not None:
        options = replace(options, rounding="calibrated", moments=moments, penalty=recorded.penalty)
        return Reconstruction(options, None, _other_moments(moments, recorded))
    if recorded.rounding == "calibrated":
        return Reconstruction(options, recorded.moments or "the file of moments")
    if recorded.rounding != "nearest":
        penalty = recorded.penalty if recorded.rounding == "adapter" else None
        options = replace(options, rounding=recorded.rounding, seed=recorded.seed, penalty=penalty)
    return Reconstruction(options)


def _other_moments(moments: str | Path, recorded: RecordedMerge) -> tuple[str, ...]:
    path = Path(moments)
    if recorded.moments_sha256 is None or not path.is_file() or sha256(path) == recorded.moments_sha256:
        return ()
    return (f"{quoted(path)} is not the file of moments that was merged with ({recorded.moments}): its hash differs",)
