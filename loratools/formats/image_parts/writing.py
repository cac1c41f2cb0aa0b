"""Writing of image formats: updates under canonical names become modules as a format names and spells them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.errors import LoraToolsError
from loratools.formats.common.base import Base
from loratools.formats.common.header_keys import FAMILY, LIBRARY, NEVER_COPIED
from loratools.formats.common.notes import metadata_of
from loratools.formats.image_parts.fused import (
    apart,
    fused,
    fused_bias,
    stacked_updates,
    swapped_back,
    why_not_fused,
    without_zeros,
)
from loratools.formats.image_parts.network_texts import network_texts
from loratools.formats.image_parts.notes import NOTES
from loratools.formats.image_parts.reading import given_base
from loratools.naming.image.evidence import decide, denoisers, family_named
from loratools.naming.image.family import Family, Fused, Place
from loratools.naming.image.given_base import decide_for
from loratools.naming.image.pipeline import DENOISERS, OTHER_PARTS, PIPELINE_PARTS, SECOND, TEXT_ENCODERS
from loratools.storage.casting import rounded
from loratools.storage.files import quoted, read_bytes
from loratools.storage.ownership import MARK
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.files import ByteRange, FileId
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import reshaped
from loratools.updates.full import Full
from loratools.updates.lora import LoRA
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

# Before names that only a base says, which is a single file and in no table.
SINGLE_FILE = "diffusion_model"

_CHUNK = 16 << 20
# Which names a family is written with: one for all, or one that depends on it.
Spelling: TypeAlias = str | Callable[[Family], str]


@dataclass
class Written:
    """A module of the file to be: its name in its part of the pipeline, and what updates its weight and its bias.

    With an empty `part`, the name is the one of the file, letter by letter.
    """

    part: str
    name: str
    weight: Update | None = None
    bias: Full | None = None

    def named(self, prefix: str, *, flat: bool = False) -> str:
        """The name of the file: `prefix` and the module's, with underscores for its dots if `flat`."""
        if not self.part:
            return self.name
        return prefix + (self.name.replace(".", "_") if flat else self.name)

    @property
    def target(self) -> str:
        """The adapter's name of what updates the weight."""
        return f"{self.part}.{self.name}" if self.part else self.name

    @property
    def lora(self) -> LoRA | None:
        """The update of its weight as a pair of factors; None if it is none."""
        return None if self.weight is None else self.weight.as_lora()


@dataclass(frozen=True)
class Layout:
    """All modules to be written, or why the ones in `problems` cannot be."""

    modules: tuple[Written, ...]
    family: Family | None
    problems: Mapping[str, str] = field(default_factory=dict)


def lay_out(
    adapter: Adapter, spelling: Spelling, *, base: Base | None, dry: bool = False, single_file: bool = False
) -> Layout:
    """The modules of `adapter` with the names of `spelling`: diffusers, original, or one of a family's own.

    What is apart here and fused there is put together.

    Args:
        adapter: The adapter.
        spelling: Which names are written.
        base: What is known of the model that it is for.
        dry: Whether only what stands against it is asked for. What would be put together is left out, and no values
            are read.
        single_file: Whether the format has the names of single files, so that those of a base in no table are right.

    Raises:
        UndecidedError: The names depend on the family, which is ambiguous.
        UnsupportedError: No family has all names.
        MismatchError: The base is of another family than the adapter.
    """
    if adapter.stored_names:
        return Layout(tuple(_as_stored(adapter)), None)
    problems: dict[str, str] = {}
    by_part: dict[str, dict[str, dict[str, Update]]] = {}
    for target, update in adapter.updates.items():
        part, dot, name = target.partition(".")
        if part not in (*PIPELINE_PARTS, SINGLE_FILE) or not dot:
            problems[target] = "no name of a part of an image or video model"
            continue
        if part in OTHER_PARTS and spelling != "diffusers":
            problems[target] = f"of a part of the pipeline ({part}) that has no names but those of diffusers"
            continue
        if part == SINGLE_FILE and not single_file:
            problems[target] = "a name of a single file, of a model whose names in diffusers are not known"
            continue
        module, leaf = (name.removesuffix(".bias"), "bias") if _is_bias(update, name) else (name, "weight")
        by_part.setdefault(part, {}).setdefault(module, {})[leaf] = update
    modules: list[Written] = []
    family: Family | None = None
    for part, members in sorted(by_part.items()):
        if part not in DENOISERS:
            modules += [_written(part, name, updates) for name, updates in members.items()]
            continue
        try:
            family = family_of(adapter, part, base, spelling=spelling)
        except LoraToolsError as error:
            if spelling != "diffusers":
                raise _without_family(adapter, error) from error
            # A canonical name is the one of diffusers, whatever the family.
            modules += [_written(part, name, updates) for name, updates in members.items()]
            continue
        spelled = _spelling_of(family, spelling)
        modules += _spelled(part, members, family, spelled, problems, dry=dry, fusing=spelling == "diffusers")
    return Layout(tuple(modules), family, problems)


def family_of(adapter: Adapter, part: str, base: Base | None = None, *, spelling: Spelling = "") -> Family:
    """The family whose modules those of this part of the pipeline are.

    Several will do if they have the same names in this spelling.

    Raises:
        UndecidedError: The names may be of several families.
        UnsupportedError: No family has all names.
        MismatchError: The base is of another family than the adapter.
    """
    names: dict[str, tuple[int | None, int | None]] = {}
    for target, update in adapter.updates.items():
        head, _, name = target.partition(".")
        if head == part:
            shape = update.shape
            module = name.removesuffix(".bias") if _is_bias(update, name) else name
            if module == name or module not in names:
                names[module] = (shape[0], shape[1]) if len(shape) > 1 else (None, None)
    candidates = [f for f in denoisers() if f.component == part.removesuffix("_2")]
    encoders = sum(_has(adapter, encoder) for encoder in TEXT_ENCODERS)
    candidates = [f for f in candidates if f.text_encoders is None or f.text_encoders >= encoders]
    if _has(adapter, SECOND):
        candidates = [f for f in candidates if f.second]
    noted = noted_family(adapter)
    if noted is not None and all(noted.find(name) for name in names):
        return noted
    named_base = given_base(base)
    if named_base is not None:
        return decide_for(named_base, names, candidates, header=adapter.base_model).families[0]

    def same(first: Family, second: Family) -> bool:
        return bool(spelling) and _same_names(names, [first, second], spelling)

    return decide(names, candidates, header=adapter.base_model, same=same).families[0]


def noted_family(adapter: Adapter) -> Family | None:
    """The family that was known when the adapter was read; None where several or none were."""
    noted = adapter.notes.get(NOTES)
    return family_named(str(noted.get("family"))) if isinstance(noted, Mapping) else None


def _without_family(adapter: Adapter, error: LoraToolsError) -> LoraToolsError:
    """What prevented the choice of a family, as the reason why names of another format cannot be written."""
    message = f"the modules of {quoted(adapter.name)} cannot be named as another format names them: {error.message}"
    return type(error)(message, details=error.details, hint=error.hint)


def _spelling_of(family: Family, spelling: Spelling) -> str:
    return spelling if isinstance(spelling, str) else spelling(family)


def _same_names(names: Iterable[str], families: list[Family], spelling: Spelling) -> bool:
    def written(family: Family, name: str) -> tuple[str, Place] | None:
        back = family.back(name, _spelling_of(family, spelling))
        return None if back is None else (back.name, back.place)

    return all(len({written(family, name) for family in families}) == 1 for name in names)


def _has(adapter: Adapter, part: str) -> bool:
    return any(target.startswith(f"{part}.") for target in adapter.updates)


def _as_stored(adapter: Adapter) -> Iterator[Written]:
    by_module: dict[str, dict[str, Update]] = {}
    for target, update in adapter.updates.items():
        leaf = "bias" if _is_bias(update, target) else "weight"
        by_module.setdefault(target.removesuffix(".bias") if leaf == "bias" else target, {})[leaf] = update
    return (_written("", name, updates) for name, updates in by_module.items())


def _is_bias(update: Update, name: str) -> bool:
    return update.as_full() is not None and name.endswith(".bias") and len(update.shape) == 1


def _written(part: str, name: str, updates: Mapping[str, Update]) -> Written:
    bias = updates.get("bias")
    return Written(part, name, updates.get("weight"), None if bias is None else bias.as_full())


def _spelled(
    part: str,
    members: Mapping[str, Mapping[str, Update]],
    family: Family,
    spelling: str,
    problems: dict[str, str],
    *,
    dry: bool,
    fusing: bool,
) -> list[Written]:
    """The modules of one part of the pipeline.

    fusing: whether the client fuses modules where an update of them together cannot be cut.
    """
    modules: list[Written] = []
    together: dict[str, tuple[Place, dict[str, Mapping[str, Update]]]] = {}
    members = _cut(members, family)
    for name, updates in members.items():
        place = family.find(name)
        assert place is not None
        if place.targets != (name,):  # kept whole, as it could not be cut
            fused_name = family.fused_back(place.targets[0]) if fusing else None
            if fused_name is not None:
                modules.append(_written(part, fused_name.name, updates))
            elif spelling == "diffusers":
                problems[f"{part}.{name}"] = (
                    "fused, and of a kind that cannot be cut exactly; 'loratools resize' makes LoRA of it"
                )
            else:
                modules.append(_written(part, name, updates))
            continue
        back = family.back(name, spelling)
        if back is None:
            problems[f"{part}.{name}"] = f"no module of {family.name} as it was published"
        elif len(back.place.targets) > 1:
            together.setdefault(back.name, (back.place, {}))[1][name] = updates
        elif (module := _in_published_order(part, back, updates)) is None:
            problems[f"{part}.{name}"] = (
                "of a module whose halves the model has in another order, which its kind has not"
            )
        else:
            modules.append(module)
    for name, (place, parts) in sorted(together.items()):
        why_not = why_not_fused(parts, place)
        if why_not is not None:
            problems |= dict.fromkeys(_targets(part, parts), why_not)
        elif not dry:
            modules.append(_together(part, name, place, parts, members))
    return sorted(modules, key=lambda module: module.name)


def _cut(members: Mapping[str, Mapping[str, Update]], family: Family) -> dict[str, Mapping[str, Update]]:
    """The modules of diffusers: of those that were kept whole, what can be cut by now, as it has become LoRA."""
    cut: dict[str, Mapping[str, Update]] = {}
    for name, updates in members.items():
        place, weight = family.find(name), updates.get("weight")
        pieces = None
        if place is not None and place.targets != (name,) and weight is not None and len(updates) == 1:
            pieces = apart(weight, place, columns=weight.shape[1] if len(weight.shape) > 1 else None)
        cut |= {name: updates} if pieces is None else {target: {"weight": piece} for target, piece in pieces.items()}
    return cut


def _targets(part: str, members: Mapping[str, Mapping[str, Update]]) -> list[str]:
    """The adapter's own names of these modules' updates."""
    return [
        f"{part}.{name}{'.bias' if leaf == 'bias' else ''}" for name, updates in members.items() for leaf in updates
    ]


def _in_published_order(part: str, back: Fused, updates: Mapping[str, Update]) -> Written | None:
    """The module with its outputs in the order of the model as it was published; None if its kind has no halves."""
    written = _written(part, back.name, updates)
    columns = None if written.weight is None or len(written.weight.shape) < 2 else written.weight.shape[1]
    if written.weight is not None:
        written.weight = swapped_back(written.weight, back.place, columns=columns)
        if written.weight is None:
            return None
    if written.bias is not None and (bias := swapped_back(written.bias, back.place, columns=columns)) is not None:
        written.bias = bias.as_full()
    return written


def _together(
    part: str,
    name: str,
    place: Place,
    parts: Mapping[str, Mapping[str, Update]],
    members: Mapping[str, Mapping[str, Update]],
) -> Written:
    columns = next(iter(parts.values()))["weight"].shape[1]
    weights = {target: updates["weight"] for target, updates in parts.items()}
    loras = {target: lora for target, u in weights.items() if (lora := u.as_lora()) is not None}
    if not loras:
        return Written(part, name, stacked_updates(weights, place))
    gaps = [
        None if t in loras else _outputs(t, i, place, loras, columns or 0, members) for i, t in enumerate(place.targets)
    ]
    biases = [
        full
        for t in place.targets
        if t in parts and (bias := parts[t].get("bias")) is not None and (full := bias.as_full()) is not None
    ]
    return Written(part, name, fused(loras, place, gaps), fused_bias(biases) if biases else None)


def _outputs(
    target: str,
    index: int,
    place: Place,
    loras: Mapping[str, LoRA],
    columns: int,
    members: Mapping[str, Mapping[str, Update]],
) -> int:
    """Outputs of a part of a fused module for which the adapter has nothing."""
    if place.split == "thirds":
        return next(iter(loras.values())).shape[0]
    if place.split == "grouped":
        outputs = [u.shape[0] for t, u in loras.items() if t != place.targets[0]]
        return columns if index == 0 else (outputs or [columns])[0]
    if index < 3:
        return columns
    # The first layer of the MLP: as in another block, or as wide as all such models have it.
    leaf = target.rpartition(".")[2]
    counts = Counter(f["weight"].shape[0] for name, f in members.items() if name.endswith(f".{leaf}") and "weight" in f)
    most = counts.most_common(1)
    return (most[0][0] or 0) if most else 4 * columns


# Tensors


Stored = dict[str, "Tensor | LazyTensor"]


def lora_parts(update: LoRA, *, keep_mid: bool) -> dict[str, LazyTensor]:
    """A, B and the core as convolutions store them. Without a core of its own the format gets its product with A."""
    a, b, mid = update.a, update.b, update.mid
    kernel = len(a.shape) - 2
    if mid is not None and not keep_mid:
        import torch

        core, inner = mid.read().double(), a.read().double().reshape(a.shape[0], -1)
        product = torch.einsum("pq...,qi->pi...", core, inner)
        a, mid, kernel = from_torch(rounded(product, a.dtype)), None, product.dim() - 2
    if kernel and len(b.shape) == 2:
        b = reshaped(b, (*b.shape, *(1,) * kernel))
    tensors = {"A": a, "B": b}
    return tensors if mid is None else tensors | {"mid": mid}


def plain_alpha(update: LoRA) -> float:
    """Alpha where the scale is alpha / rank, also of rsLoRA."""
    return update.scale * update.rank if update.rslora else update.alpha


def axis_magnitude(update: LoRA) -> LazyTensor | None:
    """The magnitude with the axis in its shape, as LyCORIS stores it: (out, 1...) or (1, in, 1...)."""
    if update.magnitude is None:
        return None
    kernel = (1,) * (len(update.shape) - 2)
    shape = (update.shape[0], 1) if update.magnitude_of == "out" else (1, update.shape[1])
    return reshaped(update.magnitude, (*shape, *kernel))


def pieces_alone(modules: Iterable[Written]) -> tuple[list[Written], list[str]]:
    """Without what only the other pieces of a fused module use; and the names of those of which nothing is left."""
    remaining: list[Written] = []
    empty: list[str] = []
    for module in modules:
        if (lora := module.lora) is not None:
            lora = without_zeros(lora)
            module = replace(module, weight=lora)
            if lora.rank == 0:
                empty.append(module.target)
                continue
        remaining.append(module)
    return remaining, empty


def header_of(adapter: Adapter, family: Family | None) -> dict[str, str]:
    """What the source said in its header that is still true; and the family, which names alone do not always tell."""
    texts = {k: v for k, v in metadata_of(adapter).items() if k not in NEVER_COPIED}
    texts |= network_texts(texts, adapter)
    return {LIBRARY: "pt", MARK: __version__} | texts | ({} if family is None else {FAMILY: family.name})


def had_hashes(adapter: Adapter) -> bool:
    """Whether the source told the hashes by which kohya's tools know a file."""
    return "sshs_model_hash" in metadata_of(adapter)


def write_file(path: Path, tensors: Stored, metadata: Mapping[str, str], *, hashed: bool = False) -> None:
    """Write one file in the order of the safetensors library: wide types first, so that all are aligned, then by name.

    hashed: with the `sshs_model_hash` and `sshs_legacy_hash` of sd-scripts. The first is SHA-256 of all that follows
    the header; the second, of 64 KiB from the first MiB on of the same file with only the `ss_` texts in its header.
    """
    from loratools.storage.safetensors_reader import read_header
    from loratools.storage.safetensors_writer import TensorSpec, layout, write_safetensors

    def width(tensor: Tensor | LazyTensor) -> int:
        return -(DTYPE_BITS[tensor.dtype] // 8 if isinstance(tensor, LazyTensor) else tensor.element_size())

    ordered = {name: tensors[name] for name in sorted(tensors, key=lambda name: (width(tensors[name]), name))}
    write_safetensors(path, ordered, metadata)
    if not hashed:
        return
    header = read_header(path)
    specs = [TensorSpec(name, t.dtype, t.shape) for name, t in header.tensors.items()]
    trained = len(layout(specs, {k: v for k, v in metadata.items() if k.startswith("ss_")}).header)
    size = header.file.size - header.data_offset
    start = min(max(0, 0x100000 - trained), size)
    legacy = _sha256(header.file, header.data_offset + start, min(0x10000, size - start))
    model = _sha256(header.file, header.data_offset, size)
    write_safetensors(path, ordered, {**metadata, "sshs_model_hash": model, "sshs_legacy_hash": legacy[:8]})


def _sha256(file: FileId, offset: int, count: int) -> str:
    import hashlib

    digest = hashlib.sha256()
    for start in range(offset, offset + count, _CHUNK):
        digest.update(read_bytes(ByteRange(file, start, min(_CHUNK, offset + count - start))))
    return digest.hexdigest()
