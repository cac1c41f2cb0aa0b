"""Which names `include` and `exclude` leave of many sources: a glob need not match in each of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from loratools.errors import UsageError
from loratools.formats.common.leave_out import LeaveOut


class NameSelection:
    """The names that match a glob of `include` (all, if there is none) and none of `exclude`."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._unmatched = dict.fromkeys([*include, *exclude])
        self._count = 0
        self._example: str | None = None

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    @property
    def leave_out(self) -> LeaveOut:
        """The same globs for what reads an adapter: tensors that are no reason to refuse it."""
        return LeaveOut(self.include, self.exclude)

    def of(self, names: Iterable[str], aliases: Mapping[str, Sequence[str]]) -> set[str]:
        """The names that are left. `aliases`: further names that a name is matched by."""
        selected = set()
        for name in names:
            self._count += 1
            self._example = self._example or name
            spellings = (name, *aliases.get(name, ()))
            included = [g for g in self.include if any(fnmatch.fnmatchcase(s, g) for s in spellings)]
            excluded = [g for g in self.exclude if any(fnmatch.fnmatchcase(s, g) for s in spellings)]
            for glob in (*included, *excluded):
                self._unmatched.pop(glob, None)
            if (included or not self.include) and not excluded:
                selected.add(name)
        return selected

    def require_matches(self) -> None:
        """Raise UsageError for a glob that matched none of all names."""
        for glob in self._unmatched:
            raise UsageError(
                f"'{glob}' matches none of {self._count} names",
                hint=f"names look like '{self._example}'; a glob may start with '*'" if self._example else None,
            )
