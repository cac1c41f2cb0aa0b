"""Which file in `updates/` knows the tensors of which `peft_type`, and how their keys are taken apart.

Kinds other than LoRA store tensors below a module (`hada_w1_a`), and some below none (`base_model.vera_A`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loratools import registry
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.common.source import counted, shown
from loratools.formats.peft_parts.keys import PREFIX
from loratools.hints import DAMAGED_ADAPTER
from loratools.storage.files import quoted
from loratools.storage.untrusted_regex import UntrustedRegexes
from loratools.tensors.dtypes import is_floating
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.kind_files import may_be_empty, peft_kind, shared_alone_hint, shared_parts
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update
from loratools.updates.parts.unmergeable import REASONS

# Where the two have the same name but for dashes and case, nothing needs to be said.
_FILES = {"BONE": "miss"}
# Types without updates, all that they store taking the place of something, and the fields that are theirs alone.
REPLACING: Mapping[str, tuple[str, ...]] = {"LN_TUNING": (), "TRAINABLE_TOKENS": ("token_indices", "init_weights")}


def refusal(peft_type: object) -> str | None:
    """Why adapters of such a type are not read; None if they are."""
    name = str(peft_type)
    if name == "LORA" or name in REPLACING:
        return None
    # Variants of LoRA, and kinds that only others store, are no type of PEFT's: they list no fields.
    if name.isupper() and _file(name) in registry.names("updates") and _fields(name) is not None:
        return None
    return REASONS.get(name, "not a kind known here")


def known_fields(peft_type: object) -> dict[str, None]:
    """Fields of the config that a kind that is read interprets, or knows to have no part in the result."""
    return dict.fromkeys(_fields(str(peft_type)) or ())


def _fields(peft_type: str) -> tuple[str, ...] | None:
    if peft_type in REPLACING:
        return REPLACING[peft_type]
    kind = peft_kind(_file(peft_type))
    return None if kind is None else kind.PEFT_FIELDS


def _file(peft_type: object) -> str:
    name = str(peft_type)
    return _FILES.get(name, name.lower().replace("_", "-"))


@dataclass
class Modules:
    """What the keys of one file say: tensors by module and part, those below no module, and all other keys."""

    parts: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    shared: dict[str, LazyTensor] = field(default_factory=dict)
    other_keys: list[str] = field(default_factory=list)


def modules(tensors: Mapping[str, LazyTensor], peft_type: str) -> Modules:
    """Take the keys of an adapter of this type apart.

    Raises:
        FormatError: Several keys mean the same part of a module, as those of several adapters do.
    """
    if peft_type in REPLACING:
        return Modules(other_keys=list(tensors))
    kind = peft_kind(_file(peft_type))
    assert kind is not None, "refused before"
    segments = {*kind.PEFT_PARTS, *shared_parts(kind)}
    roots = {segment.split(".")[0] for segment in segments}
    result, twice = Modules(), list[str]()
    for key, tensor in tensors.items():
        names = key.split(".")
        while names[:2] == PREFIX.split(".")[:2] and len(names) > 2:
            names = names[2:]
        at = next((i for i in range(len(names) - 1, -1, -1) if names[i] in roots), None)
        if at is None:
            result.other_keys.append(key)
            continue
        module = ".".join(name for name in names[:at] if name != "base_layer")
        part = ".".join(name for name in names[at:] if name not in ("default", "weight"))
        if module in ("", "base_model", "model"):
            result.shared[part] = tensor
        else:
            module_parts = result.parts.setdefault(module, {})
            if part in module_parts:
                twice.append(f"{module}.{part}")
            module_parts[part] = tensor
    if twice:
        raise FormatError(
            f"{counted(len(twice), 'part')} of modules stored more than once",
            details=shown([quoted(name)[1:-1] for name in twice]),
            hint="save each adapter on its own, with PEFT's save_pretrained",
        )
    return result


def updates(
    modules_of_kind: Modules,
    config: Mapping[str, object],
    peft_type: str,
    alphas: Mapping[str, tuple[float, str]],
    ranks: Mapping[str, int | None],
    path: object,
) -> dict[str, Update]:
    """The updates that a kind makes of its modules, by target.

    Raises:
        UnsupportedError: Parts that the kind does not know, or a field that it does not support.
        FormatError: Parts that are missing or do not fit each other.
    """
    file = _file(peft_type)
    kind = peft_kind(file)
    assert kind is not None, "refused before"
    part_names = {*kind.PEFT_PARTS, *shared_parts(kind)}
    if modules_of_kind.shared and not modules_of_kind.parts:
        raise UnsupportedError(
            f"{quoted(str(path))} has {', '.join(sorted(modules_of_kind.shared))}, which modules share, and "
            "nothing of a module",
            hint=shared_alone_hint(kind),
        )
    strange = [
        f"{module}.{part}"
        for module, parts in modules_of_kind.parts.items()
        for part in parts
        if not _is_known(part, part_names)
    ]
    if strange:
        raise UnsupportedError(
            f"{quoted(str(path))} has tensors that are not known of {file}",
            details=shown([quoted(name)[1:-1] for name in strange]),
        )
    _refuse_no_numbers(modules_of_kind, path, empty_allowed=may_be_empty(kind))
    names = list(modules_of_kind.parts)
    regexes = UntrustedRegexes(names)
    updates_by_target: dict[str, Update] = {}
    for module, parts in modules_of_kind.parts.items():
        module_of_kind = PeftModule(
            module, parts, config, ranks[module], *alphas[module], modules_of_kind.shared, names, regexes
        )
        updates_by_target |= {module + suffix: update for suffix, update in kind.from_peft(module_of_kind).items()}
    return updates_by_target


def _refuse_no_numbers(modules_of_kind: Modules, path: object, *, empty_allowed: bool) -> None:
    """Raise FormatError where parts have no axes or no values, or hold no numbers with a fraction, as indices may and
    what modules share, which may be sizes."""
    tensors = [(f"{m}.{part}", tensor) for m, parts in modules_of_kind.parts.items() for part, tensor in parts.items()]
    wrong = []
    for name, tensor in [*tensors, *modules_of_kind.shared.items()]:
        if not tensor.shape or (0 in tensor.shape and not empty_allowed):
            wrong.append(f"{quoted(name)} has shape {list(tensor.shape)}: empty, or a shard that was not gathered")
        elif not is_floating(tensor.dtype) and "indices" not in name and name not in modules_of_kind.shared:
            wrong.append(f"{quoted(name)} has dtype {tensor.dtype}; a floating-point tensor is needed")
    if wrong:
        raise FormatError(
            f"{quoted(str(path))} has {counted(len(wrong), 'tensor')} that cannot be what the kind needs",
            details=shown(wrong),
            hint=DAMAGED_ADAPTER,
        )


def _is_known(part: str, part_names: Iterable[str]) -> bool:
    return any(part == name or part.startswith(f"{name}.") for name in part_names)
