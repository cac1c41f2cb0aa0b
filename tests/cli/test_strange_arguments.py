"""What people give by mistake, or call their files: an answer, or an error that says what is the matter."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
from cli_runner import CliRunner

from loratools.cli import verbs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an adapter `a` and its base `base`."""
    factories.adapter_folder(tmp_path / "a")
    factories.checkpoint_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    """The exit code and what is printed for people."""
    result = CliRunner().invoke(verbs, list(arguments))
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "name", ['ünï \U0001f600 "x"\n=0.5', r"C:\loras\style", "spaces ", "a=b", "-dash", "%d{}$HOME"]
)
def test_an_adapter_may_be_called_anything(folder: Path, name: str) -> None:
    shutil.copytree(folder / "a", folder / name)

    assert run("inspect", "--", name)[0] == 0
    code, printed = run("merge", "-o", f"merged {name}", "-q", "--", "base", name)

    assert (code, printed) == (0, "")
    assert (folder / f"merged {name}" / "model.safetensors").is_file()


@pytest.mark.parametrize("weight", ["", "=0.5", "0x10", "１", "half"])
def test_what_is_no_weight_gets_a_hint_of_the_spelling(folder: Path, weight: str) -> None:
    code, printed = run("merge", "base", f"a={weight}", "-o", "out")

    assert code == 2
    assert printed == f"error: 'a={weight}' does not exist, and 'a' does\nhint: a weight is written a=0.7\n"


def test_a_path_that_begins_with_a_dash_gets_a_hint(folder: Path) -> None:
    shutil.copytree(folder / "a", folder / "-a")

    assert run("inspect", "-a") == (2, "error: no option named '-a'\nhint: for what is called so, write ./-a\n")
    assert run("inspect", "./-a")[0] == 0


@pytest.mark.parametrize("verb", [["inspect"], ["merge", "base"], ["check"]])
def test_a_name_that_no_file_can_have_is_wrong_usage_and_shown_in_part(folder: Path, verb: list[str]) -> None:
    code, printed = run(*verb, "x" * 300, *(["-o", "out"] if verb[0] == "merge" else []))

    assert code == 2
    assert "x" * 300 not in printed


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter_model.safetensors", b"x")


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.pt": (lambda path: path.write_bytes(b""), "'empty.pt' is an empty file"),
    "empty.gguf": (lambda path: path.write_bytes(b""), "'empty.gguf' is an empty file"),
    "x.zip": (_zipped, "a zip archive"),
    "x.safetensors.gz": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "a gzip archive"),
    "lfs.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"),
        "a git-LFS pointer",
    ),
    "page.safetensors": (lambda path: path.write_text("<!DOCTYPE html><html>401</html>"), "a web page"),
    "error.safetensors": (lambda path: path.write_text('{"error": "not found"}'), "a JSON text"),
    "fifo": (os.mkfifo, "is a FIFO"),
    "loop": (lambda path: path.symlink_to("loop"), "is a link that leads nowhere"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_is_no_adapter_is_told_by_what_it_is(folder: Path, name: str) -> None:
    make, expected = WRONG_FILES[name]
    make(folder / name)

    code, printed = run("inspect", name)

    assert code == (2 if name == "loop" else 4)
    assert expected in printed


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_no_output_replaces_what_a_person_has_linked(folder: Path, overwrite: list[str]) -> None:
    mine = folder / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    (folder / "link").symlink_to(mine)
    os.link(folder / "base" / "model.safetensors", folder / "hard.safetensors")

    assert run("merge", "base", "a", "-o", "link", "-q", *overwrite)[0] == 2
    assert run("merge", "base/model.safetensors", "a", "-o", "hard.safetensors", "-q", *overwrite)[0] == 2

    assert (folder / "link").is_symlink()
    assert (mine / "notes.txt").read_text() == "keep"
    assert (folder / "hard.safetensors").samefile(folder / "base" / "model.safetensors")


@pytest.mark.parametrize("out", ["/dev/null", "file/below", "base/inside", "."])
def test_an_output_that_cannot_be_one_is_refused_before_the_work(folder: Path, out: str) -> None:
    (folder / "file").write_text("x")

    code, printed = run("merge", "base", "a", "-o", out, "-q", "--overwrite")

    assert code == 2
    assert printed.startswith("error: ")
    assert Path("/dev/null").is_char_device()


def test_an_output_in_a_working_folder_that_is_gone_gets_a_hint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()

    code, printed = run("merge", str(folder / "base"), str(folder / "a"), "-o", "out", "-q")

    assert code == 2
    assert "the folder that you are in no longer exists" in printed


def test_files_of_file_managers_beside_an_adapter_change_nothing(folder: Path) -> None:
    for name in ("._adapter_model.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "a" / name).write_bytes(b"\0\5\x16\7")

    assert run("merge", "base", "a", "-o", "out", "-q") == (0, "")


def test_two_weight_files_of_one_adapter_are_remarked(folder: Path) -> None:
    (folder / "a" / "adapter_model.bin").write_bytes(b"x")

    code, printed = run("merge", "base", "a", "-o", "out")

    assert code == 0
    assert "'a' also holds 'adapter_model.bin', which is not read" in printed


def test_a_config_with_a_byte_order_mark_is_read_and_other_encodings_are_named(folder: Path) -> None:
    config = folder / "a" / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()))

    config.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run("inspect", "a")[0] == 0
    config.write_bytes(text.encode("utf-16"))
    assert run("inspect", "a") == (4, "error: 'a/adapter_config.json' is not UTF-8 at byte 0\n")


@pytest.mark.parametrize(
    "address", ["s3://bucket/lora", "gs://bucket/lora", "az://box/lora", "https://huggingface.co/acme/lora"]
)
@pytest.mark.parametrize("verb", [["inspect"], ["merge", "base"], ["convert"]])
def test_an_address_is_called_one_and_shown_as_it_was_given(folder: Path, verb: list[str], address: str) -> None:
    rest = {"inspect": [], "merge": ["-o", "out"], "convert": ["-o", "out", "--to", "peft"]}[verb[0]]

    code, printed = run(*verb, address, *rest)

    assert code == 2
    assert printed.startswith(f"error: '{address}' is an address of ")
    assert "which is not read; sources are files, folders and repositories of the Hugging Face hub\n" in printed
