"""An adapter under the names that its client will look for: those of the base's class in memory, or of MLX's model.

transformers gives modules other names than files have, and gave them others before; PEFT, mlx-lm and the servers look
for one name alone and load nothing of a module that they do not find.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from loratools.adapter import Adapter
from loratools.errors import MismatchError
from loratools.formats import Base
from loratools.matching import Matches, spellings
from loratools.naming.gguf import model_name as gguf_model_name
from loratools.naming.language.aliases import aliases
from loratools.naming.language.experts import parse_expert
from loratools.naming.language.memory import NamesInMemory
from loratools.naming.mlx import has_inner_language_model, model_name, reason_absent
from loratools.storage.files import quoted

# Formats whose modules have the names of transformers, or names made from them.
_NAMED_AS_IN_TRANSFORMERS = ("peft", "mlx", "gguf")


@dataclass(frozen=True)
class ClientNames:
    """The adapter under its client's names; `updates` and `replacements`: the names that changed, old -> new.

    `unknown`: what the client has no module for, by its new name, and why.
    """

    adapter: Adapter
    updates: Mapping[str, str]
    replacements: Mapping[str, str]
    unknown: Mapping[str, str]


def named_for_client(adapter: Adapter, base: Base | None, matches: Matches | None, to: str) -> ClientNames:
    """Rename modules and replaced weights for the client of format `to`.

    Args:
        adapter: Named as its source has it.
        base: The model it is for, if one is given.
        matches: What its names mean in that base; None if that could not be decided.
        to: The format to be written.

    Raises:
        MismatchError: Two names of the adapter become one.
    """
    if adapter.stored_names or to not in _NAMED_AS_IN_TRANSFORMERS:
        return ClientNames(adapter, {}, {}, {})
    updates = {name: name for name in adapter.updates}
    replacements = {name: name for name in adapter.replacements}
    in_memory: Iterable[str] = ()
    if base is not None and base.model_type is not None and matches is not None:
        base_names = {**base.shapes, **{name: alias.shape for name, alias in aliases(base.config, base.shapes).items()}}
        names = NamesInMemory.of(base.config, base.shapes)
        in_memory = (*base.shapes, *names.stored)
        absent = {leftover.name for leftover in matches.leftovers}

        def weight(name: str) -> str:
            return names.of_class(name, matches.renaming)

        for target, update in adapter.updates.items():
            # Experts keep the names that PEFT and servers take for them: it is they that bring them into memory.
            if target not in absent and parse_expert(target) is None and update.as_experts() is None:
                updates[target] = _renamed_module(target, base_names, matches, weight)
        replacements |= {n: weight(n) for n in replacements if n not in absent and n not in matches.added}
    if to == "gguf" and base is not None:
        # A file has one name for each module, which is read back as the model in memory has it.
        updates |= {old: gguf_model_name(base.model_type, new) for old, new in updates.items()}
    unknown: dict[str, str] = {}
    if to == "mlx":
        model_type = base.model_type if base is not None else None
        inner = any(has_inner_language_model(name) for name in (*updates.values(), *in_memory))
        for table in (updates, replacements):
            table.update({old: model_name(new, model_type, inner=inner) for old, new in table.items()})
        unknown = {new: why for new in updates.values() if (why := reason_absent(new, inner=inner))}
    _refuse_shared_name(adapter, updates)
    _refuse_shared_name(adapter, replacements)
    moved = replace(
        adapter,
        updates={updates[name]: update for name, update in adapter.updates.items()},
        replacements={replacements[name]: r for name, r in adapter.replacements.items()},
    )
    return ClientNames(moved, _changed(updates), _changed(replacements), unknown)


def _renamed_module(
    target: str, base_names: Mapping[str, object], matches: Matches, weight: Callable[[str], str]
) -> str:
    """The module's name in memory, told by the name of its weight, which is what bases are known by."""
    for spelled in spellings(target):
        if matches.renaming(spelled) in base_names:
            ending = spelled.removeprefix(target)
            new = weight(spelled)
            return new.removesuffix(ending) if new.endswith(ending) else target
    return target


def _refuse_shared_name(adapter: Adapter, names: Mapping[str, str]) -> None:
    twice = {new for new, count in Counter(names.values()).items() if count > 1}
    if twice:
        raise MismatchError(
            f"names of {quoted(adapter.name)} become one in the model that it is written for",
            details=[f"{old}: {new}" for old, new in names.items() if new in twice],
            hint="choose one of them with --include or --exclude",
        )


def _changed(names: Mapping[str, str]) -> dict[str, str]:
    return {old: new for old, new in names.items() if old != new}
