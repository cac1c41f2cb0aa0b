"""Combining three adapters (ranks 8, 16, 32; 28 modules) to rank 16: loratools beside PEFT's `svd` combination.

python benchmarks/combine.py [--rounds 3] [--out FILE] [--no-peer]

Two comparisons in one run. As a call: `loratools.combine` from files to files in a Python that has it imported, beside
`add_weighted_adapter` of a PEFT model that is already loaded (the peer reads and writes nothing in that time).
As a whole process: `loratools combine`, and a script that loads the base, loads the adapters, combines and saves.
The results are compared with the best rank-16 approximation by dense float64 arithmetic.
"""

import json
import statistics
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Run, Side

RANK = 16
RANKS = (8, 16, 32)


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--no-peer", action="store_true", help="without PEFT")
    given = parser.parse_args()
    layers = 2 if given.tiny else 4
    source = inputs.base(given, layers)
    adapters = [inputs.adapter(given, layers, rank, seed=20 + rank) for rank in RANKS]
    paths, timing = list(map(str, adapters)), inputs.path(given, "combine-timing.json")

    out = inputs.path(given, "combined-loratools")
    command = [bench.script("loratools"), "combine", *paths, "-o", str(out), "--rank", str(RANK)]
    sides = [Side("loratools", command, out)]
    if not given.no_peer:
        out = inputs.path(given, "combined-peft")
        command = bench.python("_peft.py", "combine", source, out, *paths, "--rank", RANK, "--timing", timing)
        sides.append(Side("PEFT", command, out))

    def one_call(side: Side) -> float:
        """Seconds of the call alone: PEFT's is timed within its process, ours in a process of its own."""
        if side.name == "PEFT":
            return float(json.loads(timing.read_text())["seconds"])
        scratch = inputs.path(given, "combined-by-call")
        seconds = bench.call("_loratools.py", "combine", scratch, *paths, "--rank", RANK)["seconds"]
        bench.remove(scratch)
        return float(seconds)

    bench.say(f"combine: ranks {', '.join(map(str, RANKS))} to {RANK}, {7 * layers} modules")
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    calls: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(given.rounds):
        for side in sides:
            warm_up = number == 0 and side.name == "loratools"  # the peer's takes more than a minute
            runs[side.name] += bench.interleave([side], 1, given.data / "logs", warm_up)[side.name]
            calls[side.name].append(one_call(side))
    bench.remove(timing)
    bench.show(runs, "loratools")

    results: dict[str, Any] = {}
    rows = []
    for side in sides:
        quality = bench.call("_measure.py", "combined", side.output, *adapters, "--rank", RANK)
        bench.remove(side.output)
        seconds = statistics.median(calls[side.name])
        results[side.name] = {
            **bench.summary(runs[side.name]), "call_seconds": seconds, "calls": calls[side.name], **quality
        }  # fmt: skip
        error = quality["relative_error"]
        above = error / quality["relative_error_of_the_best_possible"] - 1
        values = quality["largest_relative_difference_of_singular_values"]
        rows.append([side.name, f"{seconds:.4f}", f"{error:.9f}", f"{above:.1e}", f"{values:.1e}"])
    bench.table(["", "call, seconds", "relative error", "above the best possible", "singular values off by"], rows)
    bench.say()

    off = results["loratools"]["largest_relative_difference_of_singular_values"]
    goals = [Goal("singular values, stored in float32, off by", off, at_most=1e-6)]
    if not given.no_peer:
        ours, peft = results["loratools"], results["PEFT"]
        call, process = peft["call_seconds"] / ours["call_seconds"], peft["seconds"] / ours["seconds"]
        results["ratios"] = {"call: PEFT / loratools": call, "whole process: PEFT / loratools": process}
        goals += [
            Goal("call: PEFT / loratools", call, at_least=200),
            Goal("whole process: PEFT / loratools", process, at_least=25),
        ]
    settings = {"layers": layers, "ranks": RANKS, "rank": RANK, "peer": not given.no_peer}
    bench.finish(given, "combine", settings, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
