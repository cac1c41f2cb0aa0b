"""What an adapter carries along from its source, for a format that has a place for it.

`Adapter.notes` has one mapping per format: `config` for its config file, `metadata` for the texts of a safetensors
header. A format writes back its own config, and the texts of any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

from loratools.adapter import Adapter
from loratools.formats.common.header_keys import LIBRARY
from loratools.updates.parts.protocol import Update


def notes_of(adapter: Adapter, format: str, part: str) -> Mapping[str, object] | None:
    """A mapping that the adapter's source had, if it was of this format."""
    notes = adapter.notes.get(format)
    note = notes.get(part) if isinstance(notes, Mapping) else None
    return note if isinstance(note, Mapping) else None


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """The texts of the source's header, whatever format it was."""
    metadata: dict[str, str] = {}
    for format in adapter.notes:
        texts = notes_of(adapter, format, "metadata") or {}
        metadata |= {str(k): str(v) for k, v in texts.items() if k != LIBRARY}
    return metadata


# Fields of adapter_config.json that PEFT knows of every kind.
_COMMON_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
# Fields that change nothing of what is computed.
_RECORDS = frozenset({"task_type", "revision", "base_model_name_or_path", "auto_mapping", "peft_version"})


def lora_notes(notes: Mapping[str, object], updates: Mapping[str, Update]) -> dict[str, object]:
    """What the source said that is still true of an adapter whose updates are LoRA now.

    A config of another kind of PEFT's is left with the fields that all kinds have.
    """
    peft = notes.get("peft")
    config = peft.get("config") if isinstance(peft, Mapping) else None
    if not isinstance(config, Mapping) or config.get("peft_type", "LORA") == "LORA":
        return dict(notes)
    if not all(u.kind in ("lora", "lora-experts") for u in updates.values()):
        return dict(notes)
    assert isinstance(peft, Mapping)
    return {**notes, "peft": {**peft, "config": {k: v for k, v in config.items() if k in _COMMON_FIELDS}}}


def record_notes(adapter: Adapter, targets: Collection[str], fields: Mapping[str, object]) -> dict[str, object]:
    """The notes of an adapter whose config says `fields` of these targets, and of its source's config the records only.

    Records are the fields that change nothing of what is computed.
    """
    source = notes_of(adapter, "peft", "config") or {}
    config = {name: value for name, value in source.items() if name in _RECORDS} | dict(fields)
    metadata = dict(notes_of(adapter, "peft", "metadata") or {})
    return {**adapter.notes, "peft": {"config": config, "metadata": metadata, "names": names_digest(targets, {})}}


def agreed_notes(notes: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all the sources say alike, at any depth; what they disagree on is true of none of them any more."""
    first, *further_notes = notes
    agreed: dict[str, object] = {}
    for key, value in first.items():
        values = [source_notes.get(key) for source_notes in further_notes]
        if isinstance(value, Mapping) and all(isinstance(s, Mapping) for s in values):
            agreed[key] = agreed_notes([value, *(cast("Mapping[str, object]", s) for s in values)])
        elif all(s == value for s in values):
            agreed[key] = value
    return agreed


# Fields of configs that say what the tensors and their scale say as well: every format writes these in its own way.
_INTERPRETED = frozenset({
    "peft_type", "peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "base_model_name_or_path", "lora_parameters",
    "fine_tune_type", "num_layers", "model", "format", "loratools.family", "loratools.version",
    "lora_adapter_metadata",
})  # fmt: skip


def records_of(adapter: Adapter) -> dict[str, object]:
    """What the source said beside its tensors and what they mean, and the base; by field, sorted."""
    records: dict[str, object] = {}
    for format in adapter.notes:
        for part in ("metadata", "config"):
            entries = notes_of(adapter, format, part) or {}
            records |= {str(name): value for name, value in entries.items() if value and name not in _INTERPRETED}
    if adapter.base_model is not None:
        records["base model"] = adapter.base_model
    return dict(sorted(records.items()))


def names_digest(targets: Iterable[str], replaced: Iterable[str]) -> str:
    """Tells whether an adapter still has the names that were read: then the config's lists of names still hold."""
    import hashlib

    lines = [*(f"target {name}" for name in sorted(targets)), *(f"replaced {name}" for name in sorted(replaced))]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]
