"""Calls of loratools from a Python that has everything imported: how long the work takes without starting a process.

_loratools.py combine OUT ADAPTER... --rank N --repeat K [--method NAME [--set OPTION=VALUE]...]
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import loratools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["combine"])
    parser.add_argument("out", type=Path)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--method", default="linear")
    parser.add_argument("--set", action="append", default=[], dest="options")
    given = parser.parse_args()
    options = dict(text.split("=", 1) for text in given.options)
    seconds = []
    for _ in range(given.repeat + 1):
        shutil.rmtree(given.out, ignore_errors=True)
        start = time.perf_counter()
        loratools.combine(
            [(path, 1.0) for path in given.adapters], given.out, rank=given.rank, method=given.method, options=options
        )
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "first": seconds[0], "all": seconds[1:]}))


if __name__ == "__main__":
    main()
