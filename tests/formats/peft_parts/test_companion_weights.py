"""Trained tensors in files beside an adapter: read where their meaning is known, or named, and merging refuses."""

import json
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import FormatError, UnsupportedError

PROJECTOR = "model.mm_projector.0.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return factories.checkpoint_folder(
        tmp_path / "base", weights=factories.base_weights() | {PROJECTOR: torch.zeros(5, 3)}
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return factories.adapter_folder(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "program"),
    [("non_lora_trainables.bin", "LLaVA"), ("non_lora_state_dict.bin", "Qwen-VL-Series-Finetune")],
)
def test_whole_weights_beside_an_adapter_are_merged(
    name: str, program: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    trained = torch.arange(15.0).reshape(5, 3)
    torch.save({f"base_model.model.{PROJECTOR}": trained}, adapter / name)

    report = loratools.merge(base, [adapter], tmp_path / "out")

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[PROJECTOR], trained)
    assert any(f"'{name}' beside the adapter, which {program} writes" in text for text in report.warnings)


def test_value_head_beside_an_adapter_is_added_to_the_merged_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    head = torch.arange(6.0).reshape(1, 6)
    save_file({"v_head.summary.weight": head}, adapter / "value_head.safetensors")

    loratools.merge(base, [adapter], tmp_path / "out")

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["v_head.summary.weight"], head)


def test_new_embeddings_take_the_rows_that_added_tokens_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(2, 6)
    save_file({"input_embeddings": rows}, adapter / "new_embeddings.safetensors")
    (adapter / "added_tokens.json").write_text(json.dumps({"<b>": 12, "<a>": 11}))

    loratools.merge(base, [adapter], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(merged[11:], rows)
    assert torch.equal(merged[:11], factories.base_weights()["model.embed_tokens.weight"][:11])


def test_new_embeddings_without_the_numbers_of_their_tokens_are_an_error(adapter: Path) -> None:
    save_file({"input_embeddings": torch.ones(2, 6)}, adapter / "new_embeddings.safetensors")

    with pytest.raises(FormatError, match="files beside") as raised:
        loratools.load(adapter)

    assert "added_tokens.json" in str(raised.value.details)


def test_unknown_file_of_tensors_is_named_by_a_warning_and_refused_by_merge(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    save_file({"gate": torch.ones(3)}, adapter / "extra_modules.safetensors")

    warnings = loratools.load(adapter).warnings
    assert any("extra_modules.safetensors" in warning for warning in warnings)
    with pytest.raises(UnsupportedError, match="tensors that are not read") as raised:
        loratools.merge(base, [adapter], tmp_path / "out")

    assert "--allow-partial" in str(raised.value.hint)
    assert not (tmp_path / "out").exists()
    loratools.merge(base, [adapter], tmp_path / "out", allow_partial=True)


def test_other_value_of_a_weight_that_the_adapter_also_has_is_an_error(tmp_path: Path) -> None:
    adapter = factories.adapter_folder(tmp_path / "adapter", extra={PROJECTOR: torch.zeros(5, 3)})
    torch.save({PROJECTOR: torch.ones(5, 3)}, adapter / "non_lora_trainables.bin")

    with pytest.raises(FormatError) as raised:
        loratools.load(adapter)

    assert "non_lora_trainables.bin" in str(raised.value.details)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", {"state": torch.ones(2)}),
        ("training_args.bin", {"lr": torch.ones(1)}),
        ("rng_state_0.pth", {"cpu": torch.ones(1)}),
        ("0000100_adapters.safetensors", None),
        ("model.safetensors", None),
    ],
)
def test_state_of_a_training_and_whole_models_are_no_part_of_the_adapter(
    name: str, content: dict[str, torch.Tensor] | None, adapter: Path
) -> None:
    if content is None:
        save_file({"model.norm.weight": torch.ones(6)}, adapter / name)
    else:
        torch.save(content, adapter / name)

    assert loratools.load(adapter).unread_companions == ()


def test_vocabulary_that_ends_in_bin_is_no_file_of_tensors(adapter: Path) -> None:
    (adapter / "vocab.bin").write_bytes(b"\x01\x02\x03\x04 some words")

    assert loratools.load(adapter).unread_companions == ()
