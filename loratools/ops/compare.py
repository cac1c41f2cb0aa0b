"""Compare two adapters target by target: how alike their deltas are, and what each would meet in the other.

Everything comes from the factors (`algebra.lowrank`) in float64; no dense matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.arguments import Globs, Positive, checked
from loratools.errors import MismatchError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.formats import Base
from loratools.formats.common.leave_out import LeaveOut
from loratools.formats.common.opened_base import known_base
from loratools.ops.combine.shares import overlap
from loratools.ops.common.arguments import AdapterSource, RankFrom, load_weighted
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.common.same_layers import require_same_layers
from loratools.ops.lowrank.experts import apart
from loratools.ops.lowrank.factors import exact_factors, is_vector, require_factors
from loratools.ops.lowrank.reduce import inner
from loratools.selection import select_names
from loratools.short_repr import few_lines, one_line
from loratools.storage.held_inputs import holding_inputs
from loratools.storage.same import same_bytes
from loratools.updates.lora_experts import Packing
from loratools.updates.parts.protocol import flow

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.checkpoints import Checkpoint


@dataclass(frozen=True)
class ComparedModule:
    """The likeness of two deltas of one module, each at weight 1.

    Numbers are None where a delta is zero.

    Attributes:
        name: The name of the module.
        ranks: The rank of the first and of the second.
        norms: The Frobenius norm of the first and of the second, scale included.
        cosine: `<first, second> / (|first| |second|)`.
        overlap: The share of the row spaces (the inputs they react to) that is common, `|R_1^T R_2|^2 / min(r_1, r_2)`
            (Hu et al., 2021, section 7.2).
        overlap_baseline: The same for random subspaces of those sizes.
        output_overlap: The share of the column spaces (the outputs they change) that is common.
        output_baseline: The same for random subspaces of those sizes.
        angles: The principal angles between the row spaces in degrees, ascending (Björck and Golub, 1973).
        norm_ratio: `|second| / |first|`.
        gains: Of the first and of the second in their sum: `1 + <first, second> / |own|^2`.
        interferences: `|other on the row space of own| / |own|`, for the first and for the second.
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
    """The likeness of two adapters, over the modules that both have.

    Attributes:
        paths: The two adapters, as they were named.
        modules: One entry per module that both have.
        only_in_first: Names of modules and replaced weights that only the first has.
        only_in_second: Names of modules and replaced weights that only the second has.
        cosine: The cosine of the deltas of all modules as one long vector.
        norm_ratio: `|second| / |first|` of these vectors.
        overlap: The mean overlap of the row spaces.
        overlap_baseline: The mean of the same for random subspaces.
        output_overlap: The mean overlap of the column spaces.
        output_baseline: The mean of the same for random subspaces.
        gains: The gain of the first and of the second in their sum.
        interferences: The interference for the first and for the second in their sum.
        replacements_equal: Names of replaced weights that are byte for byte the same.
        replacements_differ: Names of replaced weights that differ.
        warnings: What a person should know about the result, as sentences.
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

    def rows(self) -> list[dict[str, object]]:
        """Return one row per module that both have, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [module.to_dict() for module in self.modules]

    def to_dict(self) -> dict[str, object]:
        """The document of `loratools compare --json`, without its head."""
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


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def compare(
    first: AdapterSource,
    second: AdapterSource,
    *,
    include: Globs = (),
    exclude: Globs = (),
    rank_from: RankFrom = None,
    expert_packing: Packing | None = None,
    from_format: str | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    threads: Positive | None = None,
    progress: Callable[[int], None] | None = None,
) -> CompareReport:
    """Return how alike two adapters are, over the modules that both have.

    Args:
        first: An adapter, by its path or loaded.
        second: The adapter that it is compared with.
        include: Globs over the names of both adapters; all are taken where there is none.
        exclude: Globs of what is left out.
        rank_from: `tensors` or `config`: which rank makes the scale, where the two disagree.
        expert_packing: `peft` or `expert-major`: how fused experts share the columns of B, where the files leave it
            open.
        from_format: The format of the adapters, where it is not to be found from the content.
        base: The model that they are for, where names alone do not tell: its path, opened, or its names and config.
        threads: Workers; one per CPU where it is None. The result does not depend on it.
        progress: Called with the number of bytes just read.

    Returns:
        A report of cosines, overlaps of subspaces, ratios of norms and principal angles (degrees), per module and
        overall.

    Raises:
        MismatchError: No module is in both, or one has another shape in each.
        UnsupportedError: The scale of one is uncertain, or an update has no factors.
        InputError: Values that are not finite.

    Example:
        >>> import loratools
        >>> report = loratools.compare("fixtures/llama-tiny-science", "fixtures/llama-tiny-science")
        >>> round(report.cosine, 6)
        1.0
    """
    known = known_base(base)
    loaded = load_weighted(
        [first, second],
        rank_from=rank_from,
        expert_packing=expert_packing,
        from_format=from_format,
        base=known,
        leave_out=LeaveOut.of(include, exclude),
    )
    one, two = (adapter for adapter, _ in loaded)
    require_same_layers([one, two], hint="merge each into its base, and compare what becomes of it")
    one, two = (replace(a, updates=apart(a.updates)[0]) for a in (one, two))
    every = sorted({*one.updates, *two.updates, *one.replacements, *two.replacements})
    unread = (*one.unread_tensors, *two.unread_tensors)
    names = set(select_names(every, include, exclude, unread=unread))
    left, right = ({n: u for n, u in a.updates.items() if n in names} for a in (one, two))
    both = [name for name in left if name in right]
    _ensure_comparable(one, two, both)

    def work(name: str) -> _Pair:
        pair = _pair(name, one, two)
        if progress is not None:
            progress(bytes_of((left[name], right[name])))
        return pair

    expect(progress, bytes_of(updates[name] for name in both for updates in (left, right)))
    with single_threaded_torch():
        pairs = run(both, work, threads=worker_count(threads))
    heads = [n for n in one.replacements if n in two.replacements and n in names]
    equal = {n for n in heads if same_bytes(one.replacements[n].tensor, two.replacements[n].tensor)}
    heads_of = [{n for n in a.replacements if n in names} for a in (one, two)]
    return CompareReport(
        paths=(one.name, two.name),
        modules=tuple(p.module() for p in pairs),
        only_in_first=tuple(sorted((left.keys() - right.keys()) | (heads_of[0] - heads_of[1]))),
        only_in_second=tuple(sorted((right.keys() - left.keys()) | (heads_of[1] - heads_of[0]))),
        replacements_equal=tuple(sorted(equal)),
        replacements_differ=tuple(sorted(set(heads) - equal)),
        warnings=tuple(f"'{a.name}': {text}" for a in (one, two) for text in a.warnings),
        **_overall(pairs),
    )


@dataclass(frozen=True)
class _Pair:
    """One target: squares and products that add up over targets, and what does not."""

    name: str
    ranks: tuple[int, int]
    squares: tuple[float, float]
    product: float
    rows: tuple[float, float] | None
    columns: tuple[float, float] | None
    angles: tuple[float, ...]
    disturbances: tuple[float, float]

    def module(self) -> ComparedModule:
        cosine, ratio, gains, interferences = _of_sums(self.squares, self.product, self.disturbances)
        overlap, baseline = self.rows or (None, None)
        output_overlap, output_baseline = self.columns or (None, None)
        return ComparedModule(
            name=self.name,
            ranks=self.ranks,
            norms=(math.sqrt(self.squares[0]), math.sqrt(self.squares[1])),
            cosine=cosine,
            overlap=overlap,
            overlap_baseline=baseline,
            output_overlap=output_overlap,
            output_baseline=output_baseline,
            angles=self.angles,
            norm_ratio=ratio,
            gains=gains,
            interferences=interferences,
        )


def _pair(name: str, one: Adapter, two: Adapter) -> _Pair:
    import torch

    from loratools.algebra.lowrank import Factors, row_space

    f, g = (exact_factors(a.updates[name], name, a.name) for a in (one, two))
    (rows_f, square_f), (rows_g, square_g) = row_space(f), row_space(g)
    columns_f, columns_g = (row_space(Factors(x.a.mT, x.b.mT))[0] for x in (f, g))
    # A vector has no row space to speak of.
    there = bool(rows_f.shape[1] and rows_g.shape[1]) and not is_vector(one.updates[name])
    disturbances = (
        float((g.b @ (g.a @ rows_f)).square().sum()),
        float((f.b @ (f.a @ rows_g)).square().sum()),
    )
    return _Pair(
        name,
        (rows_f.shape[1], rows_g.shape[1]),
        (square_f, square_g),
        inner(f, g),
        overlap(rows_f, rows_g) if there else None,
        overlap(columns_f, columns_g) if there else None,
        tuple(torch.rad2deg(principal_angles(rows_f, rows_g)).tolist()) if there else (),
        disturbances,
    )


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """The angles between two subspaces, each given by orthonormal columns: (the smaller count,), ascending, in radians.

    Angles below 45 degrees from sines and the others from cosines, since the arc cosine of what is nearly 1 has half of
    the digits. Björck and Golub, "Numerical methods for computing angles between linear subspaces", 1973.
    """
    import torch

    if one.shape[1] > other.shape[1]:
        one, other = other, one
    cosines = torch.linalg.svdvals(other.mT @ one).clamp(max=1)
    sines = torch.linalg.svdvals(one - other @ (other.mT @ one)).flip(0).clamp(max=1)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos())


def _ensure_comparable(one: Adapter, two: Adapter, both: Sequence[str]) -> None:
    if not both:
        example = [next(iter(a.updates), "nothing") for a in (one, two)]
        raise MismatchError(
            f"'{one.name}' and '{two.name}' have no module in common",
            details=[f"'{a.name}': {name}, ..." for a, name in zip((one, two), example, strict=True)],
            hint="they are for different models, or name modules in different ways",
        )
    require_factors((f"{name} of '{a.name}'", a.updates[name]) for name in both for a in (one, two))
    misfits = [
        f"{n}   {flow(one.updates[n].shape)} and {flow(two.updates[n].shape)}"
        for n in both
        if one.updates[n].shape != two.updates[n].shape
    ]
    if misfits:
        raise MismatchError(
            f"the adapters differ in the shape of {len(misfits)} of {len(both)} modules",
            details=misfits,
            hint="they were trained on different models; leave such modules out with --exclude",
        )


_Both = tuple[float | None, float | None]


def _of_sums(
    squares: Sequence[float], product: float, disturbances: Sequence[float]
) -> tuple[float | None, float | None, _Both, _Both]:
    cosine = product / math.sqrt(squares[0] * squares[1]) if squares[0] and squares[1] else None
    ratio = math.sqrt(squares[1] / squares[0]) if squares[0] else None
    gains = (1 + product / squares[0] if squares[0] else None, 1 + product / squares[1] if squares[1] else None)
    met = [math.sqrt(d / s) if s else None for d, s in zip(disturbances, squares, strict=True)]
    return cosine, ratio, gains, (met[0], met[1])


def _overall(pairs: Sequence[_Pair]) -> dict[str, Any]:
    sums = [math.fsum(p.squares[k] for p in pairs) for k in (0, 1)]
    met = [math.fsum(p.disturbances[k] for p in pairs) for k in (0, 1)]
    cosine, ratio, gains, interferences = _of_sums(sums, math.fsum(p.product for p in pairs), met)
    rows = [p.rows for p in pairs if p.rows is not None]
    columns = [p.columns for p in pairs if p.columns is not None]
    return {
        "cosine": cosine,
        "norm_ratio": ratio,
        "overlap": _mean_overlap(rows, 0),
        "overlap_baseline": _mean_overlap(rows, 1),
        "output_overlap": _mean_overlap(columns, 0),
        "output_baseline": _mean_overlap(columns, 1),
        "gains": gains,
        "interferences": interferences,
    }


def _mean_overlap(pairs: Sequence[tuple[float, float]], which: int) -> float | None:
    return math.fsum(p[which] for p in pairs) / len(pairs) if pairs else None
