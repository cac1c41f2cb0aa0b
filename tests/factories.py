"""Small adapters and checkpoints on disk, written with the `safetensors` package and not with our own writer.

Sizes are all different (in 6, out 10, rank 4), so that a transposed factor cannot pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# module -> (out, in)
MODULES: dict[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (10, 6),
    "model.layers.0.self_attn.v_proj": (7, 6),
    "model.layers.1.self_attn.q_proj": (10, 6),
    "model.layers.1.self_attn.v_proj": (7, 6),
}


def layered(layers: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """`{"self_attn.q_proj": (10, 6)}` for every layer of a decoder."""
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def factors(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B), random; `ranks` by module goes before `rank`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (rows, columns) in modules.items():
        r = (ranks or {}).get(name, rank)
        a = torch.randn(r, columns, generator=generator).to(dtype)
        made[name] = (a, torch.randn(rows, r, generator=generator).to(dtype))
    return made


def adapter_folder(
    folder: Path,
    *,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    rank: int = 4,
    alpha: float = 8,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    config: Mapping[str, object] | None = None,
    prefix: str = "base_model.model.",
) -> Path:
    """Write a PEFT folder and return it.

    values: module -> (A, B), in place of random ones.
    extra: further tensors by their key after the prefix, such as `score.weight`.
    config: further fields of adapter_config.json.
    """
    made = values if values is not None else factors(modules, rank=rank, ranks=ranks, dtype=dtype, seed=seed)
    tensors = {f"{prefix}{name}.lora_A.weight": a for name, (a, _) in made.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": b for name, (_, b) in made.items()}
    tensors |= {f"{prefix}{name}": t for name, t in (extra or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in made}),
        "rank_pattern": dict(ranks or {}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **(config or {})}, indent=2), encoding="utf-8")
    return folder


def base_weights(
    modules: Mapping[str, tuple[int, int]] = MODULES, *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """The weights that `modules` are for, an embedding, a norm, and nothing tied."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, Sequence[int]] = {f"{name}.weight": shape for name, shape in modules.items()}
    shapes |= {"lm_head.weight": (13, 6), "model.embed_tokens.weight": (13, 6), "model.norm.weight": (6,)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in sorted(shapes.items())}


def gguf_model(path: Path, *, layers: int = 1, shape: tuple[int, int] = (10, 6), seed: int = 1) -> Path:
    """Write a Llama in float32 as GGUF whose only weights are `mlp.up_proj` of each layer, embedding and head."""
    from loratools.storage.gguf_writer import write_gguf
    from loratools.tensors.lazy import from_torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {f"blk.{i}.ffn_up.weight": shape for i in range(layers)}
    shapes |= {"token_embd.weight": (13, shape[1]), "output.weight": (13, shape[1])}
    fields = {
        "general.architecture": "llama", "llama.block_count": layers, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2, "llama.embedding_length": shape[1],
    }  # fmt: skip
    tensors = {name: from_torch(torch.randn(*size, generator=generator)) for name, size in shapes.items()}
    write_gguf(path, fields, tensors)
    return path


def checkpoint_folder(
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a Hugging Face checkpoint, a single file or so many shards with their index, and return its folder."""
    weights = weights if weights is not None else base_weights()
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**fields, **(config or {})}, indent=2), encoding="utf-8")
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder
