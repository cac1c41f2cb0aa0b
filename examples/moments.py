"""Gather second moments of the inputs of a model's linear layers, for `loratools merge --rounding calibrated`.

    python examples/moments.py MODEL TEXTS.txt -o moments.safetensors          # a text per line; 100 lines will do

Each linear layer gets a forward hook that adds x x' for every token's input x, in float32 on the CPU: a square matrix
of the layer's width. Needs transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


def gather_moments(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of x x' over the inputs x of each linear layer, by the layer's name, and how many inputs there were."""
    sums: dict[str, Tensor] = {}

    def hook(name: str):
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().cpu()
            sums[name] = sums.get(name, 0) + x.T @ x
            sums[f"{name}.count"] = sums.get(f"{name}.count", torch.zeros(())) + len(x)

        return add

    # Conv1D is the linear layer of GPT-2.
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: tensor.contiguous() for name, tensor in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    except ValueError:
        model = AutoModel.from_pretrained(arguments.model)
    lines = [line for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    encoded = [tokenizer(line, return_tensors="pt", truncation=True, max_length=arguments.max_length) for line in lines]
    save_file(gather_moments(model.eval(), [dict(e) for e in encoded]), arguments.out)


if __name__ == "__main__":
    main()
