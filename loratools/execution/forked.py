"""Run work units in forked copies of this process, which share nothing but its memory at the time of the fork.

Threads that take turns at the interpreter every few microseconds spend half their time on the hand-over; processes do
not. A fork is only safe if the process has no other active threads, so this is for our own programs, such as the
command line, and for systems that can fork. Elsewhere, `run` falls back to `local`.

Each worker receives a range of units by number and answers with their results. A worker whose parent has died ends
before its next unit. A parent that fails or is interrupted kills its workers before it raises.
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
# Ranges of units assigned to a worker: while it processes one, it has the next already.
_AHEAD = 2
# A model with experts has tens of thousands of small units, and handing one over costs as much as computing it: more
# units than this are handed over in ranges. Fewer are handed over singly, so that progress is visible and workers end
# together.
_RUNS = 2048


def run(
    units: Sequence[Unit],
    work: Callable[[Unit], Result],
    *,
    threads: int,
    on_result: Callable[[Unit, Result], None] = lambda unit, result: None,
) -> list[Result]:
    """Run `work` on every unit in forked processes.

    Like `local.run`, with `threads` processes. `work` must return its results or write them to disk.
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
        with contextlib.suppress(ConnectionError):  # the outcome is known once its answer is read
            connection.sendall(_RANGE.pack(*units))


class _Workers:
    def __init__(self, count: int, units: Sequence[Unit], work: Callable[[Unit], Result]) -> None:
        self.connections: list[socket.socket] = []
        self.pids: list[int] = []
        self.selector = selectors.DefaultSelector()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # otherwise each worker would have a copy of the unwritten buffer
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
        """Read one answer. Return the first of its units, and the unit after the last."""
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
        except ConnectionResetError:  # it ended, with a message of ours unread
            piece = b""
        if not piece:
            raise MachineError(
                "a worker process ended before its work was done",
                hint="the system may have ended it because memory was short; try fewer with --threads",
            )
        data += piece
    return bytes(data)


def _work(connection: socket.socket, units: Sequence[Unit], work: Callable[[Unit], Result]) -> NoReturn:
    """The main loop of a worker. It never returns into the code of its parent."""
    status = 70
    parent = os.getppid()
    try:
        # The parent decides how to react to an interrupt.
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN if name == signal.SIGINT else signal.SIG_DFL)
        while numbers := connection.recv(_RANGE.size, socket.MSG_WAITALL):
            start, stop = _RANGE.unpack(numbers)
            answer = _answer(start, units[start:stop], work, parent)
            connection.sendall(_NUMBER.pack(len(answer)) + answer)
        status = 0
    except ConnectionError:
        status = 0  # the parent has died, or needs no more answers
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
            # An error that cannot be pickled is sent as text.
            return pickle.dumps((start, [], RuntimeError(f"{type(error).__name__}: {error}")))
        return answer
