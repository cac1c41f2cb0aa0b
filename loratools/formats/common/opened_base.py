"""What formats know of a base: the names of its weights from headers, or its config only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import FormatError, UsageError
from loratools.formats.common.base import Base
from loratools.naming.gguf import BY_MODEL_TYPE, hf_module
from loratools.sources.local import local_path
from loratools.storage.files import is_there, quoted
from loratools.storage.json_file import read_json

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


def known_base(base: str | Path | Checkpoint | Base | None) -> Base | None:
    """What is known of a model that is given by its path, opened, or as names and config; None if none is given.

    Raises:
        UsageError: There is nothing at the path.
        FormatError: There is neither a checkpoint nor a config.
    """
    if base is None or isinstance(base, Base):
        return base
    return open_base(base) if isinstance(base, (str, Path)) else base_of(base)


def open_base(path: str | Path) -> Base:
    """A checkpoint's names, shapes and config; of an image model, the name of its family says as much.

    A folder with nothing but a config.json, or that file itself, will do.

    Raises:
        UsageError: There is nothing at `path`.
        FormatError: It is neither a checkpoint nor a config.
    """
    name, path = str(path), local_path(path)
    if not path.exists():
        from loratools.naming.image.evidence import denoisers, family_named

        if family_named(name) is not None:
            return Base(family=name)
        families = ", ".join(sorted(family.name for family in denoisers()))
        raise UsageError(
            f"there is no base at {quoted(path)}",
            hint=f"give a model, its config.json, or the family of an image model: {families}",
        )
    if path.name == "config.json":
        return Base({}, read_json(path, infinities=True), path.parent)
    from loratools.checkpoints import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
    except FormatError:
        if not is_there(path / "config.json"):
            raise
        return Base({}, read_json(path / "config.json", infinities=True), path)
    return base_of(checkpoint)


def base_of(checkpoint: Checkpoint) -> Base:
    """Names, shapes and config of a checkpoint that is open; tied names included."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    shapes |= {tied: shapes[source] for tied, source in checkpoint.tied.items() if source in shapes}
    if checkpoint.layout == "gguf":
        return _as_in_transformers(checkpoint, shapes)
    return Base(shapes, checkpoint.config, checkpoint.path)


def _as_in_transformers(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Base:
    """A GGUF file as the model that it was converted from: its names, where they are known, and its type."""
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) else None
    type_and_table = next(((kind, table) for kind, table in BY_MODEL_TYPE.items() if table.name == name), None)
    if type_and_table is None:
        return Base(shapes, checkpoint.config, checkpoint.path)
    model_type, table = type_and_table
    renamed: dict[str, tuple[int, ...]] = {}
    for stored, shape in shapes.items():
        module, dot, leaf = stored.rpartition(".")
        renamed[f"{hf_module(table, module) or module}{dot}{leaf}"] = shape
    return Base(renamed, {**checkpoint.config, "model_type": model_type}, checkpoint.path)
