"""inspect: whole documents about adapters and checkpoints made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import factories
import pytest
import torch

from loratools.errors import FormatError, UsageError
from loratools.ops.inspect.entries import AdapterEntry, CheckpointEntry, FailedEntry
from loratools.ops.inspect.verb import inspect

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def only(path: Path, **options: object) -> AdapterEntry:
    (entry,) = inspect(path, **options).sources  # type: ignore[arg-type]
    assert isinstance(entry, AdapterEntry)
    return entry


def checkpoint(path: Path, **options: object) -> CheckpointEntry:
    (entry,) = inspect(path, **options).sources  # type: ignore[arg-type]
    assert isinstance(entry, CheckpointEntry)
    return entry


def test_adapter_document_is_the_contract(tmp_path: Path) -> None:
    folder = factories.adapter_folder(
        tmp_path / "style",
        modules={Q: (10, 6), V: (7, 6)},
        ranks={V: 2},
        extra={"score.weight": torch.zeros(3, 6, dtype=torch.bfloat16)},
        config={"modules_to_save": ["score"]},
    )

    document = inspect(folder).to_dict()

    (source,) = document["sources"]  # type: ignore[misc]
    assert source.pop("metadata").keys()
    assert source == {
        "path": str(folder),
        "format": "peft",
        "layout": None,
        "base_model": "tiny/base",
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "parameters": 4 * (10 + 6) + 2 * (7 + 6) + 3 * 6,
        "ranks": {"2": 1, "4": 1},
        "scales": [{"scale": 2.0, "modules": 1}, {"scale": 4.0, "modules": 1}],
        "kinds": {"lora": 2},
        "dtypes": {"BF16": 1, "F32": 4},
        "modules": [
            {
                "name": Q,
                "target": Q,
                "kind": "lora",
                "rank": 4,
                "alpha": 8.0,
                "alpha_source": "config",
                "scale": 2.0,
                "out_features": 10,
                "in_features": 6,
                "shape": [10, 6],
                "dtype": "F32",
                "parameters": 64,
                "dora": False,
            },
            {
                "name": V,
                "target": V,
                "kind": "lora",
                "rank": 2,
                "alpha": 8.0,
                "alpha_source": "config",
                "scale": 4.0,
                "out_features": 7,
                "in_features": 6,
                "shape": [7, 6],
                "dtype": "F32",
                "parameters": 26,
                "dora": False,
            },
        ],
        "replacements": [{"name": "score.weight", "shape": [3, 6], "dtype": "BF16"}],
        "other_tensors": [],
        "warnings": [],
    }
    json.dumps(document, allow_nan=False)


def test_values_equal_the_dense_delta(tmp_path: Path) -> None:
    made = factories.factors({Q: (10, 6)}, rank=4)
    folder = factories.adapter_folder(tmp_path / "style", values=made, alpha=2, rank=4)
    a, b = (t.double() for t in made[Q])
    s = torch.linalg.svdvals(0.5 * b @ a)[:4]
    p = s / s.sum()

    values = only(folder, values=True).modules[0].values

    assert values is not None
    assert values.singular_values == pytest.approx(s.tolist(), rel=1e-12)
    assert values.norm == pytest.approx(float(s.norm()), rel=1e-12)
    assert values.spectral_norm == pytest.approx(float(s[0]), rel=1e-12)
    assert values.stable_rank == pytest.approx(float((s.norm() / s[0]) ** 2), rel=1e-12)
    assert values.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-12)
    assert (values.finite, values.zero) == (True, False)


def test_values_of_a_rank_above_the_sizes_have_no_more_singular_values_than_the_matrix(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "style", modules={Q: (5, 3)}, rank=9)

    values = only(folder, values=True).modules[0].values

    assert values is not None
    assert values.singular_values is not None
    assert len([s for s in values.singular_values if s > 1e-9]) == 3


def test_values_tell_untrained_and_not_finite_modules(tmp_path: Path) -> None:
    made = factories.factors({Q: (10, 6), V: (7, 6)})
    made[Q] = (made[Q][0], torch.zeros(10, 4))
    made[V][0][1, 2] = float("nan")
    broken = torch.zeros(3, 6)
    broken[0, 0] = float("inf")
    folder = factories.adapter_folder(
        tmp_path / "style", values=made, extra={"score.weight": broken}, config={"modules_to_save": ["score"]}
    )

    entry = only(folder, values=True)

    assert entry.untrained == (Q,)
    assert entry.not_finite == (V, "score.weight")
    zero, nan = (m.values for m in entry.modules)
    assert zero is not None
    assert nan is not None
    assert zero == (0.0, 0.0, 0.0, 0.0, (0.0,) * 4, True, True, 10)
    assert nan == (None, None, None, None, None, False, False, None)
    json.dumps(inspect(folder, values=True).to_dict(), allow_nan=False)
    warnings = entry.to_dict()["warnings"]
    assert isinstance(warnings, list)
    assert warnings[:2] == [f"values not finite in {V}, score.weight", f"untrained modules, which change nothing: {Q}"]
    unread = only(folder).to_dict()["warnings"]
    assert isinstance(unread, list)
    assert warnings[2:] == unread


def test_infinity_in_one_factor_against_zero_in_the_other_is_not_finite(tmp_path: Path) -> None:
    made = factories.factors({Q: (10, 6)})
    made[Q][0][0, 0] = float("inf")
    made[Q][1].zero_()
    folder = factories.adapter_folder(tmp_path / "style", values=made)

    assert only(folder, values=True).not_finite == (Q,)


def test_progress_counts_the_bytes_of_every_tensor(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "style")
    done: list[int] = []

    entry = only(folder, values=True, progress=done.append)

    assert sum(done) == 4 * entry.parameters


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoint_document_is_whole(tmp_path: Path, shards: int) -> None:
    weights = {
        "b.weight": torch.zeros(5, 3),
        "a.bias": torch.zeros(7, dtype=torch.bfloat16),
        "c.scale": torch.zeros(()),
    }
    folder = factories.checkpoint_folder(tmp_path / "base", weights=weights, shards=shards)

    document = inspect(folder).to_dict()

    (source,) = document["sources"]  # type: ignore[misc]
    assert source == {
        "path": str(folder),
        "format": None,
        "layout": "huggingface",
        "architecture": "LlamaForCausalLM",
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": 23,
        "dtypes": {"BF16": 1, "F32": 2},
        "quantization": None,
        "quantised": [],
        "tensors": [
            {"name": "a.bias", "shape": [7], "dtype": "BF16", "parameters": 7},
            {"name": "b.weight", "shape": [5, 3], "dtype": "F32", "parameters": 15},
            {"name": "c.scale", "shape": [], "dtype": "F32", "parameters": 1},
        ],
        "tied": {},
        "side_files": ["config.json"],
        "left_out": [],
        "warnings": [],
    }


def test_checkpoint_values_count_what_is_not_finite_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratools.ops.inspect.values._BLOCK_BYTES", 64)
    weights = factories.base_weights()
    weights["lm_head.weight"][0, 0] = float("nan")
    weights["lm_head.weight"][12, 5] = float("-inf")
    weights["half"] = torch.tensor([1.0, float("inf")], dtype=torch.float16)
    weights["byte"] = torch.tensor([[1.0, float("nan")]]).to(torch.float8_e4m3fn)
    weights["scalar"] = torch.tensor(float("nan"))
    weights["empty"] = torch.zeros(0, 3)
    weights["ids"] = torch.arange(5)
    folder = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    done: list[int] = []

    entry = checkpoint(folder, values=True, progress=done.append)

    found = {t.name: t.non_finite for t in entry.tensors}
    assert {name: count for name, count in found.items() if count} == {
        "byte": 1,
        "half": 1,
        "lm_head.weight": 2,
        "scalar": 1,
    }
    assert set(found.values()) == {0, 1, 2}
    assert sum(done) == sum(t.numel() * t.element_size() for name, t in weights.items() if name != "ids")


def test_bare_file_of_a_model_is_a_checkpoint(tmp_path: Path) -> None:
    folder = factories.checkpoint_folder(tmp_path / "base")

    assert checkpoint(folder / "model.safetensors").parameters == checkpoint(folder).parameters


def test_bare_file_of_an_adapter_is_an_adapter(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "style")
    renamed = folder / "renamed.safetensors"
    (folder / "adapter_model.safetensors").rename(renamed)

    assert only(renamed).modules == only(factories.adapter_folder(tmp_path / "again")).modules


def test_folder_of_several_lists_them_in_natural_order(tmp_path: Path) -> None:
    for step in (1000, 500):
        factories.adapter_folder(tmp_path / f"checkpoint-{step}")
    factories.checkpoint_folder(tmp_path / "base")

    found = inspect(tmp_path)

    assert [e.path for e in found.sources] == [
        str(tmp_path / name) for name in ("base", "checkpoint-500", "checkpoint-1000")
    ]
    assert found.error is None


def test_bad_source_among_several_keeps_its_place(tmp_path: Path) -> None:
    first = factories.adapter_folder(tmp_path / "first")
    cut = factories.adapter_folder(tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    last = factories.checkpoint_folder(tmp_path / "last")

    found = inspect(first, cut, tmp_path / "missing", last)

    kinds = [type(e) for e in found.sources]
    assert kinds == [AdapterEntry, FailedEntry, FailedEntry, CheckpointEntry]
    assert found.error is not None
    assert found.error.message == "2 of 4 sources could not be inspected"
    assert found.error.exit_code == 4
    assert [set(e.to_dict()) for e in found.sources[1:3]] == [{"path", "error"}] * 2


def test_bad_adapter_in_a_folder_keeps_its_place(tmp_path: Path) -> None:
    factories.adapter_folder(tmp_path / "good")
    weights = factories.adapter_folder(tmp_path / "bad") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    assert [type(e) for e in inspect(tmp_path).sources] == [FailedEntry, AdapterEntry]


def test_one_bad_source_raises_its_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file or folder"):
        inspect(tmp_path / "missing")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(FormatError):
        inspect(tmp_path / "page.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError):
        inspect(tmp_path / "empty")


def test_format_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    folder = factories.adapter_folder(tmp_path / "style")

    with pytest.raises(UsageError, match=r"no format named 'pft'; there are: .*peft"):
        inspect(folder, from_format="pft")


def test_path_is_told_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.adapter_folder(tmp_path / "style")
    monkeypatch.chdir(tmp_path)

    assert inspect("./style/").sources[0].path == "./style/"
