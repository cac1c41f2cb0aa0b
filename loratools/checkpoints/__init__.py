"""A whole model on disk: one file per layout, and the types that layouts share.

The file of a layout has `detect(path) -> bool`, which looks at names only, and `open(path) -> Checkpoint`. Opening
reads headers and JSON, never values. Code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools import registry
from loratools.arguments import checked
from loratools.errors import FormatError, UnsupportedError, UsageError
from loratools.quantization import Quantisation
from loratools.short_repr import clipped, counted, one_line
from loratools.skipped import Skipped
from loratools.sources.address import address_hint
from loratools.sources.local import local_path
from loratools.storage.files import quoted
from loratools.storage.gguf_reader import GgufHeader
from loratools.storage.origins import shown
from loratools.tensors.files import FileId
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class WeightFile:
    """A weight file of a checkpoint.

    Attributes:
        name: Its name relative to the checkpoint, with forward slashes.
        file: The file as it was when it was first read.
        tensors: Its tensors, unread, by their names in the file, in file order.
        metadata: The metadata in its header.
        header_bytes: The offset of the values, in bytes.
        saved_as: The name of the corresponding file of a result: a safetensors file, or a GGUF file if this is one.
        gguf: The header of a GGUF file, which a result keeps; None for other files.
    """

    name: str
    file: FileId
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    header_bytes: int
    saved_as: str
    gguf: GgufHeader | None = None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Component:
    """A model with files of its own: the whole checkpoint, or one folder of a pipeline.

    Attributes:
        files: Its weight files.
        prefix: The prefix of its tensor names in the checkpoint, which they do not have in its files, such as `unet.`.
        folder: The folder of its files in a result, relative to the checkpoint, such as `unet/`.
        stem: The file name stem in a result whose files are split anew, such as `model`.
        index: The metadata of its index; None if it has none.
    """

    files: tuple[WeightFile, ...]
    prefix: str = ""
    folder: str = ""
    stem: str = "model"
    index: Mapping[str, object] | None = None

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Its tensors by their names in the checkpoint."""
        return {self.prefix + name: tensor for file in self.files for name, tensor in file.tensors.items()}

    @property
    def index_name(self) -> str:
        """The name of the index file of a result, relative to the checkpoint."""
        return f"{self.folder}{self.stem}.safetensors.index.json"


@dataclass(frozen=True)
class SideFile:
    """A file that belongs to the model and holds no weights.

    Attributes:
        name: Its name relative to the checkpoint, with forward slashes.
        path: Where it is.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Checkpoint:
    """A whole model on disk, opened by `open_checkpoint`. It is immutable, and its values are not read.

    Everything in its folder is a weight file, the index, a side file, or left out.

    Attributes:
        path: The folder or file.
        layout: Its layout, as `loratools formats` names it.
        components: The models in it with files of their own: one, or those of a pipeline.
        stored: The tensors on disk by name, in file order.
        weights: The logical tensors by name: the same, unless they are quantised.
        config: The fields of its config.
        config_file: The file that `config` was read from; None if there are several, one for each component.
        tied: Names of absent weights, and the stored weights that they are tied to, such as `lm_head.weight` to the
            embedding.
        quantisation: How each weight is packed; None if no weight is quantised.
        fixed: Weights that cannot be changed, and why not.
        side_files: Files that belong to the model and hold no weights.
        left_out: Files in the folder that are not part of the model, and why.
        warnings: Warnings that do not change how the source is read.

    Example:
        >>> import loratools
        >>> checkpoint = loratools.open_checkpoint("fixtures/llama-tiny")
        >>> checkpoint.weights["model.norm.weight"].dtype == checkpoint.stored["model.norm.weight"].dtype
        True
    """

    path: Path
    layout: str
    components: tuple[Component, ...]
    stored: Mapping[str, LazyTensor]
    weights: Mapping[str, LazyTensor]
    config: Mapping[str, object] = field(default_factory=dict)
    config_file: str | None = "config.json"
    tied: Mapping[str, str] = field(default_factory=dict)
    quantisation: Quantisation | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    left_out: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        facts = [self.layout, counted(len(self.weights), "tensor")]
        facts += [f"quantised: {clipped(self.quantization)}"] if self.quantization else []
        return f"<Checkpoint {clipped(self.name)!r}: {', '.join(facts)}>"

    @property
    def name(self) -> str:
        """The path of the checkpoint, or the address that it was fetched from."""
        return shown(self.path)

    @property
    def quantization(self) -> str | None:
        """The quantisation schemes of its weights; None if no weight is quantised."""
        return self.quantisation.name if self.quantisation is not None else None

    def require_readable(self) -> None:
        """Raise an error if a weight is quantised in a way that loratools cannot read.

        Raises:
            UnsupportedError: There are such weights. The error names all of them.
        """
        refused = self.quantisation.refused if self.quantisation is not None else ()
        if refused:
            raise UnsupportedError(
                f"{len(refused)} weights of {quoted(self.path)} are quantised in a way that is not read",
                details=refused,
                hint="give the model that it was quantised from",
            )

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The weight files of all components, in order."""
        return tuple(file for component in self.components for file in component.files)


@checked
def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a whole model, a folder or a file. Headers and configs are read, and no values.

    Args:
        path: The folder or file, or its address on the hub.

    Returns:
        The checkpoint, with its tensors by name.

    Raises:
        UsageError: `path` does not exist.
        UnsupportedError: It is something else, which the message names, or a model stored in a way that loratools
            cannot read.
        FormatError: It is not a model.
        InputError: Its files contradict each other, or a file name leads out of the folder.

    Example:
        >>> import loratools
        >>> loratools.open_checkpoint("fixtures/llama-tiny").layout
        'huggingface'
    """
    path = local_path(path)
    _ensure_present(path)
    layouts = [name for name in registry.names("checkpoints") if registry.load("checkpoints", name).detect(path)]
    if len(layouts) > 1:
        raise FormatError(f"{quoted(path)} could be stored as {' or '.join(layouts)}")
    if not layouts:
        from loratools.checkpoints.common.unsupported import refusal

        raise refusal(path)
    checkpoint: Checkpoint = registry.load("checkpoints", layouts[0]).open(path)
    return checkpoint


def _ensure_present(path: Path) -> None:
    try:
        present = path.exists()
    except (OSError, ValueError):
        # ValueError: a NUL in the name, which no file has.
        present = False
    if present:
        return
    if path.is_symlink():
        raise UsageError(f"{quoted(path)} is a link that leads nowhere")
    raise UsageError(f"there is no file or folder {quoted(path)}", hint=address_hint(path.as_posix()))
