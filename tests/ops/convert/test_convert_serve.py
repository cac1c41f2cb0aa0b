"""What servers load: one rank, one plain alpha, nothing else, and the same deltas."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import tiny_models
import torch
from cli_runner import CliRunner
from safetensors.torch import load_file

from loratools import formats
from loratools.checks.common.servers import SERVERS
from loratools.cli import verbs
from loratools.errors import UnsupportedError, UsageError
from loratools.ops.convert.verb import convert

LAST = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("server", sorted(SERVERS))
@pytest.mark.parametrize("rslora", [False, True])
def test_every_scale_is_that_of_the_config(server: str, rslora: bool, tmp_path: Path) -> None:
    source = factories.adapter_folder(
        tmp_path / "in", ranks={LAST: 2}, alpha=5, config={"use_rslora": rslora, "alpha_pattern": {"q_proj": 3}}
    )

    report = convert(source, tmp_path / "out", format="peft", serve=server)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert (config["r"], config["bias"], config["modules_to_save"]) == (4, "none", None)
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {4}
    for name, update in formats.load(source).updates.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        factors = update.factors()
        assert factors is not None
        torch.testing.assert_close(
            config["lora_alpha"] / config["r"] * b @ a, factors.b @ factors.a, rtol=1e-5, atol=1e-6
        )
    assert report.max_relative_error is not None
    assert report.max_relative_error < 2.0**-22


def test_peft_loads_it_to_the_same_products(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    modules = factories.layered(2, {"self_attn.q_proj": (12, 12), "self_attn.v_proj": (4, 12)})
    source = factories.adapter_folder(tmp_path / "in", modules=modules, ranks={LAST: 2}, config={"use_rslora": True})
    convert(source, tmp_path / "out", format="peft", serve="vllm")
    tokens = torch.tensor([[3, 1, 22]])

    logits = []
    for folder in (source, tmp_path / "out"):
        base = tiny_models.llama(seed=1, vocabulary=23, width=12, inner=20, heads=3, key_heads=1)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(base, folder)(tokens).logits)

    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_what_a_server_does_not_load_is_refused_by_name(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", extra={"score.weight": torch.ones(3, 6)})
    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="peft", serve="sglang")
    assert raised.value.details == ("score.weight: sglang loads factors and no whole weights",)
    with pytest.raises(UsageError, match="no server named 'vlm'"):
        convert(source, tmp_path / "out", format="peft", serve="vlm")
    with pytest.raises(UsageError, match="--serve needs --to peft"):
        convert(source, tmp_path / "out", format="mlx", serve="vllm", allow_partial=True)

    arguments = [
        "convert",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--to",
        "peft",
        "--serve",
        "vllm",
        "--allow-partial",
    ]
    done = CliRunner().invoke(verbs, arguments)

    assert done.exit_code == 0
    assert "left out: score.weight (vllm loads factors and no whole weights)" in done.stderr
    assert not formats.load(tmp_path / "out").replacements


def test_a_rank_beyond_the_usual_is_told_with_its_option(tmp_path: Path) -> None:
    modules = {"model.layers.0.self_attn.q_proj": (40, 30)}
    source = factories.adapter_folder(tmp_path / "in", modules=modules, rank=24)

    report = convert(source, tmp_path / "out", format="peft", serve="vllm")

    assert report.warnings == ("vllm takes rank 16 by default: --max-lora-rank 24",)
