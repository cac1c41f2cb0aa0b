"""Do methods of combining matter? Four adapters for four kinds of text on one small model, combined in every way.

python benchmarks/merging.py [--out FILE] [--tiny]

Trains a causal byte-level Llama of 0.2 million weights on a mixture of four kinds of real text that every Python
installation with torch has (Python sources, C headers, C++ templates, the documentation of Python's syntax), then a
LoRA of rank 8 for each kind on all linear layers, with different alphas. Every method combines the four; a common
factor of the weights is chosen for each method on validation text, as papers choose it, and what is told is on test
text that neither saw: of the loss that each adapter alone saves on its own kind of text, the share that the combined
one saves. One is as good as four adapters, each at home; zero is the base.
"""

import math
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _harness as bench
import torch
from _harness import Goal
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loratools import combine
from loratools.adapter import Adapter
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

CONTEXT, BATCH = 128, 8
RANK = 8
ALPHAS = {"python": 16.0, "c": 8.0, "c++": 16.0, "documentation": 24.0}
FACTORS = (0.1, 0.17, 0.25, 0.4, 0.7)
METHODS: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "linear": ("linear", {}, {}),
    "linear, rank 8": ("linear", {}, {"rank": RANK}),
    "linear, svc": ("linear", {}, {"calibrate": "svc"}),
    "karcher": ("karcher", {}, {}),
    "ties full, rank 32": ("ties", {}, {"rank": 4 * RANK}),
    "ties core": ("ties", {"space": "core"}, {}),
    "ties knots": ("ties", {"space": "knots"}, {}),
    "dare full, rank 32": ("dare", {}, {"rank": 4 * RANK}),
    "dare core": ("dare", {"space": "core"}, {}),
    "della core": ("della", {"space": "core"}, {}),
    "magnitude core": ("magnitude", {"space": "core"}, {}),
    "breadcrumbs core": ("breadcrumbs", {"space": "core"}, {}),
    "sce core": ("sce", {"space": "core"}, {}),
    "tsv": ("tsv", {}, {}),
    "iso-c": ("iso", {}, {}),
    "iso-cts": ("iso", {"common": 0.8}, {}),
    "wudi": ("wudi", {}, {}),
    "wudi, ridge 1e-4": ("wudi", {"ridge": 1e-4}, {}),
    "ctm, rank 8": ("ctm", {}, {}),
    "fedex without residual": ("fedex", {}, {}),
    "peft-linear": ("peft-linear", {}, {}),
    "peft-ties": ("peft-ties", {}, {}),
    "peft-ties on deltas, rank 32": ("peft-ties", {"on": "deltas"}, {"rank": 4 * RANK}),
    "peft-dare": ("peft-dare", {}, {}),
    "peft-magnitude-prune": ("peft-magnitude-prune", {}, {}),
}


def texts() -> dict[str, bytes]:
    """Some hundreds of kilobytes of each kind."""
    import pydoc_data.topics

    library, headers = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))
    templates = Path(torch.__file__).parent / "include" / "ATen" / "native"
    return {
        "python": _read(sorted(library.glob("*.py")), 900_000),
        "c": _read(sorted(headers.rglob("*.h")), 900_000),
        "c++": _read(sorted(templates.rglob("*.h")), 900_000),
        "documentation": "\n".join(pydoc_data.topics.topics.values()).encode()[:900_000],
    }


def _read(files: list[Path], size: int) -> bytes:
    # Spread over all of the files, so that no one author is half of it.
    files = files[:: max(1, len(files) // 120)]
    return b"\n".join(f.read_bytes()[: max(4000, size // len(files))] for f in files)[:size]


class Split:
    """A text as training, validation and test bytes, in pieces, so that all three are from everywhere in it."""

    def __init__(self, text: bytes) -> None:
        pieces = list(torch.tensor(list(text)).split(4 * CONTEXT)[:-1])
        self.train = torch.stack([p for i, p in enumerate(pieces) if i % 8 < 6])
        self.validation = torch.stack([p for i, p in enumerate(pieces) if i % 8 == 6]).view(-1, CONTEXT)
        self.test = torch.stack([p for i, p in enumerate(pieces) if i % 8 == 7]).view(-1, CONTEXT)

    def batch(self, generator: torch.Generator) -> Tensor:
        piece = torch.randint(len(self.train), (BATCH,), generator=generator)
        start = torch.randint(3 * CONTEXT, (BATCH, 1), generator=generator)
        return self.train[piece[:, None], start + torch.arange(CONTEXT)]


def make_model(tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = 32 if tiny else 64
    config = LlamaConfig(
        vocab_size=256, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, parameters: list[Tensor], splits: list[Split], steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        ids = splits[step % len(splits)].batch(generator)
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()


def adapter(model: LlamaForCausalLM, split: Split, alpha: float, steps: int, seed: int) -> Adapter:
    """Train a LoRA on every linear layer of the decoder, in the plainest way: W + alpha / rank B A."""
    from torch.nn.utils import parametrize

    class Delta(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(RANK, weight.shape[1]) / math.sqrt(weight.shape[1]))
            self.b = torch.nn.Parameter(torch.zeros(weight.shape[0], RANK))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + alpha / RANK * self.b @ self.a

    torch.manual_seed(seed)
    model.requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    deltas = {name: Delta(layer.weight) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", deltas[name])
    fit(model, [p for d in deltas.values() for p in d.parameters()], [split], steps, 4e-3)
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return Adapter(
        {name: LoRA(from_torch(d.a.detach()), from_torch(d.b.detach()), alpha, "config") for name, d in deltas.items()}
    )


@torch.no_grad()
def losses(model: LlamaForCausalLM, found: Adapter | None, splits: Mapping[str, Split], part: str) -> dict[str, float]:
    """Bits per byte of each kind of text, with the adapter added to the weights."""
    before = {}
    for name, update in (found.updates if found is not None else {}).items():
        factors = update.factors()
        assert factors is not None
        weight = model.get_submodule(name).weight
        before[name] = weight.clone()
        weight += (factors.b @ factors.a).float()
    told = {}
    for kind, split in splits.items():
        ids = getattr(split, part)[:32]
        told[kind] = float(model(ids, labels=ids).loss) / math.log(2)
    for name, weight in before.items():
        model.get_submodule(name).weight.copy_(weight)
    return told


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=1)
    given = parser.parse_args()
    # Matrices of this size are slower on two threads, and a result should not depend on their number.
    torch.set_num_threads(1)
    start = time.perf_counter()
    splits = {kind: Split(text) for kind, text in texts().items()}
    model = make_model(given.tiny)
    steps = (40, 20) if given.tiny else (600, 160)
    fit(model, list(model.parameters()), list(splits.values()), steps[0], 3e-3)
    bench.say(f"base: {sum(p.numel() for p in model.parameters()):,} weights, {time.perf_counter() - start:.0f} s")
    adapters = {
        kind: adapter(model, split, ALPHAS[kind], steps[1], seed) for seed, (kind, split) in enumerate(splits.items())
    }
    bench.say(f"adapters: {', '.join(adapters)}; {time.perf_counter() - start:.0f} s")

    base = losses(model, None, splits, "test")
    own = {kind: losses(model, a, splits, "test")[kind] for kind, a in adapters.items()}
    saved = {kind: base[kind] - own[kind] for kind in splits}
    results: dict[str, Any] = {"base": base, "adapter alone": own}
    rows = []
    for label, (method, options, more) in METHODS.items():
        began = time.perf_counter()
        tried = []
        for factor in FACTORS:
            sources = [(a, factor) for a in adapters.values()]
            report = combine(sources, method=method, options=options, seed=0, **more)  # type: ignore[arg-type]
            there = losses(model, report.adapter, splits, "validation")
            tried.append((sum(there.values()), factor, report))
        _, factor, report = min(tried, key=lambda t: t[0])
        found = losses(model, report.adapter, splits, "test")
        shares = {kind: (base[kind] - found[kind]) / saved[kind] for kind in splits}
        mean = sum(shares.values()) / len(shares)
        interference = sum(a.interference or 0.0 for a in report.adapters) / len(report.adapters)
        results[label] = {
            "factor": factor, "share": mean, "shares": shares, "bits_per_byte": found,
            "interference": interference, "error": report.error, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        rows.append((mean, [label, f"{factor:g}", *(f"{shares[k]:.2f}" for k in splits), f"{mean:.3f}"]))
    bench.table(["method", "factor", *splits, "mean share"], [row for _, row in sorted(rows, key=lambda r: -r[0])])
    bench.say(f"base: {_told(base)}; each adapter on its own text: {_told(own)}")
    bench.say(f"{time.perf_counter() - start:.0f} s in all")
    goals = (
        []
        if given.tiny
        else [Goal("linear saves, of what four adapters save", results["linear"]["share"], at_least=0.0)]
    )
    bench.finish(given, "merging", {"rank": RANK, "alphas": ALPHAS, "steps": steps}, results, goals)


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {value:.3f}" for kind, value in values.items()) + " bits per byte"


if __name__ == "__main__":
    bench.main(benchmark)
