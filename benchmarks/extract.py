"""Extracting from a full fine-tune of four layers of the 1.1B shape: `loratools extract` beside mergekit.

python benchmarks/extract.py [--rounds 3] [--out FILE] [--no-peer] [--kinds decaying power] [--ranks 16 32 128]
                             [--full] [--device cuda]

Whole processes, each followed by a sync. The spectra of the deltas are stated in generate.py and in the JSON: beyond
its 64 directions, where rank 128 looks, `decaying` is flat.
mergekit is told to leave out embeddings, head and norms: they did not change, and it would store them whole.
The energies are measured in float64 from the files that each side wrote.

--full    all 22 layers at rank 16: the time as a multiple of merely reading both checkpoints, mergekit's, the peak
          memory, and that with four times the layers. Wants 25 GB of disk.
--device  where loratools computes; mergekit stays on the CPU.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

# How many times faster than mergekit, by rank; at rank 128 where the spectrum decays there.
FASTER = {("decaying", 16): 20, ("power", 16): 20, ("power", 128): 10}


def ours(given: Namespace, source: Path, tuned: Path, out: Path, rank: int) -> Side:
    command = [bench.script("loratools"), "extract", str(source), str(tuned), "-o", str(out), "--rank", str(rank)]
    return Side("loratools", [*command, "--device", given.device], out)


def mergekit(source: Path, tuned: Path, out: Path, rank: int) -> Side:
    command = [
        *(bench.script("mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(source)),
        *("--out-path", str(out), "--max-rank", str(rank)),
        *("-e", "embed_tokens", "-e", "lm_head", "-e", "norm"),
    ]
    return Side("mergekit", command, out)


def exact_spectrum(source: Path, tuned: Path, rank: int) -> Path:
    """What the best adapter of this rank can capture: float64, measured once and kept beside the data."""
    path = tuned.with_name(f"{tuned.name}-exact-r{rank}.json")
    if not path.exists():
        bench.say("exact energies in float64 (once) ...")
        path.write_text(json.dumps(bench.call("_measure.py", "spectrum", source, tuned, "--rank", rank)))
    return path


def one_rank(given: Namespace, kind: str, rank: int, source: Path, tuned: Path) -> tuple[dict[str, Any], list[Goal]]:
    exact = exact_spectrum(source, tuned, rank)
    sides = [ours(given, source, tuned, inputs.path(given, "extracted-loratools"), rank)]
    if not given.no_peer:
        sides.append(mergekit(source, tuned, inputs.path(given, "extracted-mergekit"), rank))
    bench.say(f"extract: rank {rank}, {kind} spectrum")
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.show(runs, "loratools")

    results: dict[str, Any] = {}
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
    goals = [Goal(f"{kind}, rank {rank}: energy / exact SVD's, worst module", worst, at_least=0.9999)]
    if not given.no_peer:
        ratio = results["mergekit"]["seconds"] / results["loratools"]["seconds"]
        results["ratios"] = {"mergekit / loratools": ratio}
        if (kind, rank) in FASTER:
            goals.append(Goal(f"{kind}, rank {rank}: time: mergekit / loratools", ratio, at_least=FASTER[kind, rank]))
    return results, goals


def full(given: Namespace) -> tuple[dict[str, Any], list[Goal]]:
    """Every layer, beside merely reading both models and beside mergekit; and four times as many, for the memory."""
    layers = 4 if given.tiny else 22
    results: dict[str, Any] = {}
    peaks = []
    for count in (layers, 4 * layers):
        source = inputs.base(given, count)
        tuned, _ = inputs.tuned(given, source, "decaying")
        out = inputs.path(given, "extracted-loratools")
        sides = [ours(given, source, tuned, out, 16), Side("reading both", bench.python("_read.py", source, tuned))]
        if count == layers and not given.no_peer:
            sides.append(mergekit(source, tuned, inputs.path(given, "extracted-mergekit"), 16))
        bench.say(f"extract: rank 16, all of {count} layers")
        runs = bench.interleave(sides, given.rounds, given.data / "logs")
        bench.show(runs, "reading both")
        for side in sides:
            if side.output is not None:
                bench.remove(side.output)
        results[f"{count} layers"] = {side.name: bench.summary(runs[side.name]) for side in sides}
        peaks.append(results[f"{count} layers"]["loratools"]["peak_bytes"])
    found = results[f"{layers} layers"]
    ratio = found["loratools"]["seconds"] / found["reading both"]["seconds"]
    share = 1 - found["reading both"]["seconds"] / found["loratools"]["seconds"]
    results["ratios"] = {"loratools / reading both": ratio, "share of the time that is not reading": share}
    if "mergekit" in found:
        results["ratios"]["mergekit / loratools"] = found["mergekit"]["seconds"] / found["loratools"]["seconds"]
    return results, [
        Goal(f"{layers} layers: peak bytes", peaks[0], at_most=1e9),
        Goal(f"{4 * layers} layers: peak bytes / those of {layers}", peaks[1] / peaks[0], at_most=1.1),
    ]


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--no-peer", action="store_true", help="without mergekit")
    parser.add_argument("--kinds", nargs="*", choices=["decaying", "power"], default=["decaying", "power"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 128])
    parser.add_argument("--full", action="store_true", help="also all layers, and four times as many")
    parser.add_argument("--device", default="cpu", help="where loratools computes")
    given = parser.parse_args()
    layers = 2 if given.tiny else 4
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    for kind in given.kinds:
        source = inputs.base(given, layers)
        tuned, spectrum = inputs.tuned(given, source, kind)
        results[kind] = {"spectrum": spectrum}
        for rank in given.ranks:
            results[kind][f"rank {rank}"], more = one_rank(given, kind, rank, source, tuned)
            goals += more
    if given.full:
        results["full"], more = full(given)
        goals += more
    settings = {"layers": layers, "ranks": given.ranks, "peer": not given.no_peer, "device": given.device}
    bench.finish(given, "extract", settings, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
