"""What a person leaves out of an adapter before it is read: names that globs exclude, or all that is not read.

A glob is over the names that a verb prints. Of a tensor that is not read there is no such name, so that globs are
compared with its key and with the name of its module in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from loratools.arguments import Globs
from loratools.formats.image_parts.spellings import split
from loratools.selection import NameSelection

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LeaveOut:
    """What of an adapter a person leaves out before it is read.

    Attributes:
        include: Globs over the names that are read, as in `Adapter.selected`; empty selects all.
        exclude: Globs over the names that are left out.
        unread: Whether every tensor that cannot be read is left out.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    unread: bool = False

    @classmethod
    def of(cls, include: Globs = (), exclude: Globs = (), *, unread: bool = False) -> LeaveOut:
        """Make one from the arguments of a verb, where one glob may come without a list."""
        included, excluded = ((globs,) if isinstance(globs, str) else tuple(globs) for globs in (include, exclude))
        return cls(included, excluded, unread)

    def excludes(self, key: str) -> bool:
        """Whether the globs leave out the tensor under `key`."""
        return not self._selection.selects(names_of_key(key))

    @cached_property
    def _selection(self) -> NameSelection:
        return NameSelection(self.include, self.exclude)


NOTHING = LeaveOut()


def names_of_key(key: str) -> tuple[str, ...]:
    """What a person may call the tensor under `key`: by the key, or by its module, with PEFT's prefix or without."""
    spelled = split(key)
    names = (key, *(spelled[:1] if spelled is not None else ()))
    return (*names, *(name.removeprefix(_PEFT_PREFIX) for name in names if name.startswith(_PEFT_PREFIX)))
