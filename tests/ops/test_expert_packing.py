"""Fused experts whose B may be packed in two ways: every verb that reads adapters asks, and one option answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import load_file, save_file

import loratools
from loratools.cli import verbs

# Every size differs from every other: experts, rank, inputs and outputs.
EXPERTS, RANK, WIDTH, INNER = 4, 3, 6, 5
LAYER = "model.layers.0.mlp.experts"
# As PEFT wraps them: the parameter that the module registers first is innermost.
KEYS = {"gate_up_proj": f"base_model.model.{LAYER}.base_layer.lora", "down_proj": f"base_model.model.{LAYER}.lora"}
SIZES = {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
UNSLOTH = {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}


def factors_of(parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A: (experts, rank, in), B: (experts, out, rank)."""
    generator = torch.Generator().manual_seed(len(parameter))
    out, into = SIZES[parameter]
    a = torch.randn(EXPERTS, RANK, into, generator=generator, dtype=torch.float64)
    return a, torch.randn(EXPERTS, out, RANK, generator=generator, dtype=torch.float64)


def stored(path: Path, packing: str, *, auto_mapping: dict[str, Any] | None = None) -> Path:
    tensors = {}
    for parameter, key in KEYS.items():
        a, b = factors_of(parameter)
        # (out, rank, experts) with PEFT, (out, experts, rank) with the older Unsloth.
        columns = b.permute(1, 2, 0) if packing == "peft" else b.permute(1, 0, 2)
        tensors[f"{key}_A.weight"] = a.flatten(0, 1).contiguous()
        tensors[f"{key}_B.weight"] = columns.flatten(1).contiguous()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "peft_version": "0.21.0",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [],
        "target_parameters": [f"mlp.experts.{name}" for name in KEYS],
        "auto_mapping": auto_mapping,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def base_of(path: Path) -> Path:
    path.mkdir()
    weights = {f"{LAYER}.{name}": torch.zeros(EXPERTS, *size, dtype=torch.float64) for name, size in SIZES.items()}
    save_file(weights, path / "model.safetensors")
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes}))
    return path


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(verbs, [str(a) for a in arguments])


def arguments_of(verb: str, base: Path, adapter: Path, out: Path) -> list[str | Path]:
    found: dict[str, list[str | Path]] = {
        "merge": [base, adapter, "-o", out],
        "combine": [adapter, "-o", out],
        "resize": [adapter, "-o", out, "--rank", "2"],
        "convert": [adapter, "-o", out, "--to", "peft"],
        "compare": [adapter, adapter],
        "spectrum": [adapter],
    }
    return found[verb]


@pytest.mark.parametrize("verb", ["merge", "combine", "resize", "convert", "compare", "spectrum"])
def test_a_packing_that_the_files_leave_open_is_a_question_that_the_option_answers(tmp_path: Path, verb: str) -> None:
    base, adapter = base_of(tmp_path / "base"), stored(tmp_path / "adapter", "expert-major", auto_mapping=UNSLOTH)
    arguments = arguments_of(verb, base, adapter, tmp_path / "out")

    asked = run(verb, *arguments)
    assert (asked.exit_code, (tmp_path / "out").exists()) == (3, False)
    assert "--expert-packing expert-major" in asked.stderr
    assert f"{LAYER}.down_proj" in asked.stderr

    for packing in ("peft", "expert-major"):
        answered = run(verb, *arguments_of(verb, base, adapter, tmp_path / packing), "--expert-packing", packing)
        assert answered.exit_code == 0, answered.stderr


def test_inspect_warns_of_a_packing_that_is_open_and_of_no_other(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "adapter", "expert-major", auto_mapping=UNSLOTH)
    warnings = loratools.inspect(adapter).sources[0].to_dict()["warnings"]
    assert isinstance(warnings, list)
    assert ["--expert-packing" in warning for warning in warnings] == [True]
    assert loratools.inspect(adapter, expert_packing="peft").sources[0].to_dict()["warnings"] == []
    assert loratools.inspect(stored(tmp_path / "plain", "peft")).sources[0].to_dict()["warnings"] == []


def test_each_packing_merges_to_the_product_of_each_expert(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    for packing in ("peft", "expert-major"):
        adapter = stored(tmp_path / f"adapter-{packing}", packing, auto_mapping=UNSLOTH)
        loratools.merge(base, adapter, tmp_path / packing, expert_packing=packing)
        merged = load_file(tmp_path / packing / "model.safetensors")
        for parameter in KEYS:
            a, b = factors_of(parameter)
            torch.testing.assert_close(merged[f"{LAYER}.{parameter}"], 2.0 * b @ a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_what_is_written_is_packed_as_peft_has_it_and_asks_no_more(tmp_path: Path, verb: str) -> None:
    adapter, out = stored(tmp_path / "adapter", "expert-major", auto_mapping=UNSLOTH), tmp_path / "out"
    rank: Sequence[str] = ("--rank", str(RANK)) if verb == "resize" else ()
    base = tmp_path / "unused"
    arguments = [a for a in arguments_of(verb, base, adapter, out) if a not in ("--rank", "2")]
    assert run(verb, *arguments, *rank, "--expert-packing", "expert-major").exit_code == 0

    config = json.loads((out / "adapter_config.json").read_text())
    assert "unsloth_fixed" not in (config["auto_mapping"] or {})
    assert config["auto_mapping"]["base_model_class"] == "Qwen3MoeForCausalLM"
    tensors = load_file(out / "adapter_model.safetensors")
    for parameter, key in KEYS.items():
        a, b = factors_of(parameter)
        stored_a, stored_b = tensors[f"{key}_A.weight"].double(), tensors[f"{key}_B.weight"].double()
        rank_out = stored_a.shape[0] // EXPERTS
        # PEFT's own reading (peft.tuners.lora.layer.ParamWrapper): A is (experts, rank, in), B is (out, rank, experts).
        product = torch.einsum(
            "ore,eri->eoi",
            stored_b.reshape(-1, rank_out, EXPERTS),
            stored_a.reshape(EXPERTS, rank_out, -1),
        )
        scale = config["alpha_pattern"].get(f"{LAYER}.{parameter}", config["lora_alpha"]) / rank_out
        torch.testing.assert_close(scale * product, 2.0 * b @ a, rtol=1e-6, atol=1e-6)


def test_the_option_is_for_the_adapters_that_leave_it_open(tmp_path: Path) -> None:
    """Two adapters that do the same, one of which has the mark: only that one is read as the option says."""
    plain = stored(tmp_path / "plain", "peft")
    marked = stored(tmp_path / "marked", "expert-major", auto_mapping=UNSLOTH)

    report = loratools.compare(plain, marked, expert_packing="expert-major")

    assert report.cosine == pytest.approx(1.0, abs=1e-12)


def test_rank_1_and_a_single_expert_leave_nothing_open(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "adapter", "peft", auto_mapping=UNSLOTH)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 1}))
    loaded = loratools.load(adapter)
    assert loaded.undecided_experts == ()
    assert loaded.updates[f"{LAYER}.down_proj"].shape[0] == EXPERTS * RANK


def test_the_packing_is_given_to_load_and_kept(tmp_path: Path) -> None:
    adapter = loratools.load(stored(tmp_path / "adapter", "expert-major", auto_mapping=UNSLOTH))
    assert adapter.undecided_experts == (f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj")
    with pytest.raises(loratools.UndecidedError, match="--expert-packing"):
        adapter.delta(f"{LAYER}.down_proj")

    told = loratools.load(adapter.path or "", expert_packing="expert-major")

    a, b = factors_of("down_proj")
    np.testing.assert_allclose(told.delta(f"{LAYER}.down_proj", dtype="float64"), (2.0 * b @ a).numpy(), rtol=1e-12)


def test_a_packing_where_nothing_is_packed_is_wrong_usage(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {
            "base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(RANK, WIDTH),
            "base_model.model.layers.0.q_proj.lora_B.weight": torch.ones(INNER, RANK),
        },
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(loratools.UsageError, match="has no fused experts"):
        loratools.spectrum(adapter, expert_packing="peft")
