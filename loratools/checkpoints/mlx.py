"""MLX: the folder that mlx-lm and mlx-vlm convert a model to; files as Hugging Face has them, named by `format: mlx`.

Text models keep the names of transformers, except for experts, which are stacked as `switch_mlp`. Kernels of
convolutions have their channels last, (out, *kernel, in), and adapters cannot be added to them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.model import open_model
from loratools.checkpoints.common.paths import names_in
from loratools.checkpoints.common.peek import is_mlx
from loratools.checkpoints.common.unsupported import is_adapter_file
from loratools.checkpoints.common.weights import TRANSFORMERS, read_folder, read_single_file

_CHANNELS_LAST = "MLX keeps the channels of a kernel last, (out, *kernel, in)"


def detect(path: Path) -> bool:
    """Whether there is a model here that says that MLX saved it."""
    if path.is_dir():
        names = names_in(path)
        has_model = "model_index.json" not in names and TRANSFORMERS.entry_point(names) is not None
        return has_model and is_mlx(path)
    return path.suffix == ".safetensors" and not is_adapter_file(path.name) and is_mlx(path)


def open(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or one file; raises the same errors as for a Hugging Face folder."""
    checkpoint = open_model(
        path, "mlx", read_folder(path, TRANSFORMERS) if path.is_dir() else read_single_file(path, TRANSFORMERS)
    )
    # Three axes are a kernel of one dimension too, unless they are experts.
    kernels = [n for n, t in checkpoint.weights.items() if len(t.shape) > 2 and not _is_stack(n)]
    return replace(checkpoint, fixed=dict.fromkeys(kernels, _CHANNELS_LAST))


def _is_stack(name: str) -> bool:
    return ".switch_mlp." in name or ".experts." in name
