"""Reader of what torch.save writes (.bin, .pt, .pth, .ckpt), without torch and without unpickling.

Two containers: a zip archive (torch 1.6 and later: `data.pkl` beside one entry per storage) and the legacy stream
(three small pickles, the object, the list of storages, the storages). In both, the pickle names storages by key; here
a storage is a range of bytes of the file, a tensor a view of one. Reference: torch/serialization.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.errors import FormatError, UnsupportedError
from loratools.hints import DAMAGED
from loratools.storage.files import identify, quoted, read_bytes
from loratools.storage.pickle_machine import HINT, CopyBudget, Machine, put_items
from loratools.storage.sniff import ENOUGH, describe
from loratools.storage.stored import StoredTensor, StridedTensor
from loratools.storage.stored_zip import StoredZip
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor

# Where training programs put the weights among other things; one such level is taken off.
WRAPPERS = ("state_dict", "model", "module")

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_AXES = 64
# A view may repeat its storage (expand). Beyond this size a few bytes that claim to be terabytes are no weights.
_MAX_REPEATED = 1 << 30

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_CALLABLE = frozenset({
    "collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode",
    "builtins.set", "builtins.frozenset",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
})  # fmt: skip
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"})


@dataclass(frozen=True)
class PickledFile:
    """What a torch pickle holds.

    `inside` names the wrapper that was taken off (`state_dict`), or is empty. `other` are numbers and texts beside the
    tensors, the wrapper's before the outer ones; `ignored` names what is neither, such as the state of an optimiser.
    """

    file: FileId
    tensors: dict[str, LazyTensor]
    other: dict[str, object]
    inside: str = ""
    ignored: tuple[str, ...] = ()


def read_pickle(path: Path) -> PickledFile:
    """Find the tensors of a torch pickle. No values are read, nothing is imported or run.

    Raises:
        UsageError: There is no such file.
        UnsupportedError: It needs something that is not known to be harmless, by name.
        FormatError: It is no torch pickle, or a damaged one.
    """
    file = identify(path)
    first = read_bytes(ByteRange(file, 0, min(file.size, ENOUGH)))
    if first.startswith(b"PK\x03\x04"):
        return _select(file, *_read_zip(file))
    if first[:1] == b"\x80":
        return _select(file, *_read_legacy(file))
    sniffed = describe(first)
    actual_kind = f"but {sniffed.kind}" if sniffed else "by its first bytes"
    raise FormatError(
        f"{quoted(path)} is not a PyTorch pickle {actual_kind}", hint=sniffed.hint if sniffed else DAMAGED
    )


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    """A storage as the pickle speaks of it; where it lies is known later."""

    key: str
    dtype: str
    elements: int
    # Of a legacy view of another storage: where it begins in that, in elements.
    start: int = 0


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class _TorchWorld:
    """What torch.save refers to, by name. Everything else is refused."""

    file: FileId
    storages: dict[str, _Storage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copies = CopyBudget(self.file)

    def find(self, module: str, name: str) -> object:
        # Protocol 2 and earlier use the name that Python 2 had.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in _CALLABLE or full in _TYPES:
            return _Global(full)
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _Global(f"torch.{name}")
        if module == "torch" and name in _DTYPES:
            return _Global(full)
        raise UnsupportedError(
            f"the pickle {quoted(self.file.path)} refers to {quoted(full)}, which is not known to be harmless; "
            "no code in it was run",
            hint=HINT,
            defect="pickle-code",
        )

    def call(self, function: object, arguments: tuple[object, ...]) -> object:
        if not isinstance(function, _Global) or function.name not in _CALLABLE:
            raise TypeError("not a function")
        for argument in arguments:
            if isinstance(argument, str | bytes | list | tuple):
                self.copies.spend(len(argument))
        match function.name.rpartition(".")[2]:
            case "OrderedDict":
                return _ordered_dict(*arguments)
            case "_rebuild_tensor" | "_rebuild_tensor_v2":
                return self._tensor(None, *arguments[:4], metadata=arguments[6:7])
            case "_rebuild_tensor_v3":
                return self._tensor(arguments[6], *arguments[:4], metadata=arguments[7:8])
            case "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return arguments[0]
            case "_rebuild_from_type_v2":
                inner, _, inner_arguments = arguments[:3]
                if not isinstance(inner_arguments, tuple) or inner == function:
                    raise TypeError("not arguments")
                return self.call(inner, inner_arguments)
            case "Size" | "set" | "frozenset":
                (items,) = arguments or ((),)
                if not isinstance(items, list | tuple):
                    raise TypeError("not a sequence")
                # Not a set: hashing an untrusted value may take forever, and nothing here needs it.
                return tuple(items)
            case "device":
                return str(arguments[0]) if isinstance(arguments[0], str) else "device"
            case _:  # _codecs.encode: how protocol 2 writes bytes
                text, encoding = arguments
                if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
                    raise TypeError("not bytes")
                return text.encode("latin-1")

    def refer(self, reference: object) -> object:
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            head = reference[0] if isinstance(reference, tuple) and reference else None
            # Not any value as text: a tuple that holds itself twice, and so on, is short in the file alone.
            target = quoted(head) if isinstance(head, str) else "something else"
            raise UnsupportedError(f"the pickle {quoted(self.file.path)} refers to {target} where only storages may be")
        _, kind, key, _, elements = reference[:5]
        if not isinstance(kind, _Global) or not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise TypeError("not a storage")
        dtype = _STORAGES[kind.name.rpartition(".")[2]]
        root = _Storage(key, dtype, elements)
        if self.storages.setdefault(key, root) != root:
            raise FormatError(
                f"the storage {quoted(key)} of {quoted(self.file.path)} is described in two ways", hint=DAMAGED
            )
        view = reference[5] if len(reference) > 5 else None
        if view is None:
            return root
        _, start, count = view
        if type(start) is not int or type(count) is not int or start < 0 or count < 0 or start + count > elements:
            raise ValueError("a view beyond its storage")
        return _Storage(key, dtype, count, start)

    def _tensor(
        self,
        dtype: object,
        storage: object,
        offset: object,
        shape: object,
        strides: object,
        *,
        metadata: tuple[object, ...],
    ) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise TypeError("not a storage")
        if any(len(sizes) > _MAX_AXES for sizes in (shape, strides) if isinstance(sizes, list | tuple)):
            raise ValueError("no tensor has this number of axes")
        if any(metadata):
            raise UnsupportedError(
                f"a tensor of {quoted(self.file.path)} is a conjugated or negated view",
                hint="save it again after .clone()",
            )
        kind = storage.dtype
        if isinstance(dtype, _Global):
            kind = _DTYPES[dtype.name.removeprefix("torch.")]
        sizes, steps = _counts(shape), _counts(strides)
        if len(sizes) != len(steps) or len(sizes) > _MAX_AXES:
            raise ValueError("shape and strides differ")
        return _Tensor(storage, kind, _counts((offset,))[0], sizes, steps)


def _ordered_dict(pairs: object = ()) -> dict[object, object]:
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise TypeError("not pairs")
    items: dict[object, object] = {}
    put_items(items, [(key, value) for key, value in pairs])
    return items


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(v) is int and 0 <= v < 1 << 62 for v in values):
        raise TypeError("not counts")
    return tuple(values)


def _read_zip(file: FileId) -> tuple[object, dict[str, ByteRange]]:
    archive = StoredZip(file)
    names = set(archive.names)
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise FormatError(
            f"{quoted(file.path)} is a zip archive without one 'data.pkl'; torch.save did not write it",
            hint="unpack it first, and give the model file inside",
        )
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise UnsupportedError(
            f"{quoted(file.path)} is a TorchScript program, not a file of tensors", hint="save its state_dict() instead"
        )
    if f"{root}byteorder" in names:
        order = archive.locate(f"{root}byteorder")
        if order.nbytes != 6 or read_bytes(order) != b"little":
            raise UnsupportedError(f"{quoted(file.path)} was written on a machine of the other byte order", hint=HINT)
    world = _TorchWorld(file)
    value = Machine(archive.locate(f"{root}data.pkl"), world).run()
    places = {}
    for key in world.storages:
        if f"{root}data/{key}" not in names:
            raise FormatError(f"{quoted(file.path)} lacks the storage {quoted(key)}", hint=DAMAGED)
        places[key] = archive.locate(f"{root}data/{key}")
    return value, places


def _read_legacy(file: FileId) -> tuple[object, dict[str, ByteRange]]:
    world = _TorchWorld(file)
    machine = Machine(ByteRange(file, 0, file.size), world)
    if machine.run() != _MAGIC:
        raise UnsupportedError(f"{quoted(file.path)} is a Python pickle that torch.save did not write", hint=HINT)
    if machine.run() != _LEGACY_PROTOCOL:
        raise UnsupportedError(f"{quoted(file.path)} is a legacy PyTorch pickle of an unknown version", hint=HINT)
    system = machine.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsupportedError(f"{quoted(file.path)} was written on a machine of the other byte order", hint=HINT)
    value = machine.run()
    keys = machine.run()
    if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
        raise FormatError(f"{quoted(file.path)} has no list of its storages", hint=DAMAGED)
    at = machine.position
    places: dict[str, ByteRange] = {}
    for key in keys:
        storage = world.storages.get(key)
        if storage is None or key in places:
            raise FormatError(f"{quoted(file.path)} has the unknown storage {quoted(key)}", hint=DAMAGED)
        if at + 8 > file.size:
            raise _cut_off(file, key)
        elements = int.from_bytes(read_bytes(ByteRange(file, at, 8)), "little")
        nbytes = storage.elements * DTYPE_BITS[storage.dtype] // 8
        if elements != storage.elements:
            raise FormatError(
                f"the storage {quoted(key)} of {quoted(file.path)} has {elements:,} values, "
                f"and {storage.elements:,} are declared",
                hint=DAMAGED,
            )
        at += 8
        if at + nbytes > file.size:
            raise _cut_off(file, key)
        places[key] = ByteRange(file, at, nbytes)
        at += nbytes
    for key in world.storages:
        if key not in places:
            raise FormatError(f"{quoted(file.path)} lacks the storage {quoted(key)}", hint=DAMAGED)
    return value, places


def _cut_off(file: FileId, key: str) -> FormatError:
    return FormatError(
        f"{quoted(file.path)} is cut off at byte {file.size:,}, in the storage {quoted(key)}",
        hint=DAMAGED,
        defect="container-truncated",
    )


def _select(file: FileId, value: object, places: Mapping[str, ByteRange]) -> PickledFile:
    """The tensors among what was saved, of one dictionary: the outer one, or the one wrapper in it."""
    if not isinstance(value, dict):
        kind = (
            "one tensor" if isinstance(value, _Tensor) else "a list" if isinstance(value, list | tuple) else "a value"
        )
        raise FormatError(
            f"{quoted(file.path)} holds {kind}; a dictionary of tensors is needed", hint="save it as {name: tensor}"
        )
    inside, layers = "", [value]
    if not any(isinstance(item, _Tensor) for item in value.values()):
        wrappers = [name for name in WRAPPERS if _has_tensors(value.get(name))]
        if len(wrappers) > 1:
            raise FormatError(
                f"{quoted(file.path)} has tensors under {' and '.join(map(quoted, wrappers))}; one of them is needed",
                hint="save the right one to a file of its own",
            )
        if wrappers:
            inside = wrappers[0]
            layers = [value[inside], {name: item for name, item in value.items() if name != inside}]
    tensors: dict[str, LazyTensor] = {}
    other: dict[str, object] = {}
    ignored: list[str] = []
    for layer in layers:
        for name, item in layer.items():
            if isinstance(item, _Tensor) and layer is layers[0]:
                if not isinstance(name, str):
                    raise FormatError(f"{quoted(file.path)} has a tensor under the key {name!r}, which is no text")
                tensors[name] = _lazy(file, name, item, places[item.storage.key])
            elif isinstance(item, str | int | float | bool | None):
                other.setdefault(str(name), item)
            else:
                ignored.append(str(name))
    return PickledFile(file, tensors, other, inside, tuple(ignored))


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, _Tensor) for item in value.values())


def _lazy(file: FileId, name: str, tensor: _Tensor, place: ByteRange) -> LazyTensor:
    storage, width = tensor.storage, DTYPE_BITS[tensor.dtype] // 8
    start = storage.start * DTYPE_BITS[storage.dtype] // 8 + tensor.offset * width
    nbytes = storage.elements * DTYPE_BITS[storage.dtype] // 8
    elements = math.prod(tensor.shape)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)) if elements else -1
    subject = f"tensor {quoted(name)} of {quoted(file.path)}"
    end = storage.start * DTYPE_BITS[storage.dtype] // 8 + nbytes
    if start + (last + 1) * width > min(end, place.nbytes):
        raise FormatError(
            f"{subject} ends at byte {start + (last + 1) * width:,} of a storage of {min(end, place.nbytes):,}",
            hint=DAMAGED,
        )
    if elements * width > max(_MAX_REPEATED, nbytes):
        raise UnsupportedError(
            f"{subject} repeats {nbytes:,} bytes to {elements * width:,}", hint="save it again as it is used"
        )
    if not elements or tensor.strides == _row_major(tensor.shape, tensor.strides):
        location = ByteRange(file, place.offset + start if elements else place.offset, elements * width)
        return LazyTensor(tensor.shape, tensor.dtype, StoredTensor(location, tensor.shape, tensor.dtype))
    span = ByteRange(file, place.offset + start, (last + 1) * width)
    return LazyTensor(tensor.shape, tensor.dtype, StridedTensor(span, tensor.shape, tensor.strides, tensor.dtype))


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor; of an axis of one, which is never stepped along, as they are."""
    normalised, step = [], 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        normalised.append(stride if n == 1 else step)
        step *= n
    return tuple(reversed(normalised))
