"""Extracting convolutions, as of a UNet of Stable Diffusion 1.5: loratools beside LyCORIS and kohya's way.

python benchmarks/extract_conv.py [--ranks 16 64] [--rounds 3] [--out FILE]

Calls in one process on two threads, on the same deltas (sigma_i ~ i^-0.7, turned by random vectors), with everything
imported: LyCORIS needs a whole pipeline of diffusers for a process of its own.

lycoris   `lycoris.utils.extract_conv(mode="fixed")`, its own function: the SVD of the flattened weight, with all of U.
          It keeps a layer whole where the rank is half of its outputs or more; there are none such here.
kohya     what sd-scripts' extract_lora_from_models.py does: the same SVD, then all factors clamped to the 0.99 quantile
          of both. Written out here, as sd-scripts is no package.

The error is ||delta - B A|| / ||delta|| over all layers, in float64.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

# (out, in, kernel): every kind of 3x3 and 1x1 convolution of the model, once.
SHAPES = [(320, 320, 3), (640, 320, 3), (640, 640, 3), (1280, 640, 3), (1280, 1280, 3), (320, 960, 3), (1280, 1280, 1)]
TINY = [(64, 48, 3), (96, 64, 1)]
Factors = tuple[torch.Tensor, torch.Tensor]


def deltas(shapes: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    made = []
    for seed, (out, inputs, kernel) in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = out, inputs * kernel * kernel
        k = min(rows, columns)
        u = torch.linalg.qr(torch.randn(rows, k, generator=generator)).Q
        v = torch.linalg.qr(torch.randn(columns, k, generator=generator)).Q
        delta = 1e-2 * (u * torch.arange(1, k + 1) ** -0.7) @ v.T
        made.append(delta.reshape(out, inputs, kernel, kernel).contiguous())
    return made


def loratools(delta: torch.Tensor, rank: int) -> Factors:
    from loratools.algebra.lowrank import truncate
    from loratools.algebra.svd import truncated_svd

    found = truncate(truncated_svd(delta.flatten(1), rank), rank)
    return found.b.float(), found.a.float()


def lycoris(delta: torch.Tensor, rank: int) -> Factors:
    from lycoris.utils import extract_conv

    (a, b, *_), mode = extract_conv(delta, mode="fixed", mode_param=rank)
    assert mode == "low rank", mode
    return b.flatten(1), a.flatten(1)


def kohya(delta: torch.Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(delta.flatten(1))
    b, a = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
    largest = torch.quantile(torch.cat([b.flatten(), a.flatten()]), 0.99)
    return b.clamp(-largest, largest), a.clamp(-largest, largest)


def measured(way: Callable[[torch.Tensor, int], Factors], given: list[torch.Tensor], rank: int) -> tuple[float, float]:
    """Seconds, and the relative error of all together."""
    start = time.perf_counter()
    factors = [way(delta, rank) for delta in given]
    seconds = time.perf_counter() - start
    lost = [
        float((d.flatten(1).double() - b.double() @ a.double()).square().sum())
        for d, (b, a) in zip(given, factors, strict=True)
    ]
    return seconds, math.sqrt(sum(lost) / sum(float(d.double().square().sum()) for d in given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy size that only shows that everything runs")
    given = parser.parse_args()
    made = deltas(TINY if given.tiny else SHAPES)
    ways = {"loratools": loratools, "lycoris": lycoris, "kohya": kohya}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for rank in given.ranks:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.rounds + 1):
            for name, way in ways.items():
                runs[name].append(measured(way, made, rank))
        results[f"rank {rank}"] = {
            name: {"seconds": statistics.median(s for s, _ in done[1:]), "error": done[0][1]}
            for name, done in runs.items()
        }
    text = json.dumps({"benchmark": "extract_conv", "threads": torch.get_num_threads(), "results": results}, indent=2)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
