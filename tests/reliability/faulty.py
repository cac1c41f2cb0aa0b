"""The os module as storage calls it, with calls that fail or do half of what they were asked for."""

from __future__ import annotations

import os

from reliability.killing import CALLS


class FaultyOs:
    """The os module, whose n-th call that may fail does, with this number of an error; only calls in `calls` count."""

    def __init__(self, n: int, code: int, calls: frozenset[str] = CALLS) -> None:
        self.left = n
        self.code = code
        self.calls = calls
        self.failed = ""

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in self.calls:
            return real

        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                self.failed = f"{name}{args[:2]}"
                if name == "close":  # a failed close has closed all the same
                    real(*args)
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


class ShortOs:
    """The os module, whose reads, writes and copies stop after at most so many bytes."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __getattr__(self, name: str) -> object:
        most = self.most
        if name == "pwrite":
            return lambda fd, data, offset: os.pwrite(fd, data[:most], offset)
        if name == "preadv":
            return lambda fd, buffers, offset: os.preadv(fd, [buffers[0][:most]], offset)
        if name == "copy_file_range":
            return lambda source, target, count, *at: os.copy_file_range(source, target, min(count, most), *at)
        return getattr(os, name)
