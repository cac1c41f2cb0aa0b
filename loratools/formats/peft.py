"""PEFT: adapter_config.json with adapter_model.safetensors or .bin, LoRA and other kinds, with replaced weights.

What PEFT trains and cannot be a change of weights is refused by name. What is written, PEFT loads to the same ranks and
scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints.common.dumped import is_dump
from loratools.errors import FormatError, UnreadTensorsError, UnsupportedError, UsageError
from loratools.formats.common.base import Base
from loratools.formats.common.is_image import is_image
from loratools.formats.common.notes import names_digest
from loratools.formats.common.source import CONFIG, AdapterSource, counted, shown
from loratools.formats.peft_parts import config as fields
from loratools.formats.peft_parts import kinds
from loratools.formats.peft_parts.companion_weights import companion_weights
from loratools.formats.peft_parts.keys import (
    OF_TRAINING,
    PREFIX,
    Factor,
    Foreign,
    Parsed,
    ParsedKeys,
    WholeWeight,
    parse,
    parse_all,
    parse_keys,
)
from loratools.formats.peft_parts.ln_tuning import with_plain_keys
from loratools.formats.peft_parts.lora import kind_updates, lora_updates
from loratools.formats.peft_parts.tinker import with_names_of_peft
from loratools.storage.casting import cast
from loratools.storage.files import quoted
from loratools.storage.same import same_bytes
from loratools.tensors.lazy import LazyTensor, from_array
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

WRITES = "folder"

# By the last part of their names; what a base calls its embedding is for the base to say.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "shared")


def detect(source: AdapterSource) -> bool:
    """By `peft_type` in the config, by factors spelled as PEFT spells them, or by its prefix on anything it stores."""
    if source.declared == "peft":
        return True
    for key in source.tensors:
        # Every factor has `lora_` in its name. Asked first, since every file of a model is looked at as well.
        if "lora_" not in key and not key.startswith("base_model."):
            continue
        parsed = parse(key)
        if isinstance(parsed, Factor) or (isinstance(parsed, Foreign) and key.startswith("base_model.")):
            return not is_image(source)
    return False


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`.

    Raises:
        UnsupportedError: Fields or tensors that are not read, all of them named.
        FormatError: Factors that do not make a product, invalid values.
    """
    config = source.config
    peft_type = str((config or {}).get("peft_type", "LORA"))
    renamed, of_the_base = list[str](), list[str]()
    if peft_type == "LORA":
        source, renamed = with_names_of_peft(source)
        parsed = parse_keys(source.tensors)
        if is_dump(source.tensors):
            source, parsed, of_the_base = _without_base(source, parsed.every(source.tensors))
        _refuse_unsupported(source, parsed)
        _refuse_several_adapters(source, parsed)
        updates, uncertainties, warnings = lora_updates(source, parsed, rank_from)
    else:
        _refuse_unsupported(source, ParsedKeys())
        if peft_type == "LN_TUNING":
            source = with_plain_keys(source)
        kind_modules = kinds.modules(source.tensors, peft_type)
        meanings = parse_all(kind_modules.other_keys)
        # Factors of LoRA are of another kind here, and would be left out without a word.
        foreign = Foreign("LoRA")
        parsed = ParsedKeys(
            others={key: foreign if isinstance(meaning, Factor) else meaning for key, meaning in meanings.items()}
        )
        _refuse_unsupported(source, parsed)
        updates, uncertainties, warnings = kind_updates(source, kind_modules, peft_type), [], []
    warnings += [*renamed, *of_the_base, *_warnings(source, parsed, updates)]
    replacements = _replacements(source, parsed)
    companions = companion_weights(source, replacements)
    replacements |= companions.replacements
    base = (config or {}).get("base_model_name_or_path")
    adapter = Adapter(
        updates=updates,
        replacements=replacements,
        format="peft",
        path=source.path,
        base_model=base if isinstance(base, str) and base else None,
        fan_in_fan_out=fields.fan_in_fan_out(config or {}),
        layer_replication=fields.layer_replication(config or {}),
        invocation_tokens=fields.invocation_tokens(config or {}),
        base_class=fields.base_class(config or {}),
        task_type=fields.task_type(config or {}),
        notes={
            "peft": {
                "config": None if config is None else dict(config),
                "metadata": dict(source.metadata),
                "names": names_digest(updates, replacements),
            }
        },
        uncertainties=tuple(uncertainties),
        initialisation_changed_base=fields.initialisation_changed_base(config or {}) if peft_type == "LORA" else None,
        warnings=tuple(warnings),
        read_companions=companions.files,
    )
    if (config or {}).get("auto_mapping") is None and not _may_be_image_model(source.base):
        return adapter
    from loratools.formats.image_parts.component import with_component

    return with_component(adapter, config or {}, source.base)


def _may_be_image_model(base: Base | None) -> bool:
    """Whether a given base is an image model by name or config, or a single file, which has no config."""
    if base is None:
        return False
    of_diffusers = any(field in base.config for field in ("_class_name", "transformer", "unet"))
    return base.family is not None or of_diffusers or not base.config


def _without_base(source: AdapterSource, parsed: Mapping[str, Parsed]) -> tuple[AdapterSource, ParsedKeys, list[str]]:
    """What was trained of the state dict of a whole PeftModel, and a warning of what was not: the weights of its base.

    Modules that were trained whole have a copy of their own there; biases have none, and the config says of them.
    """
    bias = (source.config or {}).get("bias", "none")
    modules = {meaning.module for meaning in parsed.values() if isinstance(meaning, Factor)}

    def is_trained(meaning: Parsed) -> bool:
        if not isinstance(meaning, WholeWeight):
            return True
        if meaning.spelling not in ("plain", "base_layer"):
            return meaning.spelling != "original_module"
        return meaning.name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and meaning.module in modules))

    trained = {key: meaning for key, meaning in parsed.items() if is_trained(meaning)}
    warning = (
        f"{quoted(source.file)} is the state dict of a whole model: its "
        f"{counted(len(parsed) - len(trained), 'weight')} of the base are not read"
    )
    return replace(source, tensors={key: source.tensors[key] for key in trained}), ParsedKeys(others=trained), [warning]


def _warnings(source: AdapterSource, parsed: ParsedKeys, updates: Mapping[str, Update]) -> list[str]:
    """What a person should know of what was read, and what changes nothing."""
    config, warnings = source.config, []
    lora = {name: as_lora for name, update in updates.items() if (as_lora := update.as_lora()) is not None}
    if config is None:
        warnings.append(f"{quoted(source.file)} has no {CONFIG} beside it; alpha is assumed to be the rank")
    elif lora:
        if "peft_type" not in config:
            warnings.append(f"{CONFIG} has no peft_type; it is taken for LORA")
        if "lora_alpha" not in config:
            warnings.append(f"{CONFIG} has no lora_alpha; it is assumed to be {fields.DEFAULT_ALPHA}, PEFT's default")
    meanings = parsed.others
    plain_names = [
        f.name
        for f in meanings.values()
        if isinstance(f, WholeWeight) and f.spelling == "plain" and f.module in updates
    ]
    if plain_names:
        warnings.append(
            f"{counted(len(plain_names), 'weight')} of adapted modules not spelled '.base_layer.': PEFT would not load "
            f"what is replaced here: {', '.join(shown([quoted(name) for name in plain_names]))}"
        )
    if larger := [module for module, update in lora.items() if _has_spare_rank(update.rank, update.shape)]:
        warnings.append(
            f"the rank is above what the weight can have in {counted(len(larger), 'module')}, which adds size and "
            f"nothing else: {', '.join(shown([quoted(name) for name in larger]))}"
        )
    if copies := [key for key, f in meanings.items() if isinstance(f, WholeWeight) and f.spelling == "original_module"]:
        keys = ", ".join(shown([quoted(key) for key in copies]))
        warnings.append(f"{counted(len(copies), 'copy', 'copies')} of base weights that are replaced anyway: {keys}")
    if source.other:
        entries = ", ".join(shown([quoted(name) for name in source.other]))
        warnings.append(f"{counted(len(source.other), 'entry', 'entries')} besides the tensors not read: {entries}")
    if training_only := [key for key, f in meanings.items() if isinstance(f, Foreign)]:
        warnings.append(
            f"{counted(len(training_only), 'tensor')} of use in training only: {', '.join(shown(training_only))}"
        )
    if meanings and not updates:
        warnings.append(f"{quoted(source.path)} has no factors, only {counted(len(meanings), 'replaced weight')}")
    return warnings


@cache
def _has_spare_rank(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether the rank is above what a weight of this shape can have."""
    return rank > min(shape[0], math.prod(shape[1:]))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> dict[str, str]:
    """What is not written, and why."""
    from loratools.formats.image_parts.component import components

    if len(parts := components(adapter)) > 1:
        several = f"of one of {len(parts)} parts of a pipeline, and PEFT's folder holds one; choose it with --include"
        return dict.fromkeys([*adapter.updates, *adapter.replacements], f"{several} '{min(parts)}.*'")
    loras = [lora for u in adapter.updates.values() if (lora := u.as_lora()) is not None]
    normalised = {lora.magnitude is not None for lora in loras}
    problems = {name: "a trained word" for name, r in adapter.replacements.items() if r.declared == "trained word"}
    for name, update in adapter.updates.items():
        if (lora := update.as_lora()) is not None:
            if lora.mid is not None:
                problems[name] = "LoRA with a core between its factors, which PEFT has no place for"
            elif lora.magnitude is not None and (lora.magnitude_of == "in" or len(normalised) > 1):
                problems[name] = "a magnitude of its inputs, or of some modules only, which PEFT has no place for"
        elif update.as_experts() is None and not _is_bias(adapter, name):
            problems[name] = update.kind
    return problems


def write(adapter: Adapter, out_folder: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the folder that PEFT loads to exactly these ranks, scales and replaced weights. Equal input, equal bytes.

    Raises:
        UnsupportedError: An update that is not LoRA, or values that `dtype` cannot hold.
    """
    from loratools.formats.peft_parts.config_to_write import config_to_write, metadata_to_write
    from loratools.storage.json_file import write_json
    from loratools.storage.safetensors_writer import write_safetensors

    updates = _writable(adapter)
    rank_zero = sorted(n for n in set(adapter.updates) - set(updates) if adapter.updates[n].rank == 0)
    tensors = _tensors_by_key(adapter, updates)
    metadata = {"format": "pt", **metadata_to_write(adapter)}
    stored = {key: cast(key, tensor, dtype) for key, tensor in sorted(tensors.items())}
    write_safetensors(out_folder / "adapter_model.safetensors", stored, dict(sorted(metadata.items())))
    write_json(out_folder / CONFIG, config_to_write(adapter, updates), sort=True)
    if not rank_zero:
        return ()
    names = ", ".join(shown([quoted(name) for name in rank_zero]))
    return (f"{counted(len(rank_zero), 'module')} of rank 0 left out, where nothing changes: {names}",)


# Values in memory


def from_state_dict(tensors: Mapping[str, Any], config: object | None) -> Adapter:
    """The adapter of a state dict of PEFT; `config` is a `PeftConfig`, or the fields of one."""
    no_path = Path("the state dict")
    lazy_tensors = {key: from_array(values) for key, values in tensors.items()}
    fields_of_config = None if config is None else _plain_fields(config)
    adapter = read(AdapterSource(no_path, no_path, no_path, fields_of_config, lazy_tensors))
    return replace(adapter, path=None)


def to_state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as torch tensors by PEFT's keys; raises the same errors as `write`."""
    return {key: tensor.read() for key, tensor in sorted(_tensors_by_key(adapter, _writable(adapter)).items())}


def config_of(adapter: Adapter) -> dict[str, object]:
    """The fields of `adapter_config.json`; raises the same errors as `write`."""
    from loratools.formats.peft_parts.config_to_write import config_to_write

    return config_to_write(adapter, _writable(adapter))


def _plain_fields(config: object) -> Mapping[str, object]:
    """The fields as JSON has them: sets as sorted lists, enumerations as their values."""
    fields_of_config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields_of_config, Mapping):
        raise UsageError(
            f"config is of type {type(config).__name__}", hint="give a peft.PeftConfig, or its fields as a dict"
        )
    plain: dict[str, object] = json.loads(
        json.dumps(dict(fields_of_config), default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v))
    )
    return plain


def _tensors_by_key(adapter: Adapter, updates: Mapping[str, LoRA | LoRAExperts]) -> dict[str, LazyTensor]:
    from loratools.formats.peft_parts.config_to_write import factor_tensors

    tensors = factor_tensors(adapter, updates)
    for name, replacement in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        # Where a module has factors, PEFT has wrapped it, and its own weights are one level further down.
        if replacement.rows is not None:
            tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = replacement.tensor
        else:
            key = f"{module}.base_layer.{leaf}" if module in updates else name
            tensors[PREFIX + key] = replacement.tensor
    return tensors


# Reading


def _refuse_unsupported(source: AdapterSource, parsed: ParsedKeys) -> None:
    refused = fields.refusals(source.config or {})
    by_kind: dict[str, list[str]] = {}
    meanings = parsed.others
    targets = {meaning.module for meaning in meanings.values() if isinstance(meaning, Factor)}
    replaced = {f.name for f in meanings.values() if isinstance(f, WholeWeight) and f.spelling != "original_module"}
    for key, meaning in meanings.items():
        if isinstance(meaning, Foreign) and (source.config or {}).get(OF_TRAINING.get(meaning.kind, "")):
            continue  # said in a warning
        if isinstance(meaning, Foreign):
            by_kind.setdefault(meaning.kind, []).append(key)
        elif (
            isinstance(meaning, WholeWeight) and meaning.spelling == "original_module" and meaning.name not in replaced
        ):
            by_kind.setdefault("the base's own copy of a module: a dump of a whole model, not an adapter", []).append(
                key
            )
        elif (
            isinstance(meaning, WholeWeight)
            and (meaning.module in targets or meaning.module in parsed.pairs)
            and meaning.name.split(".")[-1] not in _OF_A_LAYER
        ):
            # An alpha, or the part of some other kind, taken for a weight would be dropped without a word.
            by_kind.setdefault("a tensor beside factors that PEFT does not write", []).append(key)
    if not refused and not by_kind:
        return
    lines = [line for _, line, _ in refused]
    unread = [key for keys in by_kind.values() for key in keys]
    for kind, keys in sorted(by_kind.items()):
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        lines.append(f"tensor {quoted(sorted(keys)[0])}{more}: {kind}")
    hints = [hint for _, _, hint in refused if hint]
    message = f"{quoted(source.path)} needs {counted(len(lines), 'thing')} not supported here"
    if not refused:
        raise UnreadTensorsError(message, unread, details=lines, hint="leave them out with --exclude GLOB")
    raise UnsupportedError(
        message,
        details=lines,
        hint=hints[0] if hints else "loratools formats lists the kinds that are read",
        defect="config-not-read",
    )


_OF_A_LAYER = ("weight", "bias")


def _refuse_several_adapters(source: AdapterSource, parsed: ParsedKeys) -> None:
    names = sorted(
        {f.adapter for f in parsed.others.values() if isinstance(f, Factor | WholeWeight) and f.adapter is not None}
    )
    if len(names) > 1:
        raise FormatError(
            f"{quoted(source.file)} holds {len(names)} adapters",
            details=shown([quoted(name)[1:-1] for name in names], 20),
            hint="save each on its own, with PEFT's save_pretrained",
            defect="keys-several-adapters",
        )


def _replacements(source: AdapterSource, parsed: ParsedKeys) -> dict[str, Replacement]:
    config = source.config or {}
    saved = fields.saved_modules(config)
    undeclared = "norm" if config.get("peft_type") == "LN_TUNING" else "unlisted"
    replacements: dict[str, Replacement] = {}
    twice: list[str] = []
    for key, weight in parsed.others.items():
        if not isinstance(weight, WholeWeight) or weight.spelling == "original_module":
            continue
        tensor = source.tensors[key]
        if weight.spelling == "tokens":
            replacements[weight.name] = Replacement(tensor, "tokens", _token_rows(weight, tensor, config))
        elif weight.name not in replacements:
            declared = _declared(weight, saved, config.get("bias", "none")) or undeclared
            replacements[weight.name] = Replacement(tensor, declared)
        elif not same_bytes(replacements[weight.name].tensor, tensor):
            # Equal ones may stand twice: with bias="all" PEFT saves biases of replaced modules in both spellings.
            twice.append(quoted(weight.name)[1:-1])
    if twice:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(twice), 'weight')} with more than one value",
            details=shown(sorted(twice)),
            defect="keys-duplicate",
        )
    return replacements


def _token_rows(weight: WholeWeight, tensor: LazyTensor, config: Mapping[str, object]) -> tuple[int, ...]:
    """The rows that are replaced, which only the config tells: for the input embedding, or by the module's name."""
    listed = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(listed, Mapping):
        listed = next((rows for name, rows in listed.items() if f".{weight.module}".endswith(f".{name}")), None)
    rows = tuple(row for row in listed if isinstance(row, int)) if isinstance(listed, list) else ()
    if len(rows) != tensor.shape[0] or len(set(rows)) != len(rows) or min(rows, default=0) < 0:
        raise FormatError(
            f"'{weight.module}' has {tensor.shape[0]} trained tokens, and {CONFIG} names {len(rows)} of its rows",
            hint="the numbers of the rows are stored in adapter_config.json alone; save the adapter again",
            defect="config-values",
        )
    return rows


def _declared(weight: WholeWeight, saved: Iterable[str], bias: object) -> str | None:
    """What declares that a weight is replaced; None if only its key does."""
    if weight.spelling == "modules_to_save" or any(fields.covers(entry, weight.module) for entry in saved):
        return "modules_to_save"
    module, _, leaf = weight.name.rpartition(".")
    if leaf == "bias" and bias in ("all", "lora_only"):
        return "bias"
    if leaf == "weight" and (weight.spelling == "base_layer" or module.rpartition(".")[2] in _EMBEDDINGS):
        return "embedding"
    return None


# Writing


def _writable(adapter: Adapter) -> dict[str, LoRA | LoRAExperts]:
    """The updates that get factors: all but those of rank 0, which PEFT has no way to write."""
    if problems := unwritable(adapter):
        raise UnsupportedError(
            f"{len(problems)} of {len(adapter.updates)} updates of {quoted(adapter.name)} cannot be written as PEFT",
            details=shown([f"{name}: {why}" for name, why in problems.items()]),
        )
    updates = {
        name: factored
        for name, update in adapter.updates.items()
        if (factored := update.as_lora() or update.as_experts()) is not None and factored.rank > 0
    }
    if scaleless := [name for name, u in updates.items() if not math.isfinite(u.alpha) or u.alpha == 0]:
        raise UnsupportedError(
            f"{counted(len(scaleless), 'module')} of {quoted(adapter.name)} with an alpha that is 0 or not finite",
            details=shown([f"{quoted(name)}: alpha {updates[name].alpha}" for name in scaleless]),
        )
    return updates


def _is_bias(adapter: Adapter, name: str) -> bool:
    """Whether an update is the bias that B has: of a module with factors, and scaled as they are."""
    bias, partner = adapter.updates[name].as_full(), adapter.updates.get(name.removesuffix(".bias"))
    lora = None if partner is None else partner.as_lora()
    if not name.endswith(".bias") or bias is None or lora is None:
        return False
    return bias.scale == lora.scale and lora.magnitude is None and not lora.embedding
