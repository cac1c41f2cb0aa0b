"""The self-check of a merge: rows read back from what was written, against `base + update` computed anew in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import LoraToolsError
from loratools.execution import local
from loratools.plan import Output, OutputFile
from loratools.storage.safetensors_reader import read_header
from loratools.tensors import LazyTensor, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

# Rows looked at in each touched tensor: the first, the last, and others evenly between.
_ROWS = 8


@dataclass(frozen=True)
class Check:
    """`ratio`: the largest error as a share of what is allowed (`algebra.rounding.merge_error_bound`)."""

    name: str
    ratio: float


def check_files(folder: Path, files: Sequence[OutputFile], *, threads: int) -> list[Check]:
    """Check a sample of rows of every touched tensor of the files written to `folder`.

    Raises:
        LoraToolsError: a row is further from the exact result than rounding explains; that is a bug of ours.
    """
    headers = {f.name: read_header(folder / f.name) for f in files}
    written = [(headers[f.name].tensors[o.name], o) for f in files for o in f.outputs if o.touched]
    checks = local.run(written, check_tensor, threads=threads)
    wrong = [c for c in checks if not c.ratio <= 1]
    if wrong:
        raise LoraToolsError(
            f"the self-check found {len(wrong)} merged weights that are not base + update",
            details=[f"{c.name}   {c.ratio:.3g} times the error that rounding explains" for c in wrong],
            hint="this is a bug of loratools; nothing was written",
        )
    return checks


def check_tensor(written: tuple[LazyTensor, Output]) -> Check:
    """Compare rows of a stored tensor with what its output says it is."""
    import torch

    from loratools.algebra.rounding import merge_error_bound
    from loratools.ops._merge_rows import prepared

    stored, output = written
    rows = output.shape[0] if output.shape else 1
    deltas = prepared(output.updates, torch.float64)
    terms = sum(d.terms for d in deltas)
    worst = 0.0
    for row in sorted({round(i * (rows - 1) / (_ROWS - 1)) for i in range(_ROWS)}) if rows else ():
        base = _row(output.values, row)
        found = _row(stored, row)
        exact, magnitude = base, torch.zeros_like(base)
        for delta in deltas:
            exact = exact + delta.rows(row, row + 1).reshape(-1)
            magnitude = magnitude + delta.magnitude(row, row + 1).reshape(-1)
        bound = merge_error_bound(base.abs(), magnitude, found, torch_dtype(output.dtype), terms)
        error = (found - exact).abs()
        # 0/0 is an exact zero; nan is reported as the worst there is.
        ratio = torch.where(error == 0, 0.0, error / bound)
        worst = max(worst, float(torch.where(ratio.isnan(), torch.inf, ratio).max()) if ratio.numel() else 0.0)
    return Check(output.name, worst)


def _row(tensor: LazyTensor, row: int) -> Tensor:
    return (tensor.read_rows(row, row + 1) if tensor.shape else tensor.read()).double().reshape(-1)
