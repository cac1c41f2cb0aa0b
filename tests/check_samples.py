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

# In two pieces: no file of this repository may name a folder of somebody's machine.
HOME = "/" + "home/somebody"


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
    return Sample((edited(sound(tmp_path), base_model_name_or_path=f"{HOME}/models/llama"),))


def paths_metadata(tmp_path: Path) -> Sample:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] = {"training_log": f"written to {HOME}/runs/7"}

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
    # With this alpha every update is 0.
    return Sample((edited(sound(tmp_path), lora_alpha=0),), also=frozenset({"numerics-no-change"}))


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


def changed(folder: Path, end: str, change: Callable[[torch.Tensor], torch.Tensor], *, only_first: bool = True) -> Path:
    """The folder with other values in its first tensor, or in all, whose name ends so."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = sorted(name for name in tensors if name.endswith(end))
        return tensors | {name: change(tensors[name]) for name in (names[:1] if only_first else names)}

    return with_tensors(folder, edit)


def numerics_non_finite(tmp_path: Path) -> Sample:
    def change(b: torch.Tensor) -> torch.Tensor:
        b[3, 1] = torch.nan
        return b

    return Sample((changed(sound(tmp_path), "lora_B.weight", change),))


def numerics_no_change(tmp_path: Path) -> Sample:
    return Sample((changed(sound(tmp_path), "lora_B.weight", torch.zeros_like, only_first=False),))


def numerics_untrained(tmp_path: Path) -> Sample:
    return Sample((changed(sound(tmp_path), "lora_B.weight", torch.zeros_like),))


def numerics_lost_rows(tmp_path: Path) -> Sample:
    def change(b: torch.Tensor) -> torch.Tensor:
        # Six of ten rows, so that the four that are left still have the whole rank.
        b[4:] = 0
        return b

    return Sample((changed(sound(tmp_path), "q_proj.lora_B.weight", change),))


def numerics_subnormal(tmp_path: Path) -> Sample:
    # 2^-16 is a quarter of the smallest normal number of float16; powers of two stay exact.
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.sign() * 2.0**-16).half()

    folder = sound(tmp_path, dtype=torch.float16)
    for end in ("0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"):
        changed(folder, end, change)
    return Sample((folder,), {"ignore": ["numerics-rank-deficient", "numerics-noise-ranks"]})


def numerics_outlier(tmp_path: Path) -> Sample:
    modules = factories.layered(6, {"self_attn.q_proj": (10, 6), "self_attn.v_proj": (7, 6)})
    folder = sound(tmp_path, modules=modules)
    return Sample((changed(folder, "3.self_attn.q_proj.lora_B.weight", lambda b: b * 1e4),))


def numerics_noise_ranks(tmp_path: Path) -> Sample:
    def change(b: torch.Tensor) -> torch.Tensor:
        # One column of four is left.
        b[:, 1:] = 0
        return b

    return Sample((changed(sound(tmp_path), "lora_B.weight", change),))


def numerics_rank_deficient(tmp_path: Path) -> Sample:
    def change(b: torch.Tensor) -> torch.Tensor:
        b[:, 3] = b[:, 0] + b[:, 1]
        return b

    return Sample((changed(sound(tmp_path), "lora_B.weight", change),))


def numerics_duplicate(tmp_path: Path) -> Sample:
    first = sound(tmp_path / "first")
    # The same update with other factors: A doubled and B halved.
    second = changed(sound(tmp_path / "second"), "lora_A.weight", lambda a: 2 * a, only_first=False)
    changed(second, "lora_B.weight", lambda b: b / 2, only_first=False)
    return Sample((first, second))


def structure_router(tmp_path: Path) -> Sample:
    modules = factories.MODULES | {"model.layers.0.mlp.gate": (5, 6)}
    return Sample((sound(tmp_path, modules=modules, config={"target_modules": ["q_proj", "v_proj", "gate"]}),))


def structure_head(tmp_path: Path) -> Sample:
    extra = {"score.weight": torch.ones(3, 6)}
    return Sample((sound(tmp_path, extra=extra, config={"modules_to_save": ["score"]}),))


def structure_replaced(tmp_path: Path) -> Sample:
    extra = {"model.norm.weight": torch.ones(6)}
    return Sample((sound(tmp_path, extra=extra, config={"modules_to_save": ["norm"]}),))


def structure_tokens(tmp_path: Path) -> Sample:
    extra = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 6)}
    return Sample((sound(tmp_path, extra=extra, config={"trainable_token_indices": {"embed_tokens": [3, 11]}}),))


def structure_code(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    (folder / "modeling_twist.py").write_text("print('run')\n", encoding="utf-8")
    return Sample((folder,))


def structure_companions(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    save_file({"projector.weight": torch.ones(3, 5)}, folder / "projector.safetensors")
    return Sample((folder,))


def structure_empty(tmp_path: Path) -> Sample:
    extra = {"score.weight": torch.zeros(0)}
    # What is empty is the head.
    return Sample(
        (sound(tmp_path, extra=extra, config={"modules_to_save": ["score"]}),), also=frozenset({"structure-head"})
    )


def structure_initialisation(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), init_lora_weights="pissa"),))


def structure_order(tmp_path: Path) -> Sample:
    # torchtune has queries and keys in another order than the model, which depends on the number of heads.
    tensors = {
        f"layers.0.attn.q_proj.lora_{part}.weight": torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        for part, shape in {"a": (4, 6), "b": (10, 4)}.items()
    }
    folder = tmp_path / "torchtune"
    folder.mkdir()
    torch.save(tensors, folder / "adapter_0.pt")
    # torchtune writes pickles, and its files do not say alpha.
    return Sample((folder / "adapter_0.pt",), also=frozenset({"pickle-file", "config-alpha-assumed"}))


def structure_two_files(tmp_path: Path) -> Sample:
    folder = sound(tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    return Sample((folder,))


def base(tmp_path: Path, *, name: str = "base", **changes: Any) -> Path:
    """The model that the adapter of `sound` is for."""
    return factories.checkpoint_folder(tmp_path / name, **changes)


def keys_base(tmp_path: Path) -> Sample:
    modules = factories.MODULES | {"model.layers.7.self_attn.q_proj": (10, 6)}
    return Sample((sound(tmp_path, modules=modules),), {"base": base(tmp_path)})


def shapes_base(tmp_path: Path) -> Sample:
    modules = factories.MODULES | {"model.layers.1.self_attn.v_proj": (8, 6)}
    return Sample((sound(tmp_path, modules=modules),), {"base": base(tmp_path)})


def provenance_base(tmp_path: Path) -> Sample:
    return Sample((sound(tmp_path),), {"base": base(tmp_path, name="model", config={"_name_or_path": "tiny/another"})})


def provenance_no_base(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), base_model_name_or_path=None),))


def provenance_vocabulary(tmp_path: Path) -> Sample:
    extra = {"model.embed_tokens.weight": torch.ones(15, 6)}
    # The table of two more tokens is a whole weight.
    return Sample(
        (sound(tmp_path, extra=extra, config={"modules_to_save": ["embed_tokens"]}),),
        {"base": base(tmp_path)},
        also=frozenset({"structure-replaced"}),
    )


def numerics_gain(tmp_path: Path) -> Sample:
    weights = {name: weight.bfloat16() for name, weight in factories.base_weights().items()}
    # A thousandth of a weight is a quarter of the step between two numbers of bfloat16.
    folder = changed(sound(tmp_path), "lora_B.weight", lambda b: b * 1e-4, only_first=False)
    return Sample((folder,), {"base": base(tmp_path, weights=weights)})


def server_format(tmp_path: Path) -> Sample:
    return Sample((sound(tmp_path),), {"program": "llama.cpp"})


def server_config(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), target_modules=None),), {"program": "vllm"})


def server_part(tmp_path: Path) -> Sample:
    extra = {"score.weight": torch.ones(3, 6)}
    # The head is what the server does not load.
    return Sample(
        (sound(tmp_path, extra=extra, config={"modules_to_save": ["score"]}),),
        {"program": "vllm"},
        also=frozenset({"structure-head"}),
    )


def server_rank(tmp_path: Path) -> Sample:
    modules = factories.layered(1, {"self_attn.q_proj": (100, 60), "self_attn.v_proj": (70, 60)})
    return Sample((sound(tmp_path, modules=modules, rank=32),), {"program": "vllm"})


def server_scale(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), use_rslora=True),), {"program": "sglang"})


def server_layers(tmp_path: Path) -> Sample:
    return Sample((edited(sound(tmp_path), alora_invocation_tokens=[5, 7]),), {"program": "vllm"})


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    name.replace("_", "-"): function
    for name, function in globals().copy().items()
    if callable(function) and getattr(function, "__annotations__", {}).get("return") == "Sample"
}
