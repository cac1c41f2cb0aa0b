"""--set-metadata and --strip-metadata of convert and resize: what a person says of a file stands in its header."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from cli_runner import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs
from loratools.errors import UsageError

MODULE = "lora_unet_output_blocks_4_1_transformer_blocks_0_attn2_to_k"
TEXTS = {
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_training_comment": "my private folder",
    "modelspec.title": "Old",
    "sshs_model_hash": "0" * 64,
}


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A kohya file of rank 4 whose header says what people may not want to publish."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{MODULE}.lora_down.weight": torch.randn(4, 2048, generator=generator),
        f"{MODULE}.lora_up.weight": torch.randn(1280, 4, generator=generator),
        f"{MODULE}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "ink.safetensors", TEXTS)
    return tmp_path / "ink.safetensors"


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def converted(source: Path, out: Path, **metadata: object) -> Path:
    loratools.convert(source, out, format="kohya", base="sdxl", **metadata)  # type: ignore[arg-type]
    return out


def resized(source: Path, out: Path, **metadata: object) -> Path:
    loratools.resize(source, out, rank=3, **metadata)  # type: ignore[arg-type]
    return out


VERBS = pytest.mark.parametrize("written", [converted, resized])


@VERBS
def test_a_text_is_set_and_the_others_stay(kohya: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    out = written(kohya, tmp_path / "out.safetensors", set_metadata={"modelspec.title": "Ink", "own.key": "7"})

    texts = header(out)
    assert (texts["modelspec.title"], texts["own.key"]) == ("Ink", "7")
    assert texts["ss_training_comment"] == "my private folder"


@VERBS
def test_an_empty_text_takes_the_key_away(kohya: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    texts = header(written(kohya, tmp_path / "out.safetensors", set_metadata={"ss_training_comment": ""}))

    assert "ss_training_comment" not in texts
    assert texts["modelspec.title"] == "Old"


@VERBS
def test_stripping_leaves_nothing_that_the_source_said(
    kohya: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    out = written(kohya, tmp_path / "out.safetensors", strip_metadata=True, set_metadata={"modelspec.title": "Ink"})

    assert set(header(out)) <= {"format", "loratools.version", "loratools.family", "modelspec.title"}
    assert not any("private" in text for text in header(out).values())


def test_stripping_changes_no_value(kohya: Path, tmp_path: Path) -> None:
    out = converted(kohya, tmp_path / "out.safetensors", strip_metadata=True)

    with safe_open(kohya, "pt") as before, safe_open(out, "pt") as after:
        up, down = (f"{MODULE}.lora_{part}.weight" for part in ("up", "down"))
        scale = [float(opened.get_tensor(f"{MODULE}.alpha")) / 4 for opened in (before, after)]
        product = before.get_tensor(up).double() @ before.get_tensor(down).double() * scale[0]
        again = after.get_tensor(up).double() @ after.get_tensor(down).double() * scale[1]
    torch.testing.assert_close(again, product, rtol=1e-6, atol=0)


@VERBS
@pytest.mark.parametrize("key", ["ss_network_dim", "sshs_model_hash", "format", "loratools.version"])
def test_what_the_tensors_say_cannot_be_set(
    kohya: Path, tmp_path: Path, written: Callable[..., Path], key: str
) -> None:
    with pytest.raises(UsageError, match=key):
        written(kohya, tmp_path / "out.safetensors", set_metadata={key: "8"})

    assert not (tmp_path / "out.safetensors").exists()


def test_peft_and_mlx_files_have_the_text_too(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "source")

    loratools.convert(source, tmp_path / "peft", format="peft", set_metadata={"note": "for B"})
    loratools.convert(source, tmp_path / "mlx", format="mlx", set_metadata={"note": "for B"})

    assert header(tmp_path / "peft" / "adapter_model.safetensors")["note"] == "for B"
    assert header(tmp_path / "mlx" / "adapters.safetensors")["note"] == "for B"


def test_a_format_without_texts_refuses_one(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "source")

    with pytest.raises(UsageError, match="no place for the text 'note'"):
        loratools.convert(source, tmp_path / "out.gguf", format="gguf", set_metadata={"note": "for B"})


def test_options_of_the_command_line_do_the_same(kohya: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    done = CliRunner().invoke(
        verbs,
        ["resize", str(kohya), "-o", str(out), "--rank", "2", "--strip-metadata", "--set-metadata", "author=A=B"],
    )

    assert done.exit_code == 0, done.stderr
    assert header(out)["author"] == "A=B"
    assert "modelspec.title" not in header(out)


def test_a_text_without_a_key_is_wrong_usage(kohya: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        verbs, ["resize", str(kohya), "-o", str(tmp_path / "x"), "--rank", "2", "--set-metadata", "title"]
    )

    assert done.exit_code == 2
    assert "hint: write KEY=TEXT" in done.stderr
