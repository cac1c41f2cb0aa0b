"""Many small things: a checkpoint with the counts of DeepSeek-V3, and adapters on its attention and on every expert.

python benchmarks/scale.py [--rounds 3] [--only inspect] [--experts 256] [--open-files 64] [--data FOLDER] [--out FILE]

58 layers of 256 experts: 45,000 tensors in 163 shards, 464 tensors in an adapter of the attention and 89,552 in one of
every expert. The tensors are tiny, so that what is measured is the work for each name, module and shard. Every command
is a process, with a quarter of the experts and shards, and with all of them. The last column is the ratio of the CPU
seconds by the ratio of the counts of tensors that the command reads: above 1.2, something is not linear. Seconds by the
clock say as much of the machine's other work, and are shown beside them. With `--experts 16`, the verbs that compute
something for each module take a minute in place of many, and are compared at a sixteenth of the experts and a quarter
of that; the goals in seconds are of all experts alone.

`--open-files` limits the number of files that each process may have open at once, as `ulimit -n` does.
"""

import argparse
import json
import resource
import statistics
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import _harness as bench
from _harness import Goal, Side

LAYERS = 58
HIDDEN, INTERMEDIATE, Q_RANK, KV_RANK, HEADS, VOCABULARY, RANK = 12, 10, 9, 7, 14, 40, 2
EXPERTS, SHARDS = 256, 163
# What a full count may take, by the goals of the project.
GOALS = {"inspect experts": 2.5, "merge experts": 12.0, "merge attention": 3.0}


@dataclass(frozen=True)
class Size:
    """How many experts each layer has, and in how many files the checkpoint is."""

    experts: int
    shards: int

    @property
    def name(self) -> str:
        return f"scale-{self.experts}x{self.shards}"


def sizes(given: argparse.Namespace) -> tuple[Size, Size]:
    if given.tiny:
        return Size(1, 2), Size(4, 5)
    # Never fewer than two shards, so that there is an index.
    few, many = (Size(count, max(2, SHARDS * count // EXPERTS)) for count in (given.experts // 4, given.experts))
    return few, many


def attention() -> dict[str, tuple[int, int]]:
    """Modules of one layer's attention that adapters have: (out, in)."""
    return {
        "self_attn.q_a_proj": (Q_RANK, HIDDEN),
        "self_attn.q_b_proj": (HEADS, Q_RANK),
        "self_attn.kv_a_proj_with_mqa": (KV_RANK, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS),
    }


def experts(count: int) -> dict[str, tuple[int, int]]:
    sides = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {f"mlp.experts.{expert}.{name}": shape for expert in range(count) for name, shape in sides.items()}


def weights(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, in its order."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        modules = {**attention(), **experts(size.experts), "mlp.gate": (size.experts, HIDDEN)}
        for name, shape in modules.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def values(name: str, count: int, seed: int, spread: float) -> bytes:
    """`count` float32 numbers, the same for the same name and seed."""
    import random

    numbers = random.Random(f"{seed} {name}")
    return struct.pack(f"<{count}f", *(numbers.uniform(-spread, spread) for _ in range(count)))


def write_file(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> None:
    """A safetensors file of float32 tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()))


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def checkpoint(folder: Path, size: Size, *, tuned: bool) -> Path:
    """The base; or the same with every matrix of a layer's attention and experts changed by a product of rank 2."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    every = list(weights(size))
    each = -(-len(every) // size.shards)
    index = {}
    for number in range(size.shards):
        file = f"model-{number + 1:05d}-of-{size.shards:05d}.safetensors"
        tensors = {}
        for name, shape in every[number * each : (number + 1) * each]:
            data = values(name, elements(shape), 0, 0.5)
            if tuned and len(shape) == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
                rows, columns = shape
                base = struct.unpack(f"<{rows * columns}f", data)
                left, right = (struct.unpack(f"<{2 * n}f", values(name, 2 * n, n, 0.1)) for n in (rows, columns))
                data = struct.pack(
                    f"<{rows * columns}f",
                    *(
                        base[i * columns + j] + sum(left[2 * i + k] * right[2 * j + k] for k in range(2))
                        for i in range(rows)
                        for j in range(columns)
                    ),
                )
            tensors[name] = shape, data
            index[name] = file
        write_file(folder / file, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": VOCABULARY})
    )
    return folder


def adapter(folder: Path, modules: Mapping[str, tuple[int, int]], seed: int) -> Path:
    """A PEFT adapter of rank 2 on these modules of every layer."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, inner) in modules.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("lora_A", (RANK, inner)), ("lora_B", (out, RANK))):
                full = f"{key}.{part}.weight"
                tensors[full] = shape, values(full, elements(shape), seed, 0.1)
    write_file(folder / "adapter_model.safetensors", tensors)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def commands(data: Path, size: Size) -> dict[str, Side]:
    """Every command that is measured, by its name in the table."""
    here = data / size.name
    base, tuned = checkpoint(here / "base", size, tuned=False), checkpoint(here / "tuned", size, tuned=True)
    small = adapter(here / "attention", attention(), 1)
    large = adapter(here / "experts", {**attention(), **experts(size.experts)}, 2)
    other = adapter(here / "experts-2", {**attention(), **experts(size.experts)}, 3)
    out = here / "out"

    def side(name: str, *arguments: object, writes: bool = False) -> Side:
        words = [str(a) for a in arguments] + (["-o", str(out), "--quiet"] if writes else [])
        return Side(name, [bench.script("loratools"), *words], out if writes else None)

    sides = (
        side("inspect base", "inspect", base),
        side("inspect attention", "inspect", small),
        side("inspect experts", "inspect", large),
        side("merge --plan experts", "merge", base, large, "--plan", "-o", here / "planned"),
        side("merge attention", "merge", base, small, writes=True),
        side("merge experts", "merge", base, large, writes=True),
        side("extract", "extract", base, tuned, "--rank", RANK, writes=True),
        side("resize", "resize", large, "--rank", 1, writes=True),
        side("combine", "combine", large, other, writes=True),
        side("combine --rank", "combine", large, other, "--rank", RANK, writes=True),
        side("compare", "compare", large, other),
        side("convert", "convert", large, "--to", "peft", "--dtype", "bfloat16", writes=True),
        side("spectrum", "spectrum", large),
        side("spectrum --base", "spectrum", tuned, "--base", base),
    )
    return {each.name: each for each in sides}


def benchmark() -> None:
    parser = bench.options(__doc__, rounds=3)
    parser.add_argument("--only", action="append", metavar="COMMAND", help="commands that begin so; repeatable")
    parser.add_argument("--experts", type=int, default=EXPERTS, metavar="N", help="of each layer, at full count")
    parser.add_argument("--open-files", type=int, metavar="N", help="as after `ulimit -n N`")
    given = parser.parse_args()
    if given.experts < 4:
        parser.error("--experts is at least 4, for a quarter of them to be one")
    data = given.data / "tiny" if given.tiny else given.data
    quarter, full = sizes(given)
    for size in (quarter, full):
        # Inputs are made by a process of its own: on Linux the peak memory of a child begins at its parent's size.
        maker = Process(target=commands, args=(data, size))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"error: the inputs of {size.name} were not made")
    sides = {size: commands(data, size) for size in (quarter, full)}
    if given.open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given.open_files, given.open_files))
    names = [n for n in sides[full] if not given.only or any(n.startswith(prefix) for prefix in given.only)]
    counts = {size: sum(1 for _ in weights(size)) for size in sides}
    ratio = counts[full] / counts[quarter]
    rows, results = [], {}
    for name in names:
        runs = {
            size: [bench.run(sides[size][name], data / "logs" / "scale.log") for _ in range(given.rounds)]
            for size in sides
        }
        seconds = {size: statistics.median(run.seconds for run in runs[size]) for size in sides}
        cpu = {size: statistics.median(run.cpu_seconds for run in runs[size]) for size in sides}
        peaks = {size: statistics.median(run.peak_bytes for run in runs[size]) for size in sides}
        relative = cpu[full] / cpu[quarter] / ratio
        rows.append(
            [
                name,
                *(f"{seconds[size]:.2f}" for size in sides),
                *(f"{cpu[size]:.2f}" for size in sides),
                *(f"{peaks[size] / 1e6:.0f}" for size in sides),
                f"{cpu[full] / cpu[quarter]:.2f}",
                f"{relative:.2f}",
            ]
        )
        bench.say(f"  {name:<22} {seconds[quarter]:7.2f} s {seconds[full]:7.2f} s  {peaks[full] / 1e6:6.0f} MB")
        results[name] = {"quarter": bench.summary(runs[quarter]), "full": bench.summary(runs[full]), "ratio": relative}
    bench.say()
    columns = [f"{unit}, {size}" for unit in ("s", "CPU s", "MB") for size in ("quarter", "full")]
    header = ["", *columns, "times", "by count"]
    bench.table(header, rows)
    bench.say()
    goals = [Goal(f"{name}: ratio by count", r["ratio"], at_most=1.2) for name, r in results.items()]
    if full.experts == EXPERTS:
        measured = {name: seconds for name, seconds in GOALS.items() if name in results}
        goals += [Goal(f"{n}: seconds", results[n]["full"]["seconds"], at_most=s) for n, s in measured.items()]
    settings = {"tensors": {"quarter": counts[quarter], "full": counts[full]}, "shards": [quarter.shards, full.shards]}
    bench.finish(given, "scale", settings, results, goals)


if __name__ == "__main__":
    bench.main(benchmark)
