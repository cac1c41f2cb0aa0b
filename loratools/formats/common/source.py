"""What an adapter's path leads to, opened once for all formats: the tensors' headers, and the config beside them.

Knows which file of a folder to read, and the error if there is none. Does not know the keys of any format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.errors import FormatError, UsageError
from loratools.formats.common.base import Base
from loratools.formats.common.companions import companions_of
from loratools.formats.common.dumped_model import dumped_files
from loratools.formats.common.leave_out import NOTHING, LeaveOut
from loratools.formats.common.shards import is_shard, require_indexed, shards_of
from loratools.formats.common.wrappers import unwrapped, unwrapped_config
from loratools.sources.address import address_hint
from loratools.sources.local import local_path
from loratools.storage.distributed import distributed_checkpoint, distributed_refusal
from loratools.storage.files import is_there, machine_error, quoted
from loratools.tensors.dtypes import FLOAT8_DTYPES
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import in_float16

CONFIG = "adapter_config.json"
# PEFT's own names. It too prefers safetensors.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# In order: the first that a folder has is read.
ADAPTER_FILES = (
    *WEIGHTS,
    "adapter_model.pt",  # torchtune
    "adapters.safetensors",  # MLX
    "adapters.npz",
    "pytorch_lora_weights.safetensors",  # diffusers
    "pytorch_lora_weights.bin",
)
# A checkpoint of MLX in the folder of its training: the config there is its own.
NUMBERED_FILE = re.compile(r"\d+_adapters\.(safetensors|npz)")
TENSOR_SUFFIXES = (".safetensors", ".gguf", ".npz", ".bin", ".pt", ".pth", ".ckpt")
MODEL_FILE = re.compile(r"(model|pytorch_model|diffusion_pytorch_model|consolidated).*\.(safetensors|bin|json|pth)")
TRAINING_FILE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|trainer_state).*")
# How far below a folder adapters are looked for: a run's checkpoint, and an adapter's name in it.
_DEPTH = 2


@dataclass(frozen=True)
class AdapterSource:
    """An opened adapter.

    `container`: safetensors, pickle, npz or gguf. `metadata`: the texts of a safetensors header. `other`: what else
    there is besides tensors: entries of a pickle (None if they were not read), keys of a GGUF header. `packed`: tensors
    of a GGUF file in a quantised type that is not decoded, with the type. `base`: what is known of the model it is for,
    where a person has given it. `stored_names`: whether modules of image models keep the names that the file has for
    them (`Adapter.stored_names`). `leave_out`: tensors that are no reason to refuse the adapter. `companions`: files
    with tensors beside it, which may be a part of what was trained (`formats/common/companions.py`). `wrappers`: how
    many names had a wrapper of training in them, by its tool.
    """

    path: Path
    folder: Path
    file: Path
    config: Mapping[str, object] | None
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    container: str = "safetensors"
    packed: Mapping[str, str] = field(default_factory=dict)
    base: Base | None = None
    stored_names: bool = False
    leave_out: LeaveOut = NOTHING
    companions: tuple[Path, ...] = ()
    wrappers: Mapping[str, int] = field(default_factory=dict)

    @property
    def config_belongs_to_file(self) -> bool:
        """Whether the config is surely this file's: beside a file of any other name it may be another's."""
        return self.config is not None and is_adapter_file(self.file.name)

    @property
    def declared(self) -> str | None:
        """The format that the config itself names, so that nobody else has to be asked: PEFT writes its own type."""
        written_by_peft = (
            self.config is not None
            and (self.file.name in WEIGHTS or is_shard(self.file.name))
            and "peft_type" in self.config
        )
        return "peft" if written_by_peft else None


def open_source(path: str | Path, *, base: Base | None = None) -> AdapterSource:
    """Open a folder or a file. Headers only.

    Raises:
        UsageError: There is nothing at `path`.
        FormatError: There is no adapter in it, or it is no file of tensors.
    """
    path = _existing(path)
    if is_shard(path.name) and path.is_file():
        # One shard is a part of the training; the others are beside it, or it is refused.
        shards = shards_of(path.parent, [p.name for p in _listed(path.parent)])
        return _opened(path, shards[0], [], base, shards)
    if not path.is_dir():
        return _opened(path, path, [], base)
    files = [path / name for name in ADAPTER_FILES if is_there(path / name)] or loose_files(path)
    shards = []
    if (not files or files[0].name not in ADAPTER_FILES) and (
        shards := shards_of(path, [p.name for p in _listed(path)])
    ):
        files = shards[:1]
    if not files and (dumped := dumped_files(path, [p.name for p in _listed(path)])):
        return _opened(path, dumped[0], [], base, dumped if len(dumped) > 1 else ())
    if not files or (len(files) > 1 and not is_adapter_file(files[0].name)):
        raise _no_weights(path)
    warnings = [f"{quoted(path)} also holds '{unread.name}', which is not read" for unread in files[1:]]
    if inner := [p for p in find_adapters(path) if p != path]:
        names = shown([quoted(p.relative_to(path)) for p in inner])
        are = "is" if len(inner) == 1 else "are"
        warnings.append(f"{counted(len(inner), 'adapter')} in folders below {are} not read: {', '.join(names)}")
    return _opened(path, files[0], warnings, base, shards)


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name is an adapter wherever it lies."""
    return name in ADAPTER_FILES or is_shard(name) or NUMBERED_FILE.fullmatch(name) is not None


def find_adapters(folder: str | Path) -> list[Path]:
    """Folders with an adapter in them: `folder` itself and those up to two levels below; checkpoints by number."""
    folders: list[Path] = []

    def visit(below: Path, depth: int) -> None:
        try:
            inside = {p.name: p for p in below.iterdir()}
            if any(p.is_file() for name, p in inside.items() if name in ADAPTER_FILES or is_shard(name)):
                folders.append(below)
            inner = [p for p in inside.values() if not p.name.startswith(".") and p.is_dir()] if depth < _DEPTH else []
        except OSError:
            return  # what may not be looked into is not what was asked for
        for each in sorted(inner, key=natural_order):
            visit(each, depth + 1)

    visit(Path(folder), 0)
    return folders


def loose_files(folder: Path) -> list[Path]:
    """Files of tensors in `folder` under names of their own, which neither a model nor a training has."""
    listed = _listed(folder)
    if any(MODEL_FILE.fullmatch(p.name) for p in listed):
        return []
    files = [p for p in listed if p.suffix.lower() in TENSOR_SUFFIXES and p.is_file()]
    return sorted((p for p in files if not TRAINING_FILE.fullmatch(p.name)), key=natural_order)


def shown(lines: Sequence[str], most: int = 5) -> list[str]:
    """The first few lines, and how many more there are."""
    first_lines = list(lines[:most])
    return [*first_lines, f"… and {len(lines) - most} more"] if len(lines) > most else first_lines


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun in the right number: `1 tensor`, `2 tensors`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _existing(path: str | Path) -> Path:
    text, path = str(path), local_path(path)
    try:
        if path.exists():
            return path
    except PermissionError as error:
        raise machine_error(error, "look at", path) from error
    except (OSError, ValueError):
        pass
    if (weighted := re.fullmatch(r"(.+)=([-+]?\d+\.?\d*|[-+]?\.\d+)", text)) and Path(weighted[1]).exists():
        # As the command line has it, which splits such an argument before it comes here.
        raise UsageError(
            f"give the weight beside the path: ('{weighted[1]}', {weighted[2]})",
            hint=f"'{text}' is no path, and functions take pairs of an adapter and its weight",
        )
    raise UsageError(f"there is no file or folder {quoted(text)}", hint=address_hint(text))


def _opened(
    path: Path, file: Path, warnings: list[str], base: Base | None, shards: Sequence[Path] = ()
) -> AdapterSource:
    from loratools.storage.json_file import read_json

    if file.name == CONFIG or file.suffix == ".json":
        raise FormatError(f"{quoted(file)} holds no tensors", hint="give the folder, or the file with the weights")
    config_file = file.parent / CONFIG
    config = unwrapped_config(read_json(config_file)) if is_there(config_file) else None
    if config is not None and not is_adapter_file(file.name):
        warnings = [*warnings, f"rank and alpha are taken from '{CONFIG}' in the folder of {quoted(file)}"]
    content = _without_wrappers(_content_of_shards(file, shards) if shards else _content(file))
    if content.warnings:
        warnings = [*warnings, *content.warnings]
    if short := {name: t for name, t in content.tensors.items() if t.dtype in FLOAT8_DTYPES}:
        kinds = " and ".join(sorted({t.dtype for t in short.values()}))
        warnings = [
            *warnings,
            f"{counted(len(short), 'tensor')} of {quoted(file)} are {kinds} and are read as float16, which is exact",
        ]
        content = replace(content, tensors={**content.tensors, **{n: in_float16(t) for n, t in short.items()}})
    # A folder with a config of PEFT or MLX is the adapter's own; any other may hold files of anything, also the base.
    is_adapter_folder = config is not None and (is_adapter_file(file.name) or bool(shards))
    companions = companions_of(file, [*ADAPTER_FILES, *(shard.name for shard in shards)]) if is_adapter_folder else []
    return replace(
        content,
        path=path,
        folder=file.parent,
        config=config,
        warnings=tuple(warnings),
        base=base,
        companions=tuple(companions),
    )


def _content_of_shards(first: Path, shards: Sequence[Path]) -> AdapterSource:
    """What is in all shards of an adapter together, under the name of the first."""
    parts = [_content(shard) for shard in shards]
    holders = {name: part.file.name for part in parts for name in part.tensors}
    if sum(len(part.tensors) for part in parts) > len(holders):
        counts = Counter(name for part in parts for name in part.tensors)
        twice = [quoted(name) for name, count in counts.items() if count > 1]
        raise FormatError(
            f"{counted(len(twice), 'tensor')} of {quoted(first.parent)} in more than one shard",
            details=shown(twice),
            defect="index-disagrees",
        )
    require_indexed(first.parent, holders)
    return replace(
        parts[0],
        tensors={name: tensor for part in parts for name, tensor in part.tensors.items()},
        metadata={key: text for part in parts for key, text in part.metadata.items()},
        other={key: entry for part in parts for key, entry in part.other.items()},
    )


def _without_wrappers(content: AdapterSource) -> AdapterSource:
    """The source with the names that its tensors had before training wrapped their modules, and a warning of it."""
    names = unwrapped(content.tensors)
    if not names.wrappers:
        return content
    twice = sorted(name for name, count in Counter(names.names.values()).items() if count > 1)
    if twice:
        raise FormatError(
            f"{quoted(content.file)} has {counted(len(twice), 'tensor')} both inside of a wrapper of training and not",
            details=shown([quoted(name) for name in twice]),
            hint="save the adapter again, from the model without its wrappers",
            defect="keys-duplicate",
        )
    tensors = {names.names[name]: tensor for name, tensor in content.tensors.items()}
    packed = {names.names.get(name, name): kind for name, kind in content.packed.items()}
    tools = "; ".join(f"{tool}: {counted(count, 'tensor')}" for tool, count in sorted(names.wrappers.items()))
    warning = f"{quoted(content.file)} has names of training's wrappers around its modules, left out here ({tools})"
    return replace(content, tensors=tensors, packed=packed, warnings=(warning,), wrappers=names.wrappers)


def companion_tensors(file: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a file beside an adapter, by their keys. Headers only."""
    return _without_wrappers(_content(file)).tensors


def _content(file: Path) -> AdapterSource:
    """What is in the file itself. The content decides how it is read, not the name: a .bin may hold safetensors."""
    from loratools.storage.sniff import describe

    kind = sniffed.kind if (sniffed := describe(file)) is not None else ""
    opened = AdapterSource(file, file.parent, file, None, {})
    if kind.endswith("pickle"):
        from loratools.storage.torch_pickle import read_pickle

        pickled = read_pickle(file)
        other_values = pickled.other | dict.fromkeys(pickled.ignored)
        return replace(opened, tensors=pickled.tensors, other=other_values, container="pickle")
    if kind.endswith("(.npz)"):
        from loratools.storage.npz_reader import read_npz

        return replace(opened, tensors=read_npz(file), container="npz")
    if kind == "a GGUF file":
        from loratools.storage.gguf_reader import read_gguf

        gguf = read_gguf(file)
        return replace(opened, tensors=gguf.tensors, other=gguf.fields, container="gguf", packed=gguf.quantised)
    from loratools.storage.safetensors_reader import read_header

    header = read_header(file)
    return replace(opened, tensors=header.tensors, metadata=header.metadata)


def _no_weights(folder: Path) -> FormatError:
    inner = find_adapters(folder)
    if inner:
        return FormatError(
            f"{quoted(folder)} is no adapter; it has {counted(len(inner), 'adapter')} in folders below it",
            details=shown([str(p.relative_to(folder)) for p in inner], 20),
            hint=f"give one of them: {inner[-1]}",
        )
    names = sorted(p.name for p in _listed(folder))
    if CONFIG in names:
        return FormatError(
            f"{quoted(folder)} has {CONFIG}, and no weights beside it: {' or '.join(WEIGHTS)} is missing",
            hint="download it again, or let the training finish",
            defect="index-no-weights",
        )
    if (distributed := distributed_checkpoint(folder)) is not None:
        return distributed_refusal(distributed)
    if any(MODEL_FILE.fullmatch(n) for n in names):
        return FormatError(
            f"{quoted(folder)} is a model checkpoint, not an adapter",
            details=shown(names),
            hint="'loratools extract' takes an adapter out of a fine-tuned model; 'loratools spectrum' looks at one, "
            "given with --base the model that it was trained from",
        )
    if not names:
        return FormatError(f"{quoted(folder)} is empty; an adapter has {' or '.join(WEIGHTS)}")
    weights = loose_files(folder)
    return FormatError(
        f"{quoted(folder)} has no {' or '.join(WEIGHTS)}"
        + (f", and {len(weights)} files that might be meant" if weights else ""),
        details=shown(names),
        hint=f"give the file itself: {weights[0]}" if weights else None,
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise machine_error(error, "list", folder) from error


def natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts checkpoint-500 before checkpoint-1000."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", path.name) if p]
