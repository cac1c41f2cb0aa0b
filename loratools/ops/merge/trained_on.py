"""What training saw: the values that quantising a weight made of it, computed anew from the full-precision base.

QLoRA trains an adapter on `dequantise(quantise(W))`. Added to W itself it is another function, by the error of the
quantisation, which may be larger than the update. With `trained_on` the adapters are added to the values that training
saw. Weights that no adapter changes stay as the base has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.errors import FormatError, UnsupportedError, UsageError
from loratools.ops.merge.outputs import Output
from loratools.storage.arrays import read_array
from loratools.storage.files import quoted, read_whole
from loratools.storage.json_file import parse_json
from loratools.tensors.dtypes import FLOAT_DTYPES, torch_dtype
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.blockwise import Singles
    from loratools.algebra.rounding import Floats

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Output heads, which transformers leaves as they are.
_HEADS = frozenset({"lm_head", "embed_out", "output"})
_MOST_BYTES = 1 << 20
_READ_ELEMENTS = 1 << 20
# What a folder's README says of its training, as PEFT writes it: `- load_in_4bit: True`.
_LINE = re.compile(r"^- (_?load_in_[48]bit|bnb_4bit_\w+|quant_method): (\S+)", re.MULTILINE)
# Sample for the size of a difference: this number of weights, and about this number of values of each.
_SAMPLED_WEIGHTS, _SAMPLED_VALUES = 12, 1 << 16


@dataclass(frozen=True)
class TrainingScheme:
    """How a base was quantised while an adapter was trained on it, by bitsandbytes.

    Attributes:
        codes: nf4, fp4 or int8.
        blocksize: Of 4 bits: values that share a scale.
        nested: Of 4 bits: whether scales are quantised as well.
    """

    codes: str
    blocksize: int = 64
    nested: bool = False

    def __str__(self) -> str:
        return f"{self.codes}, double quantisation" if self.nested else self.codes


def training_scheme(name_or_file: str | Path | TrainingScheme) -> TrainingScheme:
    """The scheme of that name (nf4, fp4, int8), or the one that a JSON file describes as transformers does.

    Raises:
        UsageError: It is neither.
        FormatError: The file is no JSON object.
        UnsupportedError: The file describes a scheme that cannot be computed from the weights.
    """
    if isinstance(name_or_file, TrainingScheme):
        return name_or_file
    text = str(name_or_file)
    if text in ("nf4", "fp4", "int8"):
        return TrainingScheme(text)
    path = Path(text)
    if not path.is_file():
        raise UsageError(
            f"'{text}' is neither nf4, fp4 nor int8, nor a file",
            hint="give the quantization_config of the training as a JSON file",
        )
    document = parse_json(read_whole(path), quoted(path))
    if not isinstance(document, dict):
        raise FormatError(f"{quoted(path)} holds no JSON object", hint="it is a quantization_config of transformers")
    section = document.get("quantization_config", document)
    scheme = _from_config(section) if isinstance(section, Mapping) else None
    if scheme is None:
        method = section.get("quant_method") if isinstance(section, Mapping) else None
        raise UnsupportedError(
            f"{quoted(path)} describes {method or 'no quantisation'}, which is not computed from the weights here",
            hint="bitsandbytes' nf4, fp4 and int8 are; of another scheme, merge into the quantised model itself with "
            "--dequantize",
        )
    return scheme


def _from_config(config: Mapping[str, object]) -> TrainingScheme | None:
    """The scheme of a quantization_config; None if it is not one of bitsandbytes."""

    def is_set(*keys: str) -> bool:
        return any(config.get(key) in (True, "True", "true") for key in keys)

    if config.get("quant_method", "bitsandbytes") != "bitsandbytes":
        method = str(config.get("quant_method")).rpartition(".")[2].lower()
        if method not in ("bitsandbytes", "bits_and_bytes"):
            return None
    if is_set("load_in_8bit", "_load_in_8bit"):
        return TrainingScheme("int8")
    codes = config.get("bnb_4bit_quant_type", "fp4")
    if not is_set("load_in_4bit", "_load_in_4bit") or codes not in ("nf4", "fp4"):
        return None
    blocksize = config.get("bnb_4bit_blocksize", 64)
    if blocksize not in _BLOCKSIZES:
        return None
    assert isinstance(blocksize, int)
    return TrainingScheme(str(codes), blocksize, is_set("bnb_4bit_use_double_quant"))


def declared_training(adapter: Adapter) -> TrainingScheme | None:
    """How the base was quantised in training, where the README in the adapter's folder says so as PEFT writes it."""
    if adapter.path is None:
        return None
    readme = (adapter.path if adapter.path.is_dir() else adapter.path.parent) / "README.md"
    try:
        if not readme.is_file() or readme.stat().st_size > _MOST_BYTES:
            return None
        text = read_whole(readme).decode("utf-8", "replace")
    except OSError:
        return None
    # The last run is the one that the weights are from; each says all of its settings.
    return _from_config(dict(_LINE.findall(text)))


@dataclass(frozen=True)
class AsTrained:
    """Source of the values that training saw in place of those of a full-precision weight."""

    of: LazyTensor
    scheme: TrainingScheme

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_floats(self, start: int, stop: int) -> Floats:
        """Rows start:stop as float32, rounded as bitsandbytes rounds."""
        import numpy as np

        from loratools.algebra.blockwise import block_maxima, four_bit_values, int8_values
        from loratools.algebra.packing import onto_grid

        rows, columns = self.of.shape
        if start == stop:
            return np.empty((0, columns), np.float32)
        if self.scheme.codes == "int8":
            return int8_values(read_array(self.of, "F32", start, stop))
        size = self.scheme.blocksize
        # Whole blocks, and the rows that these lie in.
        first, last = start * columns // size, -(-stop * columns // size)
        top, bottom = first * size // columns, min(rows, -(-last * size // columns))
        values = read_array(self.of, "F32", top, bottom).reshape(-1)[first * size - top * columns :]
        values = values[: (last - first) * size]
        maxima = block_maxima(values, size)
        scales = _all_scales(self.of, self.scheme)[first:last] if self.scheme.nested else maxima
        trained = four_bit_values(values, self.scheme.codes, size, maxima, scales)
        skipped = start * columns - first * size
        trained = trained[skipped : skipped + (stop - start) * columns]
        return onto_grid(trained.reshape(stop - start, columns), self.of.dtype)

    def read_rows(self, start: int, stop: int) -> Tensor:
        import torch

        return torch.from_numpy(self.read_floats(start, stop)).to(torch_dtype(self.of.dtype))

    def scalar(self) -> float:
        return float(self.read_floats(0, 1).item())


@lru_cache(maxsize=4)
def _all_scales(tensor: LazyTensor, scheme: TrainingScheme) -> Singles:
    """The scales of all blocks of one weight, quantised and dequantised themselves."""
    import numpy as np

    from loratools.algebra.blockwise import block_maxima, nested_scales

    rows, columns = tensor.shape
    size = scheme.blocksize
    # So many rows have a whole number of blocks.
    step = size // math.gcd(size, columns)
    step *= max(1, _READ_ELEMENTS // (step * columns))
    pieces = [
        block_maxima(read_array(tensor, "F32", i, min(i + step, rows)).reshape(-1), size) for i in range(0, rows, step)
    ]
    return nested_scales(np.concatenate(pieces))


def with_training_values(
    base: Checkpoint, outputs: Mapping[str, Output], scheme: TrainingScheme
) -> tuple[dict[str, Output], list[str]]:
    """The outputs, those that adapters are added to with the values that training saw, and warnings.

    Raises:
        UnsupportedError: The base is quantised, or a weight is not stored as training had it.
    """
    if base.quantisation is not None:
        raise UnsupportedError(
            f"the base {quoted(base.path)} is quantised itself ({base.quantisation.name})",
            hint="leave --trained-on out: what is stored is what training saw, if it is the same scheme",
        )
    adapted, not_quantised, wrong = dict(outputs), [], []
    for name, output in outputs.items():
        if not output.updates or output.replaced_by is not None:
            continue
        if not _is_linear(name, output):
            not_quantised.append(name)
            continue
        if (reason := _stored_otherwise(output, scheme)) is not None:
            wrong.append(f"{name}   {reason}")
            continue
        values = LazyTensor(output.values.shape, output.values.dtype, AsTrained(output.values, scheme))
        adapted[name] = replace(output, values=values)
    if wrong:
        raise UnsupportedError(
            f"{len(wrong)} weights of {quoted(base.path)} are not stored as training quantised them",
            details=wrong,
            hint="leave them out with --exclude, or merge into the quantised model itself with --dequantize",
        )
    warnings = (
        [f"not quantised in training, and taken as they are: {', '.join(not_quantised)}"] if not_quantised else []
    )
    return adapted, warnings


def as_trained(output: Output, scheme: TrainingScheme) -> Output | None:
    """The output added to the values that training saw; None if such a weight was not quantised in training."""
    if not _is_linear(output.name, output) or _stored_otherwise(output, scheme) is not None:
        return None
    values = LazyTensor(output.values.shape, output.values.dtype, AsTrained(output.values, scheme))
    return replace(output, values=values)


def _is_linear(name: str, output: Output) -> bool:
    """Whether training quantised it: weights of linear layers but for the head, and no embeddings."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    linear = len(output.shape) == 2 and output.values.dtype in FLOAT_DTYPES and name.endswith("weight")
    return linear and module not in _HEADS and not any(u.update.embedding for u in output.updates)


def _stored_otherwise(output: Output, scheme: TrainingScheme) -> str | None:
    """Why blocks of the stored weight are not those of training; None if they are."""
    if output.inputs_along_rows:
        return "it is stored (in, out), and blocks run along its inputs"
    if output.values.dtype == "F64":
        return "it is stored in float64"
    parts = any(not u.place.is_whole for u in output.updates)
    if parts and scheme.codes != "int8" and (scheme.nested or output.shape[1] % scheme.blocksize):
        return "it holds several modules, whose blocks run from one into the next"
    return None


def size_of_difference(outputs: Sequence[Output], scheme: TrainingScheme) -> float | None:
    """About ||dequantise(quantise(W)) - W|| / ||update||, from a sample of rows of the weights that adapters change.

    None if there is nothing to compare.
    """
    import numpy as np

    from loratools.ops.merge.rows import prepared, total_delta

    plain = replace(scheme, nested=False)
    fitting = [
        o for o in outputs
        if o.updates and o.replaced_by is None and _is_linear(o.name, o) and _stored_otherwise(o, plain) is None
        and not o.needs_whole
    ]  # fmt: skip
    difference = update = 0.0
    for output in fitting[:: max(1, len(fitting) // _SAMPLED_WEIGHTS)]:
        source = output.values.source
        values = source.of if isinstance(source, AsTrained) else output.values
        stop = min(output.rows, max(1, _SAMPLED_VALUES // max(1, output.columns)))
        stored = read_array(values, "F32", 0, stop)
        moved = AsTrained(values, plain).read_floats(0, stop) - stored
        delta = np.empty_like(stored)
        deltas = prepared(output, "F32", 0, stop)
        if deltas:
            total_delta(deltas, 0, stored, delta)
            difference += float(np.vdot(moved, moved))
            update += float(np.vdot(delta, delta))
    return math.sqrt(difference / update) if update > 0 else None
