"""Every way to run work units: the same results, the same order, the same errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loratools import registry
from loratools.errors import InputError, MachineError
from loratools.execution import Runner

RUNNERS = registry.names("execution")
forks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux alone")


@pytest.fixture(params=RUNNERS)
def run(request: pytest.FixtureRequest) -> Runner:
    runner: Runner = registry.load("execution", request.param).run
    return runner


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_units(run: Runner, threads: int) -> None:
    def work(unit: int) -> int:
        time.sleep(0.002 * (unit % 3))
        return unit * unit

    assert run(range(23), work, threads=threads) == [i * i for i in range(23)]


def test_no_units_give_no_results(run: Runner) -> None:
    assert run([], lambda unit: unit, threads=2) == []


def test_done_is_called_once_for_each_unit_with_its_result(run: Runner) -> None:
    seen: dict[str, int] = {}

    run(["a", "bb", "ccc"], len, threads=2, on_result=lambda unit, result: seen.update({unit: result}))

    assert seen == {"a": 1, "bb": 2, "ccc": 3}


def test_the_first_error_is_raised_whole_and_stops_the_rest(run: Runner, tmp_path: Path) -> None:
    def work(unit: int) -> None:
        if unit == 1:
            raise InputError("this one", hint="do that", details=["here"])
        time.sleep(0.01)
        (tmp_path / str(unit)).touch()

    with pytest.raises(InputError, match="this one") as caught:
        run(range(500), work, threads=2)

    assert (caught.value.hint, caught.value.details) == ("do that", ("here",))
    assert len(list(tmp_path.iterdir())) < 50


def test_an_error_in_done_stops_the_run(run: Runner) -> None:
    def on_result(unit: int, result: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(range(50), lambda unit: unit, threads=2, on_result=on_result)


def test_large_results_arrive_whole(run: Runner) -> None:
    assert run([3, 5], lambda unit: bytes([unit]) * 3_000_000, threads=2) == [b"\3" * 3_000_000, b"\5" * 3_000_000]


@forks
def test_forked_workers_are_other_processes() -> None:
    pids = registry.load("execution", "forked").run(range(8), lambda unit: os.getpid(), threads=2)

    assert len(set(pids)) == 2
    assert os.getpid() not in pids


@forks
def test_a_worker_that_is_killed_is_an_error_and_no_hang() -> None:
    def work(unit: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MachineError, match="worker process ended"):
        registry.load("execution", "forked").run(range(4), work, threads=2)


@forks
def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Odd(Exception):  # noqa: N818
        def __reduce__(self) -> str:
            raise TypeError

    def work(unit: int) -> None:
        raise Odd("no way")

    with pytest.raises(RuntimeError, match="Odd: no way"):
        registry.load("execution", "forked").run(range(4), work, threads=2)


@forks
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from loratools.execution.forked import run
def work(unit):
    (Path({str(tmp_path)!r}) / str(os.getpid())).touch()
    time.sleep(0.05)
run(range(10_000), work, threads=2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)

    parent.kill()
    parent.wait()

    workers = [int(p.name) for p in tmp_path.iterdir()]
    assert len(workers) == 2
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@forks
def test_many_units_are_handed_over_in_runs_and_each_is_done_once() -> None:
    seen: list[tuple[int, int]] = []

    results = registry.load("execution", "forked").run(
        range(5001), lambda unit: unit * 3, threads=2, on_result=lambda unit, result: seen.append((unit, result))
    )

    assert results == [unit * 3 for unit in range(5001)]
    assert sorted(seen) == [(unit, unit * 3) for unit in range(5001)]


@forks
@pytest.mark.parametrize("failure", [InputError("a bad unit"), KeyboardInterrupt()])
def test_a_parent_that_fails_kills_its_workers_before_it_raises(tmp_path: Path, failure: BaseException) -> None:
    def work(unit: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        if unit > 1:
            time.sleep(20)
        return unit

    def on_result(unit: int, result: int) -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        raise failure

    started = time.monotonic()
    with pytest.raises(type(failure)):
        registry.load("execution", "forked").run(range(100), work, threads=2, on_result=on_result)

    assert time.monotonic() - started < 15, "the workers were waited for"
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)
