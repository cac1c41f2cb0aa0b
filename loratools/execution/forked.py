"""Run work units on forked copies of this process, which share its memory and nothing else.

Threads that take turns at the interpreter every few microseconds spend half their time handing it over; processes do
not. A fork is only safe while the process has no other threads at work, so this is for a program of our own, such as
the command line, and for systems that can fork. Elsewhere, `run` is that of `local`.

Each worker is told a run of units by number and answers with their results. A worker whose parent is gone ends before
its next unit; a parent that fails or is interrupted kills its workers before it raises.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from loratools.errors import MachineError
from loratools.execution import local
from loratools.execution.local import Result, Unit

_NUMBER = struct.Struct("<q")
_RANGE = struct.Struct("<qq")
# Runs of units that a worker has been told of: while it answers for one it has the next.
_AHEAD = 2
# A model of experts has tens of thousands of small units, and handing over one costs as much as computing it: more
# units than these are handed over in runs. Fewer go one by one, so that progress is seen and workers end together.
_RUNS = 2048


def run(
    units: Sequence[Unit],
    work: Callable[[Unit], Result],
    *,
    threads: int,
    on_result: Callable[[Unit, Result], None] = lambda unit, result: None,
) -> list[Result]:
    """Run `work` on every unit in forked processes.

    `local.run`, with `threads` processes; `work` must leave its traces in its result or on disk.
    """
    if threads == 1 or len(units) < 2 or not sys.platform.startswith("linux"):
        return local.run(units, work, threads=threads, on_result=on_result)
    workers = _Workers(min(threads, len(units)), units, work)
    results: dict[int, Result] = {}
    length = max(1, len(units) // _RUNS)
    try:
        todo = iter([(start, min(start + length, len(units))) for start in range(0, len(units), length)])
        unfinished = len(units)
        for _ in range(_AHEAD):
            for connection in workers.connections:
                _send(connection, next(todo, None))
        while unfinished:
            for connection in workers.ready():
                start, stop = workers.answer(connection, results)
                unfinished -= stop - start
                _send(connection, next(todo, None))
                for i in range(start, stop):
                    on_result(units[i], results[i])
    finally:
        workers.end(kill=unfinished > 0)
    return [results[i] for i in range(len(results))]


def _send(connection: socket.socket, units: tuple[int, int] | None) -> None:
    if units is not None:
        with contextlib.suppress(ConnectionError):  # what became of it is told when its answer is read
            connection.sendall(_RANGE.pack(*units))


class _Workers:
    def __init__(self, count: int, units: Sequence[Unit], work: Callable[[Unit], Result]) -> None:
        self.connections: list[socket.socket] = []
        self.pids: list[int] = []
        self.selector = selectors.DefaultSelector()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or each worker would have a copy of what is not yet written
        try:
            for _ in range(count):
                parent_end, worker_end = socket.socketpair()
                pid = os.fork()
                if pid == 0:
                    for connection in [*self.connections, parent_end]:
                        connection.close()
                    _work(worker_end, units, work)
                worker_end.close()
                self.connections.append(parent_end)
                self.pids.append(pid)
                self.selector.register(parent_end, selectors.EVENT_READ)
        except BaseException:
            self.end(kill=True)
            raise

    def ready(self) -> list[socket.socket]:
        return [key.fileobj for key, _ in self.selector.select() if isinstance(key.fileobj, socket.socket)]

    def answer(self, connection: socket.socket, results: dict[int, Result]) -> tuple[int, int]:
        """Take one answer in; the first of its units, and the one after its last."""
        (size,) = _NUMBER.unpack(_received(connection, _NUMBER.size))
        start, answered, error = pickle.loads(_received(connection, size))
        if error is not None:
            raise error
        results.update(enumerate(answered, start))
        return int(start), int(start) + len(answered)

    def end(self, *, kill: bool) -> None:
        for pid in self.pids if kill else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for connection in self.connections:
            connection.close()
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.selector.close()


def _received(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            piece = connection.recv(size - len(data))
        except ConnectionResetError:  # it ended with a message of ours unread
            piece = b""
        if not piece:
            raise MachineError(
                "a worker process ended before its work was done",
                hint="the system may have ended it for want of memory; try fewer with --threads",
            )
        data += piece
    return bytes(data)


def _work(connection: socket.socket, units: Sequence[Unit], work: Callable[[Unit], Result]) -> NoReturn:
    """The life of a worker. It never returns into the code of its parent."""
    status = 70
    parent = os.getppid()
    try:
        # The parent decides what an interrupt means.
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN if name == signal.SIGINT else signal.SIG_DFL)
        while numbers := connection.recv(_RANGE.size, socket.MSG_WAITALL):
            start, stop = _RANGE.unpack(numbers)
            answer = _answer(start, units[start:stop], work, parent)
            connection.sendall(_NUMBER.pack(len(answer)) + answer)
        status = 0
    except ConnectionError:
        status = 0  # the parent is gone, or has heard enough
    finally:
        os._exit(status)


def _answer(start: int, units: Sequence[Unit], work: Callable[[Unit], Result], parent: int) -> bytes:
    results: list[Result] = []
    try:
        for unit in units:
            if os.getppid() != parent:
                raise ConnectionResetError
            results.append(work(unit))
        return pickle.dumps((start, results, None))
    except BaseException as error:
        try:
            answer = pickle.dumps((start, [], error))
            pickle.loads(answer)
        except Exception:
            # An error that cannot travel is told in words.
            return pickle.dumps((start, [], RuntimeError(f"{type(error).__name__}: {error}")))
        return answer
