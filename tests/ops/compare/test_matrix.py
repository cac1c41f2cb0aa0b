"""compare of three adapters or more, held against dense float64 matrices and against comparing two."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import factories
import pytest
import torch
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.algebra.linkage import linked
from loratools.cli import verbs
from loratools.errors import MismatchError
from loratools.ops.compare.matrix import steps_of
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

SHAPES = {"a": (12, 9), "b": (8, 11), "c": (7, 10)}


def adapter(seed: int, rank: int, names: str, alpha: float = 3.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name in names:
        rows, columns = SHAPES[name]
        a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        b = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        updates[name] = LoRA(from_torch(a), from_torch(b), alpha, "config")
    return Adapter(updates)


def dense(adapter: Adapter, name: str) -> Tensor:
    update = adapter.updates[name]
    assert isinstance(update, LoRA)
    return update.b.read() @ update.a.read() * update.scale


def nearly(adapter: Adapter, seed: int) -> Adapter:
    """The same with a little noise in B."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, update in adapter.updates.items():
        assert isinstance(update, LoRA)
        b = update.b.read()
        noise = 0.1 * torch.randn(b.shape, generator=generator, dtype=torch.float64)
        updates[name] = LoRA(update.a, from_torch(b + noise), 3.0, "config")
    return Adapter(updates)


def test_cosines_and_norms_are_those_of_dense_matrices() -> None:
    every = [adapter(1, 2, "ab"), adapter(2, 4, "abc"), adapter(3, 3, "bc")]

    report = loratools.compare(*every)

    for pair in report.pairs:
        one, two = every[pair.first], every[pair.second]
        both = [name for name in one.updates if name in two.updates]
        x = torch.cat([dense(one, name).flatten() for name in both])
        y = torch.cat([dense(two, name).flatten() for name in both])
        assert pair.modules == len(both)
        assert pair.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-9)
        assert pair.norm_ratio == pytest.approx(float(y.norm() / x.norm()), rel=1e-12)
        assert report.cosine[pair.first][pair.second] == report.cosine[pair.second][pair.first] == pair.cosine
    for compared, one in zip(report.adapters, every, strict=True):
        norm = torch.cat([dense(one, name).flatten() for name in one.updates]).norm()
        assert compared.norm == pytest.approx(float(norm), rel=1e-12)


def test_each_pair_is_what_comparing_the_two_tells() -> None:
    every = [adapter(4, 2, "abc"), adapter(5, 4, "abc"), adapter(6, 3, "abc")]
    report = loratools.compare(*every)
    assert [(p.first, p.second) for p in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in report.pairs:
        two = loratools.compare(every[pair.first], every[pair.second])
        for field in ("cosine", "overlap", "overlap_baseline", "output_overlap", "output_baseline", "norm_ratio"):
            assert getattr(pair, field) == pytest.approx(getattr(two, field), rel=1e-12)


def test_alike_ones_stand_together_and_make_a_cluster() -> None:
    style, facts = adapter(7, 3, "abc"), adapter(8, 3, "abc")
    report = loratools.compare(style, facts, nearly(style, 1), nearly(facts, 2), adapter(9, 3, "abc"))
    assert {frozenset(cluster) for cluster in report.clusters} == {frozenset({0, 2}), frozenset({1, 3}), frozenset({4})}
    assert sorted(report.order) == [0, 1, 2, 3, 4]
    assert abs(report.order.index(0) - report.order.index(2)) == 1


def test_a_pair_without_a_common_module_has_no_numbers() -> None:
    report = loratools.compare(adapter(1, 2, "a"), adapter(2, 2, "ab"), adapter(3, 2, "b"))
    assert report.cosine[0][2] is None
    assert report.cosine[0][1] is not None
    assert not report.is_at_least(-1)


def test_nothing_in_common_and_other_shapes_are_refused() -> None:
    with pytest.raises(MismatchError, match="no two of the 3 adapters"):
        loratools.compare(adapter(1, 2, "a"), adapter(2, 2, "b"), adapter(3, 2, "c"))
    other = Adapter({"a": LoRA(from_torch(torch.ones(2, 5)), from_torch(torch.ones(6, 2)), 1.0, "config")})
    with pytest.raises(MismatchError, match="shape of 1 of"):
        loratools.compare(adapter(1, 2, "a"), adapter(2, 2, "a"), other)


def test_linkage_joins_by_the_mean_of_all_pairs() -> None:
    # Single linkage would join all four: 0-1, 1-2, 2-3 are alike, and no others are.
    chain = [[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.8, 0.0], [0.0, 0.8, 1.0, 0.9], [0.0, 0.0, 0.9, 1.0]]
    assert linked(chain, 0.5) == ((0, 1), (2, 3))
    # The mean of the four pairs between the two groups is 0.2.
    assert linked(chain, 0.2) == ((0, 1, 2, 3),)
    assert linked(chain, 0.21) == ((0, 1), (2, 3))
    assert linked([[1.0]], 0.5) == ((0,),)
    assert linked([[1.0, None], [None, 1.0]], 0.5) == ((0,), (1,))


@pytest.mark.parametrize(
    ("paths", "steps"),
    [
        (["run/checkpoint-500", "run/checkpoint-1000", "run/checkpoint-20"], [500, 1000, 20]),
        (["ink-000002.safetensors", "ink-000012.safetensors"], [2, 12]),
        (["a/step_5", "b/step_6"], [5, 6]),
        (["style-2", "facts-3"], [None, None]),
        (["llama-7b", "llama-8b"], [None, None]),
        (["checkpoint-5", "checkpoint-5"], [None, None]),
        (["checkpoint-5", "final"], [None, None]),
    ],
)
def test_states_of_one_training_are_told_by_their_names(paths: list[str], steps: list[int | None]) -> None:
    assert steps_of(paths) == steps


def test_the_command_shows_the_way_of_a_training_and_fails_below_a_cosine(tmp_path: Path) -> None:
    for step, seed in ((500, 1), (1000, 2), (1500, 3)):
        factories.adapter_folder(tmp_path / f"checkpoint-{step}", seed=seed)
    paths = [str(tmp_path / f"checkpoint-{step}") for step in (1000, 500, 1500)]
    runner = click.testing.CliRunner()

    shown = runner.invoke(verbs, ["compare", *paths], env={"COLUMNS": "100"})
    document = runner.invoke(verbs, ["compare", *paths, "--json"])
    failed = runner.invoke(verbs, ["compare", *paths, "--fail-below", "0.9"])
    passed = runner.invoke(verbs, ["compare", *paths, "--fail-below=-1"])
    alone = runner.invoke(verbs, ["compare", paths[0]])

    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("step"))
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["500", "1,000", "1,500"]
    body = json.loads(document.stdout)
    assert [len(row) for row in body["cosine"]] == [3, 3, 3]
    assert [adapter["step"] for adapter in body["adapters"]] == [1000, 500, 1500]
    assert {"adapters", "cosine", "overlap", "overlap_baseline", "pairs"} <= set(body)
    assert set(body["pairs"][0]) == {
        "first", "second", "modules", "cosine", "overlap", "overlap_baseline", "output_overlap",
        "output_overlap_baseline", "norm_ratio",
    }  # fmt: skip
    assert (failed.exit_code, passed.exit_code, alone.exit_code) == (1, 0, 2)


def test_two_adapters_fail_below_a_cosine_too(tmp_path: Path) -> None:
    one, two = (factories.adapter_folder(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2))
    runner = click.testing.CliRunner()
    assert runner.invoke(verbs, ["compare", str(one), str(two), "--fail-below", "0.999"]).exit_code == 1
    assert runner.invoke(verbs, ["compare", str(one), str(one), "--fail-below", "0.999"]).exit_code == 0
