import errno
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.checkpoints import open_checkpoint
from loratools.errors import FormatError, InputError, LoraToolsError, UnsupportedError, UsageError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(6, 4) for name in names}


def write_index(folder: Path, weight_map: Mapping[str, object], total_size: object = 288) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    """Two shards: a.weight and b.weight, and c.weight; 288 bytes in all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors("a.weight", "b.weight"), folder / SHARDS[0])
    save_file(tensors("c.weight"), folder / SHARDS[1])
    write_index(folder, {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]})
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return folder


def single(folder: Path, name: str = "model.safetensors", metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors("a.weight"), folder / name, metadata)
    return folder


def refusal(path: Path) -> LoraToolsError:
    with pytest.raises(LoraToolsError) as raised:
        open_checkpoint(path)
    return raised.value


# Audit hooks cannot be removed again, so that one hook serves all tests and fills the list of the one that asks.
_opened: list[str] | None = None
_below = ""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(arguments[0])
        if path.startswith(_below) or path in _BAD_NAMES:
            _opened.append(path)


sys.addaudithook(_note)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[str]]:
    """Every file in the folder of the test, or of a bad name, that this process opens.

    Others are not noted: modules that are imported late, and what the threads of pytest-xdist and of earlier tests do.
    """
    global _opened, _below
    _opened, _below = [], f"{tmp_path}{os.sep}"
    yield _opened
    _opened = None


def test_sharded_checkpoint_has_its_tensors_in_file_order(tmp_path: Path) -> None:
    base = open_checkpoint(sharded(tmp_path))

    assert base.layout == "huggingface"
    assert [file.name for file in base.files] == list(SHARDS)
    assert list(base.stored) == ["a.weight", "b.weight", "c.weight"]
    assert base.weights == base.stored
    assert base.components[0].index == {"total_size": 288}
    assert base.config == {"model_type": "llama", "tie_word_embeddings": False}
    assert [side.name for side in base.side_files] == ["config.json"]
    assert (base.left_out, base.warnings, base.quantization, base.tied) == ((), (), None, {})


def test_single_file_has_no_index_metadata_and_needs_no_config(tmp_path: Path) -> None:
    base = open_checkpoint(single(tmp_path))

    assert [file.name for file in base.files] == ["model.safetensors"]
    assert (base.components[0].index, base.config, base.side_files) == (None, {}, ())


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    base = open_checkpoint(sharded(tmp_path))

    (tmp_path / SHARDS[0]).unlink()
    assert base.stored["a.weight"].shape == (6, 4)


def test_variant_is_taken_only_when_there_is_nothing_else(tmp_path: Path) -> None:
    single(tmp_path, "model.fp16.safetensors")

    base = open_checkpoint(tmp_path)

    assert [file.name for file in base.files] == ["model.fp16.safetensors"]
    assert base.warnings == ("the only weights are a variant, 'model.fp16.safetensors'",)

    single(tmp_path)
    base = open_checkpoint(tmp_path)

    assert [file.name for file in base.files] == ["model.safetensors"]
    assert [left.name for left in base.left_out] == ["model.fp16.safetensors"]
    assert base.warnings == ()


def test_two_variants_are_refused_by_name(tmp_path: Path) -> None:
    single(single(tmp_path, "model.fp16.safetensors"), "model.bf16.safetensors")

    error = refusal(tmp_path)

    assert isinstance(error, FormatError)
    assert "'model.bf16.safetensors', 'model.fp16.safetensors'" in error.message


def test_file_brings_the_config_and_side_files_beside_it(tmp_path: Path) -> None:
    single(tmp_path, "merged.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_checkpoint(tmp_path / "merged.safetensors").side_files == ()

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = open_checkpoint(tmp_path / "merged.safetensors")

    assert base.config == {"model_type": "llama"}
    assert [side.name for side in base.side_files] == ["config.json", "tokenizer.json"]


def test_one_shard_of_several_is_refused_as_a_file(tmp_path: Path) -> None:
    error = refusal(sharded(tmp_path) / SHARDS[0])

    assert isinstance(error, UsageError)
    assert "is one of 2 shards" in error.message
    assert str(tmp_path) in str(error.hint)


def test_index_and_single_file_side_by_side_are_refused(tmp_path: Path) -> None:
    error = refusal(single(sharded(tmp_path)))

    assert "holds two models" in error.message
    assert open_checkpoint(tmp_path / "model.safetensors").stored.keys() == {"a.weight"}


def test_index_may_name_the_single_file(tmp_path: Path) -> None:
    write_index(single(tmp_path), {"a.weight": "model.safetensors"}, 96)

    assert open_checkpoint(tmp_path).components[0].index == {"total_size": 96}


def test_quantised_weights_give_the_name_of_their_scheme(tmp_path: Path) -> None:
    values = {"a.weight": torch.zeros(6, 4, dtype=torch.int8), "a.SCB": torch.zeros(6)}
    save_file(values, tmp_path / "model.safetensors")

    assert open_checkpoint(tmp_path).quantization == "bitsandbytes"


# --- what the index says against what there is


def faults(path: Path) -> tuple[str, ...]:
    error = refusal(path)
    assert isinstance(error, FormatError)
    return error.details


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()

    assert faults(tmp_path) == (f"'{SHARDS[1]}' is missing",)
    assert refusal(tmp_path).hint == "download the missing shards"


def test_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()
    (tmp_path / SHARDS[1]).symlink_to("nowhere")

    assert faults(tmp_path) == (f"'{SHARDS[1]}' is missing",)


def test_name_absent_from_its_shard_is_named(tmp_path: Path) -> None:
    write_index(sharded(tmp_path), {**dict.fromkeys(["a.weight", "b.weight", "d"], SHARDS[0]), "c.weight": SHARDS[1]})

    assert faults(tmp_path) == (f"'d' is not in '{SHARDS[0]}', where the index says it is",)


def test_name_in_another_shard_is_named(tmp_path: Path) -> None:
    write_index(sharded(tmp_path), {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]})

    assert faults(tmp_path) == (f"'b.weight' is in '{SHARDS[0]}'; the index says '{SHARDS[1]}'",)


def test_name_in_two_shards_is_named(tmp_path: Path) -> None:
    save_file(tensors("b.weight", "c.weight"), sharded(tmp_path) / SHARDS[1])

    assert faults(tmp_path) == (f"'b.weight' is in '{SHARDS[0]}' and in '{SHARDS[1]}'",)


def test_tensor_that_the_index_does_not_name_is_named(tmp_path: Path) -> None:
    write_index(sharded(tmp_path), {"a.weight": SHARDS[0], "c.weight": SHARDS[1]})

    assert faults(tmp_path) == (f"'b.weight' is in '{SHARDS[0]}', and not in the index",)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    missing = "model-00003-of-00003.safetensors"
    write_index(sharded(tmp_path), {"b.weight": SHARDS[0], "c.weight": SHARDS[1], "d": SHARDS[1], "e": missing})

    assert faults(tmp_path) == (
        f"'{missing}' is missing",
        f"'a.weight' is in '{SHARDS[0]}', and not in the index",
        f"'d' is not in '{SHARDS[1]}', where the index says it is",
    )


def test_many_faults_are_counted_and_the_first_named(tmp_path: Path) -> None:
    names = {f"x{i:03}": SHARDS[1] for i in range(80)}
    write_index(sharded(tmp_path), {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1], **names})

    assert "in 80 places" in refusal(tmp_path).message
    assert len(faults(tmp_path)) == 51
    assert faults(tmp_path)[-1] == "… and 30 more"


@pytest.mark.parametrize(("said", "warns"), [(288, False), (288.0, False), (300, True), ("many", False)])
def test_wrong_total_size_is_a_warning(said: object, warns: bool, tmp_path: Path) -> None:
    weight_map = json.loads((sharded(tmp_path) / INDEX).read_text())["weight_map"]
    write_index(tmp_path, weight_map, said)

    warnings = open_checkpoint(tmp_path).warnings
    assert warnings == (("the index says that the tensors have 300 bytes; they have 288",) if warns else ())


def test_shard_of_the_same_count_that_the_index_forgot_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    forgotten = sorted(tmp_path.glob("*-of-*.safetensors"))[-1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != forgotten.name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)

    assert any(forgotten.name in line for line in caught.value.details)


def test_stale_shard_is_left_out_with_a_warning(tmp_path: Path) -> None:
    stale = "model-00001-of-00003.safetensors"
    save_file(tensors("z"), sharded(tmp_path) / stale)

    base = open_checkpoint(tmp_path)

    assert "z" not in base.stored
    assert [left.name for left in base.left_out] == [stale]
    assert base.warnings == (f"'{stale}' is a shard that does not belong to this model; it is left out",)


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[]",
        "{",
        '{"weight_map": {"a": null}}',
    ],
)
def test_index_without_a_map_of_files_is_refused(index: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(index)

    assert isinstance(refusal(tmp_path), FormatError)


def test_index_with_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}')

    assert "twice" in refusal(tmp_path).message


def test_index_of_200_megabytes_is_refused_unread(tmp_path: Path, opened: list[str]) -> None:
    os.truncate(sharded(tmp_path) / INDEX, 200_000_000)
    opened.clear()

    assert "200,000,000 bytes" in refusal(tmp_path).message
    assert opened == []


# --- names and links that lead out of the folder

_BAD_NAMES = (
    "../secret.safetensors", "sub/../../secret.safetensors", "/etc/passwd", "C:\\x.safetensors", "C:x.safetensors",
    "a\\..\\b.safetensors", "..\\secret.safetensors", "model\0.safetensors", "file:///etc/passwd", "", ".", "..",
    "x" * 5000 + ".safetensors", "sub/x.safetensors", ".hidden.safetensors", "config.json", "https://x/y.safetensors",
    "line\nbreak.safetensors", "\x1b[31m.safetensors", "\ud800.safetensors", "//server/share.safetensors",
)  # fmt: skip


def test_watch_on_opened_files_sees_shards_that_are_read(tmp_path: Path, opened: list[str]) -> None:
    open_checkpoint(sharded(tmp_path))

    assert {str(tmp_path / name) for name in (*SHARDS, INDEX, "config.json")} <= set(opened)


@pytest.mark.parametrize("name", _BAD_NAMES, ids=[ascii(name)[:40] for name in _BAD_NAMES])
def test_index_that_names_a_file_elsewhere_opens_none(name: str, tmp_path: Path, opened: list[str]) -> None:
    folder = sharded(tmp_path / "models" / "base")
    save_file(tensors("secret"), tmp_path / "models" / "secret.safetensors")
    write_index(folder, {"a.weight": SHARDS[0], "secret": name})
    opened.clear()

    error = refusal(folder)

    assert type(error) is InputError
    assert error.exit_code == 4
    assert len(error.details) == 1
    assert error.details[0].isprintable()
    assert set(opened) <= {str(folder), str(folder / INDEX)}


@pytest.mark.parametrize("name", [SHARDS[0], INDEX, "config.json"])
def test_link_that_leads_out_of_the_folder_is_not_opened(name: str, tmp_path: Path, opened: list[str]) -> None:
    folder = sharded(tmp_path / "base")
    elsewhere = (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(elsewhere)
    opened.clear()

    error = refusal(folder)

    assert type(error) is InputError
    assert error.details == (f"'{name}'",)
    assert str(folder / name) not in opened
    assert str(elsewhere) not in opened


def test_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[0]).rename(tmp_path / "data")
    (tmp_path / SHARDS[0]).symlink_to("data")

    assert list(open_checkpoint(tmp_path).stored) == ["a.weight", "b.weight", "c.weight"]


def test_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sharded(tmp_path / "base"))

    assert len(open_checkpoint(tmp_path / "link").stored) == 3


def cached(root: Path) -> Path:
    """A model as huggingface_hub keeps it: each file in `blobs`, linked to from the snapshot."""
    repository = root / "models--owner--name"
    snapshot = sharded(repository / "snapshots" / "abc123")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        path.symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_snapshot_of_the_hugging_face_cache_is_opened(tmp_path: Path) -> None:
    base = open_checkpoint(cached(tmp_path))

    assert [file.name for file in base.files] == list(SHARDS)
    assert [side.name for side in base.side_files] == ["config.json"]
    assert base.config["model_type"] == "llama"
    assert base.left_out == ()


def test_config_is_found_beside_the_link_and_not_beside_its_target(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (snapshot / "one.safetensors").symlink_to((snapshot / SHARDS[1]).readlink())

    assert open_checkpoint(snapshot / "one.safetensors").config["model_type"] == "llama"


def test_snapshot_that_links_into_another_models_blobs_is_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    save_file(tensors("c.weight"), other / "f")
    (snapshot / SHARDS[1]).unlink()
    (snapshot / SHARDS[1]).symlink_to("../../../models--owner--other/blobs/f")

    assert refusal(snapshot).details == (f"'{SHARDS[1]}'",)


def test_blobs_that_are_a_link_elsewhere_are_not_trusted(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")

    assert type(refusal(snapshot)) is InputError


def test_pipe_and_socket_in_place_of_weights_do_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "FIFO" in refusal(tmp_path).message

    (tmp_path / "model.safetensors").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 characters
        server.bind("model.safetensors")
        assert "socket" in refusal(tmp_path).message


# --- what is no checkpoint, said by name


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedError, "an adapter"),
        (["adapters.safetensors"], UnsupportedError, "an adapter"),
        (["pytorch_lora_weights.safetensors"], UnsupportedError, "an adapter"),
        (["weights.npz", "config.json"], UnsupportedError, "an MLX folder of old"),
        (["model-q4.gguf"], UnsupportedError, "a folder of GGUF files"),
        (["tf_model.h5"], UnsupportedError, "a TensorFlow model"),
        (["flax_model.msgpack"], UnsupportedError, "a Flax model"),
        (["model.onnx"], UnsupportedError, "an ONNX model"),
        (["model-00001-of-00002.safetensors"], FormatError, "shards without their index"),
        (["0_Transformer/model.safetensors", "modules.json"], FormatError, "models are in 1 of the folders inside"),
        (["anything.safetensors"], FormatError, "has no model.safetensors"),
        (["config.json"], FormatError, "holds no model"),
        ([], FormatError, "holds no model"),
    ],
)
def test_folder_that_is_no_checkpoint_is_called_what_it_is(
    files: list[str], kind: type[LoraToolsError], says: str, tmp_path: Path
) -> None:
    error = refusal(touch(tmp_path, *files))

    assert type(error) is kind
    assert says in error.message


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", FormatError, "is cut off in its header"),
        ("model.safetensors", b"GGUF\3\0\0\0", FormatError, "a GGUF file"),
        ("adapter_model.safetensors", b"", UnsupportedError, "is an adapter"),
        (INDEX, b"{}", UsageError, "is the index of a model"),
        ("model.txt", b"Hello there, reader.\n", FormatError, "a text that begins"),
        ("model.dat", bytes(range(7, 256)), FormatError, "is no model"),
    ],
)
def test_file_that_is_no_checkpoint_is_called_what_it_is(
    name: str, content: bytes, kind: type[LoraToolsError], says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)

    error = refusal(tmp_path / name)

    assert type(error) is kind
    assert says in error.message


def test_file_of_updates_is_an_adapter_whatever_its_name(tmp_path: Path) -> None:
    save_file(tensors("x.lora_down.weight", "x.lora_up.weight", "x.alpha"), tmp_path / "style.safetensors")

    error = refusal(tmp_path / "style.safetensors")

    assert isinstance(error, UnsupportedError)
    assert "is an adapter" in error.message


def test_model_with_a_few_adapters_of_its_own_is_a_model(tmp_path: Path) -> None:
    names = ["q.base_layer.weight", "q.lora_A.vision.weight", "q.lora_B.vision.weight", "norm.weight"]
    save_file(tensors(*names), tmp_path / "model.safetensors")

    assert open_checkpoint(tmp_path).stored.keys() == set(names)


def test_weights_without_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")

    assert "has no tensors" in refusal(tmp_path).message


def test_name_of_a_hub_repository_gets_a_hint_to_download_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    error = refusal(Path("meta-llama/Llama-3.2-1B"))

    assert isinstance(error, UsageError)
    assert "hf download meta-llama/Llama-3.2-1B" in str(error.hint)


@pytest.mark.parametrize("path", ["/no/such", "no", "a/b/c", "../owner/name", "a/x.safetensors", "x\0y"])
def test_other_missing_paths_get_no_such_hint(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)

    error = refusal(Path(path))

    assert isinstance(error, UsageError)
    assert error.hint is None


def test_a_missing_path_in_a_folder_that_is_here_is_asked_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)

    error = refusal(Path("here/x"))

    assert isinstance(error, UsageError)
    assert error.message == "there is no file or folder 'here/x'"
    assert error.hint == "for the repository on the Hugging Face hub, write hf://here/x"


def test_dangling_path_is_called_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")

    assert "is a link that leads nowhere" in refusal(tmp_path / "link").message


def test_folder_that_may_not_be_listed_is_a_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> list[Path]:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Path, "iterdir", refuse)

    assert refusal(tmp_path).exit_code == 5


def test_opening_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from loratools.checkpoints import open_checkpoint;"
        f"open_checkpoint(Path({str(sharded(tmp_path))!r}));"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )

    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout == "[]\n"


def test_checkpoint_is_called_by_its_path_and_cannot_be_changed(tmp_path: Path) -> None:
    base = open_checkpoint(single(tmp_path))

    assert base.name == str(tmp_path)
    with pytest.raises(FrozenInstanceError):
        base.layout = "other"  # type: ignore[misc]
