"""How good a result is, by float64 arithmetic that shares no code with loratools. Answers with JSON on stdout; untimed.

_measure.py merged BASE MERGED ADAPTER...      error of every merged weight
_measure.py spectrum BASE TUNED --rank N       energies of the exact deltas: all of it, and the best N directions
_measure.py extracted BASE TUNED ADAPTER --exact FILE
_measure.py combined RESULT ADAPTER... --rank N
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Folder:
    """The tensors of a checkpoint folder, one at a time."""

    def __init__(self, path: Path):
        self.path = path
        index = path / "model.safetensors.index.json"
        if index.exists():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(str(path / "model.safetensors"), "pt") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(str(self.path / self.files[name]), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


class Lora:
    """The factors of a PEFT folder, in float64, by the name of the weight that they are for."""

    def __init__(self, folder: Path):
        # PEFT writes an adapter that is not named "default" into a folder of its own.
        path = next(iter([*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")])).parent
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.bytes = sum(file.stat().st_size for file in path.iterdir())
        with safe_open(str(path / "adapter_model.safetensors"), "pt") as file:
            for key in sorted(file.keys()):
                if key.endswith(".lora_A.weight"):
                    module = key.removesuffix(".lora_A.weight")
                    name = module.removeprefix("base_model.model.")
                    a, b = file.get_tensor(key).double(), file.get_tensor(f"{module}.lora_B.weight").double()
                    self.factors[f"{name}.weight"] = a, b * self.scale(name)

    def scale(self, module: str) -> float:
        def special(field: str, default: float) -> float:
            for pattern, value in (self.config.get(field) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return float(value)
            return float(default)

        rank = special("rank_pattern", self.config["r"])
        alpha = special("alpha_pattern", self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def delta(self, name: str) -> torch.Tensor:
        a, b = self.factors[name]
        return b @ a


def energies(matrix: torch.Tensor, rank: int) -> tuple[float, list[float]]:
    """||M||_F^2 and the squares of the largest singular values, from the smaller Gram matrix in float64."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float(matrix.square().sum()), torch.linalg.eigvalsh(gram).flip(0)[:rank].tolist()


def merged(given: argparse.Namespace) -> dict[str, Any]:
    base, result = Folder(given.paths[0]), Folder(given.paths[1])
    adapters = [Lora(path) for path in given.paths[2:]]
    names = sorted({name for adapter in adapters for name in adapter.factors})
    largest = squares = best_largest = best_squares = 0.0
    for name in names:
        weight = base[name]
        exact = weight.double()
        for adapter in adapters:
            if name in adapter.factors:
                exact += adapter.delta(name)
        error = (result[name].double() - exact).abs_()
        best = (exact.to(weight.dtype).double() - exact).abs_()
        largest, best_largest = max(largest, float(error.max())), max(best_largest, float(best.max()))
        squares, best_squares = squares + float(error.square().sum()), best_squares + float(best.square().sum())
    untouched = [name for name in base.files if name not in names]
    return {
        "weights": len(names),
        "largest_error": largest,
        "frobenius_error": math.sqrt(squares),
        "largest_error_of_one_rounding": best_largest,
        "frobenius_error_of_one_rounding": math.sqrt(best_squares),
        "untouched_differ": [name for name in untouched if not torch.equal(base[name], result[name])],
    }


def changed(base: Folder, tuned: Folder) -> list[str]:
    return [name for name in sorted(base.files) if not torch.equal(base[name], tuned[name])]


def spectrum(given: argparse.Namespace) -> dict[str, Any]:
    base, tuned = Folder(given.paths[0]), Folder(given.paths[1])
    modules = {}
    for name in changed(base, tuned):
        energy, top = energies(tuned[name].double() - base[name].double(), given.rank)
        modules[name] = {"energy": energy, "best": sum(top)}
    return {"rank": given.rank, "modules": modules}


def extracted(given: argparse.Namespace) -> dict[str, Any]:
    base, tuned, adapter = Folder(given.paths[0]), Folder(given.paths[1]), Lora(given.paths[2])
    exact = json.loads(given.exact.read_text())["modules"]
    captured = best = energy = 0.0
    worst = math.inf
    for name, known in exact.items():
        delta = tuned[name].double() - base[name].double()
        if name in adapter.factors:
            residual = float((delta - adapter.delta(name)).square().sum())
        else:
            residual = known["energy"]
        captured += known["energy"] - residual
        best, energy = best + known["best"], energy + known["energy"]
        worst = min(worst, (known["energy"] - residual) / known["best"])
    return {
        "share_of_energy": captured / energy,
        "share_of_best_possible": captured / best,
        "share_of_best_possible_in_the_worst_module": worst,
        "modules": len(adapter.factors),
        "bytes": adapter.bytes,
    }


def combined(given: argparse.Namespace) -> dict[str, Any]:
    result, adapters = Lora(given.paths[0]), [Lora(path) for path in given.paths[1:]]
    residual = best = energy = 0.0
    values = 0.0
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        total = torch.stack([adapter.delta(name) for adapter in adapters if name in adapter.factors]).sum(0)
        all_of_it, top = energies(total, given.rank)
        got = result.delta(name)
        energy, best = energy + all_of_it, best + all_of_it - sum(top)
        residual += float((total - got).square().sum())
        ours = energies(got, given.rank)[1]
        pairs = zip(ours, top, strict=True)
        values = max(values, *(abs(math.sqrt(max(a, 0.0)) / math.sqrt(b) - 1) for a, b in pairs))
    return {
        "relative_error": math.sqrt(residual / energy),
        "relative_error_of_the_best_possible": math.sqrt(best / energy),
        "largest_relative_difference_of_singular_values": values,
    }


def main() -> None:
    verbs = {"merged": merged, "spectrum": spectrum, "extracted": extracted, "combined": combined}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--exact", type=Path, help="what `spectrum` said")
    given = parser.parse_args()
    print(json.dumps(verbs[given.verb](given)))


if __name__ == "__main__":
    main()
