"""The report of list: one row per adapter, and the other files in the folders."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from loratools.notebook_html import notebook_html
from loratools.short_repr import few_lines, one_line
from loratools.sources.cache import cached_repository


@dataclass(frozen=True)
class ListedAdapter:
    """One adapter in a list, or a file that could not be read, with the reason in `error`.

    Attributes:
        path: Where it is.
        revision: The commit of its repository, if it is in the cache of the hub; None elsewhere.
        format: Its format; None if it could not be read.
        kind: The kinds of its updates, joined by ` + `; `replaced weights` if it has no updates.
        family: The family of image models that it belongs to; for an adapter of a language model that names no base,
            the published models of the same sizes; None if neither is known.
        base_model: The base model that it names; None if it names none.
        modules: How many modules it changes.
        rank: The largest rank; None if its kind has none.
        ranks: How many modules have each rank, the commonest first.
        alpha: The commonest alpha among the modules of the largest rank; None if their kind has none.
        scale: The commonest scale of its updates.
        dtype: The commonest dtype of its tensors.
        parameters: How many values it stores.
        bytes: Size of its files in bytes.
        title: The title in its header; None if there is none.
        trigger_words: The trigger words in its header.
        date: The creation date in its header; None if there is none.
        modified: When its file was last changed, UTC, such as 2024-07-31T10:20:30Z.
        warnings: Warnings about it, as sentences.
        error: Why it could not be read; None if it could.
    """

    path: str
    revision: str | None = None
    format: str | None = None
    kind: str | None = None
    family: str | None = None
    base_model: str | None = None
    modules: int | None = None
    rank: int | None = None
    ranks: tuple[tuple[int, int], ...] = ()
    alpha: float | None = None
    scale: float | None = None
    dtype: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    title: str | None = None
    trigger_words: tuple[str, ...] = ()
    date: str | None = None
    modified: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def name(self) -> str:
        """The last part of the path; in the cache of the hub, the name of the repository."""
        path = Path(self.path)
        cached = cached_repository(path) if self.revision is not None else None
        if cached is not None:
            return f"{cached.repository}/{cached.inside}".rstrip("/")
        return path.name or self.path

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `adapters` in the document of `loratools list --json`."""
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        return body | {
            "ranks": {str(rank): count for rank, count in self.ranks},
            "trigger_words": list(self.trigger_words),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class OtherSource:
    """Something in the folders that is not an adapter.

    Attributes:
        path: Where it is.
        what: What it is, or why it is not listed.
    """

    path: str
    what: str


@dataclass(frozen=True)
class Duplicates:
    """Adapters that have the same effect.

    Attributes:
        paths: Where they are.
        how: `file` if their bytes are equal, `values` if their updates are equal up to rounding.
    """

    paths: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class ListReport:
    """The report of list: the adapters in some folders.

    Attributes:
        adapters: One row per adapter, in the requested order.
        others: Files and folders that are not adapters, and what they are.
        duplicates: Groups of adapters that have the same effect; empty if duplicates were not requested.
        hidden: How many adapters the condition excludes.
        not_compared: Paths of adapters whose values could not be compared, because they depend on the base, replace
            weights or are damaged.

    Example:
        >>> import loratools
        >>> report = loratools.list_adapters("fixtures/llama-tiny-science", cache=False)
        >>> report.adapters[0].kind, report.adapters[0].rank
        ('lora', 16)
    """

    adapters: tuple[ListedAdapter, ...]
    others: tuple[OtherSource, ...] = ()
    duplicates: tuple[Duplicates, ...] = ()
    hidden: int = 0
    not_compared: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return few_lines(self)

    _repr_html_ = notebook_html

    def rows(self) -> list[dict[str, object]]:
        """Return one row per adapter, for a data frame: `pandas.DataFrame(report.rows())`."""
        return [adapter.to_dict() for adapter in self.adapters]

    def to_dict(self) -> dict[str, object]:
        """Return the document of `loratools list --json`, without the fields common to all verbs."""
        return {
            "adapters": self.rows(),
            "others": [{"path": other.path, "what": other.what} for other in self.others],
            "duplicates": [{"paths": list(group.paths), "how": group.how} for group in self.duplicates],
            "hidden": self.hidden,
            "not_compared": list(self.not_compared),
        }
