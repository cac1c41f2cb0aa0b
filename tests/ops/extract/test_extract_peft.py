"""What extract writes of whole fine-tunes, loaded by PEFT: the outputs of the fine-tuned model, merged and unmerged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from loratools.ops.extract.verb import ExtractReport, extract

IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 33]])
_SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama(*, tied: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SMALL, tie_word_embeddings=tied, attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval()


def _tied_llama() -> transformers.PreTrainedModel:
    return _llama(tied=True)


def _gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def _bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def _gpt_oss() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **_SMALL, head_dim=6, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32
    )
    return transformers.GptOssForCausalLM(config).eval()


def _resnet() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config).eval()


def _trained(model: nn.Module, size: float = 0.05) -> nn.Module:
    """A copy with every parameter moved, as a full fine-tune moves them."""
    generator = torch.Generator().manual_seed(1)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


def _extracted(tmp_path: Path, base: nn.Module, tuned: nn.Module, **options: object) -> ExtractReport:
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    return extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", **options)  # type: ignore[arg-type]


def _outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if "pixel_values" in str(getattr(model, "main_input_name", "")):
            return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).logits
        return model(IDS).logits  # type: ignore[no-any-return]


def _loaded(folder: Path, base: nn.Module) -> Callable[[], nn.Module]:
    return lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_llama, _tied_llama, _gpt2, _bert, _resnet])
@pytest.mark.parametrize("embeddings", ["lora", "full"])
def test_at_full_rank_outputs_are_those_of_the_fine_tune(
    tmp_path: Path, make: Callable[[], transformers.PreTrainedModel], embeddings: str
) -> None:
    base = make()
    tuned = _trained(base)

    report = _extracted(tmp_path, base, tuned, rank=99, embeddings=embeddings)

    load = _loaded(tmp_path / "adapter", base)
    wanted = _outputs(tuned)
    far = float((_outputs(base) - wanted).abs().max())
    assert [s.name for s in report.skipped] == []
    for model in (load(), load().merge_and_unload()):  # type: ignore[operator]
        assert float((_outputs(model) - wanted).abs().max()) < 2e-5 * max(1.0, far)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_gpt_oss])
def test_fused_experts_work_in_peft(tmp_path: Path, make: Callable[[], transformers.PreTrainedModel]) -> None:
    base = make()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim == 3:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))

    report = _extracted(tmp_path, base, tuned, rank=99)

    assert [m.name.rpartition(".")[2] for m in report.modules] == ["down_proj", "gate_up_proj"] * 2
    wanted = _outputs(tuned)
    load = _loaded(tmp_path / "adapter", base)
    for model in (load(), load().merge_and_unload()):  # type: ignore[operator]
        assert float((_outputs(model) - wanted).abs().max()) < 1e-4
    assert float((_outputs(base) - wanted).abs().max()) > 0.01


@pytest.mark.filterwarnings("ignore")
def test_weights_in_peft_are_off_by_the_error_that_was_reported(tmp_path: Path) -> None:
    base = _llama()
    tuned = _trained(base)

    report = _extracted(tmp_path, base, tuned, energy=0.8, max_rank=9)

    merged = dict(_loaded(tmp_path / "adapter", base)().merge_and_unload().named_parameters())  # type: ignore[operator]
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    for module in report.modules:
        name = f"{module.name}.weight"
        delta = (after[name] - before[name]).double()
        missed = (after[name] - merged[name]).double()
        assert module.error == pytest.approx(float(missed.norm() / delta.norm()), rel=1e-3)
    assert len({m.rank for m in report.modules}) > 1
    for replaced in report.replacements:
        assert torch.equal(merged[replaced.name], after[replaced.name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_llama, _tied_llama])
def test_new_tokens_come_along(tmp_path: Path, make: Callable[[], transformers.PreTrainedModel]) -> None:
    base = make()
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(43)
    tuned = _trained(grown)

    _extracted(tmp_path, base, tuned, rank=99)

    wider = copy.deepcopy(base)
    wider.resize_token_embeddings(43)
    load = _loaded(tmp_path / "adapter", wider)
    for model in (load(), load().merge_and_unload()):  # type: ignore[operator]
        assert float((_outputs(model) - _outputs(tuned)).abs().max()) < 5e-5


@pytest.mark.filterwarnings("ignore")
def test_a_new_head_comes_along(tmp_path: Path) -> None:
    base = _bert()
    other = copy.deepcopy(base)
    other.classifier = nn.Linear(24, 5)  # type: ignore[assignment]
    other.config.num_labels = 5
    tuned = _trained(other)

    _extracted(tmp_path, base, tuned, rank=99)

    load = _loaded(tmp_path / "adapter", other)
    for model in (load(), load().merge_and_unload()):  # type: ignore[operator]
        assert float((_outputs(model) - _outputs(tuned)).abs().max()) < 2e-5
