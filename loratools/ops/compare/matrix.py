"""Every two of several adapters: module by module, so that the factors of each are made once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from loratools.adapter import Adapter
from loratools.algebra.linkage import linked
from loratools.errors import MismatchError
from loratools.execution.local import run, single_threaded_torch, worker_count
from loratools.ops.common.progress import bytes_of, expect
from loratools.ops.compare.module_pair import ModulePair, Side, mean_overlap, module_pair, require_comparable
from loratools.ops.compare.report import ComparedAdapter, ComparedPair, ComparisonMatrix

# Groups of this mean cosine belong together.
_ALIKE = 0.5
# What trainers call the states of one training: checkpoint-500, ink-000012, step_2000, epoch4.
_STEP = re.compile(r"(?:^|[-_. ])(?:checkpoint|step|epoch|e|s)?[-_]?(\d+)$", re.IGNORECASE)

Position = tuple[int, int]


def compare_all(
    adapters: Sequence[Adapter], *, threads: int | None, progress: Callable[[int], None] | None, warnings: Sequence[str]
) -> ComparisonMatrix:
    """The likeness of every two adapters, over the modules that both have.

    Raises:
        MismatchError: No two of them have a module in common, or one module has another shape in one of them.
        UnsupportedError: An update has no factors.
        InputError: Values are NaN or infinite.
    """
    names = sorted({name for adapter in adapters for name in adapter.updates})
    shared = [name for name in names if sum(name in adapter.updates for adapter in adapters) > 1]
    if not shared:
        raise MismatchError(
            f"no two of the {len(adapters)} adapters have a module in common",
            details=[f"'{a.name}': {next(iter(a.updates), 'nothing')}, ..." for a in adapters],
            hint="they are for different models, or name modules in different ways",
        )
    require_comparable(adapters, shared)

    def work(name: str) -> tuple[dict[Position, ModulePair], dict[int, float]]:
        having = [i for i, adapter in enumerate(adapters) if name in adapter.updates]
        sides = {i: Side.of(name, adapters[i]) for i in having}
        if progress is not None:
            progress(bytes_of(adapters[i].updates[name] for i in having))
        pairs = {(i, j): module_pair(name, sides[i], sides[j], angles=False) for i, j in combinations(having, 2)}
        return pairs, {i: side.square for i, side in sides.items()}

    expect(progress, bytes_of(update for adapter in adapters for update in adapter.updates.values()))
    with single_threaded_torch():
        results = run(names, work, threads=worker_count(threads))
    squares = [[by_adapter[i] for _, by_adapter in results if i in by_adapter] for i in range(len(adapters))]
    pairs = tuple(
        _compared(i, j, [by_pair[i, j] for by_pair, _ in results if (i, j) in by_pair])
        for i, j in combinations(range(len(adapters)), 2)
    )
    steps = steps_of([adapter.name for adapter in adapters])
    matrix = ComparisonMatrix(
        adapters=tuple(
            ComparedAdapter(adapter.name, len(adapter.updates), math.sqrt(math.fsum(of_one)), step)
            for adapter, of_one, step in zip(adapters, squares, steps, strict=True)
        ),
        pairs=pairs,
        clusters=(),
        warnings=tuple(warnings),
    )
    return replace(matrix, clusters=linked(matrix.cosine, _ALIKE))


def _compared(first: int, second: int, modules: Sequence[ModulePair]) -> ComparedPair:
    squares = [math.fsum(module.squares[k] for module in modules) for k in (0, 1)]
    product = math.fsum(module.product for module in modules)
    rows = [module.rows for module in modules if module.rows is not None]
    columns = [module.columns for module in modules if module.columns is not None]
    return ComparedPair(
        first=first,
        second=second,
        modules=len(modules),
        cosine=product / math.sqrt(squares[0] * squares[1]) if squares[0] and squares[1] else None,
        overlap=mean_overlap(rows, 0),
        overlap_baseline=mean_overlap(rows, 1),
        output_overlap=mean_overlap(columns, 0),
        output_baseline=mean_overlap(columns, 1),
        norm_ratio=math.sqrt(squares[1] / squares[0]) if squares[0] else None,
    )


def steps_of(paths: Sequence[str]) -> list[int | None]:
    """The steps of states of one training, by their names: all of them differ in nothing else; else None for each.

    Example:
        >>> steps_of(["run/checkpoint-500", "run/checkpoint-1000"]), steps_of(["style-2", "facts-3"])
        ([500, 1000], [None, None])
    """
    stems = [Path(path).name.removesuffix(".safetensors") for path in paths]
    matches = [_STEP.search(stem) for stem in stems]
    steps = [int(match.group(1)) for match in matches if match is not None]
    starts = {stem[: match.start(1)] for stem, match in zip(stems, matches, strict=True) if match is not None}
    of_one_training = len(steps) == len(paths) == len(set(steps)) and len(starts) == 1
    return [*steps] if of_one_training else [None] * len(paths)
