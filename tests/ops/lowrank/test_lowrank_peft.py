"""What combine, resize and extract write, loaded by PEFT on tiny real models: outputs are those of the definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

from loratools.ops.combine.verb import combine
from loratools.ops.extract.verb import extract
from loratools.ops.resize.verb import resize

IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


def _llama() -> transformers.PreTrainedModel:
    return tiny_models.llama(vocabulary=40, width=24, inner=36, heads=4, key_heads=2)


def _gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def _adapter(folder: Path, seed: int, **config: object) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **config))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def _deltas(folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight, by merging in float32."""
    base = {n: p.detach().clone() for n, p in _llama().named_parameters()}
    merged = peft.PeftModel.from_pretrained(_llama(), str(folder)).merge_and_unload()
    return {n: p.detach() - base[n] for n, p in merged.named_parameters() if not torch.equal(p, base[n])}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return (
        _adapter(root / "one", 1, r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=True),
        _adapter(
            root / "two", 2, r=4, lora_alpha=5, target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 9},
        ),
    )  # fmt: skip


def test_combined_adapter_is_the_sum_of_both_in_peft(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    combine([(adapters[0], 0.5), (adapters[1], -1.25)], tmp_path / "both")

    one, two, both = (_deltas(p) for p in (*adapters, tmp_path / "both"))
    assert both.keys() == one.keys() | two.keys()
    for name, found in both.items():
        zero = torch.zeros_like(found)
        # Differences of float32 weights near 0.1: an ulp of those, a few times.
        torch.testing.assert_close(found, 0.5 * one.get(name, zero) - 1.25 * two.get(name, zero), rtol=0, atol=3e-7)


def test_combined_outputs_are_those_of_weights_with_both_deltas(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    combine(list(adapters), tmp_path / "both")
    wanted = _llama()
    with torch.no_grad():
        for deltas in map(_deltas, adapters):
            for name, delta in deltas.items():
                wanted.get_parameter(name).add_(delta)
        expected = wanted(IDS).logits

        found = peft.PeftModel.from_pretrained(_llama(), str(tmp_path / "both"))(IDS).logits

    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_resized_adapter_has_its_rank_and_error_in_peft(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    report = resize(adapters[1], tmp_path / "small", rank=2)

    before, after = _deltas(adapters[1]), _deltas(tmp_path / "small")
    assert before.keys() == after.keys()
    for module in report.modules:
        name = f"{module.name}.weight"
        assert int(torch.linalg.matrix_rank(after[name], atol=1e-5)) == module.rank == 2
        error = float((after[name] - before[name]).norm() / before[name].norm())
        assert module.error == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_extracted_adapter_reproduces_the_fine_tuned_model_in_peft(
    make: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    base, tuned = make(), make()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            # One module stays as it was, so that target_modules has to be exact.
            if parameter.dim() == 2 and ("layers." in name or ".h." in name) and "1.mlp" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / "tuned")
        expected, plain = tuned(IDS).logits, base(IDS).logits

        full = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "full", rank=64)
        half = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "half", rank=12)

        found, rough = (
            peft.PeftModel.from_pretrained(make(), str(tmp_path / n)).eval()(IDS).logits for n in ("full", "half")
        )
    assert not full.skipped
    assert full.error is not None
    assert full.error < 1e-5
    # float32 throughout, some dozen products of length 24 deep.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert half.error is not None
    assert 0.1 < half.error < 0.9
    assert float((rough - expected).norm()) < float((plain - expected).norm())


def test_gpt2_deltas_are_given_as_the_layer_computes(tmp_path: Path) -> None:
    base, tuned = _gpt2(), _gpt2()
    base.save_pretrained(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn"
    with torch.no_grad():
        tuned.get_parameter(f"{name}.weight").add_(torch.randn(24, 72))
    tuned.save_pretrained(tmp_path / "tuned")

    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=24)

    assert report.adapter is not None
    update = report.adapter.updates[name]
    assert update.shape == (72, 24)
    factors = update.factors()
    assert factors is not None
    delta = tuned.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
    torch.testing.assert_close((factors.b @ factors.a).T.float(), delta.detach(), rtol=0, atol=1e-5)
