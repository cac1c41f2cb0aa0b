from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file

import loratools
from loratools.checkpoints import open_checkpoint
from loratools.errors import FormatError, InputError, UnsupportedError

NAMES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {f"layers.{i}.q.weight": torch.randn(10, 6, generator=g) for i in range(2)} | {
        "norm.weight": torch.randn(6, generator=g)
    }


def single(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(weights(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    parts = [{n: t for n, t in weights().items() if (n == "norm.weight") == bool(i)} for i in range(2)]
    for name, part in zip(NAMES, parts, strict=True):
        torch.save(part, folder / name)
    weight_map = {n: name for name, part in zip(NAMES, parts, strict=True) for n in part}
    index = {"metadata": {"total_size": 504}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_merged_into_and_written_as_safetensors(tmp_path: Path, legacy: bool) -> None:
    base = single(tmp_path / "base")
    torch.save(weights(), base / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    deltas = save_adapter(tmp_path / "adapter", {"layers.0.q": (10, 6), "layers.1.q": (10, 6)})

    report = loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module, delta in deltas.items():
        assert_added(merged[f"{module}.weight"], weights()[f"{module}.weight"], delta)
    assert torch.equal(merged["norm.weight"], weights()["norm.weight"])
    assert "'base' is stored as pickles; the result is written as safetensors" in report.warnings
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"model.safetensors", "config.json", "loratools.json", "README.md"}


def test_shards_of_pickles_become_shards_of_safetensors_with_an_index_of_their_own(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", {"layers.1.q": (10, 6)})

    loratools.merge(sharded(tmp_path / "base"), [tmp_path / "adapter"], tmp_path / "out")

    shards = [name.replace("pytorch_", "").replace(".bin", ".safetensors") for name in NAMES]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"] == {"total_size": 504}
    assert set(load_file(tmp_path / "out" / shards[1])) == {"norm.weight"}
    # What was written is a checkpoint again, of a Hugging Face folder.
    assert open_checkpoint(tmp_path / "out").layout == "huggingface"


def test_safetensors_win_where_there_are_pickles_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(), single(tmp_path / "base") / "model.safetensors")

    base = open_checkpoint(tmp_path / "base")

    assert base.layout == "huggingface"
    assert [left.name for left in base.left_out] == ["pytorch_model.bin"]


def test_a_head_that_shares_its_values_with_the_embedding_stays_tied(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_models.llama(seed=5, vocabulary=19, width=8, inner=12, heads=2, key_heads=1, layers=1, tied=True)
    model.config.save_pretrained(tmp_path / "base")
    state = model.state_dict()
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    deltas = save_adapter(tmp_path / "adapter", {"lm_head": (19, 8)})

    base = open_checkpoint(tmp_path / "base")
    assert base.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in base.stored

    # An update of the head alone has to come loose from the embedding.
    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_added(merged.lm_head.weight.detach(), state["lm_head.weight"], deltas["lm_head"])
    assert torch.equal(merged.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_a_transposed_view_is_read_and_written_row_by_row(tmp_path: Path) -> None:
    value = torch.randn(6, 10)
    (tmp_path / "base").mkdir()
    torch.save({"a.weight": value.T, "b.weight": torch.ones(4, 6)}, tmp_path / "base" / "pytorch_model.bin")
    save_adapter(tmp_path / "adapter", {"b": (4, 6)})

    loratools.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a.weight"], value.T)


def test_whole_numbers_that_are_not_in_one_piece_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"ids": torch.arange(12).reshape(3, 4).T}, tmp_path / "pytorch_model.bin")

    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(tmp_path)

    assert caught.value.details == ("ids   I64",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("ran",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))

    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


def test_an_index_of_pickles_names_nothing_but_pickles_beside_it(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(InputError):
        open_checkpoint(folder)

    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": NAMES[0]}}))
    with pytest.raises(FormatError):
        open_checkpoint(folder)


def test_one_pickle_is_a_checkpoint_by_itself(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "tuned.pt")

    base = open_checkpoint(tmp_path / "tuned.pt")

    assert (base.layout, [f.saved_as for f in base.files]) == ("pytorch", ["tuned.safetensors"])
    assert set(base.weights) == set(weights())
