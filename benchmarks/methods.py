"""Methods of combining, as calls: beside PEFT's of the same kind, and eight adapters of a 7B model.

python benchmarks/methods.py [--rounds 3] [--out FILE] [--no-peer] [--part peers|seven]

peers: three adapters of rank 16 over 28 modules up to 2048 x 5632, to rank 16. `loratools.combine` from files to files,
beside `add_weighted_adapter` of a PEFT model that is already loaded. PEFT's svd types work on dense matrices; TIES and
DARE in core space are another method by the same name, which is what `space=full` is there to tell.
seven: KnOTS and TSV-M, eight adapters of rank 16 for the 224 linear layers of a 7B model, to rank 16; whole processes.
"""

import json
import statistics
import sys
from typing import Any

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

RANK = 16
OURS = {
    "svd": ["linear"],
    "ties_svd": ["ties", "--set", "space=core"],
    "dare_ties_svd": ["dare", "--set", "join=ties", "--set", "space=core"],
    "ties_svd, space=full": ["ties", "--set", "space=full"],
    "dare_ties_svd, space=full": ["dare", "--set", "join=ties", "--set", "space=full"],
}


def peers(given: Any, results: dict[str, Any]) -> list[Goal]:
    layers = 2 if given.tiny else 4
    source = inputs.base(given, layers)
    adapters = [inputs.adapter(given, layers, RANK, seed=30 + i) for i in range(3)]
    timing = inputs.path(given, "methods-timing.json")
    theirs: dict[str, float] = {}
    rows, goals = [], []
    for name, words in OURS.items():
        kind = name.partition(",")[0]
        if not given.no_peer and kind not in theirs:
            out = inputs.path(given, "methods-peft")
            more = ["--rank", RANK, "--timing", timing, "--combination", kind, "--density", 0.5]
            bench.run(
                Side("PEFT", bench.python("_peft.py", "combine", source, out, *adapters, *more), out),
                given.data / "logs" / "methods-peft.log",
            )
            theirs[kind] = float(json.loads(timing.read_text())["seconds"])
            bench.remove(out)
            bench.remove(timing)
        scratch = inputs.path(given, "methods-by-call")
        repeat = 1 if "full" in name else given.rounds
        call = bench.call(
            "_loratools.py", "combine", scratch, *adapters, "--rank", RANK, "--repeat", repeat, "--method", *words
        )
        bench.remove(scratch)
        ratio = theirs[kind] / call["seconds"] if kind in theirs else None
        results[name] = {"loratools": call["seconds"], "PEFT": theirs.get(kind), "ratio": ratio}
        rows.append([name, f"{call['seconds']:.3f}", f"{theirs.get(kind, 0):.2f}", f"{ratio:.1f}" if ratio else ""])
        if ratio is not None and "full" not in name:
            goals.append(Goal(f"call: PEFT {kind} / loratools", ratio, at_least=200))
    bench.table(["", "loratools, seconds", "PEFT, seconds", "times faster"], rows)
    return goals


def seven(given: Any, results: dict[str, Any]) -> list[Goal]:
    layers = 2 if given.tiny else 32
    shape = "tiny" if given.tiny else "7b"
    adapters = []
    for i in range(8):
        out = inputs.path(given, f"adapter-{shape}-{layers}-seed{50 + i}")
        words = ("--shape", shape, "--layers", layers, "--rank", RANK, "--dtype", "bfloat16", "--seed", 50 + i)
        bench.call("generate.py", "adapter", out, *words)
        adapters.append(str(out))
    rows, goals = [], []
    for method in ("knots", "tsv", "linear"):
        out = inputs.path(given, "methods-seven")
        command = [
            sys.executable,
            "-m",
            "loratools",
            "combine",
            *adapters,
            "-o",
            str(out),
            "--method",
            method,
            "--rank",
            str(RANK),
        ]
        runs = [
            bench.run(Side(method, command, out), given.data / "logs" / "methods-seven.log")
            for _ in range(given.rounds)
        ]
        bench.remove(out)
        seconds, memory = statistics.median(r.seconds for r in runs), max(r.peak_bytes for r in runs)
        results[f"8 x 7B, {method}"] = {"seconds": seconds, "peak_bytes": memory}
        rows.append([method, f"{seconds:.1f}", f"{memory / 1e6:,.0f}"])
        goals.append(Goal(f"8 x 7B, {method}: seconds", seconds, at_most=60))
        goals.append(Goal(f"8 x 7B, {method}: resident MB", memory / 1e6, at_most=2000))
    bench.table(["eight adapters of a 7B model", "seconds", "MB resident"], rows)
    return goals


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--no-peer", action="store_true", help="without PEFT")
    parser.add_argument("--part", choices=["peers", "seven"], help="only one of the two")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    goals = []
    for part in (peers, seven):
        if given.part in (None, part.__name__):
            goals += part(given, results)
    bench.finish(given, "methods", {"rank": RANK, "peer": not given.no_peer}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
