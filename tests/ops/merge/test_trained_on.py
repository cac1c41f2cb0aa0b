"""Merging into the values that training saw (`trained_on`), against bitsandbytes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import factories
import peers
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from loratools import merge
from loratools.cli import verbs
from loratools.errors import FormatError, UnsupportedError, UsageError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
MODULES = {Q: (40, 128), UP: (24, 192)}
README = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: QuantizationMethod.BITS_AND_BYTES
- _load_in_8bit: False
- _load_in_4bit: True
- llm_int8_threshold: 6.0
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: False
- bnb_4bit_compute_dtype: bfloat16
- load_in_4bit: True
- load_in_8bit: False
"""


def inputs(tmp_path: Path, *, dtype: torch.dtype = torch.bfloat16, size: float = 0.02) -> tuple[Path, Path]:
    weights = factories.base_weights(MODULES, dtype=dtype)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    values = {n: (a, b * size) for n, (a, b) in factories.factors(MODULES).items()}
    return base, factories.adapter_folder(tmp_path / "a", modules=MODULES, values=values)


def update(adapter: Path, module: str) -> Tensor:
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return 2 * b @ a


def seen_by_bitsandbytes(values: Tensor, codes: str, *, nested: bool = False) -> Tensor:
    import bitsandbytes.functional as bnb

    if codes == "int8":
        packed, rows, _ = bnb.int8_vectorwise_quant(values.half())
        return bnb.int8_vectorwise_dequant(packed, rows).double()
    packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type=codes, compress_statistics=nested)
    return bnb.dequantize_4bit(packed, state).double()


def scheme_file(folder: Path, **fields: Any) -> Path:
    path = folder / "scheme.json"
    path.write_text(json.dumps(fields))
    return path


@peers.needs("bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", ["nf4", "fp4", "int8"])
def test_adapters_are_added_to_what_bitsandbytes_makes_of_the_weights(
    tmp_path: Path, codes: str, dtype: torch.dtype
) -> None:
    base, adapter = inputs(tmp_path, dtype=dtype)

    report = merge(base, adapter, tmp_path / "out", trained_on=codes)

    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    for module in MODULES:
        exact = seen_by_bitsandbytes(before[f"{module}.weight"], codes) + update(adapter, module)
        mantissa = 7 if dtype == torch.bfloat16 else 23
        bound = exact.abs() * 2.0 ** -(mantissa + 1) * 1.01 + 2e-6
        assert ((after[f"{module}.weight"].double() - exact).abs() <= bound).all()
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert report.trained_on == codes
    assert report.verified


@peers.needs("bitsandbytes")
def test_double_quantisation_comes_from_the_file_of_the_training(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    path = scheme_file(
        tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True,
                                       "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    )  # fmt: skip

    report = merge(base, adapter, tmp_path / "out", trained_on=path, dtype="float32")

    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    for module in MODULES:
        exact = seen_by_bitsandbytes(before[f"{module}.weight"], "nf4", nested=True) + update(adapter, module)
        same = torch.isclose(after[f"{module}.weight"].double(), exact, rtol=1e-6, atol=1e-6)
        # Its CPU kernel takes the second nearest code for some scales.
        assert same.float().mean() > 0.97
    assert report.trained_on == "nf4, double quantisation"


def test_the_result_does_not_depend_on_workers_or_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 96 columns: blocks of 64 run from one row into the next."""
    modules = {UP: (50, 96)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=factories.base_weights(modules))
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules)
    merge(base, adapter, tmp_path / "one", trained_on="nf4", threads=1)
    monkeypatch.setattr("loratools.ops.merge.plan._UNIT_BYTES", 7 * 96 * 4)

    merge(base, adapter, tmp_path / "many", trained_on="nf4", threads=2)

    one, many = (load_file(tmp_path / n / "model.safetensors")[f"{UP}.weight"] for n in ("one", "many"))
    assert torch.allclose(one, many, rtol=1e-6, atol=1e-6)


def test_an_adapter_that_says_how_it_was_trained_is_told_of_with_the_size_of_the_difference(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path, dtype=torch.float32, size=0.02)
    (adapter / "README.md").write_text(README)

    report = merge(base, adapter, tmp_path / "out")
    merged = merge(base, adapter, tmp_path / "trained", trained_on="nf4")

    (told,) = [w for w in report.warnings if "--trained-on nf4" in w]
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "trained"))
    difference = [after[f"{m}.weight"].double() - update(adapter, m) - before[f"{m}.weight"].double() for m in MODULES]
    size = sum(d.square().sum() for d in difference) / sum(update(adapter, m).square().sum() for m in MODULES)
    assert f"{float(size) ** 0.5:.2g} times the update" in told
    assert not any("--trained-on" in w for w in merged.warnings)
    assert any(f"{float(size) ** 0.5:.2g} times the update" in w for w in merged.warnings)


@pytest.mark.parametrize("text", ["", "# A model\n", README.replace("4bit: True", "4bit: False")])
def test_an_adapter_that_says_nothing_of_quantisation_is_not_told_of(tmp_path: Path, text: str) -> None:
    base, adapter = inputs(tmp_path)
    (adapter / "README.md").write_text(text)

    report = merge(base, adapter, tmp_path / "out")

    assert not any("--trained-on" in warning for warning in report.warnings)


def test_a_head_is_taken_as_it_is_and_that_is_said(tmp_path: Path) -> None:
    modules = {Q: (40, 128), "lm_head": (13, 128)}
    weights = factories.base_weights(MODULES) | {"lm_head.weight": torch.randn(13, 128)}
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = factories.adapter_folder(tmp_path / "a", modules=modules)

    report = merge(base, adapter, tmp_path / "out", trained_on="nf4")

    after = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].double()
    torch.testing.assert_close(
        after, weights["lm_head.weight"].double() + update(adapter, "lm_head"), atol=1e-5, rtol=0
    )
    assert any("lm_head.weight" in w and "not quantised in training" in w for w in report.warnings)


def test_a_weight_that_is_stored_transposed_is_refused_by_name(tmp_path: Path) -> None:
    name = "h.0.mlp.c_fc"
    base = factories.checkpoint_folder(tmp_path / "base", weights={f"{name}.weight": torch.randn(128, 40)})
    adapter = factories.adapter_folder(tmp_path / "a", modules={name: (40, 128)})

    with pytest.raises(UnsupportedError, match="not stored as training quantised them") as caught:
        merge(base, adapter, tmp_path / "out", trained_on="nf4")

    assert f"{name}.weight" in caught.value.details[0]


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    weights = factories.base_weights(MODULES)
    weights[f"{UP}.weight"] = torch.randint(-127, 128, (24, 192)).to(torch.int8)
    weights[f"{UP}.SCB"] = torch.rand(24) + 0.5
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights)
    adapter = factories.adapter_folder(tmp_path / "a", modules={Q: (40, 128)})

    with pytest.raises(UnsupportedError, match="quantised itself"):
        merge(base, adapter, tmp_path / "out", trained_on="int8")


def test_schemes_that_are_not_known_are_refused(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    gptq = scheme_file(tmp_path, quant_method="gptq", bits=4)
    no_json = tmp_path / "no.json"
    no_json.write_text("[1]")

    for scheme, error in (("int3", UsageError), (gptq, UnsupportedError), (no_json, FormatError)):
        with pytest.raises(error):
            merge(base, adapter, tmp_path / "out", trained_on=scheme)
    with pytest.raises(UsageError):
        merge(base, adapter, tmp_path / "out", trained_on="nf4", requantize=True)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_in_plan_and_document(tmp_path: Path) -> None:
    base, adapter = inputs(tmp_path)
    arguments = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--trained-on", "nf4"]

    planned = CliRunner().invoke(verbs, [*arguments, "--plan", "--json"])
    table = CliRunner().invoke(verbs, [*arguments, "--plan"])
    done = CliRunner().invoke(verbs, [*arguments, "--json"])

    assert [r.exit_code for r in (planned, table, done)] == [0, 0, 0], done.output
    assert json.loads(planned.stdout)["plan"]["trained_on"] == "nf4"
    assert "nf4" in table.stdout
    assert json.loads(done.stdout)["trained_on"] == "nf4"
