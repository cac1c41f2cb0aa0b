"""Merging, against float64 arithmetic written out here and against PEFT's own merge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import factories
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import registry
from loratools.errors import (
    InputError,
    LoraToolsError,
    MachineError,
    MismatchError,
    OutputExistsError,
    UsageError,
)
from loratools.ops.merge.report import MergeReport
from loratools.ops.merge.verb import merge, plan_from_headers

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
# Large enough for several blocks, with a remainder: 49,152 elements are one block.
LARGE = {"model.layers.0.mlp.up_proj": (300, 500), "model.layers.0.mlp.down_proj": (500, 300), Q: (10, 500)}


def merged_weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def base_and_adapter(tmp_path: Path, **adapter: object) -> tuple[Path, Path]:
    return factories.checkpoint_folder(tmp_path / "base"), factories.adapter_folder(tmp_path / "style", **adapter)  # type: ignore[arg-type]


def nothing_written(tmp_path: Path, *inputs: str) -> bool:
    return sorted(p.name for p in tmp_path.iterdir()) == sorted(inputs)


# --- values --------------------------------------------------------------------------------------------------------


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at `values`, from its bits of mantissa and its smallest exponent."""
    bits, lowest = {torch.float32: (23, -126), torch.float16: (10, -14), torch.bfloat16: (7, -126)}[dtype]
    exponent = torch.floor(torch.log2(values.double().abs().clamp(min=2.0**lowest)))
    return 2.0 ** (exponent - bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0], [0.7, -0.4, 2.0]])
def test_every_weight_is_within_one_rounding_of_the_exact_sum(
    tmp_path: Path, dtype: torch.dtype, weights: list[float]
) -> None:
    values = factories.base_weights(LARGE, dtype=dtype)
    base = factories.checkpoint_folder(tmp_path / "base", weights=values)
    ranks = [4, 8, 16][: len(weights)]
    parts = [factories.factors(LARGE, rank=r, seed=i) for i, r in enumerate(ranks)]
    # Small updates beside large weights: what rounding loses must show here if it is lost.
    parts = [{n: (a * 0.02, b * 0.02) for n, (a, b) in p.items()} for p in parts]
    folders = [
        factories.adapter_folder(tmp_path / f"a{i}", values=p, rank=r, alpha=3.0 * r)
        for i, (p, r) in enumerate(zip(parts, ranks, strict=True))
    ]

    report = merge(base, list(zip(folders, weights, strict=True)), tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    unit = 2.0**-24
    terms = sum(ranks) + 2
    gamma = terms * unit / (1 - terms * unit)
    for name in LARGE:
        w = values[f"{name}.weight"].double()
        exact, magnitude = w.clone(), w.abs()
        for weight, p in zip(weights, parts, strict=True):
            a, b = p[name][0].double(), p[name][1].double()
            exact += weight * 3.0 * (b @ a)
            magnitude += abs(weight) * 3.0 * (b.abs() @ a.abs())
        got = result[f"{name}.weight"]
        bound = spacing(got, dtype) / 2 + gamma * magnitude
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= bound).all()
    assert report.max_error_ratio is not None
    assert 0 < report.max_error_ratio <= 1


def test_gain_and_unchanged_share_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    values = factories.base_weights(LARGE, dtype=torch.bfloat16)
    base = factories.checkpoint_folder(tmp_path / "base", weights=values)
    parts = {n: (a * 0.01, b * 0.01) for n, (a, b) in factories.factors(LARGE).items()}
    folder = factories.adapter_folder(tmp_path / "a", values=parts, rank=4, alpha=8)

    report = merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    along = energy = still = count = 0.0
    for name, (a, b) in parts.items():
        delta = 2.0 * (b.double() @ a.double())
        moved = result[f"{name}.weight"].double() - values[f"{name}.weight"].double()
        along, energy = along + float((moved * delta).sum()), energy + float((delta * delta).sum())
        still, count = still + int((moved == 0).sum()), count + moved.numel()
    # Both sums are over float32 products: about sqrt(n) * 2^-24 off for blocks of n = 65,536.
    assert report.gain == pytest.approx(along / energy, rel=1e-4)
    assert report.gain < 0.9  # or this test would show nothing
    assert report.unchanged_share == still / count
    assert any("lost to rounding" in w for w in report.warnings)


def test_a_float64_base_is_merged_in_float64(tmp_path: Path) -> None:
    values = {n: t.double() for n, t in factories.base_weights().items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=values)
    parts = factories.factors()
    folder = factories.adapter_folder(tmp_path / "a", values=parts)

    merge(base, [folder], tmp_path / "out")

    a, b = (t.double() for t in parts[Q])
    exact = values[f"{Q}.weight"] + 2.0 * (b @ a)
    got = merged_weights(tmp_path / "out")[f"{Q}.weight"]
    assert (got - exact).abs().max() <= 8 * 2.0**-53 * (2 * (b.abs() @ a.abs()) + exact.abs()).max()


def test_rslora_scale_divides_by_the_square_root_of_the_rank(tmp_path: Path) -> None:
    parts = factories.factors()
    base, folder = base_and_adapter(tmp_path, values=parts, alpha=6, config={"use_rslora": True})

    merge(base, [folder], tmp_path / "out")

    a, b = parts[Q]
    delta = merged_weights(tmp_path / "out")[f"{Q}.weight"] - merged_weights(base)[f"{Q}.weight"]
    assert torch.allclose(delta, 6 / math.sqrt(4) * (b @ a), atol=1e-5)


def test_a_weight_of_zero_is_absence(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    other = factories.adapter_folder(tmp_path / "other", seed=9)

    merge(base, [(folder, 1.0), (other, 0.0)], tmp_path / "both")
    report = merge(base, [folder], tmp_path / "one")

    assert (tmp_path / "both" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()
    assert report.merged_weights == 4


def test_the_gain_counts_large_and_small_weights_alike(tmp_path: Path) -> None:
    # One is sampled, the other measured whole; their updates lose very different shares to rounding.
    shapes = {"model.layers.0.mlp.up_proj": (1700, 700), "model.layers.0.mlp.k_proj": (300, 700)}
    values = factories.base_weights(shapes, dtype=torch.bfloat16)
    parts = factories.factors(shapes)
    sizes = {"model.layers.0.mlp.up_proj": 0.02, "model.layers.0.mlp.k_proj": 0.05}
    parts = {n: (a * sizes[n], b * sizes[n]) for n, (a, b) in parts.items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=values)
    folder = factories.adapter_folder(tmp_path / "a", values=parts, rank=4, alpha=8)

    report = merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    along = energy = still = count = 0.0
    shares = []
    for name, (a, b) in parts.items():
        delta = 2.0 * (b.double() @ a.double())
        moved = result[f"{name}.weight"].double() - values[f"{name}.weight"].double()
        along, energy = along + float((moved * delta).sum()), energy + float((delta * delta).sum())
        still, count = still + int((moved == 0).sum()), count + moved.numel()
        shares.append(float((moved == 0).double().mean()))
    assert report.unchanged_share is not None
    assert report.gain is not None
    # A sample of n = 350,000 of the large one: six standard deviations of a share are 6 * 0.5 / sqrt(n).
    assert abs(report.unchanged_share - still / count) < 6 * 0.5 / 350_000**0.5
    assert abs(report.gain - along / energy) < 0.01
    # Counted by measured weights, the share would be that of a mixture of 350,000 and 210,000.
    assert abs((350 * shares[0] + 210 * shares[1]) / 560 - still / count) > 0.02


def test_positions_of_adapters_are_those_given_also_beside_one_of_weight_zero(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    other = factories.adapter_folder(tmp_path / "other", seed=9)

    report = merge(base, [(other, 0.0), (folder, 0.5)], tmp_path / "out").to_dict()

    assert report["adapters"] == [{"path": str(other), "weight": 0.0}, {"path": str(folder), "weight": 0.5}]
    assert isinstance(report["tensors"], list)
    assert all(t["adapters"] == [1] for t in report["tensors"])


def test_weights_and_updates_that_are_both_zero_are_exact_in_float64_too(tmp_path: Path) -> None:
    weights = {n: torch.zeros_like(w) for n, w in factories.base_weights().items()}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    parts = {n: (a, torch.zeros_like(b)) for n, (a, b) in factories.factors().items()}

    report = merge(base, [factories.adapter_folder(tmp_path / "a", values=parts)], tmp_path / "out", dtype="float64")

    assert report.max_error_ratio == 0


def test_a_head_that_is_resized_and_updated_is_its_replacement_plus_the_update(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", config={"vocab_size": 13})
    parts = factories.factors({"lm_head": (15, 6)})
    head, embedding = torch.randn(15, 6), torch.randn(15, 6)
    saved = {"lm_head.base_layer.weight": head, "model.embed_tokens.weight": embedding}
    folder = factories.adapter_folder(tmp_path / "a", values=parts, extra=saved)

    merge(base, [folder], tmp_path / "out")

    a, b = parts["lm_head"]
    result = merged_weights(tmp_path / "out")
    assert torch.allclose(result["lm_head.weight"], head + 2 * (b @ a), atol=1e-5)
    assert torch.equal(result["model.embed_tokens.weight"], embedding)


def test_a_bias_of_one_column_per_token_is_not_left_behind(tmp_path: Path) -> None:
    weights = factories.base_weights() | {"final_logits_bias": torch.zeros(1, 13)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config={"vocab_size": 13})
    saved = {"model.embed_tokens.weight": torch.randn(15, 6), "lm_head.weight": torch.randn(15, 6)}

    with pytest.raises(MismatchError, match="resized from 13 to 15") as caught:
        merge(base, [factories.adapter_folder(tmp_path / "a", extra=saved)], tmp_path / "out")

    assert caught.value.details == ("final_logits_bias",)


def test_a_config_with_an_infinity_is_read_and_kept(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", config={"time_step_limit": [0.0, math.inf]})

    merge(base, [factories.adapter_folder(tmp_path / "a")], tmp_path / "out", dtype="bfloat16")

    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, math.inf]


def test_a_single_adapter_needs_no_list(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    assert merge(base, folder, tmp_path / "out").merged_weights == 4


def test_adapters_that_cancel_leave_the_base_as_it_was(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(dtype=torch.bfloat16))
    folder = factories.adapter_folder(tmp_path / "a")

    report = merge(base, [(folder, 0.7), (folder, -0.7)], tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert report.unchanged_share == 1
    assert report.gain is None or abs(report.gain) < 1e-6


@pytest.mark.parametrize("execution", registry.names("execution"))
def test_every_way_to_run_writes_the_same_bytes(tmp_path: Path, execution: str) -> None:
    weights = factories.base_weights(LARGE, dtype=torch.float16)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=2)
    folder = factories.adapter_folder(tmp_path / "a", modules=LARGE, alpha=0.5)

    there = merge(base, [folder], tmp_path / "there", execution=execution, threads=2)
    here = merge(base, [folder], tmp_path / "here", threads=1)

    for file in (tmp_path / "here").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()
    assert [t.gain for t in there.tensors] == [t.gain for t in here.tensors]


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_byte(tmp_path: Path, threads: int) -> None:
    base = factories.checkpoint_folder(
        tmp_path / "base", weights=factories.base_weights(LARGE, dtype=torch.bfloat16), shards=2
    )
    folder = factories.adapter_folder(tmp_path / "a", modules=LARGE)

    merge(base, [folder], tmp_path / "one", threads=1)
    merge(base, [folder], tmp_path / "many", threads=threads)

    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()


def test_a_weight_stored_as_in_out_gets_the_transposed_delta(tmp_path: Path) -> None:
    weight = torch.randn(6, 10)
    base = factories.checkpoint_folder(
        tmp_path / "base", weights={"h.0.attn.c_attn.weight": weight, "h.0.ln.weight": torch.ones(6)}
    )
    parts = factories.factors({"transformer.h.0.attn.c_attn": (10, 6)})
    folder = factories.adapter_folder(tmp_path / "a", values=parts, config={"fan_in_fan_out": True})

    merge(base, [folder], tmp_path / "out")

    a, b = next(iter(parts.values()))
    assert torch.allclose(merged_weights(tmp_path / "out")["h.0.attn.c_attn.weight"], weight + 2 * (b @ a).T, atol=1e-5)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_merge_leaves_untouched_weights_byte_identical(tmp_path: Path, shards: int) -> None:
    base = factories.checkpoint_folder(
        tmp_path / "base", weights=factories.base_weights(dtype=torch.bfloat16), shards=shards
    )
    folder = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6)})

    report = merge(base, [folder], tmp_path / "out")

    before, after = merged_weights(base), merged_weights(tmp_path / "out")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{Q}.weight"}
    assert report.untouched == len(before) - 1
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "out" / file.name, "pt") as new:
            assert list(new.keys()) == list(old.keys())
            assert new.metadata() == old.metadata()
            # The same header means the same order and offsets.
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (tmp_path / "out" / file.name).read_bytes()[:size] == file.read_bytes()[:size]


def test_a_sharded_base_gives_a_sharded_result_with_its_index(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", shards=3)
    folder = factories.adapter_folder(tmp_path / "a")

    merge(base, [folder], tmp_path / "out")

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text())


def test_max_shard_size_starts_new_files_and_an_index(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    merge(base, [folder], tmp_path / "out", max_shard_size=500)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 500
        assert {n for n, f in index["weight_map"].items() if f == file} == set(tensors)
    whole = merge(base, [folder], tmp_path / "whole")
    assert whole.merged_weights == 4
    assert merged_weights(tmp_path / "out").keys() == merged_weights(tmp_path / "whole").keys()
    assert all(
        torch.equal(t, merged_weights(tmp_path / "whole")[n]) for n, t in merged_weights(tmp_path / "out").items()
    )


def test_dtype_stores_every_floating_weight_in_it_and_says_so_in_the_config(tmp_path: Path) -> None:
    weights = factories.base_weights() | {"model.position_ids": torch.arange(5)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config={"dtype": "float32"})
    folder = factories.adapter_folder(tmp_path / "a")

    merge(base, [folder], tmp_path / "out", dtype="bfloat16")

    result = merged_weights(tmp_path / "out")
    assert result.pop("model.position_ids").dtype == torch.int64
    assert {t.dtype for t in result.values()} == {torch.bfloat16}
    assert torch.equal(result["model.norm.weight"], weights["model.norm.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_side_files_come_along_code_is_not_run_and_duplicates_stay(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    (base / "generation_config.json").write_text("{}")
    (base / "modeling_odd.py").write_text("raise SystemExit('run')")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"old weights")

    merge(base, [folder], tmp_path / "out")

    written = ("loratools.json", "README.md")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "modeling_odd.py", "model.safetensors", *written}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    record = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert set(record["not_copied"]) == {"pytorch_model.bin", "original/"}


def test_the_adapters_own_tokenizer_is_taken_whole(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (base / name).write_text("base")
    (folder / "tokenizer.json").write_text("adapter")
    (folder / "chat_template.jinja").write_text("adapter")

    merge(base, [folder], tmp_path / "out")

    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter"
    # Half of one tokenizer and half of another is none.
    assert not (tmp_path / "out" / "merges.txt").exists()


def test_provenance_names_inputs_with_hashes_and_weights(tmp_path: Path) -> None:
    import hashlib

    base, folder = base_and_adapter(tmp_path)

    merge(base, [(folder, 0.5)], tmp_path / "out")

    record = json.loads((tmp_path / "out" / "loratools.json").read_text())
    (entry,) = record["adapters"]
    assert entry["weight"] == 0.5
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert {"name": "adapter_model.safetensors", "bytes": (folder / "adapter_model.safetensors").stat().st_size,
            "sha256": digest} in entry["files"]  # fmt: skip
    assert record["base"]["files"][0]["fingerprint"].startswith("sha256-sampled:")
    assert str(tmp_path) not in json.dumps(record)


# --- replaced weights, heads, vocabularies, ties -------------------------------------------------------------------


def test_a_saved_head_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    weights = factories.base_weights() | {"score.weight": torch.zeros(3, 6)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    head = torch.randn(3, 6)
    folder = factories.adapter_folder(
        tmp_path / "a", extra={"score.weight": head}, config={"modules_to_save": ["score"]}
    )

    report = merge(base, [folder], tmp_path / "out")

    assert torch.equal(merged_weights(tmp_path / "out")["score.weight"], head)
    assert (report.merged_weights, report.replaced, report.added) == (4, 1, ())


def test_a_new_head_is_added_and_the_config_names_its_class(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", config={"id2label": {"0": "a"}})
    folder = factories.adapter_folder(
        tmp_path / "a",
        extra={"score.weight": torch.randn(3, 6)},
        config={"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
    )

    report = merge(base, [folder], tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (report.added, report.replaced) == (("score.weight",), 0)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3


def test_two_adapters_with_different_heads_are_refused(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    config = {"modules_to_save": ["score"]}
    heads = [
        factories.adapter_folder(
            tmp_path / f"a{i}", extra={"score.weight": torch.full((3, 6), float(i))}, config=config
        )
        for i in range(2)
    ]

    with pytest.raises(MismatchError, match="replaced by more than one adapter"):
        merge(base, heads, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_two_adapters_with_equal_heads_agree(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    head = {"score.weight": torch.randn(3, 6)}
    config = {"modules_to_save": ["score"]}
    both = [factories.adapter_folder(tmp_path / f"a{i}", extra=head, config=config, seed=i) for i in range(2)]

    merge(base, both, tmp_path / "out")

    assert torch.equal(merged_weights(tmp_path / "out")["score.weight"], head["score.weight"])


def test_a_resized_vocabulary_resizes_embedding_head_and_config(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", config={"vocab_size": 13})
    saved = {"model.embed_tokens.weight": torch.randn(15, 6), "lm_head.weight": torch.randn(15, 6)}
    folder = factories.adapter_folder(tmp_path / "a", extra=saved)

    merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    assert all(torch.equal(result[n], t) for n, t in saved.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 15


def test_a_vocabulary_that_is_resized_in_one_place_only_is_refused(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", config={"vocab_size": 13})
    folder = factories.adapter_folder(tmp_path / "a", extra={"model.embed_tokens.weight": torch.randn(15, 6)})

    with pytest.raises(MismatchError, match="resized from 13 to 15") as caught:
        merge(base, [folder], tmp_path / "out")

    assert caught.value.details == ("lm_head.weight",)


def tied_base(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    weights = factories.base_weights()
    del weights["lm_head.weight"]
    config = {"tie_word_embeddings": True, "vocab_size": 13}
    return factories.checkpoint_folder(tmp_path / "base", weights=weights, config=config), weights


def test_a_tied_head_with_an_update_of_its_own_is_untied(tmp_path: Path) -> None:
    base, weights = tied_base(tmp_path)
    parts = factories.factors({"lm_head": (13, 6)})
    folder = factories.adapter_folder(tmp_path / "a", values=parts)

    report = merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    a, b = parts["lm_head"]
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(result["model.embed_tokens.weight"], embedding)
    assert torch.allclose(result["lm_head.weight"], embedding + 2 * (b @ a), atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("no longer tied" in w for w in report.warnings)


def test_a_tied_pair_saved_equal_stays_tied(tmp_path: Path) -> None:
    base, _ = tied_base(tmp_path)
    new = torch.randn(15, 6)
    folder = factories.adapter_folder(
        tmp_path / "a", extra={"model.embed_tokens.weight": new, "lm_head.weight": new.clone()}
    )

    merge(base, [folder], tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head.weight" not in merged_weights(tmp_path / "out")
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (True, 15)


def test_an_embedding_trained_as_a_copy_leaves_the_tied_head_as_it_was(tmp_path: Path) -> None:
    base, weights = tied_base(tmp_path)
    new = torch.randn(13, 6)
    folder = factories.adapter_folder(
        tmp_path / "a", extra={"model.embed_tokens.weight": new}, config={"modules_to_save": ["embed_tokens"]}
    )

    merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    assert torch.equal(result["model.embed_tokens.weight"], new)
    assert torch.equal(result["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


ROWS = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))


def trained_rows(module: str, rows: Tensor = ROWS) -> dict[str, Tensor]:
    return {f"{module}.token_adapter.trainable_tokens_delta": rows.clone()}


def with_rows(weight: Tensor) -> Tensor:
    found = weight.clone()
    found[[3, 5]] = ROWS
    return found


def test_tokens_trained_in_a_tied_head_alone_are_not_dropped(tmp_path: Path) -> None:
    base, weights = tied_base(tmp_path)
    indices = {"trainable_token_indices": {"lm_head": [3, 5]}}
    folder = factories.adapter_folder(tmp_path / "a", extra=trained_rows("lm_head"), config=indices)

    merge(base, [folder], tmp_path / "out")

    result, embedding = merged_weights(tmp_path / "out"), weights["model.embed_tokens.weight"]
    assert torch.equal(result["model.embed_tokens.weight"], embedding)
    assert torch.equal(result["lm_head.weight"], with_rows(embedding))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("equal", [True, False])
def test_tokens_trained_in_both_of_a_tied_pair_stay_tied_where_they_are_equal(tmp_path: Path, equal: bool) -> None:
    base, weights = tied_base(tmp_path)
    indices = {"trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [3, 5]}}
    rows = trained_rows("model.embed_tokens") | trained_rows("lm_head", ROWS if equal else ROWS + 1)
    folder = factories.adapter_folder(tmp_path / "a", extra=rows, config=indices)

    merge(base, [folder], tmp_path / "out")

    result = merged_weights(tmp_path / "out")
    assert torch.equal(result["model.embed_tokens.weight"], with_rows(weights["model.embed_tokens.weight"]))
    assert ("lm_head.weight" in result) is not equal
    assert equal or torch.equal(result["lm_head.weight"][[3, 5]], ROWS + 1)


def test_a_head_untied_by_its_own_update_keeps_the_tokens_trained_through_the_embedding(tmp_path: Path) -> None:
    base, weights = tied_base(tmp_path)
    parts = factories.factors({"lm_head": (13, 6)})
    folder = factories.adapter_folder(
        tmp_path / "a",
        values=parts,
        extra=trained_rows("model.embed_tokens"),
        config={"trainable_token_indices": [3, 5]},
    )

    merge(base, [folder], tmp_path / "out")

    result, embedding = merged_weights(tmp_path / "out"), with_rows(weights["model.embed_tokens.weight"])
    a, b = parts["lm_head"]
    assert torch.equal(result["model.embed_tokens.weight"], embedding)
    assert torch.allclose(result["lm_head.weight"], embedding + 2 * (b @ a), atol=1e-5)


def test_a_head_untied_by_its_own_update_keeps_the_saved_embedding(tmp_path: Path) -> None:
    base, _ = tied_base(tmp_path)
    parts, new = factories.factors({"lm_head": (13, 6)}), torch.randn(13, 6)
    folder = factories.adapter_folder(tmp_path / "a", values=parts, extra={"model.embed_tokens.weight": new})

    merge(base, [folder], tmp_path / "out")

    a, b = parts["lm_head"]
    assert torch.allclose(merged_weights(tmp_path / "out")["lm_head.weight"], new + 2 * (b @ a), atol=1e-5)


def test_one_adapters_tokens_of_the_embedding_and_anothers_of_its_tied_head_may_not_differ(tmp_path: Path) -> None:
    base, _ = tied_base(tmp_path)
    folders = [
        factories.adapter_folder(
            tmp_path / module,
            extra=trained_rows(module, rows),
            config={"trainable_token_indices": {module: [3, 5]}},
        )
        for module, rows in (("model.embed_tokens", ROWS), ("lm_head", ROWS + 1))
    ]

    with pytest.raises(MismatchError, match=r"'lm_head\.weight' has rows that two adapters replace"):
        merge(base, folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("head", "embedding", "message"),
    [
        ((13, 8), None, "1 replaced tensors do not fit"),
        ((15, 6), (17, 6), "resize the vocabulary to 2 different sizes"),
        ((17, 6), None, "1 weights stay as they are"),
    ],
)
def test_a_replaced_tied_head_has_to_fit(
    tmp_path: Path, head: tuple[int, int], embedding: tuple[int, int] | None, message: str
) -> None:
    base, _ = tied_base(tmp_path)
    extra = {"lm_head.weight": torch.randn(head)}
    extra |= {"model.embed_tokens.weight": torch.randn(embedding)} if embedding else {}
    folder = factories.adapter_folder(tmp_path / "a", extra=extra)

    with pytest.raises(MismatchError, match=message):
        merge(base, [folder], tmp_path / "out")


EXPERTS = {
    f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight": torch.randn(shape)
    for e in range(3)
    for name, shape in {"w1": (5, 6), "w2": (6, 5), "w3": (5, 6)}.items()
}


@pytest.mark.parametrize("shape", [(3, 14, 6), (4, 10, 6), (3, 6, 10), (3, 10, 7)])
def test_replaced_experts_of_another_size_are_not_cut_to_those_of_the_base(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3}
    base = factories.checkpoint_folder(tmp_path / "base", weights=EXPERTS, config=config)
    folder = factories.adapter_folder(
        tmp_path / "a",
        values={},
        extra={"model.layers.0.mlp.experts.gate_up_proj": torch.randn(shape)},
        config={"modules_to_save": ["experts"]},
    )

    with pytest.raises(MismatchError) as caught:
        merge(base, [folder], tmp_path / "out")

    assert f"gate_up_proj   adapter {'x'.join(map(str, shape))}, base 3x10x6" in str(caught.value)


@pytest.mark.parametrize(("a", "weight"), [((2, 4, 1, 3), (7, 4, 3, 1)), ((2, 3, 4), (7, 4, 3))])
def test_the_axes_of_a_kernel_are_not_exchanged(tmp_path: Path, a: tuple[int, ...], weight: tuple[int, ...]) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights={"conv.weight": torch.randn(weight)})
    ones = (1,) * (len(weight) - 2)
    folder = factories.adapter_folder(
        tmp_path / "a", rank=2, values={"conv": (torch.randn(a), torch.randn(7, 2, *ones))}
    )

    with pytest.raises(MismatchError, match="do not fit"):
        merge(base, [folder], tmp_path / "out")


# --- against PEFT --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32, saved by transformers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama(vocabulary=33, width=48, inner=80, heads=4, key_heads=2).save_pretrained(folder)
    return folder


def trained(llama: Path, folder: Path, *, seed: int, rank: int, targets: Sequence[str], **config: object) -> Path:
    """A PEFT adapter with random factors that are not zero, as PEFT saves it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM", **config)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped.save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapters: Sequence[Path], dtype: torch.dtype, **options: object) -> dict[str, Tensor]:
    """What PEFT's merge_and_unload leaves in the model, with weight 1 for every adapter."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    wrapped = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a0", **options)
    for i, adapter in enumerate(adapters[1:], 1):
        wrapped.load_adapter(adapter, adapter_name=f"a{i}", **options)
    merged = wrapped.merge_and_unload(adapter_names=[f"a{i}" for i in range(len(adapters))])
    return {n: p.detach() for n, p in merged.named_parameters()}


def test_a_float32_merge_equals_pefts(tmp_path: Path, llama: Path) -> None:
    adapter = trained(llama, tmp_path / "a", seed=1, rank=4, lora_alpha=12, targets=["q_proj", "down_proj"],
                      rank_pattern={"layers.1.*q_proj": 7}, alpha_pattern={"down_proj": 5})  # fmt: skip

    merge(llama, [adapter], tmp_path / "out")

    ours, theirs = merged_weights(tmp_path / "out"), peft_merged(llama, [adapter], torch.float32)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        # Both round a float32 sum of at most 9 terms of size |W| + |dW| < 2 once or twice.
        assert (weight - theirs[name]).abs().max() <= 16 * 2.0**-24 * 2, name


def exact_merged(base: Mapping[str, Tensor], adapters: Sequence[Path]) -> dict[str, Tensor]:
    """W + sum of alpha / r * B A in float64, straight from the files."""
    exact = {n: w.double() for n, w in base.items()}
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        factors = {k: v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        for key in factors:
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace("lora_A.", "")
                product = factors[key.replace("lora_A", "lora_B")] @ factors[key]
                exact[name] = exact[name] + config["lora_alpha"] / config["r"] * product
    return exact


@pytest.mark.parametrize("case", ["bf16 adapter", "three adapters"])
def test_errors_on_a_bf16_base_are_never_above_pefts(tmp_path: Path, llama: Path, case: str) -> None:
    half = {n: w.bfloat16() for n, w in merged_weights(llama).items()}
    base = tmp_path / "base"
    base.mkdir()
    save_file(half, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_bytes((llama / "config.json").read_bytes())
    targets = ["q_proj", "up_proj", "down_proj"]
    count = 1 if case == "bf16 adapter" else 3
    adapters = [
        trained(llama, tmp_path / f"a{i}", seed=i, rank=4 + i, lora_alpha=9, targets=targets) for i in range(count)
    ]
    options = {}
    if case == "bf16 adapter":
        file = adapters[0] / "adapter_model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
        options = {"autocast_adapter_dtype": False}

    merge(base, adapters, tmp_path / "out")

    ours, theirs = merged_weights(tmp_path / "out"), peft_merged(base, adapters, torch.bfloat16, **options)
    exact = exact_merged(half, adapters)
    errors = {
        "ours": [ours[n].double() - exact[n] for n in exact],
        "peft": [theirs[n].double() - exact[n] for n in exact],
    }
    largest = {who: max(float(e.abs().max()) for e in es) for who, es in errors.items()}
    frobenius = {who: math.sqrt(sum(float((e * e).sum()) for e in es)) for who, es in errors.items()}
    assert largest["ours"] <= largest["peft"]
    assert frobenius["ours"] < frobenius["peft"]  # strictly: PEFT rounds more than once here


# --- what is refused -----------------------------------------------------------------------------------------------


def test_names_that_do_not_match_are_listed_with_the_nearest_and_nothing_is_written(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    folder = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6), "model.layers.7.self_attn.q_proj": (10, 6)})

    with pytest.raises(MismatchError, match="1 of 2 names") as caught:
        merge(base, [folder], tmp_path / "out")

    assert caught.value.exit_code == 4
    assert "model.layers.7.self_attn.q_proj   no such weight" in caught.value.details[0]
    assert "nearest: model.layers.1.self_attn.q_proj.weight" in caught.value.details[0]
    assert nothing_written(tmp_path, "base", "a")


def test_a_base_of_other_sizes_is_refused_with_the_sizes(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    folder = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 8), V: (7, 8)})

    with pytest.raises(MismatchError, match="2 of 2 names") as caught:
        merge(base, [folder], tmp_path / "out")

    assert "adapter 8 -> 10, base 6 -> 10" in caught.value.details[0]
    assert "tiny/base" in str(caught.value.hint)


def test_allow_partial_leaves_out_and_reports_what_does_not_fit(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    folder = factories.adapter_folder(tmp_path / "a", modules={Q: (10, 6), "model.layers.9.self_attn.q_proj": (10, 6)})

    report = merge(base, [folder], tmp_path / "out", allow_partial=True)

    assert (report.merged_weights, report.left_out) == (1, ("model.layers.9.self_attn.q_proj",))


def test_allow_partial_does_not_allow_nothing_at_all(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    folder = factories.adapter_folder(tmp_path / "a", modules={"other.q_proj": (11, 6)})

    with pytest.raises(MismatchError, match="1 of 1 names"):
        merge(base, [folder], tmp_path / "out", allow_partial=True)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = base_and_adapter(tmp_path)
    monkeypatch.setattr("loratools.ops.merge.plan.free_space", lambda path: 100)

    with pytest.raises(MachineError, match="100 are free") as caught:
        merge(base, [folder], tmp_path / "out")

    assert caught.value.exit_code == 5
    assert nothing_written(tmp_path, "base", "style")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, value: float) -> None:
    parts = factories.factors()
    parts[Q][1][3, 2] = value
    base, folder = base_and_adapter(tmp_path, values=parts)

    with pytest.raises(InputError, match="not finite") as caught:
        merge(base, [folder], tmp_path / "out")

    assert f"{Q}.B" in caught.value.details[0]
    assert nothing_written(tmp_path, "base", "style")


def test_a_base_that_is_not_finite_is_refused_by_tensor(tmp_path: Path) -> None:
    weights = factories.base_weights()
    weights[f"{V}.weight"][0, 0] = math.nan
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)

    with pytest.raises(InputError, match="1 tensor of the base has values that are not finite") as raised:
        merge(base, [factories.adapter_folder(tmp_path / "a")], tmp_path / "out")

    assert raised.value.details == (f"{V}.weight",)
    assert nothing_written(tmp_path, "base", "a")


def test_a_result_beyond_float16_is_refused_with_its_size(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(dtype=torch.float16))
    folder = factories.adapter_folder(tmp_path / "a", alpha=4e6)

    with pytest.raises(InputError, match="F16 ends at") as caught:
        merge(base, [folder], tmp_path / "out")

    assert "bfloat16" in str(caught.value.hint)
    assert nothing_written(tmp_path, "base", "a")


def test_an_untrained_adapter_is_merged_with_a_warning_that_nothing_changed(tmp_path: Path) -> None:
    parts = {n: (a, torch.zeros_like(b)) for n, (a, b) in factories.factors().items()}
    base, folder = base_and_adapter(tmp_path, values=parts)

    report = merge(base, [folder], tmp_path / "out")

    assert report.gain is None
    assert any("untrained" in w for w in report.warnings)


def test_an_existing_output_stays_unless_overwrite_which_keeps_what_others_wrote(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    merge(base, [folder], tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()

    with pytest.raises(OutputExistsError) as caught:
        merge(base, [(folder, 2.0)], tmp_path / "out")
    assert caught.value.exit_code == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first

    (tmp_path / "out" / "checkpoint-500").mkdir()
    (tmp_path / "out" / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"precious")
    merge(base, [(folder, 2.0)], tmp_path / "out", overwrite=True)
    second = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert second != first
    assert (tmp_path / "out" / "checkpoint-500" / "adapter_model.safetensors").read_bytes() == b"precious"

    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError) as caught:
        merge(base, [folder], tmp_path / "out", overwrite=True)
    assert caught.value.details == ("config.json",)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == second


def test_files_removed_from_what_is_being_written_end_the_merge(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    def remove(nbytes: int) -> None:
        for path in tmp_path.glob(".out.loratools-*/*.safetensors"):
            path.unlink()

    with pytest.raises(MachineError, match="removed meanwhile"):
        merge(base, [folder], tmp_path / "out", progress=remove)

    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("where", ["base", "style", "base/merged"])
def test_an_output_that_is_an_input_or_lies_in_one_is_refused(tmp_path: Path, where: str) -> None:
    base, folder = base_and_adapter(tmp_path)

    with pytest.raises(OutputExistsError):
        merge(base, [folder], tmp_path / where, overwrite=True)


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, [folder], tmp_path / "out", progress=interrupt)

    assert nothing_written(tmp_path, "base", "style")


def test_the_self_check_catches_a_wrong_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.storage import files

    base, folder = base_and_adapter(tmp_path)

    def one_bit_off(fd: int, data: memoryview, offset: int) -> None:
        wrong = bytearray(data)
        wrong[-1] ^= 0x01  # the top of the last float32: its sign and upper exponent
        files.write_at(fd, wrong, offset)

    monkeypatch.setattr("loratools.ops.merge.rows.write_at", one_bit_off)

    with pytest.raises(LoraToolsError, match="self-check found 4") as caught:
        merge(base, [folder], tmp_path / "out")

    assert caught.value.exit_code == 70
    assert nothing_written(tmp_path, "base", "style")


def test_progress_counts_every_byte_of_the_tensors(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)
    seen: list[int] = []

    merge(base, [folder], tmp_path / "out", progress=seen.append)

    assert sum(seen) == sum(t.nbytes for t in merged_weights(base).values())


def test_a_plan_writes_nothing_and_tells_the_matches(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    made = plan_from_headers(base, [folder], tmp_path / "out").to_dict()["plan"]

    assert isinstance(made, dict)
    assert [m["weight"] for m in made["matches"]] == [f"{n}.weight" for n in sorted(factories.MODULES)]
    assert (made["targets"], made["untouched"]) == (4, 3)
    assert nothing_written(tmp_path, "base", "style")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adapters": []}, "no adapter"),
        ({"dtype": "int8"}, "cannot be stored"),
        ({"weight": math.nan}, "weight of"),
        ({"include": ["nothing*"]}, "matches none"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path, arguments: dict[str, object], words: str) -> None:
    base, folder = base_and_adapter(tmp_path)
    weight = arguments.pop("weight", 1.0)
    adapters = arguments.pop("adapters", [(folder, weight)])

    with pytest.raises(UsageError, match=words):
        merge(base, adapters, tmp_path / "out", **arguments)  # type: ignore[arg-type]


def test_include_merges_the_chosen_part_only(tmp_path: Path) -> None:
    base, folder = base_and_adapter(tmp_path)

    report: MergeReport = merge(base, [folder], tmp_path / "out", include=["*.q_proj"], exclude=["*.layers.1.*"])

    assert [t.name for t in report.tensors] == [f"{Q}.weight"]


def test_repeated_layers_make_a_deeper_model_that_computes_what_peft_computes(tmp_path: Path, llama: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], layer_replication=[(0, 2), (1, 2), (0, 1)]
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path / "adapter")

    merge(llama, [tmp_path / "adapter"], tmp_path / "merged", dtype="float32")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokens = torch.arange(5)[None] + 4
    assert merged.config.num_hidden_layers == 4
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert float((AutoModelForCausalLM.from_pretrained(llama)(tokens).logits - expected).abs().max()) > 0.1
