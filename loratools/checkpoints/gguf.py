"""GGUF: a model in one file, as llama.cpp runs it; with its config and tokenizer in the header.

    FILE.gguf   blk.0.attn_q.weight, token_embd.weight, ...

Names are those of llama.cpp, and so is the order of rows: for some architectures, those of queries and keys stand
otherwise than in transformers. A merge into such a file gives another one with the same header.
"""

from __future__ import annotations

import re
from pathlib import Path

from loratools.checkpoints import Checkpoint, Component, WeightFile
from loratools.errors import FormatError, LoraToolsError, UnsupportedError
from loratools.quantization import recognise
from loratools.storage.files import quoted
from loratools.storage.gguf_reader import GgufFile, read_gguf

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# What transformers calls what the header says of an architecture.
_CONFIG = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "vocab_size": "vocab_size",
}


def detect(path: Path) -> bool:
    """Whether `path` is such a file and no adapter, by its name and by what it says of itself."""
    if not path.is_file() or path.suffix != ".gguf":
        return False
    try:
        return not _is_adapter(read_gguf(path))
    except LoraToolsError:
        # Opening it tells what is wrong.
        return True


def open(path: Path) -> Checkpoint:
    """The checkpoint in the file `path`.

    Raises:
        UnsupportedError: It is one of several parts, or has tensors of a type that is not known.
        FormatError: The file is damaged, or has no tensors.
    """
    part = _PART.search(path.name)
    if part is not None and int(part[1]) > 1:
        raise UnsupportedError(
            f"{quoted(path)} is one of {int(part[1])} parts of a model",
            hint="join them first: llama-gguf-split --merge FIRST_PART OUTPUT",
        )
    gguf = read_gguf(path)
    unknown = [f"{name}   {kind}" for name, kind in gguf.quantised.items() if name not in gguf.packed]
    if unknown:
        raise UnsupportedError(f"{quoted(path)} has {len(unknown)} tensors of unknown types", details=unknown)
    # Q8_0 is decoded by the reader for adapters; here it is packed like the others.
    stored = {name: gguf.packed[name] if name in gguf.packed else gguf.tensors[name] for name in gguf.order}
    if not stored:
        raise FormatError(f"{quoted(path)} has no tensors")
    quantisation = recognise(stored, {})
    weights = quantisation.logical(stored) if quantisation is not None else stored
    # A model without a head of its own computes with its embedding.
    tied = {_HEAD: _EMBEDDING} if _EMBEDDING in stored and _HEAD not in stored else {}
    file = WeightFile(path.name, gguf.file, stored, {}, 0, path.name, gguf.layout)
    return Checkpoint(
        path=path,
        layout="gguf",
        components=(Component((file,)),),
        stored=stored,
        weights=weights,
        config=_config(gguf),
        tied=tied,
        quantisation=quantisation,
    )


def _is_adapter(gguf: GgufFile) -> bool:
    return gguf.fields.get("general.type") == "adapter" or any(name.endswith(".lora_a") for name in gguf.tensors)


def _config(gguf: GgufFile) -> dict[str, object]:
    """What the header says of the model, as transformers would say it."""
    architecture = gguf.fields.get("general.architecture")
    if not isinstance(architecture, str):
        return {}
    config: dict[str, object] = {"architectures": [architecture]}
    for key, field in _CONFIG.items():
        value = gguf.fields.get(f"{architecture}.{field}")
        if isinstance(value, list):
            # One number for each layer: the model's, where all are equal.
            value = value[0] if value and all(number == value[0] for number in value) else 0
        if isinstance(value, int):
            config[key] = value
    return config
