"""inspect FOLDER: everything below it is listed, or counted with the reason why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import FormatError

UNET = "lora_unet_output_blocks_4_1_transformer_blocks_0_attn2_to_k"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loose_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{UNET}.lora_down.weight": torch.ones(4, 20).half(),
        f"{UNET}.lora_up.weight": torch.ones(12, 4).half(),
        f"{UNET}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, path)


def listed(folder: str) -> list[tuple[str, str]]:
    """The path below the folder and the type of each entry."""
    report = loratools.inspect(folder)
    return [(str(Path(e.path).relative_to(folder)), type(e).__name__) for e in report.sources]


def skipped(folder: str) -> dict[str, list[str]]:
    report = loratools.inspect(folder)
    return {each.why: [str(Path(p).relative_to(folder)) for p in each.paths] for each in report.not_listed}


def test_files_in_folders_are_listed_beside_files_of_the_folder_itself() -> None:
    loose_file(Path("loras/a.safetensors"))
    loose_file(Path("loras/sdxl/style/old/b.safetensors"))
    loose_file(Path("loras/flux/c.safetensors"))

    assert listed("loras") == [
        ("a.safetensors", "AdapterEntry"),
        ("flux/c.safetensors", "AdapterEntry"),
        ("sdxl/style/old/b.safetensors", "AdapterEntry"),
    ]


def test_folder_of_folders_alone_is_listed() -> None:
    loose_file(Path("loras/sdxl/a.safetensors"))
    loose_file(Path("loras/flux/b.safetensors"))

    assert [path for path, _ in listed("loras")] == ["flux/b.safetensors", "sdxl/a.safetensors"]


def test_adapter_without_weights_has_an_entry_with_the_reason() -> None:
    factories.adapter_folder(Path("all/good"))
    factories.adapter_folder(Path("all/empty"))
    Path("all/empty/adapter_model.safetensors").unlink()

    report = loratools.inspect("all")

    assert listed("all") == [("empty", "FailedEntry"), ("good", "AdapterEntry")]
    assert isinstance(report.sources[0], loratools.FailedEntry)
    assert "no weights beside it" in report.sources[0].error.message
    assert report.error is not None


def test_checkpoint_beside_an_adapter_is_listed_wherever_it_lies() -> None:
    factories.checkpoint_folder(Path("all/deep/base"))
    factories.adapter_folder(Path("all/deep/lora"))
    factories.adapter_folder(Path("all/together"))
    factories.checkpoint_folder(Path("both"))
    for path in Path("both").iterdir():
        shutil.copy(path, Path("all/together"))

    assert listed("all") == [
        ("deep/base", "CheckpointEntry"),
        ("deep/lora", "AdapterEntry"),
        ("together", "AdapterEntry"),
        ("together", "CheckpointEntry"),
    ]


def test_broken_file_has_an_entry_with_the_reason() -> None:
    loose_file(Path("loras/a.safetensors"))
    Path("loras/page.safetensors").write_text("<!DOCTYPE html><html></html>")
    Path("loras/cut.safetensors").write_bytes(Path("loras/a.safetensors").read_bytes()[:-3])

    report = loratools.inspect("loras")

    assert [path for path, kind in listed("loras") if kind == "FailedEntry"] == ["cut.safetensors", "page.safetensors"]
    messages = [e.error.message for e in report.sources if isinstance(e, loratools.FailedEntry)]
    assert "web page" in messages[1]


def test_run_lists_its_checkpoints_by_number_and_counts_what_the_training_left() -> None:
    for number in (1000, 500):
        factories.adapter_folder(Path(f"all/run/checkpoint-{number}"))
        torch.save({"step": number}, f"all/run/checkpoint-{number}/optimizer.pt")

    assert [path for path, _ in listed("all")] == ["run/checkpoint-500", "run/checkpoint-1000"]
    assert skipped("all") == {
        "state of a training": ["run/checkpoint-1000/optimizer.pt", "run/checkpoint-500/optimizer.pt"]
    }


def test_file_of_no_tensors_and_hidden_folder_are_counted() -> None:
    loose_file(Path("loras/a.safetensors"))
    Path("loras/vocabulary.bin").write_bytes(bytes(range(1, 200)))
    loose_file(Path("loras/.cache/b.safetensors"))

    assert [path for path, _ in listed("loras")] == ["a.safetensors"]
    assert skipped("loras") == {
        "no tensors": ["vocabulary.bin"],
        "hidden folders, which are not searched": [".cache"],
    }


def test_adapter_counts_what_lies_below_it() -> None:
    factories.adapter_folder(Path("run"))
    factories.adapter_folder(Path("run/checkpoint-5"))
    factories.checkpoint_folder(Path("run/base"))

    report = loratools.inspect("run")

    assert listed("run") == [(".", "AdapterEntry")]
    assert skipped("run") == {"beside or below the adapter; inspect them by their own paths": ["base"]}
    (entry,) = report.sources
    assert isinstance(entry, loratools.AdapterEntry)
    assert "1 adapter in folders below is not read: 'checkpoint-5'" in entry.warnings


def test_parts_of_a_training_inside_of_a_model_are_none_of_its_own() -> None:
    factories.checkpoint_folder(Path("all/base"))
    loose_file(Path("all/base/style.safetensors"))
    save_file({"x": torch.ones(3)}, "all/base/extra.safetensors")

    assert listed("all") == [("base", "CheckpointEntry"), ("base/style.safetensors", "AdapterEntry")]
    assert skipped("all") == {"no part of the model beside them": ["base/extra.safetensors"]}


def test_link_to_a_folder_above_is_followed_once() -> None:
    loose_file(Path("loras/a.safetensors"))
    Path("loras/again").symlink_to(Path("loras").resolve(), target_is_directory=True)

    assert [path for path, _ in listed("loras")] == ["a.safetensors"]


def test_empty_folder_and_one_of_other_files_are_refused() -> None:
    Path("nothing").mkdir()
    Path("texts").mkdir()
    Path("texts/readme.md").write_text("about")

    for folder in ("nothing", "texts"):
        with pytest.raises(FormatError):
            loratools.inspect(folder)


def test_document_has_what_is_not_listed() -> None:
    loose_file(Path("loras/a.safetensors"))
    torch.save({"step": 1}, "loras/optimizer.pt")

    document = loratools.inspect("loras").to_dict()

    assert document["not_listed"] == [{"why": "state of a training", "paths": ["loras/optimizer.pt"]}]
    json.dumps(document, allow_nan=False)
