"""compare, held against dense float64 matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click.testing
import factories
import pytest
import scipy.linalg
import torch
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter, Replacement
from loratools.cli import verbs
from loratools.errors import MismatchError
from loratools.ops.compare.module_pair import principal_angles
from loratools.ops.compare.verb import compare
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

SHAPES = {"a": (12, 9), "b": (8, 11)}


def _adapter(seed: int, rank: int, alpha: float, names: tuple[str, ...] = ("a", "b")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name in names:
        rows, columns = SHAPES[name]
        a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        updates[name] = LoRA(
            from_torch(a),
            from_torch(torch.randn(rows, rank, generator=generator, dtype=torch.float64)),
            alpha,
            "config",
        )
    return Adapter(updates)


def _dense(adapter: Adapter, name: str) -> Tensor:
    update = adapter.updates[name]
    assert isinstance(update, LoRA)
    return update.b.read() @ update.a.read() * update.scale


def test_numbers_are_those_of_dense_matrices() -> None:
    one, two = _adapter(1, 2, 3.0), _adapter(2, 4, 5.0)

    report = compare(one, two)

    product = squares = others = 0.0
    for module in report.modules:
        x, y = _dense(one, module.name), _dense(two, module.name)
        u, _, vt = torch.linalg.svd(x)
        w, _, zt = torch.linalg.svd(y)
        assert module.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-9)
        assert module.norm_ratio == pytest.approx(float(y.norm() / x.norm()), rel=1e-12)
        assert module.overlap == pytest.approx(float((vt[:2] @ zt[:4].T).square().sum()) / 2, rel=1e-9)
        assert module.overlap_baseline == 4 / x.shape[1]
        assert module.output_overlap == pytest.approx(float((u[:, :2].T @ w[:, :4]).square().sum()) / 2, rel=1e-9)
        assert module.output_baseline == 4 / x.shape[0]
        angles = scipy.linalg.subspace_angles(vt[:2].T.numpy(), zt[:4].T.numpy())
        assert module.angles == pytest.approx(sorted(math.degrees(a) for a in angles), rel=1e-8)
        assert module.gains[1] == pytest.approx(1 + float((x * y).sum() / y.square().sum()), rel=1e-9)
        assert module.interferences[0] == pytest.approx(float((y @ vt[:2].T).norm() / x.norm()), rel=1e-9)
        product += float((x * y).sum())
        squares += float(x.square().sum())
        others += float(y.square().sum())
    assert report.cosine == pytest.approx(product / math.sqrt(squares * others), rel=1e-9)
    assert report.norm_ratio == pytest.approx(math.sqrt(others / squares), rel=1e-12)


def test_small_angles_keep_their_digits() -> None:
    one = torch.linalg.qr(torch.randn(30, 2, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(30, 1, dtype=torch.float64) - one @ (one.T @ torch.ones(30, 1).double())).Q
    other = torch.linalg.qr(other - one @ (one.T @ other)).Q
    turned = math.cos(1e-9) * one[:, :1] + math.sin(1e-9) * other

    assert float(principal_angles(one, turned)[0]) == pytest.approx(1e-9, rel=1e-5)


def test_an_adapter_is_itself() -> None:
    one = _adapter(1, 3, 2.0)

    report = compare(one, one)

    assert report.cosine == pytest.approx(1, rel=1e-12)
    assert (report.overlap, report.output_overlap) == (pytest.approx(1, rel=1e-9), pytest.approx(1, rel=1e-9))
    assert all(angle < 1e-4 for m in report.modules for angle in m.angles)


def test_what_only_one_has_is_named_and_zeros_have_no_cosine() -> None:
    head = Replacement(from_torch(torch.ones(2)), "modules_to_save")
    one = Adapter(_adapter(1, 2, 3.0).updates, {"head": head, "norm": head})
    zero = LoRA(from_torch(torch.randn(2, 9)), from_torch(torch.zeros(12, 2)), 1.0, "config")
    two = Adapter({"a": zero, "c": zero}, {"head": Replacement(from_torch(torch.zeros(2)), "modules_to_save")})

    report = compare(one, two)

    assert (report.only_in_first, report.only_in_second) == (("b", "norm"), ("c",))
    assert (report.replacements_equal, report.replacements_differ) == ((), ("head",))
    (module,) = report.modules
    assert (module.cosine, module.overlap, module.angles, module.norm_ratio) == (None, None, (), 0.0)
    assert module.gains == (1.0, None)


def test_nothing_in_common_and_other_shapes_are_refused() -> None:
    with pytest.raises(MismatchError, match="no module in common"):
        compare(_adapter(1, 2, 3.0, ("a",)), _adapter(1, 2, 3.0, ("b",)))
    other = Adapter({"a": LoRA(from_torch(torch.randn(2, 5)), from_torch(torch.randn(12, 2)), 1.0, "config")})
    with pytest.raises(MismatchError, match="differ in the shape"):
        compare(_adapter(1, 2, 3.0), other)


def test_command_prints_tables_and_json(tmp_path: Path) -> None:
    one = str(factories.adapter_folder(tmp_path / "one", seed=1))
    some = {n: s for n, s in factories.MODULES.items() if "q_proj" in n}
    two = str(factories.adapter_folder(tmp_path / "two", seed=2, modules=some, rank=2))
    runner = click.testing.CliRunner()

    told = runner.invoke(verbs, ["compare", one, two, "-v"])
    document = runner.invoke(verbs, ["compare", one, two, "--json"])

    assert told.exit_code == 0, told.stderr
    assert "2 modules in both" in told.stdout
    assert "model.layers.{0,1}.self_attn.v_proj" in told.stdout
    body = json.loads(document.stdout)
    assert body["only_in_first"] == [n for n in formats.load(one).updates if "v_proj" in n]
    assert {"name", "cosine", "overlap", "overlap_baseline", "norm_ratio", "principal_angles"} <= set(
        body["modules"][0]
    )
