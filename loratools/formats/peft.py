"""PEFT: adapter_config.json with adapter_model.safetensors or .bin, LoRA with whole replaced weights.

The rank of a module is its tensors', its scale is the config's. What PEFT writes for any other kind of adapter, or for
a variant that changes the mathematics, is refused by name. What is written, PEFT loads to the same ranks and scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Adapter, Replacement
from loratools.errors import FormatError, UnsupportedError
from loratools.formats import _peft_config as fields
from loratools.formats._base import Base
from loratools.formats._peft_keys import PREFIX, Factor, Foreign, Parsed, Whole, parse, parse_all
from loratools.formats._peft_patterns import matches
from loratools.formats._peft_written import config_to_write, metadata_to_write, names_digest
from loratools.formats._source import CONFIG, WEIGHTS, AdapterSource, counted, shown
from loratools.storage.files import quoted, read_bytes
from loratools.tensors import FLOAT_DTYPES, LazyTensor
from loratools.updates.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor

WRITES = "folder"

# By the last part of their names; what a base calls its embedding is for the base to say.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "shared")


def detect(source: AdapterSource) -> bool:
    """By `peft_type` in the config, by factors spelled as PEFT spells them, or by its prefix on anything it stores."""
    # The config beside a file of another name may belong to another file.
    if source.file.name in WEIGHTS and source.config is not None and "peft_type" in source.config:
        return True
    for key in source.tensors:
        found = parse(key)
        if isinstance(found, Factor) or (isinstance(found, Foreign) and key.startswith("base_model.")):
            return True
    return False


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`.

    Raises:
        UnsupportedError: fields or tensors that are not read, all of them named.
        FormatError: factors that do not make a product, values that cannot be meant.
    """
    config = source.config
    parsed = parse_all(source.tensors)
    _refuse_unsupported(source, parsed)
    numbers = fields.scaling(config or {})
    _refuse_several_adapters(source, parsed)
    pairs = _pairs(source, parsed)
    alphas, doubts, warnings = _alphas({m: a.shape[0] for m, (a, _) in pairs.items()}, numbers, config, rank_from)
    if config is None:
        warnings.append(f"{quoted(source.file)} has no {CONFIG} beside it; alpha is assumed to be the rank")
    else:
        if "peft_type" not in config:
            warnings.append(f"{CONFIG} has no peft_type; it is taken for LORA")
        if numbers.alpha is None:
            warnings.append(f"{CONFIG} has no lora_alpha; it is assumed to be {fields.DEFAULT_ALPHA}, PEFT's default")
    beside = [f.name for f in parsed.values() if isinstance(f, Whole) and f.spelling == "plain" and f.module in pairs]
    if beside:
        warnings.append(
            f"{counted(len(beside), 'weight')} of adapted modules not spelled '.base_layer.': PEFT would not load what "
            f"is replaced here: {', '.join(shown([quoted(name) for name in beside]))}"
        )
    larger = [m for m, (a, b) in pairs.items() if a.shape[0] > min(a.shape[1], b.shape[0])]
    if larger:
        warnings.append(
            f"the rank is above what the weight can have in {counted(len(larger), 'module')}, which adds size and "
            f"nothing else: {', '.join(shown([quoted(name) for name in larger]))}"
        )
    if copies := [key for key, f in parsed.items() if isinstance(f, Whole) and f.spelling == "original_module"]:
        keys = ", ".join(shown([quoted(key) for key in copies]))
        warnings.append(f"{counted(len(copies), 'copy', 'copies')} of base weights that are replaced anyway: {keys}")
    if source.other:
        entries = ", ".join(shown([quoted(name) for name in source.other]))
        warnings.append(f"{counted(len(source.other), 'entry', 'entries')} besides the tensors not read: {entries}")
    if not pairs:
        warnings.append(f"{quoted(source.path)} has no factors, only {counted(len(parsed), 'replaced weight')}")
    replacements = _replacements(source, parsed)
    base = (config or {}).get("base_model_name_or_path")
    return Adapter(
        updates={
            module: LoRA(a, b, alpha, alpha_source, numbers.rslora)
            for module, (a, b) in pairs.items()
            for alpha, alpha_source in [alphas[module]]
        },
        replacements=replacements,
        format="peft",
        path=source.path,
        base_model=base if isinstance(base, str) and base else None,
        notes={
            "peft": {
                "config": None if config is None else dict(config),
                "metadata": dict(source.metadata),
                "names": names_digest(pairs, replacements),
            }
        },
        doubts=tuple(doubts),
        warnings=tuple(warnings),
    )


def unwritable(adapter: Adapter, *, base: Base | None = None) -> dict[str, str]:
    """Updates that are not written, and why."""
    return {name: u.kind for name, u in adapter.updates.items() if not isinstance(u, LoRA)}


def write(adapter: Adapter, out_folder: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the folder that PEFT loads to exactly these ranks, scales and replaced weights. Equal input, equal bytes.

    Raises:
        UnsupportedError: an update that is not LoRA, or values that `dtype` cannot hold.
    """
    from loratools.storage.json_file import write_json
    from loratools.storage.safetensors_writer import write_safetensors

    updates = _writable(adapter)
    left_out = sorted(set(adapter.updates) - set(updates))
    tensors: dict[str, LazyTensor] = {}
    for target, update in updates.items():
        tensors[f"{PREFIX}{target}.lora_A.weight"] = update.a
        tensors[f"{PREFIX}{target}.lora_B.weight"] = update.b
    for name, replacement in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        # Where a module has factors, PEFT has wrapped it, and its own weights are one level further down.
        key = f"{module}.base_layer.{leaf}" if module in updates else name
        tensors[PREFIX + key] = replacement.tensor
    metadata = {"format": "pt", **metadata_to_write(adapter)}
    stored = {key: _cast(key, tensor, dtype) for key, tensor in sorted(tensors.items())}
    write_safetensors(out_folder / "adapter_model.safetensors", stored, dict(sorted(metadata.items())))
    write_json(out_folder / CONFIG, config_to_write(adapter, updates), sort=True)
    if not left_out:
        return ()
    names = ", ".join(shown([quoted(name) for name in left_out]))
    return (f"{counted(len(left_out), 'module')} of rank 0 left out, where nothing changes: {names}",)


# Reading


def _refuse_unsupported(source: AdapterSource, parsed: Mapping[str, Parsed]) -> None:
    refused = fields.refusals(source.config or {})
    by_kind: dict[str, list[str]] = {}
    targets = {found.module for found in parsed.values() if isinstance(found, Factor)}
    replaced = {f.name for f in parsed.values() if isinstance(f, Whole) and f.spelling != "original_module"}
    for key, found in parsed.items():
        if isinstance(found, Foreign):
            by_kind.setdefault(found.kind, []).append(key)
        elif isinstance(found, Factor) and len(source.tensors[key].shape) > 2:
            by_kind.setdefault("LoRA of a convolution", []).append(key)
        elif isinstance(found, Whole) and found.spelling == "original_module" and found.name not in replaced:
            by_kind.setdefault("the base's own copy of a module: a dump of a whole model, not an adapter", []).append(
                key
            )
        elif isinstance(found, Whole) and found.module in targets and found.name.split(".")[-1] not in _OF_A_LAYER:
            # An alpha, or the part of some other kind, taken for a weight would be dropped without a word.
            by_kind.setdefault("a tensor beside factors that PEFT does not write", []).append(key)
    if not refused and not by_kind:
        return
    lines = [line for _, line, _ in refused]
    for kind, keys in sorted(by_kind.items()):
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        lines.append(f"tensor {quoted(sorted(keys)[0])}{more}: {kind}")
    hints = [hint for _, _, hint in refused if hint]
    raise UnsupportedError(
        f"{quoted(source.path)} needs {counted(len(lines), 'thing')} not supported here",
        details=lines,
        hint=hints[0] if hints else "only plain LoRA and rsLoRA of linear layers, with replaced weights, are read",
    )


_OF_A_LAYER = ("weight", "bias")


def _refuse_several_adapters(source: AdapterSource, parsed: Mapping[str, Parsed]) -> None:
    names = sorted({f.adapter for f in parsed.values() if isinstance(f, Factor | Whole) and f.adapter is not None})
    if len(names) > 1:
        raise FormatError(
            f"{quoted(source.file)} holds {len(names)} adapters",
            details=shown([quoted(name)[1:-1] for name in names], 20),
            hint="save each on its own, with PEFT's save_pretrained",
        )


def _pairs(source: AdapterSource, parsed: Mapping[str, Parsed]) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """A and B of every module, checked to make a product; all problems are raised at once."""
    problems: list[str] = []
    found: dict[str, dict[str, LazyTensor]] = {}
    for key, factor in parsed.items():
        if not isinstance(factor, Factor):
            continue
        tensor = source.tensors[key]
        parts = found.setdefault(factor.module, {})
        if factor.part in parts:
            problems.append(f"{quoted(factor.module)} has more than one {factor.part}")
        parts[factor.part] = tensor
        if not factor.module:
            problems.append(f"{quoted(key)} names no module")
        elif len(tensor.shape) < 2 or 0 in tensor.shape:
            problems.append(f"{quoted(key)} has shape {list(tensor.shape)}: empty, or a shard that was not gathered")
        elif tensor.dtype[0] not in "FB" or tensor.dtype == "BOOL":
            problems.append(f"{quoted(key)} has dtype {tensor.dtype}, which is no number with a fraction")
    for module, parts in sorted(found.items()):
        shapes = {part: tensor.shape for part, tensor in parts.items()}
        if len(parts) < 2:
            (has,) = parts
            problems.append(f"{quoted(module)} has {has} without {'lora_B' if has == 'lora_A' else 'lora_A'}")
        elif all(len(s) == 2 for s in shapes.values()) and shapes["lora_A"][0] != shapes["lora_B"][1]:
            a, b = list(shapes["lora_A"]), list(shapes["lora_B"])
            problems.append(f"{quoted(module)} has lora_A {a} and lora_B {b}, which have different ranks")
    if problems:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(problems), 'fault')} in its factors",
            details=shown(problems),
            hint="save the adapter again, or download it again if it was cut off",
        )
    return {module: (parts["lora_A"], parts["lora_B"]) for module, parts in sorted(found.items())}


def _alphas(
    ranks: Mapping[str, int], numbers: fields.Scaling, config: Mapping[str, object] | None, rank_from: str | None
) -> tuple[dict[str, tuple[float, str]], list[str], list[str]]:
    """Alpha of every module and where it is from; doubts; warnings."""
    names = list(ranks)
    rank_keys = matches(numbers.ranks, names, where="rank_pattern") if numbers.ranks else {}
    alpha_keys = matches(numbers.alphas, names, where="alpha_pattern") if numbers.alphas else {}
    alphas: dict[str, tuple[float, str]] = {}
    differing: dict[tuple[int, int], list[str]] = {}
    for module, rank in ranks.items():
        if keys := alpha_keys.get(module):
            alpha, origin = numbers.alphas[keys[0]], "config"
        elif numbers.alpha is not None:
            alpha, origin = numbers.alpha, "config"
        else:
            alpha, origin = float(rank if config is None else fields.DEFAULT_ALPHA), "assumed"
        said = numbers.ranks[keys[0]] if (keys := rank_keys.get(module)) else numbers.rank
        if said is not None and said != rank:
            differing.setdefault((said, rank), []).append(module)
            if rank_from == "config":
                # The scale is the config's; the rank stays the tensors'.
                alpha = alpha * math.sqrt(rank) / math.sqrt(said) if numbers.rslora else alpha * rank / said
        alphas[module] = alpha, origin
    doubts = []
    for (said, rank), modules in sorted(differing.items()):
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        doubts.append(f"{quoted(modules[0])}{more}: rank {rank} in the tensors, {said} in {CONFIG}")
    warnings = _unused("rank_pattern", numbers.ranks, rank_keys) + _unused("alpha_pattern", numbers.alphas, alpha_keys)
    torn = [module for module, keys in alpha_keys.items() if len({numbers.alphas[key] for key in keys}) > 1]
    if torn and list(numbers.alphas) == sorted(numbers.alphas):
        warnings.append(
            f"alpha_pattern: keys with different values match {counted(len(torn), 'module')}, such as "
            f"{quoted(torn[0])}; the first counts, but PEFT sorts them when it saves: training may have used another"
        )
    return alphas, [] if rank_from is not None else doubts, warnings


def _unused(where: str, values: Mapping[str, float], found: Mapping[str, tuple[str, ...]]) -> list[str]:
    used = {keys[0] for keys in found.values() if keys}
    unused = [quoted(key) for key in values if key not in used]
    if not unused:
        return []
    return [f"{where}: {len(unused)} of {counted(len(values), 'key')} used by no module: {', '.join(shown(unused))}"]


def _replacements(source: AdapterSource, parsed: Mapping[str, Parsed]) -> dict[str, Replacement]:
    config = source.config or {}
    saved = fields.saved_modules(config)
    found: dict[str, Replacement] = {}
    twice: list[str] = []
    for key, whole in parsed.items():
        if not isinstance(whole, Whole) or whole.spelling == "original_module":
            continue
        tensor = source.tensors[key]
        if whole.name not in found:
            found[whole.name] = Replacement(tensor, _declared(whole, saved, config.get("bias", "none")))
        elif not _same(found[whole.name].tensor, tensor):
            twice.append(quoted(whole.name)[1:-1])
    if twice:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(twice), 'weight')} with more than one value",
            details=shown(sorted(twice)),
        )
    return found


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two stored tensors are equal. With bias="all" PEFT saves biases of replaced modules twice."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.location is not None and other.location is not None:
        return read_bytes(one.location) == read_bytes(other.location)
    return bool((one.read() == other.read()).all())


def _declared(whole: Whole, saved: Iterable[str], bias: object) -> str:
    if whole.spelling == "modules_to_save" or any(fields.covers(entry, whole.module) for entry in saved):
        return "modules_to_save"
    module, _, leaf = whole.name.rpartition(".")
    if leaf == "bias" and bias in ("all", "lora_only"):
        return "bias"
    if leaf == "weight" and (whole.spelling == "base_layer" or module.rpartition(".")[2] in _EMBEDDINGS):
        return "embedding"
    return "unlisted"


# Writing


def _writable(adapter: Adapter) -> dict[str, LoRA]:
    """The updates that get factors: all but those of rank 0, which PEFT has no way to write."""
    others = [f"{name}: {u.kind}" for name, u in adapter.updates.items() if not isinstance(u, LoRA)]
    if others:
        raise UnsupportedError(
            f"{len(others)} of {len(adapter.updates)} updates of {quoted(adapter.name)} are not LoRA, and cannot be "
            "written as PEFT",
            details=shown(others),
        )
    updates = {name: u for name, u in adapter.updates.items() if isinstance(u, LoRA) and u.rank > 0}
    if scaleless := [name for name, u in updates.items() if not math.isfinite(u.alpha) or u.alpha == 0]:
        raise UnsupportedError(
            f"{counted(len(scaleless), 'module')} of {quoted(adapter.name)} with an alpha that is 0 or not finite",
            details=shown([f"{quoted(name)}: alpha {updates[name].alpha}" for name in scaleless]),
        )
    return updates


def _cast(key: str, tensor: LazyTensor, dtype: str | None) -> Tensor | LazyTensor:
    if dtype is None or tensor.dtype == dtype or tensor.dtype not in FLOAT_DTYPES:
        return tensor
    from loratools.tensors import torch_dtype

    values = tensor.read()
    cast = values.to(torch_dtype(dtype))
    if bool((cast.isinf() & values.isfinite()).any()):
        raise UnsupportedError(f"{quoted(key)} has values too large for {dtype}", hint="choose bfloat16 or float32")
    return cast
