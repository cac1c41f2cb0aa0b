"""What a path is that is no checkpoint which can be opened, said by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from loratools.checkpoints.common.paths import names_in
from loratools.errors import FormatError, LoraToolsError, UnsupportedError, UsageError
from loratools.storage.distributed import distributed_checkpoint, distributed_refusal
from loratools.storage.files import quoted
from loratools.storage.sniff import describe

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.*")
_GIVE_WHOLE_MODEL = "give a whole model: the base that the adapter belongs to, or one that it was merged into"

# Parts of adapters' names. Not `.lora.`: some models have small matrices of that name in their own layers.
_ADAPTER_PART = re.compile(r"lora_(A|B|a|b|up|down|embedding|magnitude)|hada_w\d|lokr_w\d|oft_(blocks|R|diag)|ia3_l")

# What a folder is, by the files in it; the first row that fits decides.
_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("adapter_config.json", *_ADAPTER_FILES), "an adapter, not a whole model", _GIVE_WHOLE_MODEL),
    (("weights.npz", "weights*.safetensors"), "an MLX folder of old", "convert it with a current mlx-lm first"),
    (("*.gguf",), "a folder of GGUF files", "give the one file that is meant"),
    (("tf_model*", "*.h5"), "a TensorFlow model", "convert it to safetensors first"),
    (("flax_model*", "*.msgpack"), "a Flax model", "convert it to safetensors first"),
    (("*.onnx",), "an ONNX model", "give the model that it was exported from"),
)


def refusal(path: Path) -> LoraToolsError:
    """Why `path` cannot be opened as a checkpoint."""
    return _refuse_folder(path) if path.is_dir() else _refuse_file(path)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether most tensors are parts of updates. A few are not enough: some models carry adapters of their own."""
    names = list(names)
    return sum(bool(_ADAPTER_PART.search(name)) for name in names) * 2 > len(names)


def is_adapter_file(name: str) -> bool:
    return _has([name], _ADAPTER_FILES)


def adapter_refusal(path: Path) -> UnsupportedError:
    return UnsupportedError(f"{quoted(path)} is an adapter, not a whole model", hint=_GIVE_WHOLE_MODEL)


def _refuse_folder(folder: Path) -> LoraToolsError:
    names = names_in(folder)
    if (distributed := distributed_checkpoint(folder)) is not None:
        return distributed_refusal(distributed)
    if variants := [name for name in names if fnmatchcase(name, "model.*.safetensors")]:
        return FormatError(
            f"{quoted(folder)} has only variants of a model: {', '.join(quoted(name) for name in variants)}",
            hint="give the one file that is meant",
        )
    for globs, kind, hint in _KINDS:
        if _has(names, globs):
            return UnsupportedError(f"{quoted(folder)} is {kind}", hint=hint)
    if _has(names, ("*-of-*.safetensors",)):
        return FormatError(
            f"{quoted(folder)} has shards without their index, model.safetensors.index.json",
            hint="download the index too; it says which shards belong together",
        )
    if inside := [name for name in names if _is_model(folder / name)]:
        return FormatError(
            f"{quoted(folder)} is no model; models are in {len(inside)} of the folders inside",
            hint=f"give one of them: {', '.join(quoted(folder / name) for name in inside[:5])}",
        )
    if files := [name for name in names if name.endswith(".safetensors")]:
        return FormatError(
            f"{quoted(folder)} has no model.safetensors",
            hint=f"give the file that is meant: {', '.join(quoted(folder / name) for name in files[:5])}",
        )
    return FormatError(f"{quoted(folder)} holds no model: no model.safetensors, and no index of shards")


def _has(names: Iterable[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _refuse_file(path: Path) -> LoraToolsError:
    if is_adapter_file(path.name):
        return adapter_refusal(path)
    if ".safetensors.index" in path.name and path.suffix == ".json":
        return UsageError(f"{quoted(path)} is the index of a model", hint="give the folder that it is in")
    sniffed = describe(path)
    if path.suffix == ".gguf" and sniffed is not None and sniffed.kind == "a GGUF file":
        return adapter_refusal(path)
    if sniffed is None:
        return FormatError(f"{quoted(path)} is no model", hint="give a folder with model.safetensors, or such a file")
    return FormatError(f"{quoted(path)} is no model but {sniffed.kind}", hint=sniffed.hint)
