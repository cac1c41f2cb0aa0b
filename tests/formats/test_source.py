import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_folders import Stored, factors
from safetensors.torch import save_file

from loratools import formats, registry
from loratools.errors import FormatError, UndecidedError, UsageError


def test_safetensors_wins_over_a_pickle_and_says_so(stored: Stored) -> None:
    folder = stored()
    torch.save(factors("other"), folder / "adapter_model.bin")

    adapter = formats.load(folder)

    assert sorted(adapter.updates) == ["layers.0.q_proj", "layers.1.v_proj"]
    assert adapter.warnings == (f"'{folder}' also holds 'adapter_model.bin', which is not read",)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin", "my lora.safetensors"])
def test_a_bare_file_takes_the_config_beside_it(file: str, stored: Stored) -> None:
    # The name does not matter: the content is safetensors.
    path = stored(file=file) / file

    adapter = formats.load(path)

    assert adapter.updates["layers.0.q_proj"].alpha == 8.0
    named = file.startswith("adapter_model.")
    said = f"rank and alpha are taken from 'adapter_config.json' in the folder of '{path}'"
    assert adapter.warnings == (() if named else (said,))


def test_a_file_beside_an_adapter_is_not_taken_for_one(stored: Stored) -> None:
    folder = stored()
    save_file({"model.norm.weight": torch.ones(6)}, folder / "model.safetensors")

    with pytest.raises(FormatError, match="no adapter of a format known here"):
        formats.load(folder / "model.safetensors")


def test_a_missing_path_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        formats.load(tmp_path / "nothing")

    assert (raised.value.message, raised.value.hint) == (f"there is no file or folder '{tmp_path / 'nothing'}'", None)


def test_the_name_of_a_repository_gets_the_hint_to_download_it() -> None:
    with pytest.raises(UsageError) as raised:
        formats.load("someone/some-lora")

    assert raised.value.hint is not None
    assert "hf download someone/some-lora" in raised.value.hint


def test_a_config_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(FormatError) as raised:
        formats.load(tmp_path)

    assert raised.value.message.endswith(
        "has adapter_config.json, and no weights beside it: adapter_model.safetensors or adapter_model.bin is missing"
    )


def test_a_config_is_no_adapter_by_itself(stored: Stored) -> None:
    with pytest.raises(FormatError, match="holds no tensors"):
        formats.load(stored() / "adapter_config.json")


def test_a_folder_of_training_lists_its_checkpoints_in_order(stored: Stored, tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-500", "checkpoint-500/named"):
        stored(name=name)

    with pytest.raises(FormatError) as raised:
        formats.load(tmp_path)

    assert raised.value.details == ("checkpoint-500", "checkpoint-500/named", "checkpoint-1000")
    assert raised.value.hint == f"give one of them: {tmp_path / 'checkpoint-1000'}"
    assert formats.find_adapters(tmp_path) == [tmp_path / name for name in raised.value.details]


def test_a_model_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.mlp.weight": torch.ones(2, 3) for n in range(7)}
    save_file(weights, tmp_path / "model.safetensors")

    with pytest.raises(FormatError, match="is a model checkpoint, not an adapter"):
        formats.load(tmp_path)
    with pytest.raises(FormatError) as raised:
        formats.load(tmp_path / "model.safetensors")
    assert "none of its 7 tensors" in raised.value.message
    assert raised.value.details == (*(f"model.layers.{n}.mlp.weight" for n in range(5)), "… and 2 more")


def test_lora_in_another_spelling_is_not_taken_for_a_model(tmp_path: Path) -> None:
    save_file({"query.lora_l": torch.ones(4, 6), "query.lora_r": torch.ones(10, 4)}, tmp_path / "other.safetensors")

    with pytest.raises(FormatError) as raised:
        formats.load(tmp_path / "other.safetensors")

    assert raised.value.hint == "its names speak of LoRA, in a spelling that is not read"


def test_an_empty_folder_and_one_of_other_things_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is empty"):
        formats.load(tmp_path)
    for name in ("my.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError) as raised:
        formats.load(tmp_path)
    assert raised.value.details == ("my.safetensors", "other.safetensors")
    assert raised.value.hint == f"give the file itself: {tmp_path / 'my.safetensors'}"


def test_a_folder_with_one_file_of_tensors_means_that_file(stored: Stored, tmp_path: Path) -> None:
    folder = stored(file="my lora.safetensors", config=None)

    assert sorted(formats.load(folder).updates) == ["layers.0.q_proj", "layers.1.v_proj"]
    # What a training leaves beside its model is not taken for one.
    torch.save({"step": 1}, tmp_path / "training_args.bin")
    with pytest.raises(FormatError, match="has no adapter_model"):
        formats.load(tmp_path)


def test_two_claims_are_undecided_and_name_both(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = registry.load("formats", "peft")
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda folder: ("other", "peft") if folder == "formats" else names(folder))
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda folder, name: peft if folder == "formats" else load(folder, name))
    monkeypatch.setattr(formats, "_claims_of_names", {})
    folder = stored(config=None)  # one that names its own type is asked of nobody else

    with pytest.raises(UndecidedError) as raised:
        formats.load(folder)

    assert raised.value.message == f"'{folder}' could be other or peft"
    assert raised.value.hint == "say which: --from other, or --from peft"
    assert formats.detect(folder) == ["other", "peft"]
    assert formats.load(folder, from_format="peft").format == "peft"


def test_an_unknown_format_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="no format named 'pefd'"):
        formats.load("nothing", from_format="pefd")


def _modules_after_loading(folder: Path, first: str = "") -> set[str]:
    code = f"{first}\nimport sys\nfrom loratools import formats\nformats.load({str(folder)!r})\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_loading_imports_neither_torch_nor_numpy(stored: Stored) -> None:
    folder = stored(alpha_pattern={r"layers\.\d+\.q_proj": 3, "v_proj": 2})
    torch.save(factors("q"), folder.parent / "adapter_model.bin")

    for path in (folder, folder.parent / "adapter_model.bin"):
        assert not {"torch", "numpy", "safetensors"} & _modules_after_loading(path)


def test_the_check_of_imports_can_fail(stored: Stored) -> None:
    assert "numpy" in _modules_after_loading(stored(), first="import numpy")
