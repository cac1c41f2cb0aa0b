"""Tables of words of which a few rows changed: only these rows are stored, and PEFT puts them in their places."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from loratools import formats
from loratools.checkpoints import open_checkpoint
from loratools.errors import MismatchError
from loratools.ops.extract.verb import extract
from loratools.ops.merge.verb import merge

VOCABULARY, NEW = 120, 3
CHANGED = [5, 70, 71]
IDS = torch.tensor([[5, 7, 70, 71, 11, 2]])
pytestmark = pytest.mark.filterwarnings("ignore")


def _model(*, tied: bool) -> transformers.PreTrainedModel:
    return tiny_models.llama(vocabulary=VOCABULARY, width=24, inner=40, heads=4, key_heads=2, tied=tied)


def _tuned(base: nn.Module, *, grown: bool, everything: bool = False) -> transformers.PreTrainedModel:
    """One projection changed, some rows of the embedding (and of the head, where it is another tensor)."""
    tuned = copy.deepcopy(base)
    if grown:
        tuned.resize_token_embeddings(VOCABULARY + NEW)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "down_proj" in name or (everything and weight.ndim == 2):
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "embed" in name or "lm_head" in name:
                weight[CHANGED] += 0.5 * torch.randn(len(CHANGED), weight.shape[1], generator=generator)
    return tuned  # type: ignore[return-value]


def _saved(
    tmp_path: Path, base: transformers.PreTrainedModel, tuned: transformers.PreTrainedModel
) -> tuple[Path, Path]:
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def _weights(path: Path) -> Mapping[str, Tensor]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).weights.items()}


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_peft_puts_the_changed_and_the_new_rows_in_place(tmp_path: Path, tied: bool, grown: bool) -> None:
    base = _model(tied=tied)
    tuned = _tuned(base, grown=grown)

    report = extract(*_saved(tmp_path, base, tuned), tmp_path / "adapter", rank=99)

    rows = [*CHANGED, *(range(VOCABULARY, VOCABULARY + NEW) if grown else ())]
    # A head of as many words as before is a linear layer like others.
    tables = ["lm_head.weight", "model.embed_tokens.weight"] if grown and not tied else ["model.embed_tokens.weight"]
    assert [(r.name, r.declared, r.shape) for r in report.replacements] == [
        (name, "tokens", (len(rows), 24)) for name in tables
    ]
    assert any("resize_token_embeddings(123)" in text for text in report.warnings) == grown
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {name.removesuffix(".weight"): rows for name in tables}
    target = copy.deepcopy(base)
    if grown:
        target.resize_token_embeddings(VOCABULARY + NEW)
    ids = torch.cat([IDS, torch.tensor([[VOCABULARY, VOCABULARY + 2]])], 1) if grown else IDS
    wanted = _logits(tuned, ids)
    for merged in (False, True):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(target), str(tmp_path / "adapter")).eval()
        model = model.merge_and_unload() if merged else model  # type: ignore[operator]
        torch.testing.assert_close(_logits(model, ids), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_new_rows_makes_the_vocabulary_larger(tmp_path: Path, tied: bool) -> None:
    base = _model(tied=tied)
    before, after = _saved(tmp_path, base, _tuned(base, grown=True))
    extract(before, after, tmp_path / "adapter", rank=99)

    merge(before, tmp_path / "adapter", tmp_path / "merged")

    merged, wanted = _weights(tmp_path / "merged"), _weights(after)
    assert merged.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(merged[name], values, rtol=0, atol=0 if "down_proj" not in name else 1e-6)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == VOCABULARY + NEW
    ids = torch.tensor([[VOCABULARY + 1, 5, 9]])
    torch.testing.assert_close(
        _logits(model, ids),
        _logits(transformers.AutoModelForCausalLM.from_pretrained(after), ids),
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_adapter_of_rows_alone_is_loaded_by_peft(tmp_path: Path) -> None:
    base = _model(tied=False)
    before, after = _saved(tmp_path, base, _tuned(base, grown=False))

    report = extract(before, after, tmp_path / "adapter", rank=4, include=["*embed_tokens"])

    assert not report.modules
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()  # type: ignore[operator]
    assert torch.equal(model.get_input_embeddings().weight, _weights(after)["model.embed_tokens.weight"])


def test_trained_tokens_alone_are_written_so_that_peft_loads_them(tmp_path: Path) -> None:
    base = _model(tied=True)
    trained = peft.get_peft_model(copy.deepcopy(base), peft.TrainableTokensConfig(token_indices=CHANGED))
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    trained.save_pretrained(str(tmp_path / "trained"))

    formats.save(formats.load(tmp_path / "trained"), tmp_path / "written")

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "written")).eval()
    assert float((_logits(trained.eval(), IDS) - _logits(base, IDS)).abs().max()) > 0.1
    torch.testing.assert_close(_logits(loaded, IDS), _logits(trained, IDS))


@pytest.mark.parametrize(
    ("embeddings", "declared"), [("auto", None), ("lora", None), ("rows", "tokens"), ("full", "modules_to_save")]
)
def test_where_all_rows_changed_factors_are_smaller(tmp_path: Path, embeddings: str, declared: str | None) -> None:
    base = _model(tied=False)
    before, after = _saved(tmp_path, base, _tuned(base, grown=False, everything=True))

    report = extract(before, after, tmp_path / "adapter", rank=5, embeddings=embeddings)  # type: ignore[arg-type]

    assert ("model.embed_tokens" in [m.name for m in report.modules]) == (declared is None)
    assert [r.declared for r in report.replacements if "embed" in r.name] == ([] if declared is None else [declared])


def test_what_is_stored_by_rows_counts_as_rows_within_a_limit(tmp_path: Path) -> None:
    base = _model(tied=False)
    before, after = _saved(tmp_path, base, _tuned(base, grown=True))

    # Whole tables alone would take 2 x 123 x 24 x 4 = 23,616 bytes.
    report = extract(before, after, tmp_path / "adapter", max_size=8000)

    assert {r.declared for r in report.replacements} == {"tokens"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size <= 8000


def test_new_rows_with_a_gap_before_them_are_refused(tmp_path: Path) -> None:
    base = _model(tied=True)
    before, after = _saved(tmp_path, base, _tuned(base, grown=True))
    extract(before, after, tmp_path / "adapter", rank=4)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"]["model.embed_tokens"][-1] = 400
    file.write_text(json.dumps(config))

    with pytest.raises(MismatchError, match="do not fit") as caught:
        merge(before, tmp_path / "adapter", tmp_path / "merged")

    assert "the base has 120, the adapter has row 400 and not row 122" in caught.value.details
    assert not (tmp_path / "merged").exists()
