"""What a person leaves out of an adapter is no reason to refuse it, and is named with its share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnreadTensorsError, UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
BLOCKS = 40


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A LoRA of Wan with a tensor of unknown meaning (`diff_s`) in each block."""
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, torch.Tensor] = {}
    for i in range(BLOCKS):
        name = f"diffusion_model.blocks.{i}"
        stored[f"{name}.self_attn.q.lora_down.weight"] = torch.randn(2, 48, generator=generator)
        stored[f"{name}.self_attn.q.lora_up.weight"] = torch.randn(48, 2, generator=generator)
        stored[f"{name}.diff_s"] = torch.randn(1, 6, 8, generator=generator)
    save_file(stored, tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


def test_tensors_that_are_not_read_are_refused_by_name_with_a_remedy(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadTensorsError, match=r"40 tensors of .* not read as comfy") as refused:
        loratools.convert(wan, tmp_path / "out.safetensors", format="comfy")
    assert refused.value.tensors[0] == "diffusion_model.blocks.0.diff_s"
    assert len(refused.value.tensors) == BLOCKS
    assert "--exclude" in (refused.value.hint or "")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("options", [{"exclude": "*.diff_s"}, {"allow_partial": True}])
def test_what_is_left_out_is_counted_and_its_share_is_told(
    wan: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    report = loratools.convert(wan, tmp_path / "out.safetensors", format="comfy", **options)  # type: ignore[arg-type]
    # 2 * 2 * 48 values of factors in each block, and 48 of the modulation.
    share = 100 * 48 / (192 + 48)
    assert any("40 tensors left out, " in w and f"{share:.2f}%" in w for w in report.warnings)
    assert [d.name for d in report.dropped if d.what == "tensor"] == sorted(
        f"diffusion_model.blocks.{i}.diff_s" for i in range(BLOCKS)
    )
    written = load_file(tmp_path / "out.safetensors")
    source = load_file(wan)
    a, b = (f"diffusion_model.blocks.7.self_attn.q.lora_{part}.weight" for part in "AB")
    torch.testing.assert_close(written[a], source["diffusion_model.blocks.7.self_attn.q.lora_down.weight"])
    torch.testing.assert_close(written[b], source["diffusion_model.blocks.7.self_attn.q.lora_up.weight"])
    assert not any("diff_s" in key for key in written)


def test_include_leaves_out_what_is_not_read_as_well(wan: Path, tmp_path: Path) -> None:
    report = loratools.convert(wan, tmp_path / "out.safetensors", format="comfy", include="*.self_attn.q")
    assert len(report.modules) == BLOCKS


def test_every_verb_that_reads_adapters_leaves_out_what_is_excluded(wan: Path, tmp_path: Path) -> None:
    globs = ["*.diff_s"]
    assert loratools.inspect(wan, exclude=globs).to_dict()["sources"][0]["other_tensors"] == sorted(  # type: ignore[index]
        f"diffusion_model.blocks.{i}.diff_s" for i in range(BLOCKS)
    )
    assert loratools.spectrum(wan, exclude=globs).modules
    assert loratools.compare(wan, wan, exclude=globs).cosine == pytest.approx(1)
    assert len(loratools.resize(wan, tmp_path / "small.safetensors", rank=1, exclude=globs).modules) == BLOCKS
    assert len(loratools.combine([wan, wan], tmp_path / "sum.safetensors", exclude=globs).modules) == BLOCKS


def test_a_merge_leaves_out_what_is_not_read_where_that_is_allowed(wan: Path, tmp_path: Path) -> None:
    weights = {f"blocks.{i}.self_attn.q.weight": torch.zeros(48, 48) for i in range(BLOCKS)}
    save_file({f"model.diffusion_model.{name}": w for name, w in weights.items()}, tmp_path / "base.safetensors")
    report = loratools.merge(tmp_path / "base.safetensors", wan, tmp_path / "merged", allow_partial=True)
    assert report.merged_weights == BLOCKS
    assert any("40 tensors left out, because they cannot be read" in w for w in report.warnings)


def test_a_damaged_module_that_is_excluded_is_no_reason_to_refuse_the_others(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.{}.self_attn.q"
    stored = {f"{name.format(i)}.lora_down.weight": torch.ones(2, 48) for i in range(BLOCKS)}
    stored |= {f"{name.format(i)}.lora_up.weight": torch.ones(48, 2) for i in range(BLOCKS)}
    del stored[f"{name.format(3)}.lora_up.weight"]
    save_file(stored, tmp_path / "damaged.safetensors")
    with pytest.raises(loratools.LoraToolsError, match="1 fault"):
        loratools.inspect(tmp_path / "damaged.safetensors")
    report = loratools.inspect(tmp_path / "damaged.safetensors", exclude="diffusion_model.blocks.3.self_attn.q")
    assert len(report.sources[0].modules) == BLOCKS - 1  # type: ignore[union-attr]


def test_a_glob_that_matches_nothing_is_wrong_usage_all_the_same(wan: Path) -> None:
    with pytest.raises(UsageError, match="matches none"):
        loratools.inspect(wan, exclude=["*.diff_s", "*.no_such_module"])


def test_a_checkpoint_is_shown_without_the_tensors_that_are_excluded() -> None:
    every = loratools.inspect(FIXTURES / "llama-tiny").sources[0]
    some = loratools.inspect(FIXTURES / "llama-tiny", exclude="*.mlp.*").sources[0]
    names = {tensor.name for tensor in every.tensors}  # type: ignore[union-attr]
    kept = {tensor.name for tensor in some.tensors}  # type: ignore[union-attr]
    assert kept == {name for name in names if ".mlp." not in name} < names
    assert some.parameters < every.parameters  # type: ignore[union-attr]
