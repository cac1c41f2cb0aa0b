"""Promises of a merge that only show where something else goes wrong: an input that changes, a record, a flag."""

import hashlib
import json
import os
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file

import loratools
from loratools.errors import ChangedInputError, MachineError
from loratools.ops.merge import verb


@pytest.mark.parametrize("changed", ["content", "time"])
def test_a_base_that_changes_while_it_is_merged_is_an_error_and_nothing_is_written(
    tmp_path: Path, changed: str
) -> None:
    base, style = factories.checkpoint_folder(tmp_path / "base"), factories.adapter_folder(tmp_path / "style")
    file = next(base.glob("*.safetensors"))
    touched = []

    def change(_: int) -> None:
        if not touched:
            touched.append(file)
            found = file.stat()
            if changed == "content":
                with file.open("r+b") as opened:
                    opened.seek(found.st_size - 1)
                    opened.write(b"\x55")
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))

    with pytest.raises(ChangedInputError, match="changed while being read"):
        # Without the check of the result, which would read the changed base again.
        loratools.merge(base, [style], tmp_path / "out", threads=1, verify=False, progress=change)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "style"]


def test_every_file_of_an_adapter_is_hashed_into_the_record_its_config_too(tmp_path: Path) -> None:
    base, style = factories.checkpoint_folder(tmp_path / "base"), factories.adapter_folder(tmp_path / "style")

    loratools.merge(base, [style], tmp_path / "out")

    (recorded,) = json.loads((tmp_path / "out" / "loratools.json").read_text())["adapters"]
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert recorded["files"] == [
        {
            "name": name,
            "bytes": (style / name).stat().st_size,
            "sha256": hashlib.sha256((style / name).read_bytes()).hexdigest(),
        }
        for name in names
    ]


@pytest.mark.parametrize("flag", [True, False])
def test_square_layers_of_gpt2_are_stored_as_in_out_whatever_fan_in_fan_out_says(tmp_path: Path, flag: bool) -> None:
    # PEFT sets the flag itself for a Conv1D, and clears it for a linear layer.
    conv1d, linear = torch.randn(6, 6), torch.randn(6, 6)
    base = factories.checkpoint_folder(
        tmp_path / "base",
        weights={"h.0.attn.c_proj.weight": conv1d, "h.0.other.weight": linear, "h.0.ln.weight": torch.ones(6)},
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    parts = factories.factors({"transformer.h.0.attn.c_proj": (6, 6), "transformer.h.0.other": (6, 6)})
    style = factories.adapter_folder(tmp_path / "style", values=parts, config={"fan_in_fan_out": flag})

    loratools.merge(base, [style], tmp_path / "out")

    merged = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    (a, b), (c, d) = parts["transformer.h.0.attn.c_proj"], parts["transformer.h.0.other"]
    assert torch.allclose(merged["h.0.attn.c_proj.weight"], conv1d + 2 * (b @ a).T, atol=1e-5)
    assert torch.allclose(merged["h.0.other.weight"], linear + 2 * (d @ c), atol=1e-5)


def test_a_weight_file_that_vanishes_before_the_end_is_an_error_and_nothing_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, style = factories.checkpoint_folder(tmp_path / "base", shards=2), factories.adapter_folder(tmp_path / "style")
    write = verb.write_side_files

    def write_and_lose_a_shard(plan: object, staging: Path, provenance: str) -> None:
        write(plan, staging, provenance)  # type: ignore[arg-type]
        (staging / "model-00002-of-00002.safetensors").unlink()

    monkeypatch.setattr(verb, "write_side_files", write_and_lose_a_shard)

    with pytest.raises(MachineError, match="removed meanwhile") as caught:
        loratools.merge(base, [style], tmp_path / "out")

    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "style"]


def test_a_tokenizer_that_changes_before_it_is_copied_is_an_error(tmp_path: Path) -> None:
    base, style = factories.checkpoint_folder(tmp_path / "base"), factories.adapter_folder(tmp_path / "style")
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}')

    with pytest.raises(ChangedInputError, match=r"tokenizer\.json"):
        loratools.merge(
            base, [style], tmp_path / "out", threads=1, progress=lambda _: tokenizer.write_text('{"version": "2.0"}')
        )

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "style"]
