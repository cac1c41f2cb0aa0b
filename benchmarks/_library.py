"""A library of adapters as people have it: thousands of files from a dozen trainers, a hub cache, models, broken files.

Headers have the names, shapes, dtypes and metadata that the trainers write, and the numbers that a reader of headers
looks at (alpha) are there. All other values are holes in sparse files, so that 4,000 files of realistic size take a few
gigabytes of disk. Every file differs from the others in rank, alpha or metadata; everything follows from its number.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Shape = tuple[int, ...]
# Module -> (out, in), or (out, in, height, width) of a convolution.
Modules = Mapping[str, Shape]

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_RANKS = (4, 8, 16, 32, 64, 128)


@dataclass
class Tensors:
    """Names, shapes and dtypes of a file; `numbers` are those of one element whose value is written."""

    dtype: str = "F16"
    shapes: dict[str, Shape] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def number(self, name: str, value: float) -> None:
        self.shapes[name] = ()
        self.numbers[name] = value


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """A sparse safetensors file, its tensors sorted by name, as the reference writer sorts those of one dtype."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    width, at = BYTES[tensors.dtype], 0
    places = {}
    for name in sorted(tensors.shapes):
        shape = tensors.shapes[name]
        end = at + width * math.prod(shape)
        header[name] = {"dtype": tensors.dtype, "shape": list(shape), "data_offsets": [at, end]}
        if name in tensors.numbers:
            places[at] = _packed(tensors.numbers[name], tensors.dtype)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for place, packed in places.items():
            file.seek(start + place)
            file.write(packed)
        file.truncate(start + at)


def _packed(number: float, dtype: str) -> bytes:
    if dtype == "BF16":
        return struct.pack("<f", number)[2:]
    return struct.pack("<e" if dtype == "F16" else "<f", number)


# Modules of models


def _transformer_block(channels: int, context: int) -> dict[str, Shape]:
    """The linear layers of one block of attention in a UNet."""
    modules: dict[str, Shape] = {}
    for attention, inner in (("attn1", channels), ("attn2", context)):
        modules[f"{attention}_to_q"] = (channels, channels)
        modules[f"{attention}_to_k"] = modules[f"{attention}_to_v"] = (channels, inner)
        modules[f"{attention}_to_out_0"] = (channels, channels)
    return modules | {"ff_net_0_proj": (8 * channels, channels), "ff_net_2": (channels, 4 * channels)}


def sd15() -> Modules:
    """Stable Diffusion 1.5 as kohya's sd-scripts name it: 192 modules of the UNet, 72 of the text encoder."""
    places = [
        *((f"down_blocks_{i}_attentions_{j}", width) for i, width in enumerate((320, 640, 1280)) for j in range(2)),
        ("mid_block_attentions_0", 1280),
        *((f"up_blocks_{i}_attentions_{j}", width) for i, width in ((1, 1280), (2, 640), (3, 320)) for j in range(3)),
    ]
    modules: dict[str, Shape] = {}
    for place, width in places:
        for side in ("proj_in", "proj_out"):
            modules[f"lora_unet_{place}_{side}"] = (width, width, 1, 1)
        for name, shape in _transformer_block(width, 768).items():
            modules[f"lora_unet_{place}_transformer_blocks_0_{name}"] = shape
    return modules | _clip("lora_te", 12, 768)


def _clip(prefix: str, layers: int, width: int) -> dict[str, Shape]:
    modules: dict[str, Shape] = {}
    for layer in range(layers):
        block = f"{prefix}_text_model_encoder_layers_{layer}"
        for name in ("k_proj", "out_proj", "q_proj", "v_proj"):
            modules[f"{block}_self_attn_{name}"] = (width, width)
        modules |= {f"{block}_mlp_fc1": (4 * width, width), f"{block}_mlp_fc2": (width, 4 * width)}
    return modules


def sdxl() -> Modules:
    """Stable Diffusion XL as kohya's sd-scripts name it: 722 modules of the UNet, none of the text encoders."""
    places = [
        *((f"input_blocks_{i}_1", 640, 2) for i in (4, 5)),
        *((f"input_blocks_{i}_1", 1280, 10) for i in (7, 8)),
        ("middle_block_1", 1280, 10),
        *((f"output_blocks_{i}_1", 1280, 10) for i in (0, 1, 2)),
        *((f"output_blocks_{i}_1", 640, 2) for i in (3, 4, 5)),
    ]
    modules: dict[str, Shape] = {}
    for place, width, depth in places:
        for side in ("proj_in", "proj_out"):
            modules[f"lora_unet_{place}_{side}"] = (width, width)
        for block in range(depth):
            for name, shape in _transformer_block(width, 2048).items():
                modules[f"lora_unet_{place}_transformer_blocks_{block}_{name}"] = shape
    return modules


def flux() -> Modules:
    """FLUX.1 under the names of its authors, as kohya's sd-scripts flatten them: 304 modules."""
    modules: dict[str, Shape] = {}
    for block in range(19):
        for stream in ("img", "txt"):
            place = f"lora_unet_double_blocks_{block}_{stream}"
            modules |= {
                f"{place}_attn_qkv": (9216, 3072),
                f"{place}_attn_proj": (3072, 3072),
                f"{place}_mlp_0": (12288, 3072),
                f"{place}_mlp_2": (3072, 12288),
                f"{place}_mod_lin": (18432, 3072),
            }
    for block in range(38):
        place = f"lora_unet_single_blocks_{block}"
        modules |= {
            f"{place}_linear1": (21504, 3072),
            f"{place}_linear2": (3072, 15360),
            f"{place}_modulation_lin": (9216, 3072),
        }
    return modules


def flux_diffusers() -> Modules:
    """The attention of FLUX.1 as diffusers names it: 266 modules."""
    modules: dict[str, Shape] = {}
    for block in range(19):
        place = f"transformer.transformer_blocks.{block}.attn"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            modules[f"{place}.{name}"] = (3072, 3072)
    for block in range(38):
        for name in ("to_q", "to_k", "to_v"):
            modules[f"transformer.single_transformer_blocks.{block}.attn.{name}"] = (3072, 3072)
    return modules


@dataclass(frozen=True)
class LanguageModel:
    """The sizes of a model with blocks of Llama's kind."""

    hub: str
    layers: int
    hidden: int
    intermediate: int
    keys: int

    def modules(self, *, attention_only: bool) -> Modules:
        sizes: dict[str, Shape] = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
        }
        if not attention_only:
            sizes |= {
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
            }
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in sizes.items()}


LANGUAGE = (
    LanguageModel("meta-llama/Meta-Llama-3-8B", 32, 4096, 14336, 1024),
    LanguageModel("meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 4096),
    LanguageModel("mistralai/Mistral-7B-v0.1", 32, 4096, 14336, 1024),
    LanguageModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 22, 2048, 5632, 256),
)


# Files of trainers


def _halves(shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Shapes of A and B. B of a convolution has a kernel of 1 x 1."""
    out, inner, *kernel = shape
    return (rank, inner, *kernel), (out, rank, *(1 for _ in kernel))


def _kohya_metadata(number: int, version: str, rank: int) -> dict[str, str]:
    tags = {f"tag {i}": 5 + (number * i) % 90 for i in range(number % 120)}
    return {
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank / 2),
        "ss_output_name": f"library-{number}",
        "ss_steps": str(100 * (1 + number % 40)),
        "ss_num_epochs": str(1 + number % 20),
        "ss_training_started_at": str(1_700_000_000 + 10_000 * number),
        "ss_tag_frequency": json.dumps({"10_subject": tags}),
        "ss_resolution": "(1024, 1024)",
        "modelspec.title": f"Library {number}",
        "modelspec.trigger_phrase": f"lib{number}, style {number % 7}",
    }


def kohya(modules: Modules, version: str) -> Callable[[Path, int], None]:
    def write(path: Path, number: int) -> None:
        rank = _RANKS[number % len(_RANKS)]
        tensors = Tensors(dtype=("F16", "BF16", "F32")[number % 3])
        for name, shape in modules.items():
            a, b = _halves(shape, rank)
            tensors.shapes |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors.number(f"{name}.alpha", rank / 2)
        write_safetensors(path.with_suffix(".safetensors"), tensors, _kohya_metadata(number, version, rank))

    return write


def lycoris(path: Path, number: int) -> None:
    """LoHa of Stable Diffusion 1.5, or LoKr of XL, in turn."""
    rank = _RANKS[number % 3]
    tensors = Tensors()
    loha = number % 2 == 0
    for name, (out, inner, *kernel) in (sd15() if loha else sdxl()).items():
        columns = inner * math.prod(kernel)
        if loha:
            tensors.shapes |= {f"{name}.hada_w{i}_a": (out, rank) for i in (1, 2)}
            tensors.shapes |= {f"{name}.hada_w{i}_b": (rank, columns) for i in (1, 2)}
        else:
            tensors.shapes[f"{name}.lokr_w1"] = (16, 16)
            tensors.shapes[f"{name}.lokr_w2_a"] = (out // 16, rank)
            tensors.shapes[f"{name}.lokr_w2_b"] = (rank, columns // 16)
        tensors.number(f"{name}.alpha", rank / 2)
    version = "sd_v1" if loha else "sdxl_base_v1-0"
    write_safetensors(path.with_suffix(".safetensors"), tensors, _kohya_metadata(number, version, rank))


def diffusers(path: Path, number: int) -> None:
    rank = _RANKS[number % len(_RANKS)]
    tensors = Tensors(dtype="BF16")
    for name, shape in flux_diffusers().items():
        a, b = _halves(shape, rank)
        tensors.shapes |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    write_safetensors(path.with_suffix(".safetensors"), tensors, {"format": "pt"})


def peft(path: Path, number: int) -> None:
    model = LANGUAGE[number % len(LANGUAGE)]
    rank = _RANKS[number % len(_RANKS)]
    modules = model.modules(attention_only=number % 3 == 0)
    tensors = Tensors(dtype=("F32", "BF16")[number % 2])
    for name, shape in modules.items():
        a, b = _halves(shape, rank)
        key = f"base_model.model.{name}"
        tensors.shapes |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # Of every fifth the folder of somebody's machine, which says nothing of the model.
        "base_model_name_or_path": "/mnt/models/base" if number % 5 == 0 else model.hub,
        "r": rank,
        "lora_alpha": 2 * rank + number % 2,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (path / "README.md").write_text(f"# Adapter {number}\n")


def mlx(path: Path, number: int) -> None:
    rank = _RANKS[number % len(_RANKS)]
    tensors = Tensors(dtype="F32")
    for name, shape in LANGUAGE[number % len(LANGUAGE)].modules(attention_only=True).items():
        a, b = _halves(shape, rank)
        tensors.shapes |= {f"{name}.lora_a": a[::-1], f"{name}.lora_b": b[::-1]}
    write_safetensors(path / "adapters.safetensors", tensors, {"format": "mlx"})
    config = {
        "model": LANGUAGE[number % len(LANGUAGE)].hub,
        "fine_tune_type": "lora",
        "num_layers": 32,
        "lora_parameters": {"rank": rank, "scale": 20.0, "dropout": 0.0},
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def gguf(path: Path, number: int) -> None:
    """An adapter of llama.cpp for the attention of a model of Llama's kind."""
    model = LANGUAGE[number % len(LANGUAGE)]
    rank = _RANKS[number % len(_RANKS)]
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    shapes: dict[str, Shape] = {}
    for name, shape in model.modules(attention_only=True).items():
        _, _, layer, module = name.split(".", 3)
        if module in names:
            a, b = _halves(shape, rank)
            key = f"blk.{layer}.{names[module]}.weight"
            shapes |= {f"{key}.lora_a": a[::-1], f"{key}.lora_b": b[::-1]}
    keys = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    body = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(keys) + 1)
    for key, text in keys.items():
        body += _gguf_text(key) + struct.pack("<I", 8) + _gguf_text(text)
    body += _gguf_text("adapter.lora.alpha") + struct.pack("<If", 6, float(2 * rank))
    at = 0
    for name, shape in shapes.items():
        body += _gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, at)
        at += -(-4 * math.prod(shape) // 32) * 32
    body += b"\0" * (-len(body) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".gguf").open("wb") as file:
        file.write(body)
        file.truncate(len(body) + at)


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def hub_cache(path: Path, number: int) -> None:
    """A repository in the hub's cache: files are links into `blobs`, which the two revisions of every third share."""
    folder = path.parent / f"models--owner-{number % 40}--adapter-{number}"
    revisions = [f"{number:05x}{revision}".ljust(40, "7") for revision in ("a", "b")[: 2 if number % 3 == 0 else 1]]
    made = folder / "made"
    peft(made, number)
    blobs = folder / "blobs"
    blobs.mkdir()
    for file in sorted(made.iterdir()):
        blob = blobs / f"{number:06x}{file.name.encode().hex()}".ljust(64, "0")[:64]
        file.rename(blob)
        for revision in revisions:
            link = folder / "snapshots" / revision / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    made.rmdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revisions[-1])


def checkpoint(path: Path, number: int) -> None:
    """A model's folder, or the single file of a model, in turn."""
    model = LANGUAGE[number % len(LANGUAGE)]
    tensors = Tensors(dtype="BF16")
    tensors.shapes["model.embed_tokens.weight"] = (32000, model.hidden)
    for name, shape in model.modules(attention_only=False).items():
        tensors.shapes[f"{name}.weight"] = shape
    if number % 2:
        write_safetensors(path.with_suffix(".safetensors"), tensors, {"format": "pt"})
        return
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def broken(path: Path, number: int) -> None:
    """What downloads and crashes leave: pages of an error, half of a file, nothing, noise, the state of a training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bodies = {
        ".safetensors": (b"<!DOCTYPE html><html>", b"", b'\x10\0\0\0\0\0\0\0{"a":{', bytes(range(256))),
        ".pt": (b"not a pickle",),
    }
    suffix = ".pt" if number % 5 == 4 else ".safetensors"
    path.with_suffix(suffix).write_bytes(bodies[suffix][number % len(bodies[suffix])])


# How many of 4,000 files are of each sort, and in which folder they are.
MIX: tuple[tuple[str, int, Callable[[Path, int], None]], ...] = (
    ("sd15", 1000, kohya(sd15(), "sd_v1")),
    ("sdxl", 700, kohya(sdxl(), "sdxl_base_v1-0")),
    ("flux", 400, kohya(flux(), "flux1")),
    ("flux-diffusers", 300, diffusers),
    ("lycoris", 300, lycoris),
    ("language", 700, peft),
    ("mlx", 100, mlx),
    ("gguf", 100, gguf),
    ("hub", 200, hub_cache),
    ("models", 100, checkpoint),
    ("broken", 100, broken),
)


def library(folder: Path, files: int) -> Path:
    """The library of so many files (of 4,000, the counts of MIX); made once."""
    if folder.exists():
        return folder
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for name, write, number in _plan(files):
        write(staging / name / f"part-{number % 7}" / f"library-{number}", number)
    staging.rename(folder)
    return folder


def _plan(files: int) -> Iterator[tuple[str, Callable[[Path, int], None], int]]:
    total = sum(count for _, count, _ in MIX)
    for name, count, write in MIX:
        for number in range(max(1, round(count * files / total))):
            yield name, write, number
