"""Adapter: what one adapter file or folder holds, in whatever format it is stored.

    updates        target -> update          `model.layers.0.self_attn.q_proj` -> LoRA(A, B, alpha)
    replacements   weight -> whole tensor    `classifier.weight` -> the trained head

A target is the adapter's own name for a module, without the container's prefix; a replacement is named like the
weight it replaces. What they mean in a base is for `matching` to find out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.errors import LoraToolsError, UnsupportedError, UsageError
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of a weight of the base, or of some of its rows.

    declared  what in the adapter says so: modules_to_save, bias, embedding, tokens; or `unlisted`, where only the key
              does.
    rows      numbers of the rows that are replaced; None where the whole weight is.
    """

    tensor: LazyTensor
    declared: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """Immutable; both mappings are sorted by name.

    `doubts` are things that make the updates uncertain, their scale or the order of their rows: what needs their values
    refuses while there are any. `remedy` is what a person can do about them.
    `moved_base` is the initialisation that changed the base, whose factors at the start have to be taken off again.
    `warnings` are things that a person should know and that change nothing.
    `read_companions` are files beside the adapter's own that were read with it, `unread_companions` those that hold
    tensors and were not, since their meaning is not known: merging refuses while there are any.
    `notes` is what the source says that is not interpreted here, kept to be written back: one mapping per format.
    `stored_names` says that targets are the names of modules as a file of this format has them, letter by letter, and
    not those of diffusers or transformers; `undecided` is why there are no others, where that is so. `aliases` are
    the names by which a target is chosen beside its own.
    """

    updates: Mapping[str, Update]
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    format: str = ""
    path: Path | None = None
    base_model: str | None = None
    notes: Mapping[str, object] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    moved_base: str | None = None
    warnings: tuple[str, ...] = ()
    stored_names: bool = False
    undecided: LoraToolsError | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    read_companions: tuple[str, ...] = ()
    unread_companions: tuple[str, ...] = ()
    remedy: str = "say which rank the scale is to be taken from: --rank-from tensors, or --rank-from config"

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", dict(sorted(self.updates.items())))
        object.__setattr__(self, "replacements", dict(sorted(self.replacements.items())))

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path is not None else "adapter"

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor, by target and part, or by the name of the replaced weight."""
        parts = {f"{target}.{part}": t for target, u in self.updates.items() for part, t in u.parts.items()}
        return parts | {name: r.tensor for name, r in self.replacements.items()}

    def require_scale(self) -> None:
        """Raise UnsupportedError where it is not certain what the updates are to be multiplied with."""
        if self.doubts:
            raise UnsupportedError(
                f"the scale of '{self.name}' is uncertain",
                details=self.doubts,
                hint=self.remedy,
            )

    def selected(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Adapter:
        """The part of the adapter whose names match a glob of `include` (all, if none) and none of `exclude`.

        Raises:
            UsageError: a glob matches nothing, or nothing is left.
        """
        if not include and not exclude:
            return self
        every = [*self.updates, *self.replacements]
        kept = set(select_names(every, include, exclude, aliases=self.aliases))
        return replace(
            self,
            updates={n: u for n, u in self.updates.items() if n in kept},
            replacements={n: r for n, r in self.replacements.items() if n in kept},
        )


def select_names(
    names: Iterable[str],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Names that match a glob of `include` (all, if there is none) and none of `exclude`, in their order.

    aliases: further names that a name is matched by.

    Raises:
        UsageError: a glob matches nothing, or nothing is left.
    """
    names = list(names)
    aliases = aliases or {}

    def matches(name: str, glob: str) -> bool:
        return any(fnmatch.fnmatchcase(n, glob) for n in (name, *aliases.get(name, ())))

    for glob in [*include, *exclude]:
        if not any(matches(n, glob) for n in names):
            raise UsageError(
                f"'{glob}' matches none of {len(names)} names",
                hint=f"names look like '{names[0]}'; a glob may start with '*'" if names else None,
            )
    kept = [n for n in names if not include or any(matches(n, g) for g in include)]
    kept = [n for n in kept if not any(matches(n, g) for g in exclude)]
    if not kept:
        raise UsageError(f"--include and --exclude leave none of {len(names)} names")
    return kept
