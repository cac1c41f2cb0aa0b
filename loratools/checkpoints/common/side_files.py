"""What in a model's folder comes along with its weights, and what is left out and why.

    comes along   config, tokenizer, processor, chat templates, licence, model card, code (copied, never run)
    left out      other copies of the weights, adapters, training states, what hides, and what nobody knows

Everything that is no weight of the model is one or the other.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Set
from fnmatch import fnmatchcase
from pathlib import Path

from loratools.checkpoints import SideFile
from loratools.checkpoints.common.paths import leads_out
from loratools.skipped import Skipped
from loratools.storage.files import machine_error

STRAY_SHARD = "a shard that does not belong to this model"
_NOT_KNOWN = "not known to belong to a model"
_ANOTHER_COPY = "the same weights in another format"
_PICKLE = "a pickle"
_TRAINING = "a state or record of training"
_ADAPTER = "an adapter, not part of the base"

# The first row that fits decides; names are compared in lower case.
_FOLDERS = (
    (".*", "hidden"),
    ("original", _ANOTHER_COPY),
    ("metal", _ANOTHER_COPY),
    ("onnx", _ANOTHER_COPY),
    ("openvino", _ANOTHER_COPY),
    ("coreml", _ANOTHER_COPY),
    ("tflite", _ANOTHER_COPY),
    ("gguf", _ANOTHER_COPY),
    ("checkpoint-*", _TRAINING),
    ("global_step*", _TRAINING),
    ("runs", _TRAINING),
    ("logs", _TRAINING),
    ("wandb", _TRAINING),
    ("__pycache__", "compiled code"),
)
_LEFT_OUT = (
    (".*", "hidden"),
    ("adapter_config.json", _ADAPTER),
    ("adapter_model*", _ADAPTER),
    ("adapters.safetensors", _ADAPTER),
    ("pytorch_lora_weights*", _ADAPTER),
    ("consolidated*", _ANOTHER_COPY),
    ("optimizer*", _TRAINING),
    ("scheduler.*", _TRAINING),
    ("scaler.*", _TRAINING),
    ("rng_state*", _TRAINING),
    ("training_args*", _TRAINING),
    ("trainer_state.json", _TRAINING),
    ("*_results.json", _TRAINING),
    ("events.out.tfevents*", _TRAINING),
    ("model*-of-*.safetensors", STRAY_SHARD),
    ("diffusion_pytorch_model*", "another variant of the weights"),
    ("model*.safetensors", "another variant of the weights"),
    ("*.safetensors", "weights that are not part of this model"),
    ("*.safetensors.index*.json", "an index of other weights"),
    ("pytorch_model*", _ANOTHER_COPY),
    ("tf_model*", _ANOTHER_COPY),
    ("flax_model*", _ANOTHER_COPY),
    ("rust_model*", _ANOTHER_COPY),
    ("openvino_*", _ANOTHER_COPY),
    ("*.gguf", _ANOTHER_COPY),
    ("*.ggml", _ANOTHER_COPY),
    ("*.onnx*", _ANOTHER_COPY),
    ("*.h5", _ANOTHER_COPY),
    ("*.msgpack", _ANOTHER_COPY),
    ("*.npz", _ANOTHER_COPY),
    ("*.ot", _ANOTHER_COPY),
    ("*.tflite", _ANOTHER_COPY),
    ("*.bin", _PICKLE),
    ("*.pt", _PICKLE),
    ("*.pth", _PICKLE),
    ("*.ckpt", _PICKLE),
    ("*.pkl", _PICKLE),
    ("*.pickle", _PICKLE),
)
# By suffix, for tokenizers have names of many kinds: tekken.json, spiece.model, vocab.bpe, qwen.tiktoken, source.spm.
_COME_ALONG = (
    "*.json", "*.jsonl", "*.txt", "*.md", "*.rst", "*.py", "*.yaml", "*.yml", "*.toml",
    "*.jinja", "*.jinja2", "*.model", "*.spm", "*.vocab", "*.bpe", "*.tiktoken", "*.codes", "*.dict",
    "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg",
    "license*", "licence*", "notice*", "copying*", "readme*", "use_policy*", "authors*", "citation*",
    "tokenizer.model*",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz")
# sentence-transformers: what comes after the transformer is in folders of its own, weights and all.
_MODULE = re.compile(r"(\w+_)?\d+_[A-Z]\w*")


def sort_out(
    folder: Path, weights: Set[str], parts: Set[str] = frozenset()
) -> tuple[tuple[SideFile, ...], tuple[Skipped, ...]]:
    """What comes along and what is left out of `folder`, each sorted by name; `weights` are neither.

    parts: folders inside that belong to the model, whatever is in them.

    Links are followed to files in the folder or its cache, and to nowhere else.
    """
    along: list[SideFile] = []
    skipped: list[Skipped] = []
    for name, path, why in _walk(folder, weights, parts):
        if why is None:
            along.append(SideFile(name, path))
        else:
            skipped.append(Skipped(name, why, "file"))
    return tuple(sorted(along, key=lambda s: s.name)), tuple(sorted(skipped, key=lambda s: s.name))


def why_left_out(name: str) -> str | None:
    """Why a file of this name does not come along; None if it does."""
    lower = name.lower()
    why = next((why for glob, why in _LEFT_OUT if fnmatchcase(lower, glob)), None)
    if why is not None:
        return why
    return None if any(fnmatchcase(lower, glob) for glob in _COME_ALONG) else _NOT_KNOWN


def _walk(folder: Path, weights: Set[str], parts: Set[str]) -> Iterator[tuple[str, Path, str | None]]:
    """Name, path and why it is left out (None: it is not), of everything but the weights."""
    is_sentence_transformer = (folder / "modules.json").is_file()
    waiting = [(folder, "", False)]
    while waiting:
        folder_now, prefix, is_module = waiting.pop()
        entries = _entries(folder_now)
        files = {entry.name for entry in entries}
        for entry in entries:
            name, path = prefix + entry.name, folder_now / entry.name
            if name in weights:
                continue
            if entry.is_dir(follow_symlinks=False):
                module = is_module or (is_sentence_transformer and bool(_MODULE.fullmatch(entry.name)))
                if name not in parts and (why := _why_folder(path, module)):
                    yield f"{name}/", path, why
                else:
                    waiting.append((path, f"{name}/", module))
                continue
            yield name, path, _why_not_read(path, folder) or _why_file(entry.name, files, is_module)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise machine_error(error, "look into", folder) from error


def _why_folder(path: Path, is_module: bool) -> str | None:
    lower = path.name.lower()
    for glob, why in _FOLDERS:
        if fnmatchcase(lower, glob):
            return why
    if is_module:
        return None
    names = [entry.name.lower() for entry in _entries(path)]
    has_weights = any(fnmatchcase(name, glob) for name in names for glob in _WEIGHTS)
    return "a folder with weights of its own" if has_weights else None


def _why_not_read(path: Path, folder: Path) -> str | None:
    if leads_out(path, folder):
        return "a link that leads out of the folder"
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link that leads nowhere" if path.is_symlink() else "cannot be looked at"
    if stat.S_ISDIR(mode):
        return "a link to a folder"
    return None if stat.S_ISREG(mode) else "no regular file"


def _why_file(name: str, siblings: Set[str], is_module: bool) -> str | None:
    # A module of sentence-transformers is copied with its weights: the pickle too, where there is nothing else.
    if is_module and name == "model.safetensors":
        return None
    if is_module and name == "pytorch_model.bin" and "model.safetensors" not in siblings:
        return None
    return why_left_out(name)
