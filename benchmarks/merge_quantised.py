"""Merging into an nf4 base of 1.1B: `loratools merge --dequantize` and `--requantize` beside a plain merge and PEFT.

python benchmarks/merge_quantised.py [--rounds 3] [--layers 22] [--out FILE] [--no-peer]

Every side is a whole process followed by a sync, its input in the page cache. PEFT merges into its 4-bit layers, which
quantises them anew; "dequantise, PEFT" is what trainers do that want floats: the whole model is dequantised by
transformers, then merged and saved in bfloat16. The plain merge is into the same model in bfloat16.
"""

from pathlib import Path

import _harness as bench
import _inputs as inputs
from _harness import Goal, Side

RANK = 16


def ours(name: str, source: Path, adapter: Path, out: Path, *flags: str) -> Side:
    return Side(name, [bench.script("loratools"), "merge", str(source), str(adapter), "-o", str(out), *flags], out)


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, help="of the model (default 22; with --tiny 2)")
    parser.add_argument("--no-peer", action="store_true", help="without PEFT")
    given = parser.parse_args()
    layers = given.layers or (2 if given.tiny else 22)
    plain, adapter = inputs.base(given, layers), inputs.adapter(given, layers, RANK)
    packed, out = inputs.nf4(given, plain), inputs.path(given, "merged")
    sides = [
        ours("plain", plain, adapter, out),
        ours("--dequantize", packed, adapter, out, "--dequantize"),
        ours("--requantize", packed, adapter, out, "--requantize"),
    ]
    if not given.no_peer:
        merge = bench.python("_peft.py", "merge", packed, out, adapter)
        sides += [Side("PEFT in 4 bits", merge, out), Side("dequantise, PEFT", [*merge, "--dequantise"], out)]
    bench.say(f"merge into nf4: {layers} layers, rank {RANK}, float32 adapter")
    runs = bench.interleave(sides, given.rounds, given.data / "logs")
    bench.remove(out)
    bench.show(runs, "plain")
    results = {name: bench.summary(done) for name, done in runs.items()}
    first, second = results["plain"], results["--dequantize"]
    goals = [
        Goal("time: --dequantize / plain", second["seconds"] / first["seconds"], at_most=2),
        Goal("peak memory: --dequantize / plain", second["peak_bytes"] / first["peak_bytes"], at_most=1.2),
    ]
    bench.finish(given, "merge_quantised", {"layers": layers, "rank": RANK}, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
