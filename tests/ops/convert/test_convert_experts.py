"""Fused experts taken apart: each expert's dense delta by PEFT's formula, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import formats
from loratools.errors import UnsupportedError
from loratools.ops.convert.verb import convert

EXPERTS, RANK, HIDDEN, INNER = 3, 2, 10, 7
BASE = formats.Base({}, {"model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_experts": EXPERTS})


def fused(folder: Path, sizes: dict[str, tuple[int, int]]) -> tuple[Path, dict[str, Tensor]]:
    """A PEFT folder with target_parameters, and `scale * B[:, :, e] A[e]` of every expert of every parameter."""
    tensors, deltas = {}, {}
    generator = torch.Generator().manual_seed(0)
    # The parameter that is registered first is wrapped innermost.
    for infix, (name, (out, into)) in zip((".base_layer", ""), sizes.items(), strict=True):
        a = torch.randn(EXPERTS * RANK, into, generator=generator, dtype=torch.float64)
        b = torch.randn(out, RANK * EXPERTS, generator=generator, dtype=torch.float64)
        key = f"base_model.model.model.layers.0.mlp.experts{infix}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        deltas[name] = 3 / RANK * torch.einsum("ore,eri->eoi", b.view(out, RANK, EXPERTS), a.view(EXPERTS, RANK, into))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": [], "peft_version": "0.19.1",
        "target_parameters": [f"mlp.experts.{name}" for name in sizes],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, deltas


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_every_expert_gets_its_own_part(to: str, turned: bool, tmp_path: Path) -> None:
    sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    source, deltas = fused(tmp_path / "in", {n: s[::-1] if turned else s for n, s in sizes.items()})
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")

    report = convert(source, out, format=to, base=BASE, dtype="float32")

    found = formats.load(out, base=BASE)
    assert len(found.updates) == 3 * EXPERTS
    for e in range(EXPERTS):
        up, down = (deltas[n][e].T if turned else deltas[n][e] for n in sizes)
        wanted = {"gate_proj": up[:INNER], "up_proj": up[INNER:], "down_proj": down}
        for role, delta in wanted.items():
            factors = found.updates[f"model.layers.0.mlp.experts.{e}.{role}"].factors()
            assert factors is not None
            torch.testing.assert_close(factors.b @ factors.a, delta, rtol=1e-5, atol=1e-5)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 2.0**-22


def test_without_the_sizes_of_the_base_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    source, _ = fused(tmp_path / "in", {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)})

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="mlx")

    assert raised.value.details == (
        "model.layers.0.mlp.experts.down_proj: mlx-lm has no lora-experts",
        "model.layers.0.mlp.experts.gate_up_proj: mlx-lm has no lora-experts",
    )


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_get_one_lora_for_each_expert(server: str, tmp_path: Path) -> None:
    sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    source, deltas = fused(tmp_path / "in", sizes)

    convert(source, tmp_path / "out", format="peft", serve=server, base=BASE)

    # As the server does: keys and one scale, alpha / r, for all.
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert not config.get("target_parameters")
    assert len(tensors) == 2 * 3 * EXPERTS
    scale = config["lora_alpha"] / config["r"]
    for e in range(EXPERTS):
        up, down = (deltas[name][e] for name in sizes)
        for role, delta in {"gate_proj": up[:INNER], "up_proj": up[INNER:], "down_proj": down}.items():
            key = f"base_model.model.model.layers.0.mlp.experts.{e}.{role}"
            product = scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(product, delta, rtol=1e-12, atol=1e-12)


def test_a_server_of_single_experts_asks_for_the_base(tmp_path: Path) -> None:
    source, _ = fused(tmp_path / "in", {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)})

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="peft", serve="vllm")
    assert ["--base BASE" in line for line in raised.value.details] == [True, True]

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="peft", serve="tgi", base=BASE)
    assert raised.value.details == (
        "model.layers.0.mlp.experts.down_proj: tgi loads no lora-experts",
        "model.layers.0.mlp.experts.gate_up_proj: tgi loads no lora-experts",
    )


def test_without_a_server_peft_keeps_its_fused_experts(tmp_path: Path) -> None:
    source, _ = fused(tmp_path / "in", {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)})

    convert(source, tmp_path / "out", format="peft", base=BASE)

    assert sorted(formats.load(tmp_path / "out").updates) == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]


@pytest.mark.parametrize(("version", "turned"), [("0.21.0", False), ("0.18.1", True), ("0.19.0", True)])
def test_square_experts_are_told_by_the_peft_that_trained_them(version: str, turned: bool, tmp_path: Path) -> None:
    """As wide as the model: PEFT up to 0.18 took (in, out), 0.19.0 the opposite of the layer, later ones the layer."""
    source, deltas = fused(tmp_path / "in", {"gate_up_proj": (HIDDEN, HIDDEN), "down_proj": (HIDDEN, HIDDEN)})
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))

    convert(source, tmp_path / "out", format="peft", serve="vllm", base=BASE)

    found = formats.load(tmp_path / "out")
    for e in range(EXPERTS):
        down = found.updates[f"model.layers.0.mlp.experts.{e}.down_proj"].factors()
        gate = found.updates[f"model.layers.0.mlp.experts.{e}.gate_proj"].factors()
        assert down is not None
        assert gate is not None
        wanted = {name: delta[e].T if turned else delta[e] for name, delta in deltas.items()}
        torch.testing.assert_close(down.b @ down.a, wanted["down_proj"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gate.b @ gate.a, wanted["gate_up_proj"][: HIDDEN // 2], rtol=1e-12, atol=1e-12)


def test_square_experts_of_nobody_known_need_a_word(tmp_path: Path) -> None:
    source, deltas = fused(tmp_path / "in", {"gate_up_proj": (HIDDEN, HIDDEN), "down_proj": (HIDDEN, HIDDEN)})
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "unknown"}))

    with pytest.raises(UnsupportedError):
        convert(source, tmp_path / "out", format="peft", serve="vllm", base=BASE)
    convert(source, tmp_path / "out", format="peft", serve="vllm", base=BASE, expert_orientation="in-out")

    down = formats.load(tmp_path / "out").updates["model.layers.0.mlp.experts.1.down_proj"].factors()
    assert down is not None
    torch.testing.assert_close(down.b @ down.a, deltas["down_proj"][1].T, rtol=1e-12, atol=1e-12)


GPT_OSS = formats.Base({}, {"model_type": "gpt_oss", "hidden_size": HIDDEN, "num_local_experts": EXPERTS})


@pytest.mark.parametrize(("version", "transposed"), [("0.21.0", False), ("0.18.1", False), ("0.19.0", True)])
@pytest.mark.parametrize("inner", [INNER, HIDDEN])
def test_gguf_has_gate_and_up_of_gpt_oss_apart(inner: int, version: str, transposed: bool, tmp_path: Path) -> None:
    """Their outputs stand in turn there; square ones, as in the published models, are told by the PEFT of training."""
    sizes = {"gate_up_proj": (2 * inner, HIDDEN), "down_proj": (HIDDEN, inner)}
    source, deltas = fused(tmp_path / "in", {n: s[::-1] if transposed else s for n, s in sizes.items()})
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))

    convert(source, tmp_path / "out.gguf", format="gguf", base=GPT_OSS, dtype="float32")

    found = formats.load(tmp_path / "out.gguf", base=GPT_OSS)
    assert len(found.updates) == 3 * EXPERTS
    for e in range(EXPERTS):
        both, down = (deltas[n][e].T if transposed else deltas[n][e] for n in sizes)
        for role, delta in {"gate_proj": both[0::2], "up_proj": both[1::2], "down_proj": down}.items():
            factors = found.updates[f"model.layers.0.mlp.experts.{e}.{role}"].factors()
            assert factors is not None
            torch.testing.assert_close(factors.b @ factors.a, delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_vl_moe"])
def test_vllm_gets_fused_experts_of_models_that_it_loads_them_of(model_type: str, tmp_path: Path) -> None:
    """As its `_stack_moe_lora_weights` takes them: A (experts, rank, in), B (out, rank, experts), alpha / r for all."""
    sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    source, deltas = fused(tmp_path / "in", sizes)
    base = formats.Base({}, {**GPT_OSS.config, "model_type": model_type})

    convert(source, tmp_path / "out", format="peft", serve="vllm", base=base)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    keys = {name: f"base_model.model.model.layers.0.mlp.experts{infix}.lora" for name, infix in
            zip(sizes, (".base_layer", ""), strict=True)}  # fmt: skip
    assert len(tensors) == 4
    for name, key in keys.items():
        a = tensors[f"{key}_A.weight"].reshape(EXPERTS, -1, sizes[name][1])
        b = tensors[f"{key}_B.weight"].reshape(sizes[name][0], -1, EXPERTS).permute(2, 0, 1)
        torch.testing.assert_close(scale * b @ a, deltas[name], rtol=1e-12, atol=1e-12)


def test_vllm_needs_both_parameters_of_fused_experts(tmp_path: Path) -> None:
    source, _ = fused(tmp_path / "in", {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)})

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="peft", serve="vllm", base=GPT_OSS, exclude="*.gate_up_proj")

    assert raised.value.details == (
        "model.layers.0.mlp.experts.down_proj: vllm loads fused experts where both parameters have factors, and "
        "model.layers.0.mlp.experts.gate_up_proj has none",
    )


def test_experts_one_by_one_become_the_parameter_that_peft_loads(tmp_path: Path) -> None:
    """`(scale B A)^T` of each, and zeros where an expert has none; a version of PEFT that took the axes otherwise is
    left out of the config."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    deltas: dict[tuple[str, int], Tensor] = {}
    for e in (0, 2):
        for name, (out, into) in {"gate_up_proj": (2 * HIDDEN, HIDDEN), "down_proj": (HIDDEN, HIDDEN)}.items():
            a = torch.randn(RANK, into, generator=generator, dtype=torch.float64)
            b = torch.randn(out, RANK, generator=generator, dtype=torch.float64)
            key = f"base_model.model.model.layers.0.mlp.experts.{name}s.{e}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
            deltas[name, e] = 3 / RANK * b @ a
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": ["0", "2"], "peft_version": "0.19.0"}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))

    convert(tmp_path / "in", tmp_path / "out", format="peft", base=GPT_OSS)

    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_parameters"] == [
        "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj",
    ]  # fmt: skip
    assert "peft_version" not in written
    found = formats.load(tmp_path / "out", base=GPT_OSS)
    for name in ("gate_up_proj", "down_proj"):
        experts = found.updates[f"model.layers.0.mlp.experts.{name}"].as_experts()
        assert experts is not None
        for e in range(EXPERTS):
            factors = experts.expert(e).factors()
            assert factors is not None
            expected = deltas.get((name, e), torch.zeros(experts.shape[1:], dtype=torch.float64))
            torch.testing.assert_close(factors.b @ factors.a, expected, rtol=1e-12, atol=1e-12)
