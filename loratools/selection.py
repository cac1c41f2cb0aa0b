"""Names that a person selects by globs: `include`, `exclude`, and the weights of single modules."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from loratools.errors import UsageError


def match_glob(spellings: Iterable[str], glob: str) -> bool:
    """Whether one of the spellings of a name matches the glob; upper and lower case differ on every system."""
    return any(fnmatch.fnmatchcase(spelling, glob) for spelling in spellings)


class NameSelection:
    """The names that match a glob of `include` (all, if there is none) and none of `exclude`, of one or many sources.

    A glob need not match in each source; `require_matches` refuses one that matched nowhere.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._patterns = {glob: re.compile(fnmatch.translate(glob)).match for glob in (*include, *exclude)}
        self._unmatched = dict.fromkeys(self._patterns)
        self._count = 0
        self._example: str | None = None

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def selects(self, spellings: Collection[str]) -> bool:
        """Whether a name of these spellings is selected."""
        included = [glob for glob in self.include if any(map(self._patterns[glob], spellings))]
        excluded = [glob for glob in self.exclude if any(map(self._patterns[glob], spellings))]
        for glob in (*included, *excluded):
            self._unmatched.pop(glob, None)
        return bool(included or not self.include) and not excluded

    def of(self, names: Iterable[str], aliases: Mapping[str, Sequence[str]] | None = None) -> list[str]:
        """The names that are selected, in their order. `aliases`: further spellings of a name."""
        aliases = aliases or {}
        selected = []
        for name in names:
            self._count += 1
            self._example = self._example or name
            if self.selects((name, *aliases.get(name, ()))):
                selected.append(name)
        return selected

    def count_unread(self, keys: Iterable[str]) -> None:
        """Count globs as matched that have left out tensors before they were read, by their key or their module's."""
        for key in keys:
            for glob in list(self._unmatched):
                if match_glob([key], glob) or match_glob([key], f"{glob}.*"):
                    self._unmatched.pop(glob)

    def require_matches(self) -> None:
        """Check that every glob matched a name.

        Raises:
            UsageError: One matched nothing.
        """
        for glob in self._unmatched:
            raise UsageError(
                f"'{glob}' matches none of {self._count} names",
                hint=f"names look like '{self._example}'; a glob may start with '*'" if self._example else None,
            )


def select_names(
    names: Iterable[str],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    unread: Sequence[str] = (),
) -> list[str]:
    """Names that the globs select, in their order; all, if there are no globs.

    aliases: further spellings of a name.
    unread: keys of tensors that the globs have left out already, as they are not read.

    Raises:
        UsageError: A glob matches nothing, or nothing is left.
    """
    names = list(names)
    selection = NameSelection(include, exclude)
    if not selection:
        return names
    selected = selection.of(names, aliases)
    selection.count_unread(unread)
    selection.require_matches()
    if not selected:
        raise UsageError(f"--include and --exclude leave none of {len(names)} names")
    return selected
