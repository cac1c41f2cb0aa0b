"""The report of inspect: each source, and each module and tensor in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from loratools.charts.of_report import report_charts, report_figure
from loratools.errors import InputError, LoraToolsError
from loratools.notebook_html import notebook_html
from loratools.ops.inspect.training_run import TrainingRun
from loratools.short_repr import counted, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loratools.charts.values import Chart
    from loratools.formats.common.description import Description

_Key = TypeVar("_Key", str, int, float)
# The most lines that the report prints in a console.
_SHOWN_SOURCES = 4


# Named tuples and not dataclasses: defining one costs 0.1 ms and not 0.6 ms at every start of `inspect`.


class Values(NamedTuple):
    """Measurements of the values of an update: of all of `dW`, scale included.

    Numbers are None if the delta is not low rank, or if a factor has NaN or infinite values.

    Attributes:
        norm: The Frobenius norm.
        spectral_norm: The largest singular value.
        stable_rank: `norm^2 / spectral_norm^2`.
        effective_rank: The exponential of the entropy of `sigma / sum sigma` (Roy and Vetterli, 2007).
        singular_values: The singular values, descending.
        finite: Whether no value is NaN or infinite.
        zero: Whether the update changes nothing.
        zero_rows: How many rows of B are exactly zero, so that these outputs do not change.
    """

    norm: float | None
    spectral_norm: float | None
    stable_rank: float | None
    effective_rank: float | None
    singular_values: tuple[float, ...] | None
    finite: bool | None
    zero: bool | None
    zero_rows: int | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `values` in a module of the document of `loratools inspect --json`."""
        s = self.singular_values
        return {**self._asdict(), "singular_values": None if s is None else list(s)}


class InspectedModule(NamedTuple):
    """One update of an adapter, as its header and config describe it.

    Attributes:
        name: The name of the module in the file.
        target: The module's canonical name.
        kind: The kind of the update, such as lora.
        rank: Its rank; None if its kind has none.
        alpha: The alpha that the scale is computed from; None if its kind has none.
        alpha_source: Where alpha comes from: config, tensor, metadata or assumed.
        scale: The factor that multiplies the update.
        shape: The shape of the weight; None for a size that is not known.
        dtype: The dtype of its tensors.
        parameters: How many values it stores.
        dora: Whether it has a DoRA magnitude.
        values: The measurements of its values; None if they were not read.
    """

    name: str
    target: str
    kind: str
    rank: int | None
    alpha: float | None
    alpha_source: str
    scale: float
    shape: tuple[int | None, ...]
    dtype: str
    parameters: int
    dora: bool
    values: Values | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the document of `loratools inspect --json`."""
        return {
            "name": self.name,
            "target": self.target,
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.alpha,
            "alpha_source": self.alpha_source,
            "scale": self.scale,
            "out_features": self.shape[0] if self.shape else None,
            "in_features": self.shape[1] if len(self.shape) > 1 else None,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "parameters": self.parameters,
            "dora": self.dora,
            **(self.values.to_dict() if self.values is not None else {}),
        }


class TensorEntry(NamedTuple):
    """A tensor of a checkpoint, or one that replaces a weight.

    Attributes:
        name: Its name.
        shape: Its shape.
        dtype: Its dtype as safetensors spells it.
        parameters: How many values it has.
        non_finite: How many of its values are NaN or infinite; None if the values were not read or cannot be unpacked.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    non_finite: int | None = None


class AdapterEntry(NamedTuple):
    """An adapter that was inspected.

    Attributes:
        path: Where it is.
        format: Its format.
        base_model: The base model that it names; None if it names none.
        bytes: Size of its tensors in bytes.
        parameters: How many values it stores.
        dtypes: How many tensors there are of each dtype.
        modules: One entry per update.
        replacements: Tensors that replace weights of the base.
        metadata: Metadata of its files.
        warnings: Warnings about it, as sentences.
        unread_tensors: Keys of tensors in its files that a glob excluded before they were read.
        family: The family of image models that it belongs to; for an adapter of a language model that names no base,
            the published models of the same sizes; None if neither is known.
        description: The title, trigger words, tags and date in the header; None if there are none.
        revision: The hash of the commit, if it is a repository of the hub; None if it is not.
    """

    path: str
    format: str
    base_model: str | None
    bytes: int
    parameters: int
    dtypes: Mapping[str, int]
    modules: tuple[InspectedModule, ...]
    replacements: tuple[TensorEntry, ...]
    metadata: Mapping[str, object]
    warnings: tuple[str, ...]
    unread_tensors: tuple[str, ...] = ()
    family: str | None = None
    description: Description | None = None
    revision: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_html_(self) -> str | None:
        return notebook_html(self)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Modules that change nothing; empty if the values were not read."""
        return tuple(m.name for m in self.modules if m.values is not None and m.values.zero)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Modules and replaced weights with NaN or infinite values; empty if the values were not read."""
        return (
            *(m.name for m in self.modules if m.values is not None and m.values.finite is False),
            *(t.name for t in self.replacements if t.non_finite),
        )

    @property
    def mostly_zero(self) -> tuple[str, ...]:
        """Modules with more than half of the rows of B exactly zero, but not all.

        A shard that was lost while an adapter was saved leaves such rows. Empty if the values were not read.
        """
        return tuple(
            m.name
            for m in self.modules
            if m.values is not None and not m.values.zero and 2 * (m.values.zero_rows or 0) > (m.shape[0] or 0)
        )

    @property
    def value_warnings(self) -> tuple[str, ...]:
        """Warnings about the values, with all names; empty if the values were not read."""
        warnings = [f"values not finite in {', '.join(self.not_finite)}"] if self.not_finite else []
        if self.untrained:
            warnings.append(f"untrained modules, which change nothing: {', '.join(self.untrained)}")
        if self.mostly_zero:
            warnings.append(f"most rows of B are zeros, as a lost shard leaves them: {', '.join(self.mostly_zero)}")
        return tuple(warnings)

    def charts(self) -> tuple[Chart, ...]:
        """Return the charts of the report as plain values; see `loratools.charts`."""
        return report_charts(self)

    def plot(self) -> Figure:
        """Return a matplotlib figure of the report's charts; needs the extra `plot`.

        Raises:
            UnsupportedError: Matplotlib is not installed.
            InputError: There is nothing to draw.
        """
        return report_figure(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `sources` in the document of `loratools inspect --json`."""
        ranks = frequencies(m.rank for m in self.modules if m.rank is not None)
        return {
            "path": self.path,
            "format": self.format,
            "layout": None,
            "base_model": self.base_model,
            **({"family": self.family} if self.family is not None else {}),
            **(self.description.to_dict() if self.description is not None else {}),
            "bytes": self.bytes,
            "parameters": self.parameters,
            "ranks": {str(rank): count for rank, count in ranks.items()},
            "scales": [{"scale": s, "modules": n} for s, n in frequencies(m.scale for m in self.modules).items()],
            "kinds": frequencies(m.kind for m in self.modules),
            "dtypes": dict(self.dtypes),
            "modules": [m.to_dict() for m in self.modules],
            "replacements": [_replacement_json(t) for t in self.replacements],
            # Every tensor of an adapter belongs to an update or a replacement, or a glob excludes it, or loading fails.
            "other_tensors": list(self.unread_tensors),
            "metadata": dict(self.metadata),
            "warnings": [*self.value_warnings, *self.warnings],
            **({"revision": self.revision} if self.revision is not None else {}),
        }


class QuantisedEntry(NamedTuple):
    """Weights of a checkpoint that are quantised with the same scheme and parameters.

    Attributes:
        scheme: The scheme, as `loratools formats` names it.
        format: The number format within the scheme; None if the scheme has only one.
        bits: Bits of a stored number; None if unknown.
        group: How many weights share a scale; None if scales are not per group.
        weights: Names of these weights.
        why: Why they cannot be read; None if they can.
    """

    scheme: str
    format: str | None
    bits: float | None
    group: int | None
    weights: tuple[str, ...]
    why: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `quantised` in the document of `loratools inspect --json`."""
        return {**self._asdict(), "weights": list(self.weights)}


class CheckpointEntry(NamedTuple):
    """A checkpoint that was inspected.

    Attributes:
        path: Where it is.
        layout: How it is stored.
        architecture: The class of the model in its config; None if the config names none.
        bytes: Size of its tensors in bytes.
        parameters: How many weights it has, quantised ones unpacked.
        dtypes: How many tensors there are of each dtype.
        quantization: The quantisation named by its config or shown by its tensors; None if it is not quantised.
        quantised: Its quantised weights, one entry per scheme and parameters.
        tensors: One entry per stored tensor.
        tied: Names of absent weights, and the stored weights that they are tied to.
        side_files: Names of files that belong to the model and hold no weights.
        left_out: Names of files that are not part of the model, and why.
        warnings: Warnings about the result, as sentences.
        values_read: Whether values were read.
        revision: The hash of the commit, if it is a repository of the hub; None if it is not.
    """

    path: str
    layout: str
    architecture: str | None
    bytes: int
    parameters: int
    dtypes: Mapping[str, int]
    quantization: str | None
    quantised: tuple[QuantisedEntry, ...]
    tensors: tuple[TensorEntry, ...]
    tied: Mapping[str, str]
    side_files: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]
    values_read: bool
    revision: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_html_(self) -> str | None:
        return notebook_html(self)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinite values; empty if the values were not read."""
        return tuple(t.name for t in self.tensors if t.non_finite)

    @property
    def value_warnings(self) -> tuple[str, ...]:
        """Warnings about the values, with all names; empty if the values were not read."""
        return (f"values not finite in {', '.join(self.not_finite)}",) if self.not_finite else ()

    def rows(self) -> list[dict[str, object]]:
        """Return one row per tensor, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [_tensor_json(t, values=self.values_read) for t in self.tensors]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `sources` in the document of `loratools inspect --json`."""
        return {
            "path": self.path,
            "format": None,
            "layout": self.layout,
            "architecture": self.architecture,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "quantization": self.quantization,
            "quantised": [entry.to_dict() for entry in self.quantised],
            "tensors": self.rows(),
            "tied": dict(self.tied),
            "side_files": list(self.side_files),
            "left_out": [{"name": name, "why": why} for name, why in self.left_out.items()],
            "warnings": [*self.value_warnings, *self.warnings],
            **({"revision": self.revision} if self.revision is not None else {}),
        }


class FailedEntry(NamedTuple):
    """A source that could not be inspected, among several sources.

    Attributes:
        path: Where it is.
        error: Why it could not be inspected.
    """

    path: str
    error: LoraToolsError

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_html_(self) -> str | None:
        return notebook_html(self)

    def rows(self) -> list[dict[str, object]]:
        """Return no rows, since the source could not be read."""
        return []

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `sources` in the document of `loratools inspect --json`."""
        error = self.error
        document = {"code": error.code, "message": error.message, "hint": error.hint, "details": list(error.details)}
        return {"path": self.path, "error": document}


Entry = AdapterEntry | CheckpointEntry | FailedEntry


class NotListed(NamedTuple):
    """Files and folders below a searched folder that have no entry of their own.

    Attributes:
        why: Why they have none.
        paths: Where they are.
    """

    why: str
    paths: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `not_listed` in the document of `loratools inspect --json`."""
        return {"why": self.why, "paths": list(self.paths)}


class InspectReport(NamedTuple):
    """The report of an inspection.

    Attributes:
        sources: One entry per source, in the order given; those of a folder sorted by name.
        not_listed: Other files and folders in the searched folders, and why they have no entry.
        runs: For each training run in the folders, what its trainer recorded, such as the best checkpoint.

    Example:
        >>> import loratools
        >>> report = loratools.inspect("fixtures/llama-tiny-science")
        >>> report.sources[0].format, report.sources[0].modules[0].rank
        ('peft', 16)
    """

    sources: tuple[Entry, ...]
    not_listed: tuple[NotListed, ...] = ()
    runs: tuple[TrainingRun, ...] = ()

    def __repr__(self) -> str:
        lines = [f"  {one_line(entry)}" for entry in self.sources[:_SHOWN_SOURCES]]
        if (more := len(self.sources) - _SHOWN_SOURCES) > 0:
            lines.append(f"  … and {counted(more, 'source')} more")
        return "\n".join(["InspectReport", *lines])

    def _repr_html_(self) -> str | None:
        return notebook_html(self)

    @property
    def error(self) -> InputError | None:
        """The error of the sources that could not be inspected, if there were several; else None."""
        failed = [e for e in self.sources if isinstance(e, FailedEntry)]
        if not failed:
            return None
        return InputError(
            f"{len(failed)} of {len(self.sources)} sources could not be inspected",
            details=[f"{e.path}: {e.error.message}" for e in failed],
        )

    def charts(self) -> tuple[Chart, ...]:
        """Return the charts of the report as plain values; see `loratools.charts`."""
        return report_charts(self)

    def plot(self) -> Figure:
        """Return a matplotlib figure of the report's charts; needs the extra `plot`.

        Raises:
            UnsupportedError: Matplotlib is not installed.
            InputError: There is nothing to draw.
        """
        return report_figure(self)

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module of an adapter and per tensor of a checkpoint, each with the path of its source.

        For a data frame: `pandas.DataFrame(report.rows())`.
        """
        return [{"path": entry.path, **row} for entry in self.sources for row in entry.rows()]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools inspect --json`, without the fields common to all verbs."""
        return {
            "sources": [entry.to_dict() for entry in self.sources],
            "not_listed": [each.to_dict() for each in self.not_listed],
            "runs": [run.to_dict() for run in self.runs],
        }


def frequencies(values: Iterable[_Key]) -> dict[_Key, int]:
    return dict(sorted(Counter(values).items()))


def _replacement_json(tensor: TensorEntry) -> dict[str, object]:
    values = {} if tensor.non_finite is None else {"non_finite": tensor.non_finite}
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, **values}


def _tensor_json(tensor: TensorEntry, *, values: bool) -> dict[str, object]:
    of_values = {"non_finite": tensor.non_finite} if values else {}
    head = {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
    return {**head, "parameters": tensor.parameters, **of_values}
