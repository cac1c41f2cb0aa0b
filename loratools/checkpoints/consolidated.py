"""Consolidated: the authors' own files of Llama (`consolidated.00.pth`) and Mistral (`consolidated.safetensors`).

    FOLDER/consolidated.00.pth            Meta, one for each piece of a tensor-parallel run
    FOLDER/consolidated.safetensors       Mistral, or shards and their index
    FOLDER/params.json, tokenizer.model, ...

Names are `layers.0.attention.wq.weight`; the rows of queries and keys stand in another order than in transformers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.model import open_model
from loratools.checkpoints.common.paths import names_in
from loratools.checkpoints.common.weights import (
    DIFFUSERS,
    TRANSFORMERS,
    TRANSFORMERS_PICKLED,
    Spelling,
    read_folder,
    read_single_file,
)
from loratools.checkpoints.pytorch import result_is_safetensors
from loratools.errors import FormatError, UnsupportedError
from loratools.storage.files import quoted

_MISTRAL = Spelling("consolidated")
_META = Spelling("consolidated.00", ".pth", "consolidated")
_PIECE = re.compile(r"consolidated\.(\d\d)\.pth")
_CONFIG = "params.json"


def detect(path: Path) -> bool:
    """Whether there are such files, and none that another layout reads."""
    if not path.is_dir():
        return path.name.startswith("consolidated") and path.suffix in (".safetensors", ".pth")
    names = names_in(path)
    other_layouts = any(s.entry_point(names) for s in (TRANSFORMERS, TRANSFORMERS_PICKLED, DIFFUSERS))
    return not other_layouts and any(s.entry_point(names) is not None for s in (_MISTRAL, _META))


def open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or one file.

    Raises:
        UnsupportedError: It is cut into pieces for several devices.
        FormatError: There is no params.json, without which the heads are not known.
    """
    folder = path if path.is_dir() else path.parent
    names = names_in(folder)
    _refuse_pieces(folder, names)
    if _CONFIG not in names:
        raise FormatError(
            f"{quoted(folder)} has no {_CONFIG}, which says how many heads the model has",
            hint="download it too; the order of rows of queries and keys depends on it",
        )
    spelling = _MISTRAL if (path.suffix == ".safetensors" or _MISTRAL.entry_point(names)) else _META
    weights = read_folder(path, spelling) if path.is_dir() else read_single_file(path, spelling)
    checkpoint = open_model(path, "consolidated", weights, config_file=_CONFIG)
    return replace(
        checkpoint, warnings=(*checkpoint.warnings, *([result_is_safetensors(path)] if spelling.is_pickle else []))
    )


def _refuse_pieces(folder: Path, names: list[str]) -> None:
    pieces = [name for name in names if _PIECE.fullmatch(name)]
    if len(pieces) > 1:
        raise UnsupportedError(
            f"{quoted(folder)} is cut into {len(pieces)} pieces for as many devices ({', '.join(pieces[:3])}, ...)",
            hint="give the version of the model that is made for transformers; "
            "its convert_llama_weights_to_hf joins the pieces",
        )
