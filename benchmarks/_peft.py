"""What a PEFT user does today, as scripts: one process each, the peer's side of the benchmarks.

_peft.py merge BASE OUT ADAPTER... [--max-shard-size BYTES] [--no-autocast] [--dequantise]
_peft.py combine BASE OUT ADAPTER... --rank N [--combination TYPE] [--density F] [--timing FILE]
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load(
    base: str, adapters: list[str], autocast: bool = True, dequantise: bool = False
) -> tuple[PeftModel, list[str]]:
    names = [f"adapter{number}" for number in range(len(adapters))]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if dequantise:
        model = model.dequantize()
    tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0], autocast_adapter_dtype=autocast)
    for name, path in zip(names[1:], adapters[1:], strict=True):
        tuned.load_adapter(path, adapter_name=name, autocast_adapter_dtype=autocast)
    return tuned, names


def merge(given: argparse.Namespace) -> None:
    tuned, names = load(given.base, given.adapters, not given.no_autocast, given.dequantise)
    merged = tuned.merge_and_unload(adapter_names=names)
    # transformers 5 cannot go back to the names of a file of 4 bits; these models have the same names in memory.
    plain = "quantization_config" not in json.loads((Path(given.base) / "config.json").read_text())
    merged.save_pretrained(given.out, max_shard_size=given.max_shard_size, save_original_format=plain)


def combine(given: argparse.Namespace) -> None:
    tuned, names = load(given.base, given.adapters)
    start = time.perf_counter()
    tuned.add_weighted_adapter(
        names,
        [1.0] * len(names),
        adapter_name="combined",
        combination_type=given.combination,
        svd_rank=given.rank,
        density=given.density,
    )
    seconds = time.perf_counter() - start
    tuned.save_pretrained(given.out, selected_adapters=["combined"])
    if given.timing:
        given.timing.write_text(json.dumps({"seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["merge", "combine"])
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--max-shard-size", type=int, default=5 * 10**9)
    parser.add_argument("--no-autocast", action="store_true", help="keep a bfloat16 adapter in bfloat16")
    parser.add_argument(
        "--dequantise", action="store_true", help="a quantised base as floats, before it is merged into"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--combination", default="svd")
    parser.add_argument("--density", type=float)
    parser.add_argument("--timing", type=Path)
    given = parser.parse_args()
    {"merge": merge, "combine": combine}[given.verb](given)


if __name__ == "__main__":
    main()
