"""What comes along beside the weights of a merged model: the base's files, and the adapter's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.ops.merge.outputs import PlannedFile
from loratools.storage.files import read_whole

# The files that together are a tokenizer: they come from one place, never mixed.
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# One of these is there wherever a tokenizer is; a lone chat template or token map is none.
_SIGNS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def planned_side_files(
    base: Checkpoint, adapters: Sequence[Adapter], configs: Mapping[str, str]
) -> tuple[tuple[PlannedFile, ...], list[str]]:
    """Files to put beside the weights, sorted by name, and warnings; `configs`: texts that replace the base's."""
    warnings: list[str] = []
    files = {f.name: PlannedFile(f.name, f.path) for f in base.side_files}
    bringing = [
        (a, folder) for a in adapters for folder in [_folder(a)] if folder is not None and _has_tokenizer(folder)
    ]
    if bringing:
        adapter, folder = bringing[0]
        for name in _TOKENIZER:
            files.pop(name, None)
            if (folder / name).is_file():
                files[name] = PlannedFile(name, folder / name, origin=adapter.name)
        warnings += [
            f"'{other.name}' brings another tokenizer than '{adapter.name}', whose is used"
            for other, place in bringing[1:]
            if not _same_tokenizer(folder, place)
        ]
    files |= {name: PlannedFile(name, text=text) for name, text in configs.items()}
    return tuple(files[name] for name in sorted(files)), warnings


def _folder(adapter: Adapter) -> Path | None:
    if adapter.path is None:
        return None
    return adapter.path if adapter.path.is_dir() else adapter.path.parent


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SIGNS)


def _same_tokenizer(a: Path, b: Path) -> bool:
    def content(folder: Path, name: str) -> bytes | None:
        return read_whole(folder / name) if (folder / name).is_file() else None

    return all(content(a, name) == content(b, name) for name in _TOKENIZER)
