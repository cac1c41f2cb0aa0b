"""Regular expressions from an untrusted file, matched against names within one budget of computing time.

Python's engine tries every way that a pattern can match: one of thirty characters can take years, and forty thousand
harmless ones take minutes on a large adapter. So whatever one file brings shares one budget, which grows with the
number of names. Patterns in which nothing repeats are matched in this process, with a look at the clock between them;
all others in a child process, which the system stops.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Sequence

from loratools.errors import FormatError, MachineError
from loratools.storage.files import quoted

BUDGET_SECONDS = 1.5
# A file of more names may take longer, in proportion.
SECONDS_PER_NAME = 1e-4
# How much longer than its computing time a child may take by the clock on the wall: machines are shared.
_WALL_FACTOR = 10


class UntrustedRegexes:
    """The regular expressions of one file, and the time that is left for matching them.

    Example:
        >>> regexes = UntrustedRegexes(["layers.0.q_proj", "layers.1.q_proj"])
        >>> regexes.match([r".*\\.0\\..*", "q"], subject="rank_pattern")
        [frozenset({'layers.0.q_proj'}), frozenset()]
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.seconds = BUDGET_SECONDS + SECONDS_PER_NAME * len(names)
        self.spent = 0.0
        self._matching: dict[str, frozenset[str]] = {}

    def matching(self, pattern: str, *, subject: str) -> frozenset[str]:
        """The names that one pattern matches from beginning to end, matched once however often it is asked.

        Raises:
            FormatError: The pattern is no regular expression, or the budget is used up.
            MachineError: No child process could be started.
        """
        if pattern not in self._matching:
            (self._matching[pattern],) = self.match([pattern], subject=subject)
        return self._matching[pattern]

    def match(
        self, patterns: Sequence[str], *, subject: str, around: tuple[str, str] | None = None
    ) -> list[frozenset[str]]:
        """For every pattern the names that it matches.

        Args:
            patterns: Regular expressions.
            subject: Begins the messages of errors, such as the name of the field that they are from.
            around: What stands before and after each of them; the whole is then matched from the beginning of a name
                (`re.match`). Without it a pattern matches a name from beginning to end (`re.fullmatch`).

        Raises:
            FormatError: A pattern is no regular expression, or the budget is used up.
            MachineError: No child process could be started.
        """
        bounded = [i for i, pattern in enumerate(patterns) if _is_bounded(pattern)]
        apart = sorted(set(range(len(patterns))).difference(bounded))
        matched = self._match_here({i: patterns[i] for i in bounded}, subject, around)
        matched |= self._match_apart({i: patterns[i] for i in apart}, subject, around)
        return [matched[i] for i in range(len(patterns))]

    def charge(self, seconds: float, *, subject: str, count: int) -> None:
        """Take computing time of `count` patterns off the budget.

        Raises:
            FormatError: It is used up.
        """
        self.spent += seconds
        if self.spent > self.seconds:
            raise FormatError(
                f"{subject}: {count} patterns take more than {self.seconds:.3g} seconds on {self._counted_names()}",
                hint="write the names of the modules in their place",
            )

    def _counted_names(self) -> str:
        return f"{len(self.names)} module name{'' if len(self.names) == 1 else 's'}"

    def _match_here(
        self, patterns: dict[int, str], subject: str, around: tuple[str, str] | None
    ) -> dict[int, frozenset[str]]:
        matched: dict[int, frozenset[str]] = {}
        for index, pattern in patterns.items():
            started = time.thread_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a set inside a set may mean something else one day
                    if around is None:
                        matches = re.compile(pattern).fullmatch
                    else:
                        matches = re.compile(pattern.join(around)).match
            except (re.error, RecursionError, OverflowError) as error:
                raise _no_regex(pattern, str(error), subject) from None
            names: list[str] = []
            for first in range(0, len(self.names), 256):
                names += filter(matches, self.names[first : first + 256])
                now = time.thread_time()
                self.charge(now - started, subject=subject, count=len(patterns))
                started = now
            matched[index] = frozenset(names)
        return matched

    def _match_apart(
        self, patterns: dict[int, str], subject: str, around: tuple[str, str] | None
    ) -> dict[int, frozenset[str]]:
        if not patterns:
            return {}
        import subprocess  # 10 ms, and hardly ever needed

        if not sys.executable:
            raise MachineError("could not start a Python of its own for the regular expressions of an adapter")
        seconds = max(0.1, self.seconds - self.spent)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        question = json.dumps([list(patterns.items()), self.names, around, seconds]).encode()
        try:
            output, _ = child.communicate(question, timeout=seconds * _WALL_FACTOR)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        stopped = child.returncode < 0
        matched: dict[int, frozenset[str]] = {}
        begun = next(iter(patterns))
        # The last line is cut off where the process was stopped in the middle of it.
        for line in output.decode("utf-8", errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            begun, used, *answer = json.loads(line)
            if answer and isinstance(answer[0], str):
                raise _no_regex(patterns[begun], answer[0], subject)
            if answer:
                self.spent += used
                matched[begun] = frozenset(self.names[i] for i in answer[0])
        if len(matched) < len(patterns):
            why = f"takes more than {self.seconds:.3g} seconds" if stopped else "could not be matched"
            raise FormatError(
                f"{subject}: the regular expression {quoted(patterns[begun])} {why} on {self._counted_names()}",
                hint="write the names of the modules in its place",
            )
        return matched


# Nothing repeats, and so few alternatives that even all of their combinations are soon tried.
_BOUNDED = re.compile(r"[\w.\-()|^$\[\]\\]{0,500}")
_MOST_ALTERNATIVES = 6


def _is_bounded(pattern: str) -> bool:
    return (
        _BOUNDED.fullmatch(pattern) is not None
        and pattern.count("|") <= _MOST_ALTERNATIVES
        and pattern.count("(") <= 20
    )


# Says which pattern it is at before it begins with it, so that one that never ends can be named. Where the system has
# the timer, it stops the process once it has computed for so long; elsewhere the parent stops it, by its own clock.
_CHILD = r"""
import json, re, signal, sys, time, warnings
warnings.simplefilter("ignore")
patterns, names, around, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, seconds)
for index, pattern in patterns:
    print(json.dumps([index, 0]), flush=True)
    started = time.process_time()
    try:
        matches = re.compile(pattern.join(around)).match if around else re.compile(pattern).fullmatch
        answer = [i for i, name in enumerate(names) if matches(name)]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        answer = str(error) or type(error).__name__
    print(json.dumps([index, time.process_time() - started, answer]), flush=True)
"""


def _no_regex(pattern: str, why: str, subject: str) -> FormatError:
    return FormatError(f"{subject}: {quoted(pattern)} is no regular expression: {why}")
