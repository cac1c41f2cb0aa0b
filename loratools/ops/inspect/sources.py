"""What there is to inspect at a path: the file or folder itself, or every adapter, model and broken file below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from loratools import formats, registry
from loratools.errors import LoraToolsError
from loratools.formats.common.companions import companions_of
from loratools.formats.common.dumped_model import dumped_files
from loratools.formats.common.shards import is_shard
from loratools.formats.common.source import (
    ADAPTER_FILES,
    CONFIG,
    MODEL_FILE,
    NUMBERED_FILE,
    TENSOR_SUFFIXES,
    TRAINING_FILE,
    find_adapters,
    natural_order,
)
from loratools.ops.inspect.entries import NotListed
from loratools.storage.origins import shown

# The files of an adapter's folder, by which no layout knows a model.
_OF_ADAPTERS = frozenset({*ADAPTER_FILES, CONFIG, "README.md"})
# What else files of these suffixes hold is no reason to call them broken: vocabularies, states of programs.
_OF_ANYTHING = frozenset({".bin", ".pt", ".pth", ".ckpt"})


class FoundSource(NamedTuple):
    """Something to inspect. `error`: why it cannot be, where the search has come upon that already."""

    path: Path
    is_adapter: bool
    error: LoraToolsError | OSError | None = None


class SearchResult(NamedTuple):
    """What a path has to inspect, and what is there besides."""

    sources: tuple[FoundSource, ...]
    not_listed: tuple[NotListed, ...] = ()


# Whether each of some files is an adapter, or why that cannot be known.
Verdict: TypeAlias = "bool | LoraToolsError | OSError"
Decide: TypeAlias = Callable[[Sequence[Path]], Sequence[Verdict]]


def adapter_shaped(paths: Sequence[Path]) -> list[Verdict]:
    """Decide of each file by its keys whether it is an adapter."""
    verdicts: list[Verdict] = []
    for path in paths:
        try:
            verdicts.append(formats.is_adapter_shaped(path))
        except (LoraToolsError, OSError) as error:
            verdicts.append(error)
    return verdicts


def sources_at(path: Path, format: str | None, *, decide: Decide = adapter_shaped) -> SearchResult:
    """What there is to inspect at `path`: itself, or what is in a folder that is neither adapter nor model.

    `decide` is asked once, of all files whose names do not tell whether they are adapters.
    """
    if format is not None:
        return SearchResult((FoundSource(path, is_adapter=True),))
    if not path.is_dir():
        # Of a file the content decides; what is not there is for `open_checkpoint` to tell.
        verdict = path.exists() and decide([path])[0]
        if not isinstance(verdict, bool):
            raise verdict
        return SearchResult((FoundSource(path, is_adapter=verdict),))
    adapters = find_adapters(path)
    if path not in adapters and _is_dump(path):
        return SearchResult((FoundSource(path, is_adapter=True),))
    if path not in adapters and is_checkpoint(path):
        # It says itself what lies in its folder and is no part of it.
        return SearchResult((FoundSource(path, is_adapter=False),))
    search = _Search()
    search.visit(path)
    search.settle(decide)
    sources = sorted(search.sources, key=lambda source: natural_order_of_path(source.path))
    if path in adapters:
        # Adapters in folders below are named by the adapter's own warning.
        other_paths = [s.path for s in sources if s.path != path and s.path not in adapters]
        why = "beside or below the adapter; inspect them by their own paths"
        search.skip(why, other_paths)
        sources = [s for s in sources if s.path == path]
    # Neither: opening it tells what it is instead.
    return SearchResult(tuple(sources) or (FoundSource(path, is_adapter=False),), search.not_listed)


def _is_dump(folder: Path) -> bool:
    return bool(dumped_files(folder, [p.name for p in folder.iterdir() if p.is_file()]))


def is_checkpoint(path: Path) -> bool:
    """Whether a layout of whole models claims what is at `path`."""
    return any(registry.load("checkpoints", name).detect(path) for name in registry.names("checkpoints"))


def natural_order_of_path(path: Path) -> list[list[tuple[int, int, str]]]:
    """Return a key that sorts checkpoint-500 before checkpoint-1000, and a folder before what is in it."""
    return [_natural_order_of_part(part) for part in path.parts]


# Thousands of paths have their first folders in common.
@lru_cache(maxsize=1 << 14)
def _natural_order_of_part(part: str) -> list[tuple[int, int, str]]:
    return natural_order(Path(part))


class _Undecided(NamedTuple):
    """A file that may be an adapter, and whether a model lies beside it."""

    path: Path
    beside_model: bool


class _Search:
    """A walk through a folder to its bottom. Links to folders are followed, each folder is visited once."""

    def __init__(self) -> None:
        self.sources: list[FoundSource] = []
        self._undecided: list[_Undecided] = []
        self._skipped: dict[str, list[str]] = {}
        self._visited: set[tuple[int, int]] = set()

    @property
    def not_listed(self) -> tuple[NotListed, ...]:
        return tuple(NotListed(why, tuple(paths)) for why, paths in self._skipped.items())

    def skip(self, why: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self._skipped.setdefault(why, []).append(shown(path))

    def visit(self, folder: Path) -> None:
        # A list in place of calls in calls: folders may be nested deeper than the interpreter's stack.
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            try:
                status = current.stat()
                if (status.st_dev, status.st_ino) in self._visited:
                    continue
                self._visited.add((status.st_dev, status.st_ino))
                inside = sorted(current.iterdir(), key=natural_order)
                folders = [p for p in inside if p.is_dir()]
                files = [p for p in inside if p.is_file()]
            except OSError as error:
                self.sources.append(FoundSource(current, is_adapter=False, error=error))
                continue
            is_pipeline = self._note_folder(current, files)
            self.skip("hidden folders, which are not searched", [p for p in folders if p.name.startswith(".")])
            # The folders of a pipeline are its parts.
            waiting += [] if is_pipeline else [p for p in folders if not p.name.startswith(".")]

    def _note_folder(self, folder: Path, files: list[Path]) -> bool:
        """Note what `folder` itself is, and its files that stand for themselves; whether it is a pipeline."""
        names = {p.name for p in files}
        is_adapter = any(name in ADAPTER_FILES or is_shard(name) for name in names)
        # A dozen layouts look into the folder, and most folders of a library have an adapter or nothing.
        is_model = not names <= _OF_ADAPTERS and is_checkpoint(folder)
        of_a_model = any(MODEL_FILE.fullmatch(p.name) and p.suffix in TENSOR_SUFFIXES for p in files)
        if not is_adapter and of_a_model and _is_dump(folder):
            is_adapter, of_a_model, is_model = True, False, False
        if any(is_shard(name) for name in names) and not of_a_model:
            is_model = False  # the index, which has a model's name, is of the adapter's shards
        if is_adapter or CONFIG in names:
            self.sources.append(FoundSource(folder, is_adapter=True))
        if is_model or of_a_model:
            self.sources.append(FoundSource(folder, is_adapter=False))
        self._note_files(folder, files, is_adapter=is_adapter, is_model=is_model)
        return is_model and "model_index.json" in names

    def _note_files(self, folder: Path, files: list[Path], *, is_adapter: bool, is_model: bool) -> None:
        named_by_adapter = set(companions_of(folder / CONFIG, ADAPTER_FILES)) if is_adapter else set()
        for path in files:
            name = path.name
            if path.suffix.lower() not in TENSOR_SUFFIXES or name in ADAPTER_FILES or is_shard(name):
                continue
            if TRAINING_FILE.fullmatch(name):
                self.skip("state of a training", [path])
            elif is_adapter and NUMBERED_FILE.fullmatch(name):
                self.skip("earlier states of the adapter beside them", [path])
            elif not MODEL_FILE.fullmatch(name) and path not in named_by_adapter:
                self._undecided.append(_Undecided(path, is_model))

    def settle(self, decide: Decide) -> None:
        """Note what the files are that stand for themselves, now that all of them are known."""
        verdicts = decide([each.path for each in self._undecided])
        for (path, beside_model), verdict in zip(self._undecided, verdicts, strict=True):
            if isinstance(verdict, bool):
                if beside_model and not verdict:
                    self.skip("no part of the model beside them", [path])
                else:
                    self.sources.append(FoundSource(path, is_adapter=verdict))
            elif path.suffix.lower() in _OF_ANYTHING and not _is_container(path):
                self.skip("no tensors", [path])
            else:
                self.sources.append(FoundSource(path, is_adapter=False, error=verdict))


def _is_container(path: Path) -> bool:
    """Whether the first bytes are those of a file that tensors are stored in, or of what a failed download leaves."""
    from loratools.storage.sniff import describe

    try:
        description = describe(path)
    except (LoraToolsError, OSError):
        return True
    return description is not None and not description.kind.startswith("a text that")
