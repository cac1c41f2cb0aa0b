"""What the header of an image adapter says for people, from keys of its trainers as these write them."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs
from loratools.formats.common.description import describe

KOHYA = {
    "ss_output_name": "ink-wash",
    "ss_training_comment": "None",
    "ss_dataset_dirs": json.dumps({"12_inkw style": {"n_repeats": 12, "img_count": 31}}),
    "ss_tag_frequency": json.dumps({"12_inkw style": {"landscape": 17, "boat ": 5}, "reg": {"landscape": 2, "": 9}}),
    "ss_resolution": "(768, 1024)",
    "ss_num_epochs": "10",
    "ss_epoch": "7",
    "ss_steps": "2604",
    "ss_max_train_steps": "3720",
    "ss_training_started_at": "1722384000.25",
    "ss_training_finished_at": "1722470400.5",
    "sshs_model_hash": "0F" * 32,
}
MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.title": "Ink wash v2",
    "modelspec.author": "Li",
    "modelspec.description": "Say the word.\nThen paint.",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.trigger_phrase": "inkw, wash style",
    "modelspec.resolution": "1024x1280",
    "modelspec.date": "2024-08-02T10:00:00",
    "modelspec.hash_sha256": "0x" + "ab" * 32,
}


def adapter_file(path: Path, metadata: dict[str, str]) -> Path:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(3, 640),
        f"{name}.lora_up.weight": torch.zeros(640, 3),
        f"{name}.alpha": torch.tensor(3.0),
    }
    save_file(tensors, path, metadata=metadata)
    return path


def test_what_sd_scripts_write_is_read() -> None:
    description = describe(KOHYA)
    assert description is not None
    assert description.to_dict() == {
        "title": "ink-wash",
        "trigger_words": ["inkw style"],
        "tags": [{"tag": "landscape", "count": 19}, {"tag": "boat", "count": 5}],
        "resolution": "768x1024",
        "epochs": 7,
        "steps": 2604,
        "date": "2024-08-01",
        "hashes": {"autov3": "0f0f0f0f0f0f"},
    }


def test_the_model_standard_goes_before_what_is_told_by_folders() -> None:
    description = describe(KOHYA | MODELSPEC)
    assert description is not None
    assert (description.title, description.author, description.license) == ("Ink wash v2", "Li", "CC-BY-4.0")
    assert description.trigger_words == ("inkw", "wash style")
    assert description.notes == "Say the word.\nThen paint."


def test_the_model_standard_alone_is_enough() -> None:
    description = describe(MODELSPEC)
    assert description is not None
    assert (description.resolution, description.date) == ("1024x1280", "2024-08-02")
    assert description.hashes == {"autov3": "abababababab"}
    assert (description.steps, description.tags) == (None, ())


def test_what_ai_toolkit_writes_is_read() -> None:
    written = {"name": "my_lora", "training_info": json.dumps({"step": 1500, "epoch": 21}), "format": "pt"}
    description = describe(written)
    assert description is not None
    assert (description.title, description.steps, description.epochs) == ("my_lora", 1500, 21)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {"ss_network_dim": "16", "ss_network_alpha": "8", "ss_base_model_version": "sdxl_base_v1-0"},
        {"ss_output_name": "None", "ss_steps": "", "ss_epoch": "-3", "ss_resolution": "None"},
        {"ss_tag_frequency": "{not json", "ss_dataset_dirs": "[1, 2]", "training_info": '"a text"'},
        {"ss_tag_frequency": '{"1_a": 4}'.replace("1_a", "a"), "ss_training_started_at": "nan"},
        {"ss_tag_frequency": '{"a": ' * 900 + "1" + "}" * 900},
        {"ss_resolution": "as large as can be", "modelspec.date": "soon", "sshs_model_hash": "none"},
        {"ss_training_started_at": "99999999999999", "ss_steps": "9" * 400, "training_info": '{"step": true}'},
    ],
)
def test_what_says_nothing_or_is_damaged_is_left_out(metadata: dict[str, str]) -> None:
    assert describe(metadata) is None


def test_inspect_has_it_in_its_document(tmp_path: Path) -> None:
    (entry,) = loratools.inspect(adapter_file(tmp_path / "ink.safetensors", KOHYA)).sources
    body = entry.to_dict()
    assert (body["title"], body["trigger_words"], body["date"]) == ("ink-wash", ["inkw style"], "2024-08-01")
    assert body["metadata"] != {}


def test_inspect_shows_it_and_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    path = adapter_file(
        tmp_path / "ink.safetensors", KOHYA | {"modelspec.author": "\x1b[31mred", "ss_output_name": "[b]x"}
    )
    shown = click.testing.CliRunner().invoke(verbs, ["inspect", str(path)], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert "[b]x" in shown.stdout
    assert "\x1b[31mred" not in shown.stdout
    for words in ("trigger words", "inkw style", "landscape (19)", "7 epochs", "2,604 steps", "pictures of 768x1024"):
        assert words in shown.stdout


def test_an_adapter_of_a_language_model_has_no_description() -> None:
    (entry,) = loratools.inspect("fixtures/llama-tiny-science").sources
    assert isinstance(entry, loratools.AdapterEntry)
    assert (entry.family, entry.description) == (None, None)
    assert not {"title", "trigger_words", "tags", "family"} & set(entry.to_dict())
