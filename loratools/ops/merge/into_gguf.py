"""Merging into a GGUF file: what of the result is the base's, and what a header of llama.cpp leaves no room for.

The result has the keys of the base, letter by letter, and its tensors in the same order. Each has a ggml type of its
own: those that nothing changes keep theirs, and their bytes; `--dequantize` and `--requantize TYPE` are for the changed
ones alone, unlike in formats whose config speaks of the whole model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.checkpoints import Checkpoint
from loratools.errors import UnsupportedError, UsageError
from loratools.matching import Matches
from loratools.ops.merge.options import MergeOptions
from loratools.ops.merge.outputs import Output, OutputFile
from loratools.ops.merge.quantised import changed_and_packed, is_dequantised, with_dequantised
from loratools.storage.files import quoted, read_bytes
from loratools.storage.gguf_reader import BlockTensor
from loratools.storage.gguf_writer import GgufSpec, gguf_layout, key_bytes
from loratools.storage.streamed_file import FileLayout
from loratools.tensors.dtypes import FLOAT_DTYPES
from loratools.tensors.shapes import shape_text

# What llama.cpp's own export of a merged model has, and its kernels are fastest with.
_DEQUANTISED = "F16"
# Matrices that llama.cpp's conversion keeps in float32 whatever the type of the file, by a part of their names.
_ALWAYS_F32 = ("ffn_gate_inp", "_norm", "position_embd", "token_types", "ssm_", "shortconv.conv", "time_mix_")
_FILE_TYPE = "general.file_type"
# llama.cpp's number for a file that is mostly of that type (LLAMA_FTYPE_MOSTLY_...), for the types that a merge can
# make the most common one.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


def is_gguf(base: Checkpoint) -> bool:
    """Whether the base is a GGUF file."""
    return base.layout == "gguf"


def refuse_options(base: Checkpoint, options: MergeOptions) -> None:
    """Raise UsageError where an option means nothing for the base."""
    if options.retype is not None and not is_gguf(base):
        raise UsageError(
            f"--requantize {options.retype.lower()} is a ggml type, and {quoted(base.path)} is no GGUF file",
            hint="give --requantize alone, which keeps the base's own scheme",
        )
    if is_gguf(base) and options.stored_dtype == "F64":
        raise UsageError("llama.cpp does not compute with float64", hint="give --dtype float32")
    if is_gguf(base) and options.max_shard_bytes is not None:
        raise UsageError(
            "a merge into a GGUF file gives one file, and --max-shard-size cuts it",
            hint="leave it out, and cut the result with llama-gguf-split",
        )


def dequantised_where_changed(base: Checkpoint, matches: Sequence[Matches]) -> Checkpoint:
    """The base with the quantised weights that adapters change as plain ones."""
    changed = changed_and_packed(base, matches)
    return with_dequantised(base, changed) if changed else base


def in_types_of_gguf(base: Checkpoint, outputs: Mapping[str, Output], dtype: str | None) -> dict[str, Output]:
    """The outputs of a merge in the dtypes that they are stored in.

    `dtype` is for matrices; vectors, and the few matrices that llama.cpp keeps in float32, keep the type that they
    have. Dequantised weights are float16 if None.

    Raises:
        UnsupportedError: A tensor has another shape than in the base, or none there.
    """
    stored: dict[str, Output] = {}
    packed = base.quantisation.weights if base.quantisation is not None else {}
    misfits = []
    for name, output in outputs.items():
        source = base.tied.get(name, name)
        weight = base.weights.get(source)
        if weight is None or weight.shape != output.shape:
            before = f"the base has {shape_text(weight.shape)}" if weight is not None else "the base has none"
            misfits.append(f"{name}   {shape_text(output.shape)}, {before}")
            continue
        if weight.dtype in FLOAT_DTYPES and source not in packed:
            keeps_type = len(output.shape) < 2 or any(part in name for part in _ALWAYS_F32)
            to = weight.dtype if keeps_type or dtype is None else dtype
            if is_dequantised(weight):
                to = dtype or _DEQUANTISED
            output = replace(output, dtype=to)
        stored[name] = output
    if misfits:
        raise UnsupportedError(
            f"{len(misfits)} tensors of the result would not fit the header of {quoted(base.path)}",
            details=misfits,
            hint="merge into the model that it was converted from, and convert the result: a new vocabulary or a new "
            "head is in its config and tokenizer as well",
        )
    return stored


def ggml_spec(file: OutputFile, output: Output) -> GgufSpec:
    """Type and shape of a tensor as the header tells them."""
    if output.requantised is not None:
        weight = output.requantised.weight
        return GgufSpec(file.stored_name(output), weight.parameters.format, weight.shape)
    source = output.values.source
    if output.dtype == "U8" and isinstance(source, BlockTensor):
        return GgufSpec(file.stored_name(output), source.kind, source.logical)
    return GgufSpec(file.stored_name(output), output.dtype, output.shape)


def layout_of_gguf(file: OutputFile) -> FileLayout:
    """The header of a result, and where its tensors lie.

    The keys are the base's, then what `metadata` says of the merge. The type of the file changes where the type that
    most of its values have does.
    """
    header = file.gguf
    assert header is not None, "of a GGUF file only"
    specs = [ggml_spec(file, output) for output in file.outputs]
    changed = {key: key_bytes(key, text) for key, text in file.metadata.items()}
    file_type = _changed_file_type(file, specs)
    if file_type is not None:
        changed[_FILE_TYPE] = key_bytes(_FILE_TYPE, file_type)
    keys = [changed.pop(key) if key in changed else read_bytes(span) for key, span in header.keys.items()]
    return gguf_layout([*keys, *changed.values()], specs, version=header.version, alignment=header.alignment)


def _changed_file_type(file: OutputFile, specs: Sequence[GgufSpec]) -> int | None:
    """The number of the type that most values have now, where another had most of them before."""
    assert file.gguf is not None, "of a GGUF file only"
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for spec in specs:
        if len(spec.shape) > 1:
            after[spec.kind] += math.prod(spec.shape)
            if (kind := file.gguf.types.get(spec.name)) is not None:
                before[kind] += math.prod(spec.shape)
    most = after.most_common(1)[0][0] if after else None
    if most is None or not before or most == before.most_common(1)[0][0]:
        return None
    return _FILE_TYPES.get(most)
