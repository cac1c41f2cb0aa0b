"""Damaged files of every format, as adapter and as base: an error of ours, in little time and memory, or an answer.

Some of the cases in each run of the tests; LORATOOLS_FUZZ_CASES asks for more, and so does
``python tests/fuzz/test_damaged_files.py CASES [SEED]``, which prints its figures. A case is known by its seed.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

# As a program of its own it finds here what pytest has on its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import peers
from fuzz import mutations

import loratools
from loratools.errors import LoraToolsError

CASES = int(os.environ.get("LORATOOLS_FUZZ_CASES", "120"))
# A case is a file of a few kilobytes. Seconds are of the processor, its own and its children's, so that a machine with
# other work to do fails nothing.
SECONDS = 20.0
MEGABYTES = 400
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


class Target(NamedTuple):
    """A sound file below `root`, how it is damaged, and what is done with it afterwards."""

    file: str
    mutations: tuple[mutations.Mutation, ...]
    use: Callable[[Path], object]


def inspect_adapter(root: Path) -> object:
    return loratools.inspect(root / "adapter", values=True)


def merge(root: Path) -> object:
    return loratools.merge(root / "base", [root / "adapter"], root / "out", overwrite=True, threads=1)


def rewrite_image(root: Path) -> object:
    """Values are read, and the names found and written anew."""
    loratools.inspect(root / "image.safetensors", values=True)
    return loratools.convert(
        root / "image.safetensors", root / "out.safetensors", format="lycoris", overwrite=True, allow_partial=True
    )


def inspected(name: str) -> Callable[[Path], object]:
    return lambda root: loratools.inspect(root / name, values=True)


TARGETS = (
    Target("adapter/adapter_model.safetensors", (*mutations.ANY, *[mutations.header_changed] * 6), merge),
    Target("adapter/adapter_model.safetensors", (*mutations.ANY, *[mutations.header_changed] * 6), inspect_adapter),
    Target("adapter/adapter_config.json", (*mutations.ANY, *[mutations.json_changed] * 8), merge),
    Target("base/model.safetensors", (*mutations.ANY, *[mutations.header_changed] * 6), merge),
    Target("base/config.json", (*mutations.ANY, *[mutations.json_changed] * 8), merge),
    Target("image.safetensors", (*mutations.ANY, *[mutations.header_changed] * 8), rewrite_image),
    Target("single.pt", (*mutations.ANY, *[mutations.member_changed] * 8), inspected("single.pt")),
    Target("legacy.pt", mutations.ANY, inspected("legacy.pt")),
    Target("single.npz", (*mutations.ANY, *[mutations.member_changed] * 4), inspected("single.npz")),
    Target("model.gguf", mutations.ANY, inspected("model.gguf")),
)


def sound(root: Path) -> Path:
    """Folders and files in which nothing is wrong."""
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(3, 8),
        f"base_model.model.{name}.lora_B.weight": torch.randn(12, 3),
    }
    for folder in ("adapter", "base"):
        (root / folder).mkdir(parents=True)
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "layers_to_transform": None, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x",
    }  # fmt: skip
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{name}.weight": torch.randn(12, 8)}, root / "base" / "model.safetensors")
    base = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "tie_word_embeddings": False}
    (root / "base" / "config.json").write_text(json.dumps(base | {"architectures": ["LlamaForCausalLM"]}))
    torch.save(factors, root / "single.pt")
    torch.save(factors, root / "legacy.pt", _use_new_zipfile_serialization=False)
    np.savez(root / "single.npz", **{key: value.numpy() for key, value in factors.items()})
    save_file(
        image_tensors(),
        root / "image.safetensors",
        {"ss_base_model_version": "sd_v1", "ss_network_dim": "3", "ss_tag_frequency": '{"a": {"b": 1}}'},
    )
    shutil.copy(FIXTURES / "quantised" / "model.gguf", root / "model.gguf")
    return root


def image_tensors() -> dict[str, torch.Tensor]:
    """A kohya file of Stable Diffusion 1 with a module of each kind."""
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    sizes: dict[str, tuple[int, ...]] = {
        f"{block}_attn1_to_q.lora_down.weight": (3, 10), f"{block}_attn1_to_q.lora_up.weight": (10, 3),
        f"{block}_attn1_to_q.alpha": (), f"{block}_attn1_to_q.dora_scale": (10, 1),
        f"{block}_attn1_to_k.hada_w1_a": (10, 2), f"{block}_attn1_to_k.hada_w1_b": (2, 10),
        f"{block}_attn1_to_k.hada_w2_a": (10, 2), f"{block}_attn1_to_k.hada_w2_b": (2, 10),
        f"{block}_attn1_to_v.lokr_w1": (2, 2), f"{block}_attn1_to_v.lokr_w2": (5, 5),
        f"{block}_attn2_to_k.diff": (10, 7), f"{block}_norm1.w_norm": (10,), f"{block}_norm1.b_norm": (10,),
        f"{conv}.lora_down.weight": (3, 10, 1, 1), f"{conv}.lora_mid.weight": (3, 3, 3, 3),
        f"{conv}.lora_up.weight": (10, 3, 1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 7),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (28, 2),
    }  # fmt: skip
    return {name: torch.rand(size) + 0.1 for name, size in sizes.items()}


def cpu_seconds() -> float:
    """Seconds of the processor that this process and its children have had."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_case(root: Path, seed: int) -> str:
    """Damage one file as the seed says, use it, and mend it again.

    Returns:
        The class of the error, or "answer".

    Raises:
        AssertionError: Something else than an error of ours, or too slow, or too much memory.
    """
    rng = random.Random(seed)
    target = TARGETS[seed % len(TARGETS)]
    file = root / target.file
    before = file.read_bytes()
    file.write_bytes(rng.choice(target.mutations)(before, rng))
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cpu_seconds()
    try:
        target.use(root)
        outcome = "answer"
    except LoraToolsError as error:
        if error.exit_code == 70:
            raise AssertionError(f"seed {seed}, {target.file}: {error}") from error
        outcome = type(error).__name__
    except Exception as error:
        lines = "".join(traceback.format_exception(error)[-3:])
        raise AssertionError(f"seed {seed}, {target.file}: {lines}") from error
    finally:
        file.write_bytes(before)
    seconds = cpu_seconds() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    assert seconds < SECONDS, f"seed {seed}, {target.file}: {seconds:.1f} s"
    assert megabytes < MEGABYTES, f"seed {seed}, {target.file}: {megabytes:.0f} MB"
    return outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_a_damaged_file_ends_in_an_error_of_ours_or_in_an_answer(tmp_path: Path, part: int) -> None:
    root = sound(tmp_path)

    outcomes = collections.Counter(run_case(root, seed) for seed in range(part, CASES, 4))

    assert len(outcomes) > 1, "damages that nothing comes of test nothing"


@peers.needs("gguf")
def test_what_is_damaged_is_sound_before(tmp_path: Path) -> None:
    root = sound(tmp_path)

    for target in TARGETS:
        target.use(root)


def main(cases: int, first: int = 0) -> int:
    """Run so many cases, print what escapes and the figures, and give the number of failures."""
    outcomes: collections.Counter[str] = collections.Counter()
    failures = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = sound(Path(folder))
        for seed in range(first, first + cases):
            try:
                outcomes[run_case(root, seed)] += 1
            except AssertionError as error:
                failures += 1
                print(f"FAILED {error}", flush=True)
            if (seed - first) % 500 == 499:
                print(f"{seed - first + 1} cases, {time.monotonic() - start:.0f} s, {dict(outcomes)}", flush=True)
    print(f"{cases} cases, {failures} failures, {time.monotonic() - start:.0f} s, {dict(outcomes)}")
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]), *map(int, sys.argv[2:3]))))
