"""How adapters are stored: one file per format, detected by content, read to an `Adapter` and written from one.

The protocol of such a file is `Format` below. Reading looks at headers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from loratools import registry
from loratools.adapter import Adapter
from loratools.arguments import checked
from loratools.errors import FormatError, InputError, UndecidedError, UnreadTensorsError, UnsupportedError, UsageError
from loratools.formats.common.base import Base
from loratools.formats.common.companions import WRITERS
from loratools.formats.common.detection_key import DetectionKey, detection_key
from loratools.formats.common.expert_layout import with_expert_layout
from loratools.formats.common.malformed import refuse_malformed
from loratools.formats.common.opened_base import known_base
from loratools.formats.common.sam_blocks import with_fused_blocks
from loratools.formats.common.source import (
    AdapterSource,
    counted,
    find_adapters,
    open_source,
    shown,
)
from loratools.formats.image_parts.spellings import is_learnt_token, is_spelled
from loratools.storage.files import quoted
from loratools.storage.held_inputs import holding_inputs
from loratools.updates.lora_experts import Packing

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint
    from loratools.storage.resumption import Resumable
    from loratools.storage.staging import Staging
    from loratools.storage.written_tensors import WrittenTensors

__all__ = ["Base", "Format", "RankFrom", "Staged", "detect", "find_adapters", "load", "load_source", "save", "staged"]

# Which rank the scale is computed from, if the config and the tensors disagree.
RankFrom = Literal["tensors", "config"]
FOLDER = "folder"
# Formats that read and write names exactly as the file has them (`Adapter.stored_names`).
_WITH_STORED_NAMES = ("bare", "comfy", "diffusers", "kohya", "lycoris", "onetrainer")


class Format(Protocol):
    """The protocol of a format's file. One that cannot be written has no `WRITES`, `unwritable` and `write`."""

    WRITES: str
    """`folder`, or the suffix of the one file it writes: `.safetensors`, `.gguf`."""

    HAS_TEXTS: bool
    """Whether the header of its file has texts that people can set. True for formats that do not say so."""

    def detect(self, source: AdapterSource) -> bool:
        """Whether the format claims the source. Must be strict: two formats that claim one source are an error."""

    def read(self, source: AdapterSource, *, rank_from: RankFrom | None) -> Adapter:
        """Read the adapter. Names of the base are in `source.base`, if a base was given."""

    def unwritable(self, adapter: Adapter, *, base: Base | None) -> Mapping[str, str]:
        """Names of updates and replacements that the format cannot hold, and why."""

    def write(self, adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None) -> tuple[str, ...]:
        """Write to `out`, an empty folder or the path of a file to create, and return warnings."""


@dataclass(frozen=True)
class Staged:
    """A written adapter at a temporary place, from which it will be moved.

    Attributes:
        path: The folder or file.
        warnings: What a person should know about it.
        prepared: The hidden folder that it is in.
        tensors: Which tensors were written and which a killed run had written; None for a run that cannot be resumed.
    """

    path: Path
    warnings: tuple[str, ...]
    prepared: Staging
    tensors: WrittenTensors | None = None


@checked(Checkpoint="loratools.checkpoints")
def load(
    path: str | Path,
    *,
    from_format: str | None = None,
    rank_from: RankFrom | None = None,
    base: str | Path | Checkpoint | Base | None = None,
    stored_names: bool = False,
    expert_packing: Packing | None = None,
) -> Adapter:
    """Read an adapter from a file or a folder. Headers are read, and no values.

    Args:
        path: The file or folder.
        from_format: One of `list_formats()`; detected from the content if None.
        rank_from: `tensors` or `config`: which rank the scale is computed from, if the two disagree. If None, such an
            adapter has `uncertainties`, and functions that need its scale refuse it.
        base: The base model: a path, an opened checkpoint, or a `Base`. Some formats need its names.
        stored_names: Keep the names of modules of image models exactly as the file has them.
        expert_packing: `peft` or `expert-major`: how the columns of B are ordered for fused experts. If None and both
            are possible, functions that need the values refuse the adapter.

    Returns:
        The adapter: a mapping of modules, whose values are read on access.

    Raises:
        UsageError: The path or the format does not exist.
        UndecidedError: More than one format matches the file.
        FormatError: It is not an adapter, or it is damaged.
        UnsupportedError: It needs features that loratools does not support, all of which are named.

    Example:
        >>> import loratools
        >>> adapter = loratools.load("fixtures/llama-tiny-science")
        >>> adapter["model.layers.0.self_attn.q_proj"].shape
        (96, 96)
    """
    if from_format is not None:
        _entry(from_format)
    source = replace(open_source(path, base=known_base(base)), stored_names=stored_names)
    adapter = load_source(source, format=from_format, rank_from=rank_from)
    return adapter if expert_packing is None else with_expert_layout([adapter], packing=expert_packing)[0]


def load_source(source: AdapterSource, *, format: str | None = None, rank_from: RankFrom | None = None) -> Adapter:
    """Like `load`, for a source that is open already."""
    if rank_from not in (None, "tensors", "config"):
        raise UsageError(f"the rank cannot be taken from '{rank_from}'; there are: config, tensors")
    entry = _entry(format or _only_claim(source))
    adapter = _read(entry, source, rank_from)
    unread = tuple(f.name for f in source.companions if f.name not in adapter.read_companions)
    companion_warnings = [
        f"trained weights are also read from {quoted(name)} beside the adapter, which {WRITERS[name]} writes"
        for name in adapter.read_companions
    ]
    companion_warnings += [
        f"{quoted(name)} beside the adapter holds tensors that are not read; they may be a part of the training"
        for name in unread
    ]
    empty = _empty_warnings(adapter)
    return replace(
        adapter, warnings=(*source.warnings, *adapter.warnings, *empty, *companion_warnings), unread_companions=unread
    )


def _empty_warnings(adapter: Adapter) -> list[str]:
    """The warnings and facts about an adapter that was saved without values."""
    if not adapter.updates and not adapter.replacements:
        return [f"{quoted(adapter.name)} holds no tensors: nothing was trained, or nothing was saved"]
    empty = [name for name, replacement in adapter.replacements.items() if not replacement.tensor.elements]
    if not empty:
        return []
    return [
        f"{counted(len(empty), 'replaced weight')} without any values: {', '.join(shown(empty))}; they were saved "
        "while they lay on other devices (DeepSpeed ZeRO-3, FSDP)"
    ]


def _read(entry: Format, source: AdapterSource, rank_from: RankFrom | None) -> Adapter:
    """The adapter without the tensors that a glob excludes, if they are the reason that it cannot be read."""
    left_out: tuple[str, ...] = ()
    why = "as --include and --exclude have it"
    while True:
        try:
            adapter = _read_all(entry, _without(source, left_out) if left_out else source, rank_from)
            return _noting(adapter, source, left_out, why) if left_out else adapter
        except InputError as error:
            # Only in this case, since most adapters can be read in full, and every key is compared with every glob.
            excluded = tuple(key for key in source.tensors if source.leave_out.excludes(key))
            unread = error.tensors if isinstance(error, UnreadTensorsError) and source.leave_out.unread else ()
            all_left_out = tuple(dict.fromkeys((*left_out, *excluded, *unread)))
            if len(all_left_out) in (len(left_out), len(source.tensors)):
                raise
            left_out, why = all_left_out, "because they cannot be read" if unread else why


def _read_all(entry: Format, source: AdapterSource, rank_from: RankFrom | None) -> Adapter:
    refuse_malformed(source)
    return entry.read(source, rank_from=rank_from)


def _without(source: AdapterSource, keys: Sequence[str]) -> AdapterSource:
    left_out = set(keys)
    return replace(source, tensors={key: tensor for key, tensor in source.tensors.items() if key not in left_out})


def _noting(adapter: Adapter, source: AdapterSource, keys: Sequence[str], why: str) -> Adapter:
    """The adapter with a warning that names the tensors that were not read, with their share of the values."""
    sizes = {key: tensor.elements for key, tensor in source.tensors.items()}
    share = sum(sizes[key] for key in keys) / max(1, sum(sizes.values()))
    names = ", ".join(shown([quoted(key) for key in sorted(keys)]))
    warning = f"{counted(len(keys), 'tensor')} left out, {why} ({share:.2%} of the values in the file): {names}"
    return replace(adapter, unread_tensors=tuple(sorted(keys)), warnings=(*adapter.warnings, warning))


def detect(path: str | Path) -> list[str]:
    """Names of the formats that match the file or folder at `path`."""
    return claims_of(open_source(path))


def claims_of(source: AdapterSource) -> list[str]:
    """Names of the formats that match an opened source."""
    if source.declared is not None:
        return [source.declared]  # a dozen formats need not be imported to learn that none of them matches
    key = detection_key(source)
    if key is None:
        return _detected(source)
    claims = _claims_of_names.get(key)
    if claims is None:
        if len(_claims_of_names) >= _MOST_KNOWN:
            _claims_of_names.clear()
        claims = _claims_of_names[key] = _detected(source)
    return list(claims)


# A folder of adapters has only a few distinct sets of names, and a dozen formats check each name of each file.
_MOST_KNOWN = 64
_claims_of_names: dict[DetectionKey, list[str]] = {}


def _detected(source: AdapterSource) -> list[str]:
    return [name for name in registry.names("formats") if registry.load("formats", name).detect(source)]


def is_adapter_shaped(path: str | Path) -> bool:
    """Whether a format matches the file at `path`, or its names end like parts of an adapter, in any spelling."""
    source = open_source(path)
    return bool(claims_of(source)) or has_spelled_parts(source)


def has_spelled_parts(source: AdapterSource) -> bool:
    """Whether a name ends like a part of an adapter, in any spelling."""
    return any(is_spelled(name) for name in source.tensors)


@checked(Checkpoint="loratools.checkpoints")
@holding_inputs()
def save(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    format: str = "peft",
    dtype: str | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    base: str | Path | Checkpoint | Base | None = None,
) -> tuple[str, ...]:
    """Write an adapter to `out`, completely or not at all.

    Args:
        adapter: The adapter: a path or a loaded adapter.
        out: The folder or file to write, depending on the format.
        format: The format to write, one of `list_formats()`.
        dtype: The dtype of the stored floating-point tensors: float32, bfloat16, float16 or float64. If None, each
            keeps its own.
        overwrite: Replace an output that loratools wrote. Files of other origin are never replaced.
        inputs: Paths that must not be overwritten.
        base: The base model: a path, an opened checkpoint, or a `Base`. Some formats need its names.

    Returns:
        Warnings about the result, as sentences.

    Raises:
        UsageError: The format or the dtype does not exist.
        OutputExistsError: `out` exists and may not be replaced, or is one of the inputs.
        UnsupportedError: The format cannot hold the adapter, or the scale of the adapter is uncertain.

    Example:
        >>> import loratools
        >>> loratools.save("fixtures/llama-tiny-science", "science-bf16", dtype="bfloat16")
        ()
    """
    base_names = known_base(base)
    if not isinstance(adapter, Adapter):
        inputs = [*inputs, adapter]
        adapter = load(adapter, base=base_names)
    with staged(
        adapter, out, format=format, dtype=dtype, overwrite=overwrite, inputs=inputs, base=base_names
    ) as written:
        return written.warnings


@contextmanager
def staged(
    adapter: Adapter,
    out: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    base: Base | None = None,
    resumable: Resumable | None = None,
) -> Iterator[Staged]:
    """Write an adapter beside `out`, and move it there when the block ends without an error. Raises the same errors as
    `save`.

    With `resumable`, tensors are noted as they are written, and what a killed run of the same plan had written stays.
    """
    from loratools.storage.casting import stored_dtype
    from loratools.storage.staging import require_files
    from loratools.storage.written_tensors import noting_tensors

    entry = writer(format)
    stored = None if dtype is None else stored_dtype(dtype)
    # Every format stores the scale in some way, so that an uncertain scale would be written as a fact.
    adapter.require_certain()
    adapter = fitted_names(adapter, format)
    ensure_writable(adapter, format, base=base)
    sources = [Path(p) for p in inputs]
    place = named(Path(out), format)
    with _prepared(place, entry.WRITES, overwrite, sources, resumable) as (prepared, path):
        if resumable is None:
            tensors = None
            warnings = entry.write(adapter, path, dtype=stored, base=base)
        else:
            with noting_tensors(prepared) as tensors:
                warnings = entry.write(adapter, path, dtype=stored, base=base)
        names = [p.name for p in path.iterdir()] if path.is_dir() else []
        yield Staged(path, warnings, prepared, tensors)
        require_files(path, Path(out), names)


@contextmanager
def _prepared(
    out: Path, writes: str, overwrite: bool, inputs: Sequence[Path], resumable: Resumable | None
) -> Iterator[tuple[Staging, Path]]:
    """The hidden folder of an output, and what to write in it: the folder itself, or one file."""
    from loratools.storage.commit import prepared_file, prepared_folder

    if writes == FOLDER:
        with prepared_folder(out, overwrite=overwrite, inputs=inputs, resumable=resumable) as prepared:
            yield prepared, prepared.path
    else:
        with prepared_file(out, overwrite=overwrite, inputs=inputs, resumable=resumable) as (prepared, path):
            yield prepared, path


def ensure_writable(adapter: Adapter, format: str, *, base: Base | None = None) -> None:
    """Raise UnsupportedError that names every part of the adapter that the format cannot hold, if there is any."""
    adapter = fitted_names(adapter, format)
    ensure_layers(adapter, format)
    if lost := writer(format).unwritable(adapter, base=base):
        raise UnsupportedError(
            f"{counted(len(lost), 'part')} of {quoted(adapter.name)} cannot be written as {format}",
            details=[f"{name}: {why}" for name, why in sorted(lost.items())],
            hint="leave out what it cannot hold, with --exclude, or write another format",
        )


def fitted_names(adapter: Adapter, format: str) -> Adapter:
    """The adapter with the module names of `format`. Raises the same errors as `ensure_named`.

    Only SAMed stores queries and values of SAM apart. PEFT uses the names of one model, without the component of a
    pipeline; if a file is for one model, a second transformer alone has the names of any.
    """
    from loratools.formats.image_parts.component import second_as_first, without_component

    ensure_named(adapter, format)
    if format != "sam-lora":
        adapter = with_fused_blocks(adapter)
    if "image" not in adapter.notes or format == "diffusers":
        return adapter
    return without_component(adapter) if format == "peft" else second_as_first(adapter)


def written_suffix(format: str) -> str | None:
    """What a format writes: `folder`, or the suffix of its single file; None if it cannot be written."""
    entry = _entry(format)
    return entry.WRITES if hasattr(entry, "write") else None


def keeps_names(format: str) -> bool:
    """Whether adapters of this format can be read with the names of the file and written back with them."""
    return format in _WITH_STORED_NAMES


def ensure_layers(adapter: Adapter, client: str) -> None:
    """Raise UnsupportedError if `client`, a format or server, would apply the adapter to other layers or tokens."""
    if adapter.invocation_tokens and client not in ("peft", "gguf"):
        raise UnsupportedError(
            f"{quoted(adapter.name)} acts after certain tokens only (aLoRA), which cannot be written for {client}: "
            "there it would act on every token",
            hint="write it as peft or gguf, which can store the tokens",
        )
    if adapter.layer_replication and client != "peft":
        raise UnsupportedError(
            f"{quoted(adapter.name)} repeats layers of its base (layer_replication), which {client} cannot: "
            "there it would be applied to the wrong layers, or to layers that the base does not have",
            hint="merge it into its base, which gives a deeper model",
        )


def ensure_named(adapter: Adapter, format: str) -> None:
    """Raise an error if the module names of the adapter are those of a file in another format.

    Raises:
        UndecidedError: The names may belong to several models.
        UnsupportedError: The names belong to no model that is known here.
    """
    if not adapter.stored_names:
        from loratools.formats.image_parts.component import ensure_component

        ensure_component(adapter, format)
    if not adapter.stored_names or adapter.format == format:
        return
    # Names of diffusers are those of its models, whichever they are.
    if (adapter.format, format) == ("diffusers", "peft"):
        return
    why = adapter.undecided or UnsupportedError(
        f"its modules have the names of {adapter.format}", hint="name the model it is for: --base BASE"
    )
    kind = UndecidedError if isinstance(why, UndecidedError) else UnsupportedError
    raise kind(
        f"{quoted(adapter.name)} cannot be written as {format}, which names modules otherwise: {why.message}",
        details=why.details,
        hint=why.hint,
    )


def writer(format: str) -> Format:
    """The format with this name.

    Raises:
        UsageError: The format does not exist, or cannot be written.
    """
    entry = _entry(format)
    if not hasattr(entry, "write"):
        able = [name for name in registry.names("formats") if hasattr(registry.load("formats", name), "write")]
        raise UsageError(f"{format} can be read, but not written", hint=f"choose one of {', '.join(able)}")
    return entry


def named(out: Path, format: str) -> Path:
    """Return `out` if its name is suitable for what the format writes.

    Raises:
        UsageError: A format that writes a folder was given the name of a file, or the other way round.
    """
    suffix, has = writer(format).WRITES, out.suffix.lower()
    if suffix == FOLDER and has in (".safetensors", ".gguf", ".npz", ".bin", ".pt"):
        raise UsageError(
            f"{format} writes a folder, and {quoted(out)} is the name of a file", hint="leave out the suffix"
        )
    if suffix not in (FOLDER, has):
        raise UsageError(f"{format} writes one file, '*{suffix}'", hint=f"name it {out.name}{suffix}")
    return out


def _entry(name: str) -> Format:
    return cast(Format, registry.load("formats", name))


def _only_claim(source: AdapterSource) -> str:
    claims = claims_of(source)
    if len(claims) == 1:
        return claims[0]
    if claims:
        raise UndecidedError(
            f"{quoted(source.path)} could be {' or '.join(claims)}",
            hint=f"say which: --from {claims[0]}, or --from {claims[1]}",
        )
    count = len(source.tensors)
    if not count:
        raise FormatError(f"{quoted(source.file)} holds no tensors")
    learnt = all(is_learnt_token(name) for name in source.tensors)
    embeddings_only = "these are embeddings of new tokens (textual inversion), which change no weight of a model"
    adapted = any("lora" in name.lower() for name in source.tensors)
    model = "a whole model is given as the base: to take an adapter out of a fine-tuned one, use loratools extract"
    raise FormatError(
        f"{quoted(source.path)} is no adapter of a format known here: none of its {count} tensors is a part of one",
        details=shown([quoted(name)[1:-1] for name in source.tensors]),
        hint="its names speak of LoRA, in a spelling that is not read"
        if adapted
        else embeddings_only
        if learnt
        else model,
    )
