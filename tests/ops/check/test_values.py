"""check reads each value once, of files that stay what they are, and says what it could not look at."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import click.testing
import factories
import pytest
import torch
from check_samples import sound
from safetensors.torch import load_file

import loratools
from loratools.checks.common.subject import Subject
from loratools.cli import verbs
from loratools.ops.check import measuring
from loratools.storage import files, system

MODULE = "model.layers.0.self_attn.q_proj"


class CountedReads:
    """The os module, which counts the bytes that are read of each file."""

    def __init__(self) -> None:
        self.bytes_of: Counter[str] = Counter()

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name != "preadv":
            return real

        def preadv(fd: int, *args: object) -> int:
            count: int = real(fd, *args)
            self.bytes_of[Path(f"/proc/self/fd/{fd}").readlink().name] += count
            return count

        return preadv


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system which file a descriptor is of")
def test_values_are_read_once_for_all_rules_and_for_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {MODULE: (1024, 640), "model.layers.0.self_attn.v_proj": (512, 640)}
    folders = [
        factories.adapter_folder(tmp_path / name, modules=modules, rank=256, seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(modules))
    counted = CountedReads()
    files.close_inputs()
    monkeypatch.setattr(system, "os", counted)

    loratools.check(*folders, base=base, threads=1)

    monkeypatch.setattr(system, "os", os)
    # The values once, and twice the pieces by which a file is held to what it was (16 of 16 KiB), and the header.
    bytes_read = counted.bytes_of["adapter_model.safetensors"]
    assert size <= bytes_read <= size + 2 * (2 * 16 * (1 << 14) + (1 << 16))


def test_source_that_changes_meanwhile_is_a_finding_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, unchanged = sound(tmp_path / "changed"), sound(tmp_path / "unchanged", seed=1)
    weights = changed / "adapter_model.safetensors"
    measure = measuring.measured

    def rewriting(subject: Subject, **options: Any) -> object:
        result = measure(subject, **options)
        if subject.path == changed:
            data = weights.read_bytes()
            weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return result

    monkeypatch.setattr(measuring, "measured", rewriting)

    report = loratools.check(changed, unchanged, threads=1)

    assert [[finding.id for finding in source.findings] for source in report.sources] == [["container-not-read"], []]
    assert "changed while being read" in report.findings[0].message
    assert report.exit_code == 1


def lost_share(weight: torch.Tensor, delta: torch.Tensor) -> float:
    """What rounding to the dtype of the weight leaves, in float64."""
    stored = weight.double()
    moved = (stored + delta.double()).to(weight.dtype).double() - stored
    return float((moved * delta).sum() / delta.square().sum())


def small_adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Write an adapter whose changes are below the step of bfloat16; the delta of each module."""
    values = {name: (a, b * 1e-3) for name, (a, b) in factories.factors(modules).items()}
    factories.adapter_folder(folder, modules=modules, values=values)
    return {name: 2.0 * b.double() @ a.double() for name, (a, b) in values.items()}  # alpha 8, rank 4


def gain_lines(report: loratools.CheckReport) -> dict[str, str]:
    (finding,) = [finding for finding in report.findings if finding.id == "numerics-gain"]
    return dict(line.split(": ") for line in finding.evidence)


def test_gain_is_measured_in_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 stores a layer as (in, out)."""
    torch.manual_seed(4)
    name = "transformer.h.0.attn.c_attn"
    weight = torch.randn(10, 30).bfloat16()
    weights = {f"{name}.weight": weight, "transformer.wte.weight": torch.ones(13, 10).bfloat16()}
    base = factories.checkpoint_folder(
        tmp_path / "base", weights=weights, config={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    )
    delta = small_adapter(tmp_path / "adapter", {name: (30, 10)})[name]

    report = loratools.check(tmp_path / "adapter", base=base, select=["numerics"])

    assert gain_lines(report) == {name: f"{lost_share(weight.mT, delta):.1%}"}


def test_gain_is_measured_in_fused_weights(tmp_path: Path) -> None:
    """Phi-3 stores q, k and v as rows of one weight."""
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    weight = torch.randn(8 + 4 + 4, 6).bfloat16()
    base = factories.checkpoint_folder(
        tmp_path / "base",
        weights={fused: weight, "model.embed_tokens.weight": torch.ones(13, 6).bfloat16()},
        config={
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
        },
    )  # fmt: skip
    name = "model.layers.0.self_attn.qkv_proj"
    delta = small_adapter(tmp_path / "adapter", {name: (16, 6)})[name]

    report = loratools.check(tmp_path / "adapter", base=base, select=["numerics"])

    assert gain_lines(report) == {name: f"{lost_share(weight, delta):.1%}"}


def test_gain_is_measured_in_one_expert_of_a_stack(tmp_path: Path) -> None:
    """An adapter of one expert, of a base that stores all of them as one tensor (experts, out, in)."""
    shapes = {f"model.layers.0.mlp.experts.{i}.down_proj": (6, 10) for i in range(3)}
    stack = torch.randn(3, 6, 10).bfloat16()
    name = "model.layers.0.mlp.experts.1.down_proj"
    base = factories.checkpoint_folder(
        tmp_path / "base",
        weights={
            "model.layers.0.mlp.experts.down_proj": stack,
            "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 20, 6).bfloat16(),
            "model.embed_tokens.weight": torch.ones(13, 6).bfloat16(),
        },
        config={"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 3},
    )
    delta = small_adapter(tmp_path / "adapter", {name: shapes[name]})[name]

    report = loratools.check(tmp_path / "adapter", base=base, select=["numerics"])

    assert gain_lines(report) == {name: f"{lost_share(stack[1], delta):.1%}"}


def test_what_rounding_loses_of_updates_that_depend_on_their_weight_is_said_to_be_unknown(tmp_path: Path) -> None:
    folder = sound(tmp_path / "dora", modules={MODULE: (10, 6)})
    tensors = load_file(folder / "adapter_model.safetensors")
    factories.adapter_folder(
        tmp_path / "dora",
        modules={MODULE: (10, 6)},
        extra={f"{MODULE}.lora_magnitude_vector": torch.ones(10)},
        config={"use_dora": True},
    )
    assert tensors
    base = factories.checkpoint_folder(tmp_path / "base")

    report = loratools.check(tmp_path / "dora", base=base)

    (unknown,) = [each for each in report.sources[0].not_checked if each.id == "numerics-gain"]
    assert (unknown.id, unknown.names) == ("numerics-gain", (MODULE,))
    assert "depends on all of its weight" in unknown.why
    printed = click.testing.CliRunner().invoke(verbs, ["check", str(tmp_path / "dora"), "--base", str(base)])
    assert "not checked[numerics-gain] 1 module of 1 source" in printed.output


def test_adapters_that_cannot_be_compared_for_duplicates_are_named(tmp_path: Path) -> None:
    sound(tmp_path / "library" / "one")
    sound(tmp_path / "library" / "with-head", extra={"lm_head.weight": torch.ones(13, 6)})
    broken = factories.factors(seed=3)
    broken[MODULE][1][2, 1] = float("nan")
    factories.adapter_folder(tmp_path / "library" / "broken", values=broken)

    report = loratools.check(tmp_path / "library", threads=1)

    reasons = {
        Path(source.path).relative_to(tmp_path / "library").parts[0]: [
            (each.id, each.why, each.names) for each in source.not_checked
        ]
        for source in report.sources
    }
    assert reasons == {
        "broken": [("numerics-duplicate", "values are not finite", (MODULE,))],
        "one": [],
        "with-head": [("numerics-duplicate", "there are replaced weights", ())],
    }
    document = report.to_dict()
    assert isinstance(document["sources"], list)
    assert [len(source["not_checked"]) for source in document["sources"]] == [1, 0, 1]


def test_numbers_that_need_factors_are_said_to_be_unknown_where_an_update_has_none(tmp_path: Path) -> None:
    extra = {f"{MODULE}.lora_magnitude_vector": torch.ones(10)}
    folder = sound(tmp_path, modules={MODULE: (10, 6)}, extra=extra, config={"use_dora": True})

    report = loratools.check(folder, ignore=["config"])

    why = "their updates are not known as products of two factors"
    rules = ("lost-rows", "no-change", "noise-ranks", "outlier", "rank-deficient", "untrained")
    assert report.sources[0].not_checked == tuple(
        loratools.NotChecked(f"numerics-{rule}", why, (MODULE,)) for rule in rules
    )
    printed = click.testing.CliRunner().invoke(verbs, ["check", str(folder), "--ignore", "config"]).stdout
    ids = ", ".join(f"numerics-{rule}" for rule in rules)
    assert " ".join(printed.split()) == f"not checked[{ids}] 1 module of 1 source, as {why}"


def test_targets_that_are_a_text_for_peft_to_expand_are_said_to_be_not_looked_at(tmp_path: Path) -> None:
    folder = sound(tmp_path, config={"target_modules": ".*self_attn.(q|v)_proj"})

    (source,) = loratools.check(folder).sources

    assert source.findings == ()
    assert [each.id for each in source.not_checked] == ["config-targets", "config-targets-unused"]


def test_rules_that_are_not_asked_are_not_said_to_be_unanswered(tmp_path: Path) -> None:
    folder = sound(tmp_path, config={"target_modules": ".*self_attn.(q|v)_proj"})

    assert loratools.check(folder, ignore=["config"]).sources[0].not_checked == ()


def test_a_single_adapter_is_compared_with_none(tmp_path: Path) -> None:
    folder = sound(tmp_path, extra={"lm_head.weight": torch.ones(13, 6)})

    assert loratools.check(folder).sources[0].not_checked == ()
