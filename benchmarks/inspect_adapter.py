"""Inspecting an adapter of 448 tensors (32 layers of the 1.1B shape): `loratools inspect`, a whole process.

python benchmarks/inspect_adapter.py [--rounds 21] [--out FILE] [--no-peer]

Beside it: a Python that only imports click and rich, which is the least that such a command can cost, and one that
only imports peft, which is what a script of today pays before it reads anything. Nothing is written, so nothing is
synced. (The file is not called inspect.py: it would hide the standard library's module of that name.)
"""

import sys

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

IMPORTS = "import click, rich"


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=21)
    parser.add_argument("--no-peer", action="store_true", help="without peft")
    given = parser.parse_args()
    layers = 2 if given.tiny else 32
    adapter = inputs.adapter(given, layers)
    sides = [
        Side(IMPORTS, [sys.executable, "-c", "import click, rich.console, rich.table"]),
        Side("loratools", [bench.script("loratools"), "inspect", str(adapter)]),
    ]
    if not given.no_peer:
        sides.append(Side("import peft", [sys.executable, "-c", "import peft"]))
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.show(runs, IMPORTS)
    results = {name: bench.summary(done) for name, done in runs.items()}
    seconds = results["loratools"]["seconds"]
    goals = [
        Goal("milliseconds", seconds * 1000, at_most=150),
        Goal(f"time: loratools / {IMPORTS}", seconds / results[IMPORTS]["seconds"], at_most=1.6),
    ]
    settings = {"layers": layers, "tensors": 14 * layers, "peer": not given.no_peer}
    bench.finish(given, "inspect", settings, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
