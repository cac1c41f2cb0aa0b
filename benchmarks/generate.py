"""Makes the benchmarks' inputs: deterministic, one tensor in memory at a time, from seeds and shapes alone.

    python benchmarks/generate.py base OUT --layers 22
    python benchmarks/generate.py adapter OUT --layers 22 --rank 16 --dtype float32
    python benchmarks/generate.py tuned OUT --base BASE --kind decaying
    python benchmarks/generate.py nf4 OUT --base BASE

base     A Llama-shaped bfloat16 checkpoint that transformers loads: hidden 2048, intermediate 5632, 32 heads, 4 key and
         value heads, vocabulary 32000, untied head; with 22 layers 1.1 billion weights. Three shards and an index.
         Weights are normal with standard deviation 0.02, norms are one.
adapter  A PEFT folder with LoRA on all seven linear layers of every block, alpha = 2 * rank. A is uniform in
         +-1/sqrt(in), as PEFT starts it; B is normal, of the size that gives rms(dW) = 1e-2 * rms(W), as if trained.
tuned    The base plus a full-rank delta on every linear layer, rounded once to bfloat16; all else is the base's bytes.
         rms(delta) = 1e-2 * rms(W) for both kinds. Singular vectors are those of normal random matrices (by QR).
         `decaying`: 64 directions, sigma_i = s * exp(-i / 16) for i = 0 ... 63, hold 90 % of the energy
                     ||delta||_F^2; white noise (independent normal entries) holds the other 10 %.
         `power`:    sigma_i = s * i^-0.7 for i = 1 ... min(out, in) hold all the energy; no noise but that of rounding.
         A rank-16 adapter can then keep 76 % and 75 % of the energy.
nf4      The base with every linear layer of its blocks in nf4, blocks of 64, as bitsandbytes packs and transformers
         stores them; one file.

A tensor's values depend on the seed, its name and its shape only: not on the number of layers, threads or shards.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

STD = 0.02
DELTA_RMS = 1e-2 * STD
NOISE_ENERGY = 0.1
DIRECTIONS = 64
DECAY = 16.0
POWER = 0.7
ROWS = 4096  # rows made at a time; the values depend on it, so it is fixed

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    def linear(self) -> Iterator[tuple[str, int, int]]:
        """(name, out, in) of every linear layer of every block."""
        kv = self.hidden // self.heads * self.kv_heads
        sizes = (
            (self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, self.hidden),
            (self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate),
        )  # fmt: skip
        for layer in range(self.layers):
            for name, (rows, columns) in zip(LINEAR, sizes, strict=True):
                yield f"model.layers.{layer}.{name}", rows, columns

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, in the order of the forward pass."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        linear = list(self.linear())
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found[f"{block}.input_layernorm.weight"] = (self.hidden,)
            found.update({f"{name}.weight": (o, i) for name, o, i in linear if name.startswith(f"{block}.")})
            found[f"{block}.post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found


SHAPES = {
    "1.1b": Shape(),
    "7b": Shape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32),
    "tiny": Shape(layers=2, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=128),
}


def stream(seed: int, *words: object) -> torch.Generator:
    """A random stream of its own for everything that has a name."""
    digest = hashlib.sha256(":".join(map(str, (seed, *words))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def blocks(shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], torch.Tensor]) -> Iterator[torch.Tensor]:
    """A large tensor as consecutive blocks of rows."""
    for start in range(0, shape[0], ROWS):
        yield draw((min(ROWS, shape[0] - start), *shape[1:]))


def raw(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, values: Callable[[str], Iterator[torch.Tensor]]
) -> int:
    """Write a file tensor by tensor; returns the bytes of its tensors. All tensors have one dtype."""
    code, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for name in shapes:
            for block in values(name):
                file.write(raw(block.to(kind)))
        if file.tell() != 8 + len(head) + end:
            raise AssertionError(f"{path}: wrote {file.tell()} bytes, not {8 + len(head) + end}")
    return end


def split(shapes: Mapping[str, tuple[int, ...]], parts: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in consecutive groups of about the same size."""
    total = sum(map(math.prod, shapes.values()))
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(parts)]
    done = 0
    for name, shape in shapes.items():
        groups[min(done * parts // total, parts - 1)][name] = shape
        done += math.prod(shape)
    return [group for group in groups if group]


def write_model(
    out: Path, shape: Shape, shards: int, values: Callable[[str, tuple[int, ...]], Iterator[torch.Tensor]]
) -> None:
    shapes = shape.tensors()
    groups = split(shapes, shards)
    index: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        total += write_safetensors(out / file, group, "bfloat16", lambda name: values(name, shapes[name]))
        index.update(dict.fromkeys(group, file))
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def base(out: Path, shape: Shape, *, shards: int = 3, seed: int = 0) -> None:
    """A checkpoint folder."""

    def values(name: str, size: tuple[int, ...]) -> Iterator[torch.Tensor]:
        if len(size) == 1:
            yield torch.ones(size)
            return
        source = stream(seed, "base", name)
        yield from blocks(size, lambda rows: torch.randn(rows, generator=source).mul_(STD))

    write_model(out, shape, shards, values)


def adapter(out: Path, shape: Shape, *, rank: int = 16, dtype: str = "float32", seed: int = 1, name: str = "") -> None:
    """A PEFT folder; `name` is what its config says the base model is."""
    scale = 2.0
    shapes: dict[str, tuple[int, ...]] = {}
    for module, rows, columns in shape.linear():
        shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, columns)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, rank)

    def values(key: str) -> Iterator[torch.Tensor]:
        size, source = shapes[key], stream(seed, "adapter", rank, key)
        if ".lora_A." in key:
            yield (torch.rand(size, generator=source) * 2 - 1) / math.sqrt(size[1])
        else:  # an entry of B @ A has the standard deviation sqrt(rank) * std(B) * std(A)
            columns = shapes[key.replace(".lora_B.", ".lora_A.")][1]
            std = DELTA_RMS / (scale * math.sqrt(rank / (3 * columns)))
            yield torch.randn(size, generator=source) * std

    write_safetensors(out / "adapter_model.safetensors", dict(sorted(shapes.items())), dtype, values)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": name or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank * scale,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": sorted({module.rpartition(".")[2] for module in LINEAR}),
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(out / "adapter_config.json", config)


def orthonormal(rows: int, columns: int, source: torch.Generator) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=source))[0]
    return basis


def delta(kind: str, rows: int, columns: int, source: torch.Generator) -> torch.Tensor:
    """A dense update with the spectrum that the heading of this file states."""
    energy = rows * columns * DELTA_RMS**2
    rank = min(rows, columns)
    if kind == "decaying":
        rank = min(DIRECTIONS, rank)
        sigma = torch.exp(-torch.arange(rank, dtype=torch.float32) / DECAY)
        signal, noise = (1 - NOISE_ENERGY) * energy, math.sqrt(NOISE_ENERGY) * DELTA_RMS
    else:
        sigma = torch.arange(1, rank + 1, dtype=torch.float32) ** -POWER
        signal, noise = energy, 0.0
    sigma *= math.sqrt(signal) / torch.linalg.vector_norm(sigma)
    update = (orthonormal(rows, rank, source) * sigma) @ orthonormal(columns, rank, source).T
    if noise:
        update += torch.randn(rows, columns, generator=source) * noise
    return update


def tuned(out: Path, base: Path, kind: str, *, shards: int = 3, seed: int = 2) -> None:
    """A full fine-tune of `base`, with a stated spectrum."""
    from safetensors import safe_open

    config = json.loads((base / "config.json").read_text())
    shape = Shape(
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
        config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"],
    )  # fmt: skip
    files = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    linear = {f"{name}.weight" for name, _, _ in shape.linear()}

    def values(name: str, size: tuple[int, ...]) -> Iterator[torch.Tensor]:
        with safe_open(str(base / files[name]), "pt") as file:
            weight = file.get_tensor(name)
        if name in linear:
            rows, columns = size
            weight = weight.float() + delta(kind, rows, columns, stream(seed, "tuned", kind, name))
        yield weight

    write_model(out, shape, shards, values)


def nf4(out: Path, base: Path) -> None:
    """The same model quantised, by bitsandbytes on the CPU."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if name.removesuffix(".weight").endswith(LINEAR):
                packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
                parts = state.as_dict(packed=True)
                tensors |= {name: packed, **{f"{name}.{part}": values for part, values in parts.items()}}
            else:
                tensors[name] = weight
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    write_json(out / "config.json", config)


def spectrum(kind: str) -> dict[str, Any]:
    """What `tuned` put in, for the record of a benchmark."""
    common = {"kind": kind, "rms_delta_over_rms_weight": DELTA_RMS / STD, "stored_as": "bfloat16"}
    if kind == "decaying":
        directions = {"sigma_i": f"s * exp(-i / {DECAY:g})", "i": f"0 ... {DIRECTIONS - 1}"}
        return {**common, **directions, "energy": 1 - NOISE_ENERGY, "white_noise_energy": NOISE_ENERGY}
    return {**common, "sigma_i": f"s * i^-{POWER}", "i": "1 ... min(out, in)", "energy": 1.0, "white_noise_energy": 0.0}


def once(out: Path, make: Callable[[Path], None]) -> None:
    """Make a folder if it is not there yet; half-made ones never get its name."""
    if out.exists():
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(out)
    print(f"made {out}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s WHAT OUT [options]"
    )
    parser.add_argument("what", choices=["base", "adapter", "tuned", "nf4"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, help="default: the shape's (22 for 1.1b)")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, help="default: 0 for a base, 1 for an adapter, 2 for a fine-tune")
    parser.add_argument("--rank", type=int, default=16, help="of an adapter")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of an adapter")
    parser.add_argument("--base", type=Path, help="the model that is fine-tuned or quantised")
    parser.add_argument("--kind", choices=["decaying", "power"], default="decaying", help="of a fine-tune")
    given = parser.parse_args(arguments)
    shape = SHAPES[given.shape]
    shape = replace(shape, layers=given.layers or shape.layers)
    seed = {} if given.seed is None else {"seed": given.seed}
    if given.what == "base":
        once(given.out, lambda out: base(out, shape, shards=given.shards, **seed))
    elif given.what == "adapter":
        once(given.out, lambda out: adapter(out, shape, rank=given.rank, dtype=given.dtype, **seed))
    elif given.base is None:
        parser.error(f"{given.what} needs --base")
    elif given.what == "nf4":
        once(given.out, lambda out: nf4(out, given.base))
    else:
        once(given.out, lambda out: tuned(out, given.base, given.kind, shards=given.shards, **seed))
    print(json.dumps(spectrum(given.kind) if given.what == "tuned" else asdict(shape)))


if __name__ == "__main__":
    main()
