"""For every rule of `check`, an adapter or a model with that defect and, as far as possible, with no other.

`also` names the rules that the same bytes must also set off, each with the reason beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import factories
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Sample:
    """What to check, with which arguments, and which other rules speak of it."""

    sources: tuple[Path, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    also: frozenset[str] = frozenset()


def sound(tmp_path: Path, **changes: Any) -> Path:
    """A PEFT folder with nothing wrong."""
    modules = dict.fromkeys(("q_proj", "v_proj"))
    config = {"target_modules": list(modules), "bias": "none", "use_dora": False, **changes.pop("config", {})}
    return factories.adapter_folder(tmp_path / "adapter", config=config, **changes)


def edited(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config; those that are None are taken out."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | fields
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(kept), encoding="utf-8")
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The folder with other tensors."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def with_header(
    folder: Path, change: Callable[[dict[str, Any]], object], *, data: Callable[[bytes], bytes] = bytes
) -> Path:
    """The folder with another header in its file of weights, and perhaps other bytes behind it."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header) or header
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + data(content[8 + length :]))
    return folder


def as_pickle(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def sharded(folder: Path) -> Path:
    """The folder with its weights in two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"adapter_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def first_of(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


# Defects, one function for each rule, under the rule's name.


def container_truncated(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 5)
    return Sample((folder,))


def container_header(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).write_bytes((20).to_bytes(8, "little") + b"\x01\x7f" * 30)
    return Sample((folder,))


def container_header_size(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).write_bytes((100_000_001).to_bytes(8, "little") + b"\x01{" + bytes(60))
    return Sample((folder,))


def container_type(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).write_text("<!doctype html><html><body>404</body></html>", encoding="utf-8")
    return Sample((folder,))


def container_entry(tmp_path: Path) -> Sample:
    def change(header: dict[str, Any]) -> None:
        header[first_of(header, "lora_A.weight")]["shape"] = [4, 7]

    return Sample((with_header(sound(tmp_path), change),))


def container_layout(tmp_path: Path) -> Sample:
    def change(header: dict[str, Any]) -> None:
        # Eight bytes in front of all tensors that are nobody's.
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]

    return Sample((with_header(sound(tmp_path), change, data=lambda data: bytes(8) + data),))


def container_trailing_bytes(tmp_path: Path) -> Sample:
    return Sample((with_header(sound(tmp_path), lambda header: None, data=lambda data: data + b"PK\x03\x04"),))


def container_duplicate_key(tmp_path: Path) -> Sample:
    def change(header: dict[str, Any]) -> bytes:
        name = first_of(header, "lora_A.weight")
        return f'{{"{name}": {json.dumps(header[name])}, {json.dumps(header)[1:]}'.encode()

    return Sample((with_header(sound(tmp_path), change),))


def container_json(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4,}', encoding="utf-8")
    return Sample((folder,))


def container_not_read(tmp_path: Path) -> Sample:
    (tmp_path / "nothing").mkdir()
    return Sample((tmp_path / "nothing",))


def container_suffix(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    return Sample((folder,))


class _Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch run",)


def pickle_code(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).unlink()
    torch.save({"base_model.model.q.lora_A.weight": _Touch()}, folder / "adapter_model.bin", pickle_module=pickle)
    return Sample((folder,))


def pickle_file(tmp_path: Path) -> Sample:
    return Sample((as_pickle(sound(tmp_path)),))


def paths_outside(tmp_path: Path) -> Sample:
    folder = factories.checkpoint_folder(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    document["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(document), encoding="utf-8")
    return Sample((folder,))


def paths_base(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), base_model_name_or_path="/home/somebody/models/llama"),))


def paths_metadata(tmp_path: Path) -> Sample:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] = {"training_log": "written to /home/somebody/runs/7"}

    return Sample((with_header(sound(tmp_path), change),))


def index_missing_shards(tmp_path: Path) -> Sample:
    folder = sharded(sound(tmp_path))
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    return Sample((folder,))


def index_stale_shards(tmp_path: Path) -> Sample:
    folder = sharded(sound(tmp_path))
    shutil.copy(
        folder / "adapter_model-00001-of-00002.safetensors", folder / "adapter_model-00003-of-00003.safetensors"
    )
    return Sample((folder,))


def index_disagrees(tmp_path: Path) -> Sample:
    folder = sharded(sound(tmp_path))
    index = folder / "adapter_model.safetensors.index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    name = first_of(document["weight_map"], "lora_A.weight")
    document["weight_map"][name] = "adapter_model-00002-of-00002.safetensors"
    index.write_text(json.dumps(document), encoding="utf-8")
    return Sample((folder,))


def index_no_weights(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / WEIGHTS).unlink()
    return Sample((folder,))


def config_not_read(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), spectral_twist=0.5),))


def config_values(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), r=0),))


def config_missing(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / CONFIG).unlink()
    # Without a config there is no alpha.
    return Sample((folder,), also=frozenset({"config-alpha-assumed"}))


def config_rank(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), r=8),))


def config_alpha_zero(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), lora_alpha=0),))


def config_alpha_assumed(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), lora_alpha=None),))


def config_dora(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), use_dora=True),))


def config_scale(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), lora_alpha=4096),))


def config_targets(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), target_modules=["q_proj"]),))


def config_targets_unused(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), target_modules=["q_proj", "v_proj", "o_proj"]),))


def config_patterns(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), alpha_pattern={"o_proj": 16}),))


def keys_unknown(tmp_path: Path) -> Sample:
    extra = {"model.layers.0.self_attn.q_proj.lora_core.weight": torch.zeros(4, 4)}
    return Sample((sound(tmp_path, extra=extra),))


def keys_several_adapters(tmp_path: Path) -> Sample:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {name: "first" if ".0." in name else "second" for name in tensors}
        return {name.removesuffix(".weight") + f".{names[name]}.weight": tensor for name, tensor in tensors.items()}

    return Sample((with_tensors(sound(tmp_path), change),))


def keys_duplicate(tmp_path: Path) -> Sample:
    extra = {
        "score.weight": torch.ones(3, 6),
        "score.modules_to_save.weight": torch.zeros(3, 6),
    }
    return Sample((sound(tmp_path, extra=extra, config={"modules_to_save": ["score"]}),))


def keys_half_pair(tmp_path: Path) -> Sample:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors[first_of(tensors, "lora_B.weight")]
        return tensors

    return Sample((with_tensors(sound(tmp_path), change),))


def keys_doubled_prefix(tmp_path: Path) -> Sample:
    return Sample((sound(tmp_path, prefix=PREFIX * 2),))


def keys_wrappers(tmp_path: Path) -> Sample:
    return Sample((sound(tmp_path, prefix=f"{PREFIX}_orig_mod."),))


def shapes_rank(tmp_path: Path) -> Sample:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = first_of(tensors, "lora_B.weight")
        return {**tensors, name: tensors[name][:, :3]}

    return Sample((with_tensors(sound(tmp_path), change),))


def shapes_factor(tmp_path: Path) -> Sample:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, first_of(tensors, "lora_A.weight"): torch.zeros(4, 0)}

    return Sample((with_tensors(sound(tmp_path), change),))


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    name.replace("_", "-"): function
    for name, function in globals().copy().items()
    if callable(function) and getattr(function, "__annotations__", {}).get("return") == "Sample"
}
