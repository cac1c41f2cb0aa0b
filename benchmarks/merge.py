"""Merging a 1.1B model: `loratools merge` beside `cp` of the base and PEFT's load, merge and save.

python benchmarks/merge.py [--rounds 5] [--out FILE] [--no-peer] [--no-depth] [--accuracy]

Every side is a whole process followed by a sync, its input in the page cache. A second part merges into a model of
four times the layers and compares the peak memory (it needs 17 GB of disk). With `--accuracy`, the merged weights of a
model of four layers are compared with float64 arithmetic, for loratools and PEFT.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

RANK = 16


def copy(source: Path, out: Path) -> Side:
    reflink = [] if sys.platform == "darwin" else ["--reflink=never"]
    return Side("cp -r", ["cp", "-R", *reflink, str(source), str(out)], out)


def ours(source: Path, adapters: Sequence[Path], out: Path) -> Side:
    command = [bench.script("loratools"), "merge", str(source), *map(str, adapters), "-o", str(out)]
    return Side("loratools", command, out)


def peft(source: Path, adapters: Sequence[Path], out: Path, *flags: str) -> Side:
    """Saved in shards no larger than the base's, so that both write files of one size."""
    shard = max(file.stat().st_size for file in source.glob("*.safetensors"))
    command = bench.python("_peft.py", "merge", source, out, *adapters, "--max-shard-size", shard, *flags)
    return Side("PEFT", command, out)


def speed(given: Namespace, layers: int) -> tuple[dict[str, Any], list[Goal]]:
    source, update = inputs.base(given, layers), inputs.adapter(given, layers, RANK)
    out = inputs.path(given, "merged")
    sides = [copy(source, out), ours(source, [update], out)]
    if not given.no_peer:
        sides.append(peft(source, [update], out))
    bench.say(f"merge: {layers} layers, rank {RANK}, float32 adapter")
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.remove(out)
    bench.show(runs, "cp -r")

    results: dict[str, Any] = {name: bench.summary(done) for name, done in runs.items()}
    mine = results["loratools"]
    results["ratios"] = {"loratools / cp -r": mine["seconds"] / results["cp -r"]["seconds"]}
    goals = [
        Goal("time: loratools / cp -r", results["ratios"]["loratools / cp -r"], at_most=1.3),
        Goal("peak resident MB", mine["peak_bytes"] / 1e6, at_most=700),
    ]
    if not given.no_peer:
        ratio = results["PEFT"]["seconds"] / mine["seconds"]
        results["ratios"]["PEFT / loratools"] = ratio
        goals.append(Goal("time: PEFT / loratools", ratio, at_least=4))
    return results, goals


def depth(given: Namespace, layers: int, peak_before: int) -> tuple[dict[str, Any], list[Goal]]:
    """Peak memory with four times the layers."""
    out = inputs.path(given, "merged")
    side = ours(inputs.base(given, 4 * layers), [inputs.adapter(given, 4 * layers, RANK)], out)
    bench.say(f"merge: {4 * layers} layers")
    runs = bench.interleave([side], 1, given.data / "logs", warm_up=False)["loratools"]
    bench.remove(out)
    ratio = runs[0].peak_bytes / peak_before
    return {**bench.summary(runs), "peak_ratio": ratio}, [Goal("peak memory: 4x layers / 1x", ratio, at_most=1.1)]


def accuracy(given: Namespace, layers: int) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Errors against float64. PEFT as it loads by default, and holding a bfloat16 adapter in its own dtype."""
    source, out = inputs.base(given, layers), inputs.path(given, "merged")
    plain, half = inputs.adapter(given, layers, RANK), inputs.adapter(given, layers, RANK, "bfloat16")
    three = [plain, *(inputs.adapter(given, layers, RANK, seed=seed) for seed in (11, 12))]
    cases: list[tuple[str, list[Path], tuple[str, ...]]] = [
        ("a float32 adapter", [plain], ()),
        ("a bfloat16 adapter", [half], ()),
        ("a bfloat16 adapter, autocast_adapter_dtype=False", [half], ("--no-autocast",)),
        ("three float32 adapters", three, ()),
    ]
    found: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    goals: list[Goal] = []
    bench.say(f"accuracy: {layers} layers, against float64")
    for what, adapters, flags in cases:
        errors: dict[str, dict[str, Any]] = {}
        for side in (ours(source, adapters, out), peft(source, adapters, out, *flags)):
            bench.run(side, given.data / "logs" / "accuracy.log")
            errors[side.name] = bench.call("_measure.py", "merged", source, out, *adapters)
        bench.remove(out)
        found.append({"case": what, **errors})
        for field, word in (("largest_error", "largest"), ("frobenius_error", "Frobenius")):
            values = [errors["loratools"][field], errors["PEFT"][field], errors["PEFT"][f"{field}_of_one_rounding"]]
            rows.append([f"{what}: {word}", *(f"{value:.7e}" for value in values)])
            # Where both round once, which of the two float32 sums lies nearer is chance: 1e-6 for that.
            goals.append(Goal(f"{word} error, loratools / PEFT: {what}", values[0] / values[1], at_most=1 + 1e-6))
    bench.table(["error", "loratools", "PEFT", "one rounding of float64"], rows)
    bench.say()
    return found, goals


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, help="of the model (default 22; with --tiny 2)")
    parser.add_argument("--no-peer", action="store_true", help="without PEFT")
    parser.add_argument("--no-depth", action="store_true", help="without the model of four times the layers")
    parser.add_argument("--accuracy", action="store_true", help="also the errors against float64")
    given = parser.parse_args()
    layers = given.layers or (2 if given.tiny else 22)
    results, goals = speed(given, layers)
    if not given.no_depth:
        results["four_times_the_layers"], more = depth(given, layers, results["loratools"]["peak_bytes"])
        goals += more
    if given.accuracy:
        results["accuracy"], more = accuracy(given, 2 if given.tiny else 4)
        goals += more
    bench.finish(given, "merge", {"layers": layers, "rank": RANK, "peer": not given.no_peer}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
