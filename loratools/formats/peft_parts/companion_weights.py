"""Weights that other programs store in a file of their own beside PEFT's, as replacements of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Replacement
from loratools.errors import FormatError
from loratools.formats.common.companions import NEW_HEADS, NEW_TOKENS, TABLES, WRITERS
from loratools.formats.common.source import AdapterSource, companion_tensors, counted, shown
from loratools.formats.peft_parts.keys import WholeWeight, parse
from loratools.storage.files import quoted
from loratools.storage.json_file import read_json
from loratools.storage.same import same_bytes


@dataclass(frozen=True)
class CompanionWeights:
    """The replacements in files beside an adapter, by the names of weights, and the names of the files."""

    replacements: Mapping[str, Replacement]
    files: tuple[str, ...]


def companion_weights(source: AdapterSource, in_adapter: Mapping[str, Replacement]) -> CompanionWeights:
    """Read what the files beside an adapter replace, where the meaning of such a file is known.

    Args:
        source: The adapter.
        own: The replacements in the adapter's own file.

    Raises:
        FormatError: A key that is no weight of the base, rows without numbers of their tokens, or a weight with another
            value than the adapter's own file has.
    """
    weights: dict[str, Replacement] = {}
    problems: list[str] = []
    files = [file for file in source.companions if file.name in WRITERS]
    for file in files:
        if file.name in NEW_TOKENS:
            replaced, faults = _new_tokens(file)
        else:
            replaced, faults = _whole_weights(file, "modules_to_save" if file.name in NEW_HEADS else "companion")
        problems += faults
        for name, replacement in replaced.items():
            earlier = weights.get(name, in_adapter.get(name))
            if earlier is not None and not same_bytes(earlier.tensor, replacement.tensor):
                problems.append(f"{quoted(name)} has another value in '{file.name}' than elsewhere")
            weights[name] = replacement
    if problems:
        raise FormatError(
            f"{quoted(source.folder)} has {counted(len(problems), 'fault')} in the files beside its adapter",
            details=shown(problems),
            hint="move the file away to read the adapter without it",
        )
    return CompanionWeights(weights, tuple(file.name for file in files))


def _whole_weights(file: Path, declared: str) -> tuple[dict[str, Replacement], list[str]]:
    replaced: dict[str, Replacement] = {}
    faults = []
    for key, tensor in companion_tensors(file).items():
        parsed = parse(key)
        if isinstance(parsed, WholeWeight) and parsed.spelling in ("plain", "base_layer", "modules_to_save"):
            replaced[parsed.name] = Replacement(tensor, declared)
        else:
            faults.append(f"{quoted(key)} in '{file.name}' is no weight of the base")
    return replaced, faults


def _new_tokens(file: Path) -> tuple[dict[str, Replacement], list[str]]:
    listed = file.parent / "added_tokens.json"
    numbers = sorted(n for n in read_json(listed).values() if isinstance(n, int)) if listed.is_file() else []
    replaced: dict[str, Replacement] = {}
    faults = []
    for key, tensor in companion_tensors(file).items():
        if key not in TABLES:
            faults.append(f"{quoted(key)} in '{file.name}' is none of {', '.join(TABLES)}")
        elif tensor.shape[:1] != (len(numbers),) or len(tensor.shape) != 2:
            faults.append(
                f"{quoted(key)} in '{file.name}' has shape {list(tensor.shape)}, and added_tokens.json beside it the "
                f"numbers of {len(numbers)} tokens"
            )
        else:
            replaced[TABLES[key]] = Replacement(tensor, "tokens", tuple(numbers))
    return replaced, faults
