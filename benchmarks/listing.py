"""A list of 4,000 adapters as people have them: `loratools list`, a whole process, the first time and again.

python benchmarks/listing.py [--files 4000] [--rounds 3] [--data FOLDER] [--out FILE]

The library (`_library.py`) has adapters of kohya's sd-scripts, LyCORIS, diffusers, PEFT, MLX and llama.cpp, a cache of
the hub with links, models and broken files: headers of full size in sparse files. Measured are the first list, which
reads all headers and fills the catalogue; the same again, from the catalogue; and one without a catalogue. The disk's
cache is warm in each. Seconds by the clock say as much of the machine's other work: CPU seconds of all processes are
beside them, and the goals count these, as two idle cores share them.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import _harness as bench
from _harness import Goal, Run, Side
from _library import library

FILES = 4000
CORES = 2
# By the clock, on two cores with nothing else to do.
GOAL_FIRST, GOAL_AGAIN = 20.0, 1.0


def sides(folder: Path) -> dict[str, Side]:
    words = [sys.executable, "-m", "loratools", "list", str(folder), "--csv", "--threads", str(CORES)]
    return {
        "first": Side("first", words),
        "again": Side("again", words),
        "--no-cache": Side("--no-cache", [*words, "--no-cache"]),
    }


def measured(given: argparse.Namespace, data: Path) -> dict[str, list[Run]]:
    files = 44 if given.tiny else given.files
    every = sides(library(data / f"library-{files}", files))
    cache = data / "listing-cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    runs: dict[str, list[Run]] = {name: [] for name in every}
    for number in range(given.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name, side in every.items():
            runs[name].append(bench.run(side, data / "logs" / f"listing-{name.strip('-')}.log"))
            done = runs[name][-1]
            bench.say(f"  round {number + 1}  {name:<12} {done.seconds:7.2f} s  CPU {done.cpu_seconds:7.2f} s")
    return runs


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--files", type=int, default=FILES, help=f"how many files (default {FILES})")
    given = parser.parse_args()
    runs = measured(given, given.data / "tiny" if given.tiny else given.data)
    results = {name: bench.summary(done) for name, done in runs.items()}
    bench.say()
    rows = [
        [name, f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        for name, r in results.items()
    ]
    bench.table(["", "seconds", "CPU seconds", "peak MB"], rows)
    bench.say()
    goals = [
        Goal(f"first: CPU seconds / {CORES}", results["first"]["cpu_seconds"] / CORES, at_most=GOAL_FIRST),
        Goal("again: CPU seconds", results["again"]["cpu_seconds"], at_most=GOAL_AGAIN),
    ]
    bench.finish(given, "listing", {"files": 44 if given.tiny else given.files}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
