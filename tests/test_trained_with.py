"""Every command in the tables of docs/trained-with.md is run on a file of the program that its row names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools import formats
from loratools.cli import verbs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trained-with.md").read_text(encoding="utf-8")
BASE = ROOT / "fixtures" / "llama-tiny"
SCIENCE = ROOT / "fixtures" / "llama-tiny-science"
IMAGE_MODELS = PAGE.partition("## Image and video models")[2]
# Of llama-tiny: width 96, six heads and two key-value heads of 16, 248 in the middle of the MLP.
WIDTH, HEAD, HEADS, KEY_HEADS, MIDDLE = 96, 16, 6, 2, 248


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mlx(folder: Path) -> Path:
    loratools.convert(SCIENCE, folder / "a", format="mlx")
    return folder / "a"


def torchtune(folder: Path) -> Path:
    shapes = {"attn.q_proj": (HEADS * HEAD, WIDTH), "attn.k_proj": (KEY_HEADS * HEAD, WIDTH), "mlp.w1": (MIDDLE, WIDTH)}
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"layers.1.{name}.lora_a.weight"] = drawn(3, into)
        tensors[f"layers.1.{name}.lora_b.weight"] = drawn(out, 3)
    (folder / "a").mkdir()
    torch.save(tensors, folder / "a" / "adapter_model.pt")
    (folder / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    return folder / "a"


def megatron(folder: Path) -> Path:
    rows = {"self_attention.linear_qkv": (HEADS + 2 * KEY_HEADS) * HEAD, "mlp.linear_fc1": 2 * MIDDLE}
    tensors = {}
    for name, out in rows.items():
        tensors[f"model.decoder.layers.2.{name}.adapter.linear_in.weight"] = drawn(5, WIDTH)
        tensors[f"model.decoder.layers.2.{name}.adapter.linear_out.weight"] = drawn(out, 5)
    torch.save({"state_dict": tensors}, folder / "a.ckpt")
    return folder / "a.ckpt"


def tuned(folder: Path) -> Path:
    loratools.merge(BASE, [SCIENCE], folder / "a")
    return folder / "a"


def flux(folder: Path, prefix: str, joint: str, down: str, up: str, *, alpha: bool = False) -> Path:
    """One projection of every double block of Flux, whose number and width tell the family.

    Args:
        folder: Where to write the file.
        prefix: What stands before the name of a module.
        joint: What joins the parts of the name: a dot or an underscore.
        down: What follows the name for A, with its dot.
        up: What follows the name for B, with its dot.
        alpha: Whether an alpha stands beside each.
    """
    tensors = {}
    for block in range(19):
        name = prefix + joint.join(["transformer_blocks", str(block), "attn", "to_out", "0"])
        tensors[name + down], tensors[name + up] = drawn(2, 3072), drawn(3072, 2)
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def authors(folder: Path, prefix: str, joint: str, down: str, up: str, *, alpha: bool = False) -> Path:
    """The same under the names of Flux's authors."""
    tensors = {}
    for block in range(19):
        name = prefix + joint.join(["double_blocks", str(block), "img_attn", "proj"])
        tensors[name + down], tensors[name + up] = drawn(2, 3072), drawn(3072, 2)
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def peft_of_diffusers(folder: Path) -> Path:
    source = flux(folder, "transformer.", ".", ".lora_A.weight", ".lora_B.weight")
    loratools.convert(source, folder / "a", format="peft")
    return folder / "a"


KOHYA = (".lora_down.weight", ".lora_up.weight")
DIFFUSERS = (".lora_A.weight", ".lora_B.weight")
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth": lambda _: SCIENCE,
    "mlx-lm": mlx,
    "torchtune": torchtune,
    "Megatron, NeMo": megatron,
    "a full fine-tune": tuned,
    "kohya sd-scripts, musubi-tuner": lambda folder: authors(folder, "lora_unet_", "_", *KOHYA, alpha=True),
    "OneTrainer": lambda folder: flux(folder, "lora_transformer_", "_", *KOHYA, alpha=True),
    "ai-toolkit, DiffSynth-Studio": lambda folder: authors(folder, "diffusion_model.", ".", *DIFFUSERS),
    "diffusers' training scripts": lambda folder: flux(folder, "transformer.", ".", *DIFFUSERS),
    "PEFT on a diffusers model": peft_of_diffusers,
    "LyCORIS, SimpleTuner": lambda folder: flux(folder, "lycoris_", "_", *KOHYA, alpha=True),
}


def cells() -> list[tuple[str, str]]:
    """The program of the row and the command of every cell of the tables, each once for a row."""
    commands = []
    for row in re.findall(r"^\| (?!trained with)([^|\n]+) \|(.*)\|$", PAGE, re.MULTILINE):
        commands += [(row[0], command) for command in re.findall(r"`loratools ([^`]+)`", row[1])]
    return list(dict.fromkeys(commands))


def test_there_is_a_sample_for_every_row_and_a_row_for_every_sample() -> None:
    assert {row for row, _ in cells()} == set(SAMPLES)
    assert len(cells()) > 25


@pytest.mark.parametrize(("row", "command"), cells())
def test_commands_of_the_matrix_write_what_the_program_of_the_column_loads(
    row: str, command: str, tmp_path: Path
) -> None:
    source = SAMPLES[row](tmp_path)
    names = {"a": source, "a.safetensors": source, "tuned": source, "base": "flux" if row in IMAGE_MODELS else BASE}
    words = shlex.split(command)
    out = words[words.index("-o") + 1]
    words = [str(names[word]) if word in names else str(tmp_path / out) if word == out else word for word in words]

    result = CliRunner().invoke(verbs, words)

    assert result.exit_code == 0, result.stderr
    written = words[words.index("--to") + 1] if "--to" in words else "peft"
    assert written in formats.detect(tmp_path / out)
    assert len(loratools.load(tmp_path / out, base=BASE if source.name == "a.ckpt" else None).updates) > 1
