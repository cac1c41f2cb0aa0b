"""The reports of compare: the similarity of two adapters, and of every pair of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.charts.of_report import report_charts, report_figure
from loratools.notebook_html import notebook_html
from loratools.short_repr import few_lines, one_line

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ComparedModule:
    """The similarity of the two deltas of one module, each at weight 1.

    Numbers are None if a delta is zero.

    Attributes:
        name: The name of the module.
        ranks: The rank of the first and of the second.
        norms: The Frobenius norm of the first and of the second, scale included.
        cosine: `<first, second> / (|first| |second|)`.
        overlap: The share of the row spaces (the inputs that the deltas react to) that is common, `|R_1^T R_2|^2 /
            min(r_1, r_2)` (Hu et al., 2021, section 7.2).
        overlap_baseline: The overlap expected of random subspaces of the same sizes.
        output_overlap: The share of the column spaces (the outputs that the deltas change) that is common.
        output_baseline: The output overlap expected of random subspaces of the same sizes.
        angles: The principal angles between the row spaces in degrees, ascending (Björck and Golub, 1973).
        norm_ratio: `|second| / |first|`.
        gains: The gain of the first and of the second in their sum: `1 + <first, second> / |own|^2`, where `own` is the
            one in question.
        interferences: `|other on the row space of own| / |own|`, for the first and for the second as `own`.
    """

    name: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    overlap: float | None
    overlap_baseline: float | None
    output_overlap: float | None
    output_baseline: float | None
    angles: tuple[float, ...]
    norm_ratio: float | None
    gains: tuple[float | None, float | None]
    interferences: tuple[float | None, float | None]

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `modules` in the document of `loratools compare --json`."""
        return {
            "name": self.name,
            "cosine": self.cosine,
            "overlap": self.overlap,
            "overlap_baseline": self.overlap_baseline,
            "output_overlap": self.output_overlap,
            "output_overlap_baseline": self.output_baseline,
            "principal_angles": list(self.angles),
            "norm_ratio": self.norm_ratio,
            "ranks": list(self.ranks),
            "norms": list(self.norms),
            "gains": list(self.gains),
            "interferences": list(self.interferences),
        }


@dataclass(frozen=True)
class CompareReport:
    """The similarity of two adapters, over the modules that both have.

    Attributes:
        paths: The two adapters, as the caller named them.
        modules: One entry per module that both have.
        only_in_first: Names of modules and replaced weights that only the first has.
        only_in_second: Names of modules and replaced weights that only the second has.
        cosine: The cosine between the deltas, each taken over all modules as one long vector.
        norm_ratio: `|second| / |first|` of these long vectors.
        overlap: The mean overlap of the row spaces.
        overlap_baseline: The mean overlap of random subspaces of the same sizes.
        output_overlap: The mean overlap of the column spaces.
        output_baseline: The mean output overlap of random subspaces of the same sizes.
        gains: The gain of the first and of the second in their sum.
        interferences: The interference for the first and for the second in their sum.
        replacements_equal: Names of replaced weights that are identical byte for byte.
        replacements_differ: Names of replaced weights that differ.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> report = loratools.compare("fixtures/llama-tiny-science", "fixtures/llama-tiny-shakespeare")
        >>> -1 <= report.cosine <= 1
        True
    """

    paths: tuple[str, str]
    modules: tuple[ComparedModule, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    cosine: float | None
    norm_ratio: float | None
    overlap: float | None
    overlap_baseline: float | None
    output_overlap: float | None
    output_baseline: float | None
    gains: tuple[float | None, float | None]
    interferences: tuple[float | None, float | None]
    replacements_equal: tuple[str, ...] = ()
    replacements_differ: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    def is_at_least(self, cosine: float) -> bool:
        """Return whether the cosine is defined and at least `cosine`.

        Args:
            cosine: The smallest cosine to accept, from -1 to 1.

        Returns:
            True if it is.
        """
        return self.cosine is not None and self.cosine >= cosine

    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module that both have, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools compare --json`, without the fields common to all verbs."""
        return {
            "paths": list(self.paths),
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "overlap": self.overlap,
            "overlap_baseline": self.overlap_baseline,
            "output_overlap": self.output_overlap,
            "output_overlap_baseline": self.output_baseline,
            "gains": list(self.gains),
            "interferences": list(self.interferences),
            "modules": [m.to_dict() for m in self.modules],
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
            "replacements": {"equal": list(self.replacements_equal), "different": list(self.replacements_differ)},
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class ComparedAdapter:
    """One of several compared adapters.

    Attributes:
        path: The adapter, as the caller named it.
        modules: How many of its modules are selected.
        norm: The Frobenius norm of the deltas of these modules as one long vector.
        step: The training step at the end of its name, as in `checkpoint-500`, if all adapters are checkpoints of one
            training run; else None.
    """

    path: str
    modules: int
    norm: float
    step: int | None = None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class ComparedPair:
    """The similarity of a pair of adapters, over the modules that both have. Numbers are None if they cannot be
    computed.

    Attributes:
        first: The position of the first adapter among the arguments, from 0.
        second: The position of the second adapter.
        modules: How many modules both have.
        cosine: The cosine between the deltas, each taken over these modules as one long vector.
        overlap: The mean overlap of the row spaces.
        overlap_baseline: The mean overlap of random subspaces of the same sizes.
        output_overlap: The mean overlap of the column spaces.
        output_baseline: The mean output overlap of random subspaces of the same sizes.
        norm_ratio: `|second| / |first|` of the long vectors.
    """

    first: int
    second: int
    modules: int
    cosine: float | None
    overlap: float | None
    overlap_baseline: float | None
    output_overlap: float | None
    output_baseline: float | None
    norm_ratio: float | None

    def __repr__(self) -> str:
        return one_line(self)

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `pairs` in the document of `loratools compare --json`."""
        body = dict(vars(self))
        body["output_overlap_baseline"] = body.pop("output_baseline")
        return body


@dataclass(frozen=True)
class ComparisonMatrix:
    """The similarity of every pair of three or more adapters.

    Attributes:
        adapters: The adapters, in the order given.
        pairs: Every pair once, with `first` before `second`.
        clusters: Groups of positions whose mean cosine is at least 0.5, ordered so that similar adapters are next to
            each other.
        warnings: Warnings about the result, as sentences.

    Example:
        >>> import loratools
        >>> paths = [f"fixtures/llama-tiny-{name}" for name in ("science", "shakespeare", "science")]
        >>> report = loratools.compare(*paths)
        >>> round(report.cosine[0][2], 6)
        1.0
    """

    adapters: tuple[ComparedAdapter, ...]
    pairs: tuple[ComparedPair, ...]
    clusters: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    @property
    def order(self) -> tuple[int, ...]:
        """The positions of the adapters, ordered so that similar adapters are next to each other."""
        return tuple(position for cluster in self.clusters for position in cluster)

    @property
    def cosine(self) -> tuple[tuple[float | None, ...], ...]:
        """The cosines of all pairs as a symmetric matrix, 1 on the diagonal."""
        return self._matrix("cosine")

    @property
    def overlap(self) -> tuple[tuple[float | None, ...], ...]:
        """The overlaps of the row spaces of all pairs as a symmetric matrix, 1 on the diagonal."""
        return self._matrix("overlap")

    @property
    def overlap_baseline(self) -> tuple[tuple[float | None, ...], ...]:
        """The overlaps expected of random subspaces of the same sizes, as a symmetric matrix; 1 on the diagonal."""
        return self._matrix("overlap_baseline")

    def is_at_least(self, cosine: float) -> bool:
        """Return whether the cosines of all pairs are defined and at least `cosine`.

        Args:
            cosine: The smallest cosine to accept, from -1 to 1.

        Returns:
            True if all of them are.
        """
        return all(pair.cosine is not None and pair.cosine >= cosine for pair in self.pairs)

    def _matrix(self, field: str) -> tuple[tuple[float | None, ...], ...]:
        size = len(self.adapters)
        rows: list[list[float | None]] = [[1.0 if i == j else None for j in range(size)] for i in range(size)]
        for pair in self.pairs:
            rows[pair.first][pair.second] = rows[pair.second][pair.first] = getattr(pair, field)
        return tuple(map(tuple, rows))

    charts = report_charts
    plot = report_figure

    def rows(self) -> list[dict[str, object]]:
        """Return one row per pair, for a data frame: `pandas.DataFrame(report.rows())`."""
        paths = [adapter.path for adapter in self.adapters]
        return [pair.to_dict() | {"first": paths[pair.first], "second": paths[pair.second]} for pair in self.pairs]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools compare --json` for three or more adapters, without the fields common to
        all verbs.
        """
        return {
            "adapters": [dict(vars(adapter)) for adapter in self.adapters],
            "cosine": [list(row) for row in self.cosine],
            "overlap": [list(row) for row in self.overlap],
            "overlap_baseline": [list(row) for row in self.overlap_baseline],
            "pairs": [pair.to_dict() for pair in self.pairs],
            "order": list(self.order),
            "clusters": [list(cluster) for cluster in self.clusters],
            "warnings": list(self.warnings),
        }
