"""Original: an image model in one file, under the names of its first publication (LDM, and ComfyUI's checkpoints).

    model.diffusion_model.input_blocks.4.1.proj_in.weight
    cond_stage_model.transformer.text_model.encoder..., conditioner.embedders.0..., first_stage_model...

A `.ckpt` is read without running anything of it; the result is safetensors.
"""

from __future__ import annotations

from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.peek import is_original
from loratools.checkpoints.common.unsupported import is_adapter_file
from loratools.checkpoints.common.weights import Spelling, read_single_file
from loratools.checkpoints.pytorch import result_is_safetensors
from loratools.quantization import recognise


def detect(path: Path) -> bool:
    """Whether `path` is such a file, by the names of its tensors."""
    return path.is_file() and not is_adapter_file(path.name) and is_original(path)


def open(path: Path) -> Checkpoint:
    """The checkpoint in the file `path`, without whatever lies beside it.

    Raises:
        UsageError: It is one shard of several.
    """
    weights = read_single_file(path, Spelling(path.stem, path.suffix))
    stored = weights.component.tensors
    quantisation = recognise(stored, {})
    return Checkpoint(
        path=path,
        layout="original",
        components=(weights.component,),
        stored=stored,
        weights=quantisation.logical(stored) if quantisation is not None else stored,
        quantisation=quantisation,
        warnings=(*weights.warnings, *([] if path.suffix == ".safetensors" else [result_is_safetensors(path)])),
    )
