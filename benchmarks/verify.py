"""Verifying the merge of a 1.1B model: `loratools verify` beside reading both models and deltalint.

python benchmarks/verify.py [--rounds 3] [--out FILE] [--no-peer]

Every side is a whole process, its input in the page cache. The merged model is made by `loratools merge`, so that all
sides look at a right one and have to look at all of it.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

RANK = 16


def read(*folders: Path) -> Side:
    """Every byte of the models, read and thrown away."""
    files = [str(file) for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return Side("read both", ["sh", "-c", 'cat "$@" > /dev/null', "cat", *files])


def speed(given: Namespace, layers: int) -> tuple[dict[str, Any], list[Goal]]:
    source, update = inputs.base(given, layers), inputs.adapter(given, layers, RANK)
    merged = inputs.path(given, "verified")
    merge = [bench.script("loratools"), "merge", str(source), str(update), "-o", str(merged)]
    bench.run(Side("merge", merge, merged), given.data / "logs" / "merge.log")
    verify = [bench.script("loratools"), "verify", str(merged), "--base", str(source), str(update)]
    sides = [read(source, merged), Side("loratools", verify)]
    if not given.no_peer:
        check = ["--base", str(source), "--adapter", str(update), "--merged", str(merged)]
        # It takes a float32 sum in another order for a defect, and ends with 1; what counts here is its time.
        tolerant = ["sh", "-c", '"$@"; test $? -le 1', "sh"]
        sides.append(Side("deltalint", [*tolerant, bench.script("deltalint"), "check", *check, "--quiet"]))
    bench.say(f"verify: {layers} layers, rank {RANK}, float32 adapter")
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.remove(merged)
    bench.show(runs, "read both")

    results: dict[str, Any] = {name: bench.summary(done) for name, done in runs.items()}
    mine = results["loratools"]
    results["ratios"] = {"loratools / read both": mine["seconds"] / results["read both"]["seconds"]}
    goals = [
        Goal("time: loratools / reading both models", results["ratios"]["loratools / read both"], at_most=1.5),
        Goal("peak resident MB", mine["peak_bytes"] / 1e6, at_most=700),
    ]
    if not given.no_peer:
        ratio = results["deltalint"]["seconds"] / mine["seconds"]
        results["ratios"]["deltalint / loratools"] = ratio
        goals.append(Goal("time: deltalint / loratools", ratio, at_least=5))
    return results, goals


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, help="of the model (default 22; with --tiny 2)")
    parser.add_argument("--no-peer", action="store_true", help="without deltalint")
    given = parser.parse_args()
    layers = given.layers or (2 if given.tiny else 22)
    results, goals = speed(given, layers)
    bench.finish(given, "verify", {"layers": layers, "rank": RANK, "peer": not given.no_peer}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
