"""Conditions on rows, as `--where` takes them: `rank >= 32 and family = flux and not title ~ '*test*'`.

A small language of its own, read by a recursive descent: names of columns, comparisons, `and`, `or`, `not` and
parentheses. Nothing in it can run anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from loratools.arguments import parse_size
from loratools.errors import UsageError

Row = Mapping[str, object]
Predicate = Callable[[Row], bool]

# Parentheses within each other.
_DEEPEST = 50

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>'[^']*'|"[^"]*")
      | (?P<operator><=|>=|!=|==|=|<|>|~)
      | (?P<bracket>[()])
      | (?P<word>[^\s()<>=!~'"]+)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


def condition(text: str, columns: Mapping[str, type]) -> Predicate:
    """Return what decides whether a row meets a condition.

    Args:
        text: The condition.
        columns: The columns that rows have, and whether each holds texts (str), numbers (float) or several texts
            (tuple), of which one has to meet a comparison.

    Raises:
        UsageError: It is not such a condition, or names a column that there is not.

    Example:
        >>> few = condition("rank < 8 or not title ~ '*ink*'", {"rank": float, "title": str})
        >>> few({"rank": 16, "title": "Ink wash"}), few({"rank": 4, "title": "Ink wash"})
        (False, True)
    """
    parser = _Parser(text, columns)
    met = parser.either()
    if parser.token is not None:
        raise parser.wrong("nothing can follow here")
    return met


class _Parser:
    def __init__(self, text: str, columns: Mapping[str, type]) -> None:
        self.text, self.columns = text, columns
        self._depth = 0
        self._tokens = self._split()
        self.token: _Token | None = next(self._tokens, None)

    def _split(self) -> Iterator[_Token]:
        at = 0
        while self.text[at:].strip():
            match = _TOKEN.match(self.text, at)
            if match is None or match.lastgroup is None:
                raise self.wrong("this cannot be read", at)
            yield _Token(match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup))
            at = match.end()

    def wrong(self, why: str, at: int | None = None) -> UsageError:
        """The error that something at a place is not as it has to be."""
        if at is None:
            at = self.token.at if self.token is not None else len(self.text)
        place = f"at '{self.text[at : at + 20].strip()}'" if self.text[at:].strip() else "at its end"
        return UsageError(
            f"the condition '{self.text}' cannot be read {place}: {why}",
            hint='write conditions such as "rank >= 32 and family = flux"; texts with blanks in quotes, ~ for globs',
        )

    def _next(self) -> _Token:
        token = self.token
        if token is None:
            raise self.wrong("something is missing")
        self.token = next(self._tokens, None)
        return token

    def _is(self, *words: str) -> bool:
        return self.token is not None and self.token.kind != "quoted" and self.token.text.lower() in words

    def either(self) -> Predicate:
        terms = [self._conjunction()]
        while self._is("or"):
            self._next()
            terms.append(self._conjunction())
        return terms[0] if len(terms) == 1 else lambda row: any(term(row) for term in terms)

    def _conjunction(self) -> Predicate:
        terms = [self._negated()]
        while self._is("and"):
            self._next()
            terms.append(self._negated())
        return terms[0] if len(terms) == 1 else lambda row: all(term(row) for term in terms)

    def _negated(self) -> Predicate:
        # A list in place of calls in calls: a condition may have as many of these as fit into a line.
        negations = 0
        while self._is("not"):
            self._next()
            negations += 1
        term = self._single()
        return term if negations % 2 == 0 else lambda row: not term(row)

    def _single(self) -> Predicate:
        if self._is("("):
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self.wrong("it is nested too deeply")
            self._next()
            inside = self.either()
            self._depth -= 1
            if not self._is(")"):
                raise self.wrong("a closing parenthesis is missing")
            self._next()
            return inside
        return self._comparison()

    def _comparison(self) -> Predicate:
        if self.token is None or self.token.kind != "word":
            raise self.wrong("the name of a column is missing")
        column = self.token.text
        if column not in self.columns:
            near = get_close_matches(column, self.columns, n=1)
            raise UsageError(
                f"the condition '{self.text}' names no column with '{column}'",
                hint=f"did you mean '{near[0]}'?" if near else f"columns are: {', '.join(self.columns)}",
            )
        self._next()
        if self.token is None or self.token.kind != "operator":
            # A column alone: whether there is anything in it.
            return lambda row: bool(row.get(column))
        operator = self._next().text
        if self.token is None or self.token.kind not in ("word", "quoted"):
            raise self.wrong("the value to compare with is missing")
        at = self.token.at
        token = self._next()
        value = token.text[1:-1] if token.kind == "quoted" else token.text
        if operator == "~":
            return _glob(column, value)
        if self.columns[column] is float:
            number = _number(value)
            if number is None:
                raise self.wrong(f"'{column}' is compared with a number", at)
            return _compared(column, operator, number)
        return _compared_text(column, operator, value)


def _number(text: str) -> float | None:
    """A number, or a size such as 200MB in bytes; None of any other text."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(parse_size(text))
    except UsageError:
        return None


def _compared(column: str, operator: str, number: float) -> Predicate:
    def met(row: Row) -> bool:
        value = row.get(column)
        if not isinstance(value, int | float):
            return operator == "!="
        return _ordered(operator, (value > number) - (value < number))

    return met


def _compared_text(column: str, operator: str, text: str) -> Predicate:
    wanted = text.casefold()

    def met(row: Row) -> bool:
        values = _texts(row.get(column))
        if operator == "!=":
            return wanted not in values
        return any(_ordered(operator, (value > wanted) - (value < wanted)) for value in values)

    return met


def _glob(column: str, pattern: str) -> Predicate:
    glob = pattern.casefold()
    return lambda row: any(fnmatchcase(value, glob) for value in _texts(row.get(column)))


def _texts(value: object) -> list[str]:
    if value is None:
        return []
    return [str(each).casefold() for each in (value if isinstance(value, tuple) else (value,))]


def _ordered(operator: str, sign: int) -> bool:
    """Whether a value compares so with another, given the sign of their difference."""
    return {
        "=": sign == 0, "==": sign == 0, "!=": sign != 0,
        "<": sign < 0, "<=": sign <= 0, ">": sign > 0, ">=": sign >= 0,
    }[operator]  # fmt: skip
