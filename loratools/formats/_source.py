"""What an adapter's path leads to, opened once for all formats: the tensors' headers, and the config beside them.

Knows which file of a folder to take, and what to say where there is none. Knows no format's keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratools.errors import FormatError, UsageError
from loratools.storage.files import machine_error, quoted
from loratools.tensors import LazyTensor

CONFIG = "adapter_config.json"
# In order: the first that a folder has is read. PEFT too prefers safetensors.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# How far below a folder adapters are looked for: a run's checkpoint, and an adapter's name in it.
_DEPTH = 2


@dataclass(frozen=True)
class AdapterSource:
    """An opened adapter. `other` is what a pickle holds besides tensors; None where it was not read."""

    path: Path
    folder: Path
    file: Path
    config: Mapping[str, object] | None
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def open_source(path: str | Path) -> AdapterSource:
    """Open a folder or a file. Headers only.

    Raises:
        UsageError: there is nothing at `path`.
        FormatError: there is no adapter in it, or it is no file of tensors.
    """
    path = _existing(path)
    if not path.is_dir():
        return _opened(path, path, [])
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise _no_weights(path)
    warnings = [f"{quoted(path)} also holds '{other.name}', which is not read" for other in found[1:]]
    if inner := [p for p in find_adapters(path) if p != path]:
        names = shown([quoted(p.relative_to(path)) for p in inner])
        warnings.append(f"{counted(len(inner), 'adapter')} in folders below are not read: {', '.join(names)}")
    return _opened(path, found[0], warnings)


def find_adapters(folder: str | Path) -> list[Path]:
    """Folders with an adapter in them: `folder` itself and those up to two levels below; checkpoints by number."""
    found: list[Path] = []

    def visit(here: Path, depth: int) -> None:
        try:
            inside = {p.name: p for p in here.iterdir()}
            if any(name in inside and inside[name].is_file() for name in WEIGHTS):
                found.append(here)
            inner = [p for p in inside.values() if not p.name.startswith(".") and p.is_dir()] if depth < _DEPTH else []
        except OSError:
            return  # what may not be looked into is not what was asked for
        for each in sorted(inner, key=_natural):
            visit(each, depth + 1)

    visit(Path(folder), 0)
    return found


def shown(lines: Sequence[str], most: int = 5) -> list[str]:
    """The first few lines, and how many more there are."""
    kept = list(lines[:most])
    return [*kept, f"… and {len(lines) - most} more"] if len(lines) > most else kept


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _existing(path: str | Path) -> Path:
    given, path = str(path), Path(path)
    try:
        if path.exists():
            return path
    except PermissionError as error:
        raise machine_error(error, "look at", path) from error
    except (OSError, ValueError):
        pass
    hint = None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not given.startswith(".") and not path.parent.exists():
        hint = f"if it is a repository on the Hugging Face Hub, download it first: hf download {given} --local-dir DIR"
    raise UsageError(f"there is no file or folder {quoted(given)}", hint=hint)


def _opened(path: Path, file: Path, warnings: list[str]) -> AdapterSource:
    from loratools.storage.json_file import read_json
    from loratools.storage.safetensors_reader import read_header
    from loratools.storage.sniff import describe

    if file.name == CONFIG or file.suffix == ".json":
        raise FormatError(f"{quoted(file)} holds no tensors", hint="give the folder, or the file with the weights")
    found = describe(file)
    other: Mapping[str, object] = {}
    metadata: Mapping[str, str] = {}
    # The content decides, not the name: a .bin may hold safetensors.
    if found is not None and found.what.endswith("pickle"):
        from loratools.storage.torch_pickle import read_pickle

        pickled = read_pickle(file)
        tensors, other = pickled.tensors, pickled.other | dict.fromkeys(pickled.ignored)
    else:
        header = read_header(file)
        tensors, metadata = header.tensors, header.metadata
    beside = file.parent / CONFIG
    config = read_json(beside) if beside.is_file() else None
    if config is not None and file.name not in WEIGHTS:
        warnings = [*warnings, f"rank and alpha are taken from '{CONFIG}' in the folder of {quoted(file)}"]
    return AdapterSource(path, file.parent, file, config, tensors, metadata, other, tuple(warnings))


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
        )
    if any(re.fullmatch(r"(model|pytorch_model|diffusion_pytorch_model).*\.(safetensors|bin|json)", n) for n in names):
        return FormatError(f"{quoted(folder)} is a model checkpoint, not an adapter", details=shown(names))
    if not names:
        return FormatError(f"{quoted(folder)} is empty; an adapter has {' or '.join(WEIGHTS)}")
    weights = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    return FormatError(
        f"{quoted(folder)} has no {' or '.join(WEIGHTS)}",
        details=shown(names),
        hint=f"give the file itself: {folder / weights[0]}" if weights else None,
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise machine_error(error, "list", folder) from error


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """checkpoint-500 before checkpoint-1000."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", path.name) if p]
