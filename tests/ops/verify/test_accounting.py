"""Every weight, config and file of a merged model is accounted for; what has no account is named."""

import json
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import MismatchError, UsageError
from loratools.ops.merge.outputs import Output, OutputFile
from loratools.ops.merge.plan import MergePlan
from loratools.ops.verify.accounting import accounts, compare_untouched

GGUF = Path(__file__).parents[3] / "fixtures" / "quantised" / "model.gguf"


@pytest.fixture
def merged(tmp_path: Path) -> dict[str, Tensor]:
    """A right merge in `tmp_path / "merged"`, and its weights."""
    factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(dtype=torch.bfloat16))
    factories.adapter_folder(tmp_path / "style")
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")
    return load_file(tmp_path / "merged" / "model.safetensors")


def verified(tmp_path: Path, weights: dict[str, Tensor] | None = None) -> loratools.VerifyReport:
    if weights is not None:
        save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    return loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style")


def codes(report: loratools.VerifyReport) -> list[str]:
    return [finding.code for finding in report.diagnosis]


def test_weights_of_a_right_merge_are_all_accounted_for(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    report = verified(tmp_path)

    assert (report.verdict, codes(report)) == ("same", [])
    assert (len(report.tensors), report.same, report.cast) == (4, 3, 0)
    assert (report.different, report.missing, report.unexplained, report.config_changes) == ((), (), (), ())


def test_one_changed_byte_of_an_untouched_weight_is_told(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    merged["model.norm.weight"].view(torch.int16)[4] ^= 1

    report = verified(tmp_path, merged)

    assert (codes(report), report.different) == (["untouched-changed"], ("model.norm.weight",))
    assert report.verdict == "different"


def test_model_from_another_base_is_told_as_that(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    other = factories.base_weights(dtype=torch.bfloat16, seed=77)
    factories.checkpoint_folder(tmp_path / "other", weights=other)
    loratools.merge(tmp_path / "other", tmp_path / "style", tmp_path / "merged", overwrite=True)

    assert "other-base" in codes(verified(tmp_path))


def test_missing_and_additional_weights_are_named(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    del merged["lm_head.weight"]
    merged["model.surprise.weight"] = torch.ones(3, dtype=torch.bfloat16)

    report = verified(tmp_path, merged)

    assert (report.missing, report.unexplained) == (("lm_head.weight",), ("model.surprise.weight",))
    assert codes(report) == ["missing", "unexplained"]


def test_untouched_weights_in_another_dtype_are_cast_and_not_different(
    tmp_path: Path, merged: dict[str, Tensor]
) -> None:
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged", dtype="float32", overwrite=True)

    report = verified(tmp_path)

    assert (report.verdict, report.same, report.cast) == ("same", 0, 3)
    assert report.gain == pytest.approx(1, abs=1e-6)


def test_vocabulary_that_was_cut_is_told_with_both_sizes(tmp_path: Path) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    pairs = {"lm_head": (torch.randn(4, 6), torch.randn(13, 4))}
    factories.adapter_folder(tmp_path / "style", values=pairs)
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:11].contiguous()

    report = verified(tmp_path, weights)

    assert codes(report) == ["vocabulary-cut"]
    assert "13 to 11" in report.diagnosis[0].message


def test_replacement_that_was_left_out_is_told(tmp_path: Path) -> None:
    factories.checkpoint_folder(tmp_path / "base")
    extra = {"lm_head.weight": torch.randn(13, 6)}
    factories.adapter_folder(tmp_path / "style", extra=extra, config={"modules_to_save": ["lm_head"]})
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")
    assert verified(tmp_path).replaced == 1
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights["lm_head.weight"] = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]

    report = verified(tmp_path, weights)

    assert [(f.code, f.names) for f in report.diagnosis] == [("replacement-missing", ("lm_head.weight",))]


def test_head_that_must_be_stored_and_follows_the_embedding_is_told(tmp_path: Path) -> None:
    weights = factories.base_weights()
    del weights["lm_head.weight"]
    factories.checkpoint_folder(tmp_path / "base", weights=weights, config={"tie_word_embeddings": True})
    factories.adapter_folder(tmp_path / "style", values={"lm_head": (torch.randn(4, 6), torch.randn(13, 4))})
    loratools.merge(tmp_path / "base", tmp_path / "style", tmp_path / "merged")
    assert verified(tmp_path).verdict == "same"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    del merged["lm_head.weight"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    assert "tied-overwritten" in codes(verified(tmp_path, merged))


def test_quantisation_left_in_the_config_of_floats_is_told(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))

    report = verified(tmp_path)

    assert codes(report) == ["quantization-left"]
    assert any(change.startswith("quantization_config: absent -> ") for change in report.config_changes)


def test_stale_shard_beside_the_index_is_told(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "merged" / "model-00003-of-00007.safetensors", {"format": "pt"})

    report = verified(tmp_path)

    assert [(f.code, f.names) for f in report.diagnosis] == [("stray-shards", ("model-00003-of-00007.safetensors",))]


def test_tokenizer_that_differs_is_listed(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    factories.adapter_folder(tmp_path / "style")
    loratools.merge(base, tmp_path / "style", tmp_path / "merged")
    (tmp_path / "merged" / "tokenizer.json").write_text('{"version": "2.0"}')

    report = verified(tmp_path)

    assert (report.verdict, report.file_changes) == ("same", ("tokenizer.json differs",))


def test_models_without_a_common_name_do_not_fit(tmp_path: Path, merged: dict[str, Tensor]) -> None:
    with pytest.raises(MismatchError, match="none of the weights"):
        verified(tmp_path, {"something.else": torch.ones(3)})


@pytest.mark.parametrize("sample", [0.0, -0.5, 1.5])
def test_sample_is_a_share(tmp_path: Path, merged: dict[str, Tensor], sample: float) -> None:
    with pytest.raises(UsageError, match="share"):
        loratools.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "style", sample=sample)


@pytest.mark.parametrize(("changed", "state"), [(False, "same"), (True, "different")])
def test_blocks_of_a_gguf_that_nothing_changes_are_compared_as_the_weight_of_their_name(
    changed: bool, state: str, tmp_path: Path
) -> None:
    """A plan has such blocks as they are stored, in bytes; the merged model has the weight that they stand for."""
    name = "Q4_0.weight"
    base = loratools.open_checkpoint(GGUF)
    blocks = base.stored[name]
    assert blocks.location is not None
    data = bytearray(GGUF.read_bytes())
    data[blocks.location.offset + 2] ^= 0x11 if changed else 0  # two codes, after the scale of the first block
    (tmp_path / "merged.gguf").write_bytes(data)
    output = Output(name, blocks.dtype, blocks.shape, blocks)
    file = OutputFile("merged.gguf", {}, (output,))
    plan = MergePlan(base, (), (), (), (file,), (), (), (), tmp_path / "merged.gguf")

    (pair,) = accounts(plan, loratools.open_checkpoint(tmp_path / "merged.gguf")).pairs

    assert compare_untouched(pair.output, pair.merged) == state
