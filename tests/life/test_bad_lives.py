"""What goes wrong in the life of an adapter: the contract's exit code, a message that names it, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers as hf
from life.lives import Life, lora_layers

Lived = Callable[[str], Life]
WEIGHTS = "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 41234\n"


class Bad(NamedTuple):
    """Arguments of `loratools merge`, the exit code, and words of the message, its details and its hint."""

    arguments: list[str | Path]
    code: int
    words: list[str]


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def changed_config(folder: Path, **fields: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def adapter_of_another_model(lived: Lived, tmp: Path) -> Bad:
    bert = lived("bert")
    words = [
        "bert.encoder.layer.0.attention.self.query",
        "no such weight in the base",
        f"the adapter names its base as '{bert.base}'",
    ]
    return Bad([lived("t5").base, bert.adapter, "-o", tmp / "out"], 4, words)


def another_hidden_size(lived: Lived, tmp: Path) -> Bad:
    config = hf.BertConfig.from_pretrained(lived("bert").base, hidden_size=28)
    hf.BertModel(config).save_pretrained(tmp / "wider")
    words = ["4 of 6", "bert.encoder.layer.1.attention.self.value", "adapter 24 -> 24, base 28 -> 28"]
    return Bad([tmp / "wider", lived("bert").adapter, "-o", tmp / "out"], 4, words)


def missing_shard(lived: Lived, tmp: Path) -> Bad:
    base = copied(lived("t5").base, tmp / "base")
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    return Bad([base, lived("t5").adapter, "-o", tmp / "out"], 4, [shard.name])


def index_that_points_outside(lived: Lived, tmp: Path) -> Bad:
    base = copied(lived("t5").base, tmp / "base")
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.rename(tmp / "outside.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../outside.safetensors"))
    return Bad([base, lived("t5").adapter, "-o", tmp / "out"], 4, ["../outside.safetensors"])


def existing_output(lived: Lived, tmp: Path) -> Bad:
    (tmp / "out").mkdir()
    (tmp / "out" / "model.safetensors").write_bytes(b"dear to someone")
    return Bad([lived("bert").base, lived("bert").adapter, "-o", tmp / "out"], 2, [str(tmp / "out"), "--overwrite"])


def output_that_is_the_base(lived: Lived, tmp: Path) -> Bad:
    base = copied(lived("bert").base, tmp / "base")
    return Bad([base, lived("bert").adapter, "-o", base, "--overwrite"], 2, [str(base), "input"])


def output_that_is_the_adapter(lived: Lived, tmp: Path) -> Bad:
    adapter = copied(lived("bert").adapter, tmp / "adapter")
    return Bad([lived("bert").base, adapter, "-o", adapter, "--overwrite"], 2, [str(adapter), "input"])


def pointer_in_place_of_the_weights(lived: Lived, tmp: Path) -> Bad:
    adapter = copied(lived("bert").adapter, tmp / "adapter")
    (adapter / WEIGHTS).write_text(POINTER)
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, [WEIGHTS, "LFS"])


def weights_cut_off(lived: Lived, tmp: Path) -> Bad:
    adapter = copied(lived("bert").adapter, tmp / "adapter")
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-100])
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, [WEIGHTS])


def header_cut_off(lived: Lived, tmp: Path) -> Bad:
    adapter = copied(lived("bert").adapter, tmp / "adapter")
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:50])
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, [WEIGHTS])


def nan_in_a_factor(lived: Lived, tmp: Path) -> Bad:
    adapter = copied(lived("bert").adapter, tmp / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"][7, 3] = torch.nan
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    words = ["bert.encoder.layer.1.attention.self.value.B", "not finite", "--exclude"]
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, words)


def absurd_alpha(lived: Lived, tmp: Path) -> Bad:
    adapter = changed_config(copied(lived("gemma").adapter, tmp / "adapter"), lora_alpha=1e30)
    # Which layer is named depends on which worker is first.
    return Bad([lived("gemma").base, adapter, "-o", tmp / "out"], 4, ["model.layers.", "would reach", "F16", "alpha"])


def absurd_alpha_that_float32_still_holds(lived: Lived, tmp: Path) -> Bad:
    adapter = changed_config(copied(lived("bert").adapter, tmp / "adapter"), lora_alpha=1e30)
    words = ["encoder.layer.", "which no trained weight does", "alpha"]
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, words)


def rank_of_the_config_that_is_not_the_tensors(lived: Lived, tmp: Path) -> Bad:
    adapter = changed_config(copied(lived("bert").adapter, tmp / "adapter"), r=8)
    words = ["rank 16 in the tensors, 8 in adapter_config.json", "--rank-from tensors", "--rank-from config"]
    return Bad([lived("bert").base, adapter, "-o", tmp / "out"], 4, words)


CASES = [
    adapter_of_another_model,
    another_hidden_size,
    missing_shard,
    index_that_points_outside,
    existing_output,
    output_that_is_the_base,
    output_that_is_the_adapter,
    pointer_in_place_of_the_weights,
    weights_cut_off,
    header_cut_off,
    nan_in_a_factor,
    absurd_alpha,
    absurd_alpha_that_float32_still_holds,
    rank_of_the_config_that_is_not_the_tensors,
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratools", "merge", *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("to_dict", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_merge_refuses_by_name_and_writes_nothing(
    case: Callable[[Lived, Path], Bad], to_dict: bool, lived: Lived, tmp_path: Path
) -> None:
    arguments, code, words = case(lived, tmp_path)
    before = contents(tmp_path)

    ended = run(*arguments, *(["--json"] if to_dict else []))

    assert ended.returncode == code
    if to_dict:
        document = json.loads(ended.stdout)
        assert document.keys() == {"loratools", "schema_version", "verb", "error"}
        error = document["error"]
        told = "\n".join([error["message"], *error["details"], error["hint"] or ""])
    else:
        assert ended.stdout == ""
        assert ended.stderr.count("error: ") == 1
        assert "Traceback" not in ended.stderr
        told = ended.stderr
    assert [word for word in words if word not in told] == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("choice", "scale"), [("tensors", 32 / 16), ("config", 32 / 8)])
def test_rank_from_says_which_rank_divides_alpha(choice: str, scale: float, lived: Lived, tmp_path: Path) -> None:
    life = lived("bert")
    adapter = changed_config(copied(life.adapter, tmp_path / "adapter"), r=8)

    ended = run(life.base, adapter, "-o", tmp_path / "out", "--rank-from", choice)

    assert ended.returncode == 0, ended.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (life.base, tmp_path / "out"))
    for name, layer in lora_layers(life.peft()).items():
        weight = f"{name.removeprefix('bert.')}.weight"
        delta = scale * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        assert torch.allclose(after[weight] - before[weight], delta, rtol=1e-5, atol=1e-6)
