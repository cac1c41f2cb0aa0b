"""Trained tensors in files beside an adapter, which its config does not mention.

Some programs train more than factors and save the rest in a file of its own. What such a file means is known for a few
names; any other file that holds tensors is left unread, and every verb says so: half of what was trained may be in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from loratools.storage.sniff import describe

# Whole weights of the base model by their names in memory, with or without PEFT's prefix, and who writes the file.
REPLACED_WEIGHTS: dict[str, str] = {
    "non_lora_trainables.bin": "LLaVA",
    "non_lora_state_dict.bin": "Qwen-VL-Series-Finetune",
}
# A head for rewards or values (`v_head.summary.weight`), which the base has not got: TRL looks for it in the model.
NEW_HEADS: dict[str, str] = {"value_head.safetensors": "LLaMA-Factory", "value_head.bin": "TRL"}
# Rows of the vocabulary's two tables for tokens that the base does not know, in the order of their numbers, which are
# in `added_tokens.json` (vLLM's layout).
NEW_TOKENS: dict[str, str] = {"new_embeddings.safetensors": "vLLM", "new_embeddings.bin": "vLLM"}
# Who writes each of these files, for people who wonder where it came from.
WRITERS = {**REPLACED_WEIGHTS, **NEW_HEADS, **NEW_TOKENS}
TABLES = {"input_embeddings": "model.embed_tokens.weight", "output_embeddings": "lm_head.weight"}
# Files with tensors that are no part of an adapter: the state of a training, and whole models.
_NOT_TRAINED_BESIDE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|trainer_state|random_states|zero_pp_rank|mp_rank).*"
    r"|(model|pytorch_model|diffusion_pytorch_model|consolidated).*\.(safetensors|bin|pth|gguf)"
    r"|\d+_adapters\.(safetensors|npz)",
)
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".npz", ".ckpt"})


def companions_of(file: Path, adapter_files: Collection[str]) -> list[Path]:
    """Files with tensors in the folder of an adapter, other than adapters, models and the state of a training.

    Args:
        file: The adapter's file of weights.
        adapter_files: Names of files that are adapters themselves, of whatever format.
    """
    candidates = [
        path
        for path in sorted(file.parent.iterdir())
        if path.suffix.lower() in _SUFFIXES
        and path.name not in adapter_files
        and not _NOT_TRAINED_BESIDE.fullmatch(path.name)
        and path.is_file()
    ]
    return [path for path in candidates if _holds_tensors(path)]


def _holds_tensors(path: Path) -> bool:
    """Whether the first bytes are those of a container of tensors: `.bin` is also a suffix of vocabularies."""
    description = describe(path)
    if description is None:
        return False
    return description.kind == "a safetensors file" or description.kind.endswith(("pickle", "(.npz)"))
