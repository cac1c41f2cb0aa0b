"""The self-check of a merge sees what was not written as it should be, wherever it looks; the gain is of the sum."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import factories
import pytest

import loratools
from loratools.errors import LoraToolsError
from loratools.ops.merge import writing
from loratools.ops.merge.outputs import RowsUnit
from loratools.ops.merge.rows import Gain
from loratools.storage.checksum import Checksum

# More weights than are looked at in one piece: of such a unit a few rows are.
ROWS, COLUMNS = 200, 90
MODULES = {"model.layers.0.self_attn.q_proj": (ROWS, COLUMNS)}


@pytest.mark.parametrize("value", [7.0, float("nan")], ids=["a wrong number", "no number"])
@pytest.mark.parametrize("row", [0, ROWS // 2 - 1, ROWS - 1], ids=["first", "middle", "last"])
def test_wrong_value_in_a_row_that_is_looked_at_ends_the_merge(
    row: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(MODULES))
    adapter = factories.adapter_folder(tmp_path / "style", modules=MODULES)
    merge_rows = writing.merge_rows

    def damaged(unit: RowsUnit, fd: int, offset: int, checksum: Checksum) -> Gain:
        gain = merge_rows(unit, fd, offset, checksum)
        os.pwrite(fd, struct.pack("<f", value), offset + row * unit.output.row_bytes)
        return gain

    monkeypatch.setattr(writing, "merge_rows", damaged)
    with pytest.raises(LoraToolsError, match="self-check found 1 merged weights"):
        loratools.merge(base, adapter, tmp_path / "out", threads=1)

    assert not (tmp_path / "out").exists()


def test_gain_of_several_adapters_is_that_of_their_sum(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(MODULES))
    adapters = [factories.adapter_folder(tmp_path / f"style-{i}", modules=MODULES, seed=i) for i in range(2)]

    report = loratools.merge(base, adapters, tmp_path / "out")

    # In float32 all of the update survives, to the rounding of values that are sums of its own size.
    assert report.gain == pytest.approx(1.0, abs=1e-5)
