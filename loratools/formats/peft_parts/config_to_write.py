"""The `adapter_config.json` from which PEFT makes exactly the ranks, scales and replaced modules of an adapter.

Starts from what the source said, so that nothing is lost on the way, and states anew whatever the adapter decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from loratools.adapter import Adapter
from loratools.formats.common.notes import metadata_of, names_digest
from loratools.formats.common.scale import most_common
from loratools.formats.peft_parts import config as fields
from loratools.formats.peft_parts.keys import PREFIX
from loratools.formats.peft_parts.lora import orientation_of, registered
from loratools.formats.peft_parts.patterns import matches
from loratools.storage.untrusted_regex import UntrustedRegexes
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts

Factored: TypeAlias = LoRA | LoRAExperts

_NEW_CONFIG: dict[str, object] = {
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "task_type": None,
    "use_dora": False,
}
# What PEFT (0.13 and later) takes for "no module has factors" without raising an error.
_NO_TARGETS = "dummy-target-modules"


def config_to_write(adapter: Adapter, updates: Mapping[str, Factored]) -> dict[str, object]:
    """The fields of the file; `updates` are those that have factors in it."""
    notes = _notes(adapter)
    raw = notes.get("config")
    config: dict[str, object] = dict(raw) if isinstance(raw, Mapping) else dict(_NEW_CONFIG)
    config.pop("runtime_config", None)  # PEFT warns about it and ignores it
    config.pop("token_indices", None)  # of an adapter of trained tokens alone, which a LoRA holds as well
    experts = sorted(target for target, u in updates.items() if u.as_experts() is not None)
    bare = {t for t in set(updates) - set(experts) if experts and _leaf(t) in _TAKEN_FOR_EXPERTS}
    ranks = {target: u.rank for target, u in updates.items()}
    rslora = bool(updates) and all(u.rslora for u in updates.values())
    # Where only some are rsLoRA, all become plain: PEFT has one flag for all.
    alphas = {t: float(u.alpha if u.rslora == rslora else u.scale * u.rank) for t, u in updates.items()}
    rank = most_common(ranks.values(), fields.DEFAULT_RANK)
    alpha = most_common(alphas.values(), float(fields.DEFAULT_ALPHA))
    config |= {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": pattern(ranks, rank, bare),
        "alpha_pattern": {key: _number(value) for key, value in pattern(alphas, alpha, bare).items()},
        "use_rslora": rslora,
    }
    config |= _of_the_trained_model(adapter, config)
    if experts:
        # What is written is packed as PEFT has it; the mark would have every reader ask again.
        config.pop("unsloth_fixed", None)
        if isinstance(mapping := config.get("auto_mapping"), Mapping):
            config["auto_mapping"] = {k: v for k, v in mapping.items() if k != "unsloth_fixed"} or None
        _state_orientation(config, updates)
    # PEFT runs the initialisation again when it loads; these two need the base for it, or an even rank.
    if config.get("init_lora_weights") in ("orthogonal", "mica"):
        config["init_lora_weights"] = True
    if "bias" not in config:  # no source, or several that disagree
        config["bias"] = _bias(adapter, updates)
    modules = sorted(set(updates) - set(experts) - bare)
    config["use_dora"] = any("magnitude" in u.parts for u in updates.values())
    if experts or config.get("target_parameters"):
        config["target_parameters"] = sorted([*experts, *(f"{target}.weight" for target in bare)]) or None
    if any(target.endswith(".bias") for target in adapter.updates) or config.get("lora_bias"):
        config["lora_bias"] = any(f"{target}.bias" in adapter.updates for target in updates)
    unchanged = notes.get("names") == names_digest(adapter.updates, adapter.replacements)
    if tokens := _trained_tokens(adapter):
        config["trainable_token_indices"] = tokens
    elif config.get("trainable_token_indices"):
        config["trainable_token_indices"] = None
    config["modules_to_save"] = _saved(adapter, updates, config, unchanged)
    if bare or not (modules and unchanged and _listed_already(modules, config)):
        # Whole names, so that exactly these modules are found; nothing else may narrow them.
        config["target_modules"] = modules or ([] if experts else _NO_TARGETS)
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
        config |= {name: None for name in narrowing if name in config}
    return config


def factor_tensors(adapter: Adapter, updates: Mapping[str, Factored]) -> dict[str, LazyTensor]:
    """The tensors of the updates by PEFT's keys; parameters of one module are wrapped one around the other."""
    tensors: dict[str, LazyTensor] = {}
    for target, factored in updates.items():
        update = factored.as_lora()
        if update is None:
            continue
        a, b = ("lora_embedding_A", "lora_embedding_B") if update.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{target}.{a}"], tensors[f"{PREFIX}{target}.{b}"] = update.a, update.b
        if update.magnitude is not None:
            tensors[f"{PREFIX}{target}.lora_magnitude_vector"] = update.magnitude
        if (bias := adapter.updates.get(f"{target}.bias")) is not None:
            tensors[f"{PREFIX}{target}.lora_B.bias"] = bias.parts["diff"]
    wrapped: dict[str, list[str]] = {}
    packed = {t: one.packed_as_peft() for t, u in updates.items() if (one := u.as_experts()) is not None}
    for target in packed:
        wrapped.setdefault(target.rpartition(".")[0], []).append(target)
    for module, targets in wrapped.items():
        inside_out = sorted(targets, key=lambda target: registered(target.rpartition(".")[2]))
        for depth, target in enumerate(reversed(inside_out)):
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{place}.lora_A.weight"] = packed[target].a
            tensors[f"{place}.lora_B.weight"] = packed[target].b
    return tensors


def metadata_to_write(adapter: Adapter) -> dict[str, str]:
    """The metadata that the source's file had, whatever its format."""
    return metadata_of(adapter)


def _of_the_trained_model(adapter: Adapter, config: Mapping[str, object]) -> dict[str, object]:
    """The fields that the adapter has typed: of its layers, its tokens, and the class and task of its model."""
    stated: dict[str, object] = {"task_type": adapter.task_type}
    if adapter.fan_in_fan_out is not None or "fan_in_fan_out" in config:
        stated["fan_in_fan_out"] = bool(adapter.fan_in_fan_out)
    if adapter.layer_replication or "layer_replication" in config:
        stated["layer_replication"] = [list(layers) for layers in adapter.layer_replication] or None
    if adapter.invocation_tokens or "alora_invocation_tokens" in config:
        stated["alora_invocation_tokens"] = list(adapter.invocation_tokens) or None
    source = config.get("auto_mapping")
    mapping: dict[str, object] = dict(source) if isinstance(source, Mapping) else {}
    if adapter.base_class is not None:
        library, _, name = adapter.base_class.rpartition(".")
        stated["auto_mapping"] = mapping | {"base_model_class": name} | ({"parent_library": library} if library else {})
    elif "base_model_class" in mapping:
        stated["auto_mapping"] = None
    return stated


def _state_orientation(config: dict[str, object], updates: Mapping[str, Factored]) -> None:
    """Leave out a version of PEFT that took experts the other way round than these are, where none means theirs."""
    orientations = {experts.orientation for u in updates.values() if (experts := u.as_experts()) is not None}
    if orientations == {orientation_of(None)} and orientation_of(config.get("peft_version")) not in orientations:
        config.pop("peft_version", None)


def _notes(adapter: Adapter) -> Mapping[str, object]:
    notes = adapter.notes.get("peft")
    return notes if isinstance(notes, Mapping) else {}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def pattern(values: Mapping[str, int | float], default: float, bare: Collection[str] = ()) -> dict[str, int | float]:
    """The modules whose value is not the default, as keys from which PEFT gives every module its own value.

    bare: those that PEFT looks for by the name of their weight.
    """
    # In the order of the file, which is sorted: the first key that matches counts.
    different = {target: value for target, value in sorted(values.items()) if value != default}
    plain = {f"{re.escape(t)}{_WEIGHT}" if t in bare else t: value for t, value in different.items()}
    if not plain:
        return {}
    matched = matches(plain, UntrustedRegexes(list(values)), subject="a pattern to be written")
    if all((plain[keys[0]] if keys else default) == values[target] for target, keys in matched.items()):
        return plain
    # A short name is also the end of a longer one.
    return dict(sorted((f"^{re.escape(t)}{_WEIGHT if t in bare else ''}", value) for t, value in different.items()))


_WEIGHT = r"(\.weight)?"
# Where a model's experts are fused, PEFT (0.21) takes every module called so for one of their projections as they were
# before transformers 5, shared experts and dense layers too; and routers are no linear layers any more. As parameters
# all of them are what they are.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "router", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def _leaf(target: str) -> str:
    return target.rpartition(".")[2]


def _bias(adapter: Adapter, updates: Mapping[str, Factored]) -> str:
    modules = {name.rpartition(".")[0] for name, r in adapter.replacements.items() if r.declared == "bias"}
    if not modules:
        return "none"
    return "lora_only" if modules <= set(updates) else "all"


def _trained_tokens(adapter: Adapter) -> dict[str, list[int]]:
    """Module -> the numbers of its rows that are replaced."""
    rows = {name.rpartition(".")[0]: r.rows for name, r in adapter.replacements.items()}
    return {module: list(numbers) for module, numbers in rows.items() if numbers is not None}


def _saved(
    adapter: Adapter, updates: Mapping[str, Factored], config: Mapping[str, object], unchanged: bool
) -> list[str] | None:
    """Entries of modules_to_save that find the modules declared so, and no other module of the adapter."""
    declared: set[str] = set()
    not_saved = set(updates)
    for name, replacement in adapter.replacements.items():
        module = name.rpartition(".")[0]
        is_saved = replacement.declared in ("modules_to_save", "norm") and module not in updates
        (declared if is_saved else not_saved).add(module)
    stated = config.get("modules_to_save")
    entries = [entry for entry in stated if isinstance(entry, str)] if isinstance(stated, list) else []
    valid = [entry for entry in entries if not any(fields.covers(entry, module) for module in not_saved)]
    if not unchanged:
        # An entry that finds no weight here may find a module of the base, for which PEFT would miss the weights.
        valid = [entry for entry in valid if any(fields.covers(entry, module) for module in declared)]
    missing = {module for module in declared if not any(fields.covers(entry, module) for entry in valid)}
    # Several entries that find the same module are one wrapper in another: parents only.
    added = [m for m in sorted(missing) if not any(m.startswith(f"{parent}.") for parent in missing)]
    return [*valid, *added] or None


def _listed_already(updates: Iterable[str], config: Mapping[str, object]) -> bool:
    """Whether the source's own target_modules, with nothing to narrow it, finds all modules."""
    listed, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not isinstance(listed, list) or not isinstance(excluded, list):
        return False
    if config.get("layers_to_transform") is not None or config.get("layers_pattern"):
        return False

    def named(target: str, names: list[object]) -> bool:
        return any(isinstance(name, str) and (target == name or target.endswith(f".{name}")) for name in names)

    return all(named(target, listed) and not named(target, excluded) for target in updates)
