"""Extracting rank 16 from a full fine-tune of four layers of the 1.1B shape: `loratools extract` beside mergekit.

python benchmarks/extract.py [--rounds 3] [--out FILE] [--no-peer] [--kinds decaying power]

Whole processes, each followed by a sync. The spectra of the deltas are stated in generate.py and in the JSON.
mergekit is told to leave out embeddings, head and norms: they did not change, and it would store them whole.
The energies are measured in float64 from the files that each side wrote.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

RANK = 16


def ours(source: Path, tuned: Path, out: Path) -> Side:
    command = [bench.script("loratools"), "extract", str(source), str(tuned), "-o", str(out), "--rank", str(RANK)]
    return Side("loratools", command, out)


def mergekit(source: Path, tuned: Path, out: Path) -> Side:
    command = [
        *(bench.script("mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(source)),
        *("--out-path", str(out), "--max-rank", str(RANK)),
        *("-e", "embed_tokens", "-e", "lm_head", "-e", "norm"),
    ]
    return Side("mergekit", command, out)


def exact_spectrum(source: Path, tuned: Path) -> Path:
    """What the best adapter of this rank can capture: float64, measured once and kept beside the data."""
    path = tuned.with_name(f"{tuned.name}-exact.json")
    if not path.exists():
        bench.say("exact energies in float64 (once) ...")
        path.write_text(json.dumps(bench.call("_measure.py", "spectrum", source, tuned, "--rank", RANK)))
    return path


def one_kind(given: Namespace, kind: str, source: Path) -> tuple[dict[str, Any], list[Goal]]:
    tuned, spectrum = inputs.tuned(given, source, kind)
    exact = exact_spectrum(source, tuned)
    sides = [ours(source, tuned, inputs.path(given, "extracted-loratools"))]
    if not given.no_peer:
        sides.append(mergekit(source, tuned, inputs.path(given, "extracted-mergekit")))
    bench.say(f"extract: rank {RANK}, {kind} spectrum")
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.show(runs, "loratools")

    results: dict[str, Any] = {"spectrum": spectrum}
    rows = []
    for side in sides:
        quality = bench.call("_measure.py", "extracted", source, tuned, side.output, "--exact", exact)
        bench.remove(side.output)
        results[side.name] = {**bench.summary(runs[side.name]), **quality}
        shares = [quality["share_of_best_possible"], quality["share_of_best_possible_in_the_worst_module"]]
        rows.append([side.name, *(f"{share:.7f}" for share in shares), f"{quality['bytes'] / 1e6:.2f}"])
    bench.table(["energy captured", "of the best possible", "in the worst module", "output MB"], rows)
    bench.say()
    worst = results["loratools"]["share_of_best_possible_in_the_worst_module"]
    goals = [Goal(f"{kind}: energy / exact SVD's, worst module", worst, at_least=0.9999)]
    if not given.no_peer:
        ratio = results["mergekit"]["seconds"] / results["loratools"]["seconds"]
        results["ratios"] = {"mergekit / loratools": ratio}
        goals.append(Goal(f"{kind}: time: mergekit / loratools", ratio, at_least=15))
    return results, goals


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--no-peer", action="store_true", help="without mergekit")
    parser.add_argument("--kinds", nargs="+", choices=["decaying", "power"], default=["decaying", "power"])
    given = parser.parse_args()
    layers = 2 if given.tiny else 4
    source = inputs.base(given, layers)
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    for kind in given.kinds:
        results[kind], more = one_kind(given, kind, source)
        goals += more
    bench.finish(given, "extract", {"layers": layers, "rank": RANK, "peer": not given.no_peer}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
