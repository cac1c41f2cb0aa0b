"""combine, held against sums and SVDs of dense float64 matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import click.testing
import factories
import pytest
import torch
from torch import Tensor

from loratools import formats
from loratools.adapter import Adapter, Replacement
from loratools.algebra.lowrank import Factors
from loratools.cli import verbs
from loratools.errors import InputError, MismatchError, OutputExistsError, UnsupportedError, UsageError
from loratools.methods import Terms, linear
from loratools.ops.combine.verb import combine
from loratools.ops.lowrank.limit import Limit
from loratools.ops.lowrank.reduce import reduced
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

SHAPES = {"a.first": (10, 7), "a.second": (9, 12), "b.first": (8, 11)}


def _adapter(
    seed: int,
    rank: int = 2,
    *,
    alpha: float = 3.0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    heads: Mapping[str, Tensor] | None = None,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(dtype)
        b = torch.randn(rows, rank, generator=generator, dtype=torch.float64).to(dtype)
        updates[name] = LoRA(from_torch(a), from_torch(b), alpha, "config", rslora)
    replacements = {name: Replacement(from_torch(t), "modules_to_save") for name, t in (heads or {}).items()}
    return Adapter(updates, replacements, path=None, base_model=base)


def _dense(adapter: Adapter | None, name: str) -> Tensor:
    """`scale * B @ A` in float64, or zeros."""
    assert adapter is not None
    if name not in adapter.updates:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    update = adapter.updates[name]
    assert isinstance(update, LoRA)
    scale = update.alpha / (math.sqrt(update.rank) if update.rslora else update.rank)
    return scale * update.b.read().double() @ update.a.read().double()


def _best(dense: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_combine_is_the_sum_for_mixed_ranks_scales_and_targets() -> None:
    one = _adapter(1, rank=2, alpha=3.0)
    two = _adapter(2, rank=3, alpha=5.0, rslora=True, shapes={n: SHAPES[n] for n in ("a.first", "b.first")})
    three = _adapter(3, rank=1, alpha=-2.0, shapes={"a.second": SHAPES["a.second"]})

    report = combine([(one, 0.7), (two, -1.5), three], dtype="float64")

    assert [(m.name, m.rank_in, m.rank) for m in report.modules] == [
        ("a.first", 5, 5), ("a.second", 3, 3), ("b.first", 5, 5),
    ]  # fmt: skip
    for name in SHAPES:
        wanted = 0.7 * _dense(one, name) - 1.5 * _dense(two, name) + _dense(three, name)
        torch.testing.assert_close(_dense(report.adapter, name), wanted, rtol=1e-13, atol=1e-13)
    assert report.adapter is not None
    assert {u.scale for u in report.adapter.updates.values()} == {1.0}


@pytest.mark.parametrize("limit", [{"rank": 3}, {"energy": 0.9}])
def test_truncated_sum_equals_dense_svd(limit: dict[str, float]) -> None:
    one, two = _adapter(1, rank=4), _adapter(2, rank=3)

    report = combine([one, (two, 2.0)], dtype="float64", **limit)  # type: ignore[arg-type]

    for module in report.modules:
        wanted = _dense(one, module.name) + 2 * _dense(two, module.name)
        s = torch.linalg.svdvals(wanted)
        assert module.rank is not None
        found = _dense(report.adapter, module.name)
        # Residuals and singular values: the subspaces themselves are only defined where there is a gap.
        tail = float(s[module.rank :].square().sum().sqrt())
        assert float((wanted - found).norm()) == pytest.approx(tail, rel=1e-10)
        torch.testing.assert_close(torch.linalg.svdvals(found)[: module.rank], s[: module.rank], rtol=1e-10, atol=0)
        assert module.error == pytest.approx(tail / float(s.norm()), rel=1e-10)
        assert module.energy == pytest.approx(1 - module.error**2, rel=1e-12)
        if "energy" in limit:
            shares = s.square().cumsum(0) / s.square().sum()
            assert module.rank == int((shares < 0.9).sum()) + 1


def test_factors_before_storing_equal_dense_svd_to_1e_10() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = [
        (w, Factors(*(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((40, r), (r, 30)))))
        for w, r in ((1.0, 3), (-0.5, 4))
    ]
    wanted = sum(w * f.b @ f.a for w, f in parts)
    assert isinstance(wanted, Tensor)

    terms = Terms("m", tuple(f for _, f in parts), tuple(w for w, _ in parts), (1.0, 1.0))
    found = reduced(linear.combine(terms), Limit(rank=4), "m", "F64", unchanged=None, unchanged_dtype=None)

    torch.testing.assert_close(found.factors.b @ found.factors.a, _best(wanted, 4), rtol=1e-10, atol=1e-10)
    assert found.stored.lost == pytest.approx(float((wanted - _best(wanted, 4)).norm()), rel=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [None, 3])
def test_reported_error_is_that_of_the_stored_values(dtype: str, rank: int | None) -> None:
    one, two = _adapter(1, rank=4), _adapter(2, rank=3)

    report = combine([(one, 0.3), (two, 1.7)], rank=rank, dtype=dtype)

    lost = total = 0.0
    for module in report.modules:
        wanted = 0.3 * _dense(one, module.name) + 1.7 * _dense(two, module.name)
        distance = float((_dense(report.adapter, module.name) - wanted).norm())
        assert module.error == pytest.approx(distance / float(wanted.norm()), rel=1e-6)
        lost, total = lost + distance**2, total + float(wanted.norm()) ** 2
    assert report.error == pytest.approx(math.sqrt(lost / total), rel=1e-6)


@pytest.mark.parametrize("limit", [{}, {"rank": 4}, {"rank": 9}])
@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_at_weight_one_comes_back_as_it_was(tmp_path: Path, limit: dict[str, int], rslora: bool) -> None:
    source = factories.adapter_folder(
        tmp_path / "in",
        ranks={"model.layers.0.self_attn.q_proj": 2},
        dtype=torch.bfloat16,
        extra={"score.weight": torch.randn(3, 6)},
        config={"use_rslora": rslora, "modules_to_save": ["score"], "lora_dropout": 0.1},
    )

    report = combine([source], tmp_path / "out", **limit)  # type: ignore[arg-type]

    before, after = formats.load(source), formats.load(tmp_path / "out")
    assert {n: t.read().view(torch.uint8).tolist() for n, t in before.tensors().items()} == {
        n: t.read().view(torch.uint8).tolist() for n, t in after.tensors().items()
    }
    assert [(n, u.alpha, u.scale) for n, u in before.updates.items()] == [
        (n, u.alpha, u.scale) for n, u in after.updates.items()
    ]
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert report.error == 0
    assert report.adapters[0].gain == pytest.approx(1, rel=1e-12)
    assert report.adapters[0].interference == pytest.approx(0, abs=1e-12)


def test_target_of_one_adapter_keeps_its_bytes_beside_a_sum() -> None:
    one = _adapter(1, dtype=torch.bfloat16)
    two = _adapter(2, shapes={"a.first": SHAPES["a.first"]})

    report = combine([one, two])

    assert report.adapter is not None
    assert report.adapter.updates["b.first"] is one.updates["b.first"]
    # float32 holds every bfloat16: the widest of both.
    assert {t.dtype for t in report.adapter.updates["a.first"].parts.values()} == {"F32"}


def test_float16_and_bfloat16_meet_in_float32() -> None:
    report = combine([_adapter(1, dtype=torch.float16), _adapter(2, dtype=torch.bfloat16)])

    assert report.adapter is not None
    assert {t.dtype for t in report.adapter.tensors().values()} == {"F32"}


def test_order_of_adapters_does_not_matter() -> None:
    adapters = [(_adapter(1), 0.5), (_adapter(2, rank=3), 2.0), (_adapter(3, rank=1), -1.0)]

    forward, backward = combine(adapters, rank=3, dtype="F64"), combine(adapters[::-1], rank=3, dtype="F64")

    for name in SHAPES:
        torch.testing.assert_close(
            _dense(forward.adapter, name), _dense(backward.adapter, name), rtol=1e-11, atol=1e-11
        )
    assert [a.gain for a in forward.adapters] == pytest.approx([a.gain for a in backward.adapters[::-1]])


def test_weight_zero_is_absence() -> None:
    one = _adapter(1)
    absent = _adapter(2, shapes={"a.first": (3, 4), "other": (5, 6)}, base="another", heads={"head": torch.ones(2)})

    report = combine([one, (absent, 0.0)])

    assert report.adapter is not None
    assert report.adapter.updates == one.updates
    assert not report.adapter.replacements
    assert not report.warnings
    assert (report.adapters[1].weight, report.adapters[1].gain) == (0.0, None)


def test_gain_and_interference_equal_their_dense_definitions() -> None:
    sources = [(_adapter(1, rank=2), 0.8), (_adapter(2, rank=3, shapes={"a.first": SHAPES["a.first"]}), 1.5)]

    report = combine(sources, rank=2)

    for (own, _), share in zip(sources, report.adapters, strict=True):
        inner = norm = lost = 0.0
        for name in own.updates:
            wanted, found = _dense(own, name), _dense(report.adapter, name)
            rows = torch.linalg.svd(wanted).Vh[: own.updates[name].rank]
            inner += float((wanted * found).sum())
            norm += float(wanted.square().sum())
            lost += float(((found - wanted) @ rows.T).square().sum())
        assert share.gain == pytest.approx(inner / norm, rel=1e-10)
        assert share.interference == pytest.approx(math.sqrt(lost / norm), rel=1e-10)


def test_untrained_adapter_has_no_gain() -> None:
    zero = _adapter(1)
    updates = {
        n: LoRA(u.parts["A"], from_torch(torch.zeros(u.shape[0], 2)), 3.0, "config") for n, u in zero.updates.items()
    }

    report = combine([Adapter(updates), _adapter(2)], energy=0.99)

    assert (report.adapters[0].gain, report.adapters[0].interference) == (None, None)


def test_sum_that_cancels_is_zero_and_keeps_rank_one() -> None:
    one = _adapter(1)

    report = combine([one, (one, -1.0)], energy=0.9)

    assert report.error == 0
    assert {m.rank for m in report.modules} == {1}
    assert all(not _dense(report.adapter, name).any() for name in SHAPES)


def test_shapes_that_differ_are_all_named() -> None:
    other = {"a.first": (10, 8), "a.second": (9, 12), "b.first": (11, 8)}

    with pytest.raises(MismatchError, match="2 of 3 modules") as raised:
        combine([_adapter(1), _adapter(2, shapes=other)])

    assert [d.split()[0] for d in raised.value.details] == ["a.first", "b.first"]


def test_equal_heads_are_kept_once_and_different_ones_are_refused() -> None:
    head = torch.randn(3, 4)
    one = _adapter(1, heads={"score.weight": head})

    same = combine([one, _adapter(2, heads={"score.weight": head.clone()})])

    assert same.adapter is not None
    assert list(same.adapter.replacements) == ["score.weight"]
    assert not same.warnings
    with pytest.raises(MismatchError, match="different values") as raised:
        combine([one, _adapter(2, heads={"score.weight": head + 1})])
    assert raised.value.hint is not None
    assert "--exclude 'score.weight'" in raised.value.hint
    assert combine([one, _adapter(2, heads={"score.weight": head + 1})], exclude=["score.*"])


def test_head_that_one_adapter_has_is_kept_with_a_warning() -> None:
    report = combine([(_adapter(1, heads={"score.weight": torch.ones(3)}), 0.5), _adapter(2)])

    assert report.adapter is not None
    assert list(report.adapter.replacements) == ["score.weight"]
    assert report.warnings == (
        "replaced weights that not all adapters have are kept: score.weight",
        "weights do not apply to replaced weights: 1 are kept as they are",
    )


def test_different_bases_are_a_warning() -> None:
    report = combine([_adapter(1, base="this"), _adapter(2, base="that")])

    assert report.warnings == ("the adapters name different base models: 'that', 'this'",)


def test_not_finite_is_refused_by_name() -> None:
    bad = _adapter(1)
    values = bad.updates["a.second"].parts["B"].read()
    values[3, 1] = math.nan
    bad = replace(bad, updates={**bad.updates, "a.second": replace(bad.updates["a.second"], b=from_torch(values))})

    with pytest.raises(InputError, match="not finite") as raised:
        combine([bad, _adapter(2)])
    assert raised.value.details == ("a.second.B",)
    with pytest.raises(UsageError, match="not finite"):
        combine([(_adapter(1), math.inf)])


def test_values_beyond_float16_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beyond the range of float16"):
        combine([(_adapter(1), 1e6), _adapter(2)], tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "exclude each other"),
        ({"rank": 0}, "not positive"),
        ({"energy": 95.0}, "no share"),
        ({"method": "linaer"}, "no method named"),
        ({"dtype": "int8"}, "cannot be stored"),
        ({"include": ["nothing*"]}, "matches none"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combine([_adapter(1)], **arguments)  # type: ignore[arg-type]


def test_no_adapter_and_all_weights_zero_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no adapter"):
        combine([])
    with pytest.raises(UsageError, match="weight 0"):
        combine([(_adapter(1), 0.0)])


def test_uncertain_scale_is_refused(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", rank=4, config={"r": 2})

    with pytest.raises(UnsupportedError, match="uncertain"):
        combine([source])
    assert combine([source], rank_from="tensors").adapter is not None


def test_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")

    with pytest.raises(OutputExistsError):
        combine([source], source, overwrite=True)


@pytest.mark.parametrize("limit", [{"rank": 4}, {"energy": 0.5}])
def test_plan_tells_what_the_result_will_be_and_writes_nothing(tmp_path: Path, limit: dict[str, float]) -> None:
    adapters = [_adapter(1, rank=2), _adapter(2, rank=3)]

    planned = combine(adapters, tmp_path / "out", plan=True, **limit)  # type: ignore[arg-type]
    done = combine(adapters, **limit)  # type: ignore[arg-type]

    assert not list(tmp_path.iterdir())
    assert (planned.output, planned.adapter) == (None, None)
    assert (planned.modules, planned.adapters, planned.bytes) == (done.modules, done.adapters, done.bytes)


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    sources = [factories.adapter_folder(tmp_path / str(i), seed=i) for i in range(3)]

    for threads in (1, 3):
        combine(sources, tmp_path / f"out{threads}", rank=4, threads=threads)

    one, three = ((tmp_path / f"out{t}" / "adapter_model.safetensors").read_bytes() for t in (1, 3))
    assert one == three


def test_peft_config_of_mixed_ranks_reads_back(tmp_path: Path) -> None:
    one = factories.adapter_folder(tmp_path / "one", rank=2, alpha=3)
    some = {n: s for n, s in factories.MODULES.items() if "q_proj" in n}
    two = factories.adapter_folder(tmp_path / "two", rank=3, alpha=5, modules=some, config={"use_rslora": True})

    report = combine([one, (two, 0.5)], tmp_path / "out")

    back = formats.load(tmp_path / "out")
    assert back.base_model == "tiny/base"
    assert {n: u.rank for n, u in back.updates.items()} == {m.name: m.rank for m in report.modules}
    for name, shape in factories.MODULES.items():
        pairs = [formats.load(p).updates.get(name) for p in (one, two)]
        wanted = torch.zeros(shape, dtype=torch.float64)
        for weight, update in zip((1.0, 0.5), pairs, strict=True):
            if update is not None:
                f = update.factors()
                assert f is not None
                wanted += weight * f.b @ f.a
        found = back.updates[name].factors()
        assert found is not None
        # B is rounded to float32 once; A is stored as it is.
        torch.testing.assert_close(found.b @ found.a, wanted, rtol=1e-6, atol=1e-6)


def test_command_prints_json_and_a_summary(tmp_path: Path) -> None:
    one, two = (str(factories.adapter_folder(tmp_path / n, seed=i)) for i, n in enumerate(("one", "two")))
    runner = click.testing.CliRunner()

    told = runner.invoke(verbs, ["combine", one, f"{two}=0.5", "-o", str(tmp_path / "out"), "--rank", "4"])
    document = runner.invoke(verbs, ["combine", one, two, "-o", str(tmp_path / "out2"), "--json"])
    again = runner.invoke(verbs, ["combine", one, two, "-o", str(tmp_path / "out")])

    assert told.exit_code == 0, told.stderr
    assert told.stdout == ""
    assert "4 modules, rank 8 to rank 4" in told.stderr
    body = json.loads(document.stdout)
    assert body["verb"] == "combine"
    assert set(body["modules"][0]) == {"name", "rank_in", "rank", "energy", "error", "adapters"}
    told = {"weight", "gain", "gain_lost", "interference", "overlap", "overlap_baseline"}
    assert [set(a) for a in body["modules"][0]["adapters"]] == [{"adapter", *told}] * 2
    assert [set(a) for a in body["adapters"]] == [{"path", *told}] * 2
    assert body["output"] == str(tmp_path / "out2")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
