"""How every benchmark here measures: fresh processes, taken in turns, a sync after each that writes, medians.

The measuring process itself imports no torch: on Linux a child's peak memory starts at its parent's resident size,
so the parent has to stay small.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux


class RunError(Exception):
    """A side of a benchmark ended with an error: there is nothing to compare."""


@dataclass(frozen=True)
class Run:
    """One process: wall-clock seconds from its start to its end, or to that of the sync; peak resident memory.

    `cpu_seconds` are those of the process and of the workers that it waited for, in user mode and in the kernel. They
    say more than the clock does where the machine has other work.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float


@dataclass(frozen=True)
class Side:
    """One contestant: a command, and what it writes.

    The output is removed (untimed) before every run; a side that has one ends with a sync, and that is timed.
    """

    name: str
    command: Sequence[str]
    output: Path | None = None


def script(name: str) -> str:
    """A console script of this environment, such as `loratools`."""
    folder = Path(sysconfig.get_path("scripts"))
    for path in (folder / name, folder / f"{name}.exe"):
        if path.exists():
            return str(path)
    raise SystemExit(f"error: {name} is not installed beside {sys.executable}\nhint: make oracles")


def python(name: str, *arguments: object) -> list[str]:
    """The command that runs one of the files of this folder."""
    return [sys.executable, str(HERE / name), *map(str, arguments)]


def remove(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run(side: Side, log: Path, timeout: float = 3600.0) -> Run:
    """Run one side in a fresh process; its own words go to `log`, and to the error if it fails."""
    remove(side.output)
    log.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # what earlier runs left to be written must not be paid by this one
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
    # Compiling every module again at each start is nothing that an installed program does.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("wb") as words:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(side.command), stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environment
        )
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if side.output is not None:
            os.sync()
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-3000:]
        raise RunError(f"{side.name} ended with {process.returncode}: {' '.join(side.command)}\n{tail}")
    return Run(seconds, usage.ru_maxrss * PEAK_UNIT, usage.ru_utime + usage.ru_stime)


def interleave(sides: Sequence[Side], rounds: int, logs: Path, warm_up: bool = True) -> dict[str, list[Run]]:
    """All sides once per round, `rounds` times, so that a slow minute of the machine is shared by all of them.

    The order turns by one every round: nobody always runs after the same neighbour. The warm-up round fills the page
    cache and the bytecode caches, and is not counted.
    """
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for number in range(-1 if warm_up else 0, rounds):
        turn = max(number, 0) % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            done = run(side, logs / f"{side.name.replace(' ', '-')}.log")
            round_ = f"round {number + 1}/{rounds}" if number >= 0 else "warm-up"
            say(f"  {round_:<12} {side.name:<20} {done.seconds:8.3f} s {done.peak_bytes / 1e6:8.1f} MB")
            if number >= 0:
                runs[side.name].append(done)
    return runs


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
        "peak_bytes": int(statistics.median(run.peak_bytes for run in runs)),
        "runs": [asdict(run) for run in runs],
    }


@dataclass(frozen=True)
class Goal:
    """A figure that the project has set itself. `at_most` or `at_least` is the limit."""

    what: str
    measured: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool:
        below = self.at_most is None or self.measured <= self.at_most
        return below and (self.at_least is None or self.measured >= self.at_least)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached}


def machine() -> dict[str, Any]:
    packages = {}
    for name in ("loratools", "torch", "safetensors", "numpy", "transformers", "peft", "mergekit", "click", "rich"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    memory = 0
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages,
    }


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def say(line: str = "") -> None:
    print(line, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table on stderr: first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        say("  " + "  ".join(cells).rstrip())


def show(runs: dict[str, list[Run]], against: str) -> None:
    """Seconds and memory of all sides, and every side's time as a multiple of one of them."""
    unit = summary(runs[against])["seconds"]
    rows = []
    for name, done in runs.items():
        s = summary(done)
        spread = f"{s['seconds_min']:.3f} - {s['seconds_max']:.3f}"
        times, peak = f"{s['seconds'] / unit:.2f}x", f"{s['peak_bytes'] / 1e6:.0f}"
        rows.append([name, f"{s['seconds']:.3f}", spread, times, peak])
    say()
    table(["", "seconds (median)", "range", f"of {against}", "peak MB"], rows)
    say()


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where inputs and outputs are kept")
    parser.add_argument("--out", type=Path, help="write the JSON document here (default: stdout)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often each side runs (default {rounds})")
    parser.add_argument("--tiny", action="store_true", help="a toy size that only shows that everything runs")
    return parser


def call(name: str, *arguments: object) -> Any:
    """The JSON that a file of this folder answers with on stdout; untimed."""
    done = subprocess.run(python(name, *arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"{name} ended with {done.returncode}")
    return json.loads(done.stdout)


def finish(
    arguments: argparse.Namespace, benchmark: str, settings: dict[str, Any], results: dict[str, Any], goals: list[Goal]
) -> None:
    """Show how the goals stand, and write the JSON document."""
    if goals:
        rows = [
            [
                goal.what,
                f"{goal.measured:.6g}",
                f"<= {goal.at_most:g}" if goal.at_most is not None else f">= {goal.at_least:g}",
                "reached" if goal.reached else "NOT REACHED",
            ]
            for goal in goals
        ]
        table(["goal", "measured", "limit", ""], rows)
    document = {
        "benchmark": benchmark,
        "settings": {"tiny": arguments.tiny, "rounds": arguments.rounds, **settings},
        "machine": machine(),
        "results": results,
        "goals": [goal.to_dict() for goal in goals],
    }
    text = json.dumps(document, indent=2) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
        say(f"\nwrote {arguments.out}")
    else:
        print(text, end="")


def main(benchmark: Callable[[], None]) -> None:
    try:
        benchmark()
    except RunError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
