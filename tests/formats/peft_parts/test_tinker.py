"""Adapters of Tinker: a head called unembed_tokens, the parts of in_proj_qkv, experts that share a factor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools

# Every size differs; the scale is 32 / 4, Tinker's own.
EXPERTS, RANK, WIDTH, INNER, TOKENS = 5, 4, 6, 7, 11
SCALE = 8.0
LAYER = "base_model.model.model.layers.0."


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pair(module: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": random(RANK, into), f"{module}.lora_B.weight": random(out, RANK)}


def adapter_of(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base_of(folder: Path, weights: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(tmp_path: Path, base: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    loratools.merge(base, adapter_of(tmp_path / "adapter", tensors), tmp_path / "merged")
    return load_file(tmp_path / "merged" / "model.safetensors")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_unembed_tokens_is_the_head_and_unties_it(tmp_path: Path, tied: bool) -> None:
    weights = {"model.embed_tokens.weight": random(TOKENS, WIDTH), "model.norm.weight": random(WIDTH)}
    if not tied:
        weights["lm_head.weight"] = random(TOKENS, WIDTH)
    base = base_of(tmp_path / "base", weights, model_type="qwen3", tie_word_embeddings=tied)
    tensors = pair("base_model.model.model.unembed_tokens", TOKENS, WIDTH)

    after = merged(tmp_path, base, tensors)

    a, b = (tensors[f"base_model.model.model.unembed_tokens.lora_{part}.weight"] for part in "AB")
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    close(after["lm_head.weight"], head + SCALE * b @ a)
    assert torch.equal(after["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("parts", ["qkv", "k", "v", "qv"])
def test_parts_of_in_proj_qkv_are_its_rows_in_turn(tmp_path: Path, parts: str) -> None:
    rows = {"q": 3, "k": 3, "v": 10}
    name = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight"
    # Values have as many rows as their gate, which is how the parts are told where one of them is not trained.
    weights = {name: random(16, WIDTH), name.replace("qkv", "z"): random(10, WIDTH)}
    base = base_of(tmp_path / "base", weights, model_type="qwen3_5")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= pair(f"{LAYER}linear_attn.in_proj_{part}", rows[part], WIDTH)

    after = merged(tmp_path, base, tensors)

    delta = torch.zeros(16, WIDTH, dtype=torch.float64)
    for part, start in (("q", 0), ("k", 3), ("v", 6)):
        if part in parts:
            a, b = (tensors[f"{LAYER}linear_attn.in_proj_{part}.lora_{side}.weight"] for side in "AB")
            delta[start : start + rows[part]] = SCALE * b @ a
    close(after[name], weights[name] + delta)


def test_the_rows_of_all_three_parts_tell_where_the_base_does_not(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.linear_attn.in_proj_qkv.weight"
    base = base_of(tmp_path / "base", {name: torch.zeros(16, WIDTH, dtype=torch.float64)}, model_type="qwen3_5")
    tensors: dict[str, Tensor] = {}
    for part, out in (("q", 3), ("k", 3), ("v", 10)):
        tensors |= pair(f"{LAYER}linear_attn.in_proj_{part}", out, WIDTH)

    after = merged(tmp_path, base, tensors)

    parts = [[tensors[f"{LAYER}linear_attn.in_proj_{p}.lora_{side}.weight"] for side in "BA"] for p in "qkv"]
    close(after[name], torch.cat([SCALE * b @ a for b, a in parts]))


def stacks(shared: bool) -> dict[str, Tensor]:
    """Factors of all experts; where they share one, the input's of gate and up, and the output's of down."""
    one = 1 if shared else EXPERTS
    sizes = {"w1": (one, WIDTH, EXPERTS, INNER), "w3": (one, WIDTH, EXPERTS, INNER), "w2": (EXPERTS, INNER, one, WIDTH)}
    tensors = {}
    for name, (of_a, into, of_b, out) in sizes.items():
        tensors[f"{LAYER}mlp.experts.{name}.lora_A.weight"] = random(of_a, RANK, into)
        tensors[f"{LAYER}mlp.experts.{name}.lora_B.weight"] = random(of_b, out, RANK)
    return tensors


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_have_their_own_factors_or_the_one_that_all_share(tmp_path: Path, shared: bool, fused: bool) -> None:
    parent, tensors = "model.layers.0.mlp.experts", stacks(shared)
    sizes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    apart = {f"{parent}.{e}.{role}.weight": random(*size) for e in range(EXPERTS) for role, size in sizes.items()}
    weights = dict(apart)
    if fused:
        gates, ups, downs = (
            torch.stack([apart[f"{parent}.{e}.{role}.weight"] for e in range(EXPERTS)]) for role in sizes
        )
        weights = {f"{parent}.gate_up_proj": torch.cat([gates, ups], dim=1), f"{parent}.down_proj": downs}
    base = base_of(tmp_path / "base", weights, model_type="qwen3_moe", num_experts=EXPERTS, hidden_size=WIDTH)

    after = merged(tmp_path, base, tensors)

    for e in range(EXPERTS):
        expected = {}
        for name, role in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            a, b = (tensors[f"{LAYER}mlp.experts.{name}.lora_{part}.weight"] for part in "AB")
            delta = SCALE * b[e % b.shape[0]] @ a[e % a.shape[0]]
            expected[role] = apart[f"{parent}.{e}.{role}.weight"] + delta
        if fused:
            close(after[f"{parent}.gate_up_proj"][e], torch.cat([expected["gate_proj"], expected["up_proj"]]))
            close(after[f"{parent}.down_proj"][e], expected["down_proj"])
        else:
            for role, weight in expected.items():
                close(after[f"{parent}.{e}.{role}.weight"], weight)


@pytest.mark.parametrize(
    ("part", "shape", "word"),
    [
        ("lora_B", (EXPERTS - 1, INNER, RANK), "different numbers of experts"),
        ("lora_B", (EXPERTS, INNER, RANK - 1), "different ranks"),
    ],
)
def test_experts_that_do_not_fit_are_faults_of_what_does_not_fit(
    tmp_path: Path, part: str, shape: tuple[int, ...], word: str
) -> None:
    tensors = stacks(shared=False) | {f"{LAYER}mlp.experts.w1.{part}.weight": random(*shape)}

    with pytest.raises(loratools.FormatError) as raised:
        loratools.load(adapter_of(tmp_path / "adapter", tensors))

    assert [word in line for line in raised.value.details] == [True]


def test_a_convolution_called_as_an_expert_is_no_stack_of_experts(tmp_path: Path) -> None:
    """Factors of a convolution have three axes as well: only the names of experts make them factors of all experts."""
    tensors = {
        f"{LAYER}conv.w1.lora_A.weight": random(RANK, WIDTH, 3),
        f"{LAYER}conv.w1.lora_B.weight": random(INNER, RANK, 1),
    }

    adapter = loratools.load(adapter_of(tmp_path / "adapter", tensors))

    assert adapter.updates["model.layers.0.conv.w1"].shape == (INNER, WIDTH, 3)
