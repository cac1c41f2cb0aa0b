"""Small models of the families that LoRA is used with, adapters trained on them with PEFT, and what PEFT computes.

Sizes are all different (hidden, intermediate, vocabulary, rank), so that a transposed factor cannot pass.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

warnings.filterwarnings("ignore", category=DeprecationWarning)
import transformers as hf  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

UNIT = 2.0**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Story:
    """How a life begins.

    base: the model that is saved as the base, perhaps without the head that the adapter's model has.
    whole: the class that the adapter is trained on.
    lora, second: the fields of the config of one adapter and of another.
    batch: inputs and labels.
    labels: how many a classifier has, which its base does not know.
    dtype, shard_bytes: how the base is stored.
    """

    base: Callable[[], Any]
    whole: Any
    lora: Mapping[str, Any]
    second: Mapping[str, Any]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    labels: int | None = None
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None


def tokens(rows: int, columns: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    # The lowest numbers are padding, beginning and end.
    return lambda g: torch.randint(4, vocabulary, (rows, columns), generator=g)


def classified(vocabulary: int, labels: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Sentences whose class is told by their first token."""

    def make(g: torch.Generator) -> dict[str, Tensor]:
        ids = tokens(6, 5, vocabulary)(g)
        return {"input_ids": ids, "labels": ids[:, 0] % labels}

    return make


def answered(vocabulary: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Questions, and answers that repeat a part of them."""

    def make(g: torch.Generator) -> dict[str, Tensor]:
        ids = tokens(2, 6, vocabulary)(g)
        return {"input_ids": ids, "labels": ids[:, 2:5].contiguous()}

    return make


def continued(vocabulary: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        ids = tokens(2, 4, vocabulary)(g)
        return {"input_ids": ids, "labels": ids}

    return make


def pictured(g: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=g), "labels": torch.tensor([0, 1, 2, 4])}


def spoken(g: torch.Generator) -> dict[str, Tensor]:
    """A log-mel spectrogram of two frames for each of Whisper's positions, and its transcript."""
    return {"input_features": torch.randn(2, 10, 22, generator=g), "labels": tokens(2, 3, 31)(g)}


def bert() -> Any:
    return hf.BertModel(
        hf.BertConfig(
            vocab_size=53,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=19,
            initializer_range=0.2,
        )
    )


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=29,
            d_model=18,
            d_kv=5,
            d_ff=34,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        )
    )


def bart() -> Any:
    return hf.BartModel(
        hf.BartConfig(
            vocab_size=31,
            d_model=20,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=4,
            encoder_ffn_dim=26,
            decoder_ffn_dim=38,
            max_position_embeddings=17,
            init_std=0.2,
        )
    )


def vit() -> Any:
    return hf.ViTModel(
        hf.ViTConfig(
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=36,
            image_size=8,
            patch_size=4,
            initializer_range=0.2,
        ),
        add_pooling_layer=False,  # which a classifier of images has not got
    )


def whisper() -> Any:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=31,
            num_mel_bins=10,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=28,
            decoder_ffn_dim=22,
            max_source_positions=11,
            max_target_positions=13,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
            suppress_tokens=None,
            init_std=0.2,
        )
    )


def gpt2() -> Any:
    return hf.GPT2Model(
        hf.GPT2Config(vocab_size=37, n_positions=16, n_embd=18, n_layer=2, n_head=3, n_inner=30, initializer_range=0.2)
    )


def llama(**changed: object) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, "vocab_size": 41, **changed}))


def phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**{**DECODER, "vocab_size": 43}))


def gemma() -> Any:
    return hf.GemmaForCausalLM(
        hf.GemmaConfig(**{**DECODER, "vocab_size": 47, "head_dim": 10, "tie_word_embeddings": True})
    )


DECODER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_OF_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

STORIES: dict[str, Story] = {
    "bert": Story(
        base=bert,
        whole=hf.BertForSequenceClassification,
        labels=3,
        # The setting of the textbook.
        lora={
            "task_type": "SEQ_CLS",
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": ["query", "value"],
        },
        second={"r": 5, "lora_alpha": 7, "target_modules": ["query", "key", "output.dense"]},
        batch=classified(53, 3),
    ),
    "t5": Story(
        base=t5,
        whole=hf.T5ForConditionalGeneration,
        lora={"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 12, "target_modules": ["q", "v"]},
        second={"task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 3, "target_modules": ["v", "o", "wi"]},
        batch=answered(29),
        shard_bytes=20_000,
    ),
    "bart": Story(
        base=bart,
        whole=hf.BartForConditionalGeneration,
        lora={
            "task_type": "SEQ_2_SEQ_LM",
            "r": 6,
            "lora_alpha": 9,
            "target_modules": ["q_proj", "v_proj", "fc1", "fc2", "out_proj"],
        },
        second={"task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 8, "target_modules": ["k_proj", "fc1"]},
        batch=answered(31),
        shard_bytes=25_000,
    ),
    "vit": Story(
        base=vit,
        whole=hf.ViTForImageClassification,
        labels=5,
        lora={
            "r": 8,
            "lora_alpha": 12,
            "lora_dropout": 0.1,
            # transformers 5 names the modules otherwise than the files; before, both were called query and value.
            "target_modules": r".*\.(query|q_proj|value|v_proj)",
            "modules_to_save": ["classifier"],
        },
        second={"r": 3, "lora_alpha": 6, "target_modules": r".*\.(key|k_proj|value|v_proj)"},
        batch=pictured,
        dtype=torch.float16,
    ),
    "whisper": Story(
        base=whisper,
        whole=hf.WhisperForConditionalGeneration,
        lora={"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
        second={"r": 6, "lora_alpha": 3, "target_modules": ["out_proj", "fc2"]},
        batch=spoken,
        dtype=torch.bfloat16,
        shard_bytes=9_000,
    ),
    # c_attn is 18 -> 54, the c_proj of the attention is 18 -> 18 and says by no shape that it is stored as (in, out).
    "gpt2": Story(
        base=gpt2,
        whole=hf.GPT2LMHeadModel,
        lora={
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
        },
        second={
            "task_type": "CAUSAL_LM",
            "r": 7,
            "lora_alpha": 5,
            "target_modules": ["attn.c_proj"],
            "fan_in_fan_out": True,
        },
        batch=continued(37),
    ),
    "llama": Story(
        base=llama,
        whole=hf.LlamaForCausalLM,
        lora={
            "task_type": "CAUSAL_LM",
            "r": 5,
            "lora_alpha": 10,
            "target_modules": ALL_OF_LLAMA,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.[qk]_proj": 7},
            "alpha_pattern": {"o_proj": 4, "layers.0.mlp.up_proj": 2.5},
        },
        second={"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
        batch=continued(41),
        dtype=torch.bfloat16,
        shard_bytes=8_000,
    ),
    "phi3": Story(
        base=phi3,
        whole=hf.Phi3ForCausalLM,
        lora={"task_type": "CAUSAL_LM", "r": 5, "lora_alpha": 10, "target_modules": ["qkv_proj", "gate_up_proj"]},
        second={"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]},
        batch=continued(43),
    ),
    "gemma": Story(
        base=gemma,
        whole=hf.GemmaForCausalLM,
        lora={"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        second={"task_type": "CAUSAL_LM", "r": 6, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
        batch=continued(47),
        dtype=torch.float16,
    ),
}


@dataclass(frozen=True)
class Life:
    """A base and two adapters on disk. `losses`: before and after the training of each, on its own batch."""

    name: str
    story: Story
    base: Path
    adapter: Path
    second: Path
    batch: Mapping[str, Tensor]
    losses: tuple[tuple[float, float], tuple[float, float]]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the logits are computed from: the labels are the decoder's inputs, where there is one."""
        inputs = dict(self.batch)
        labels = inputs.pop("labels")
        if "input_features" in inputs or self.story.lora.get("task_type") == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = labels
        return inputs

    def model(self, folder: Path | None = None, **options: Any) -> Any:
        """The model in `folder` (or the base) in float32, of the class that the adapter was trained on."""
        torch.manual_seed(5)  # a head that the base has not got
        options = {"num_labels": self.story.labels, **options} if self.story.labels and folder is None else options
        return self.story.whole.from_pretrained(folder or self.base, dtype=torch.float32, **options)

    def bare(self, folder: Path) -> Any:
        """The model in `folder`, of the class that the base was saved from, in float32."""
        built = self.story.base()
        torch.manual_seed(5)
        model, told = type(built).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert all(name.startswith("pooler.") for name in told["missing_keys"])
        return model.eval()

    def peft(self, weights: Sequence[float] = (1.0,)) -> Any:
        """PEFT's own model with the adapter, or both, not merged; `weights` multiply the scales."""
        if len(weights) == 1:
            model = PeftModel.from_pretrained(self.model(), self.adapter)
        else:
            # In this order: after an adapter with a saved head, PEFT 0.21 loads none without one.
            model = PeftModel.from_pretrained(self.model(), self.second, adapter_name="second")
            model.load_adapter(self.adapter, "default")
            model.set_adapter("default")
            for layer in lora_layers(model).values():
                layer.set_adapter(["default", "second"])
        for layer in lora_layers(model).values():
            for name, weight in zip(["default", "second"], weights, strict=False):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
        return model.eval()

    @torch.no_grad()
    def output(self, model: Any) -> Tensor:
        """The first output of a model in its own precision: logits, or hidden states of one without a head."""
        dtype = next(model.parameters()).dtype
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.inputs.items()}
        return model.eval()(**inputs)[0].double()


def lora_layers(model: Any) -> dict[str, Any]:
    """Module -> PEFT's layer, by the names that the base model has for them."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}


def live(name: str, folder: Path) -> Life:
    """Make the base, and train both adapters on it."""
    story = STORIES[name]
    torch.manual_seed(len(name))
    shards = {} if story.shard_bytes is None else {"max_shard_size": story.shard_bytes}
    story.base().to(story.dtype).save_pretrained(folder / "base", **shards)
    batches = [story.batch(torch.Generator().manual_seed(seed)) for seed in (11, 12)]
    begun = Life(name, story, folder / "base", folder / "adapter", folder / "second", batches[0], ((0, 0), (0, 0)))
    first = _train(begun, story.lora, batches[0], begun.adapter)
    second = _train(begun, story.second, batches[1], begun.second)
    return Life(name, story, begun.base, begun.adapter, begun.second, batches[0], (first, second))


def _train(life: Life, lora: Mapping[str, Any], batch: Mapping[str, Tensor], out: Path) -> tuple[float, float]:
    model = get_peft_model(life.model(), LoraConfig(**copy.deepcopy(dict(lora))))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    before = _loss(model, batch)
    model.train()
    for _ in range(6):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    after = _loss(model, batch)
    model.save_pretrained(out, save_embedding_layers=False)
    return before, after


@torch.no_grad()
def _loss(model: Any, batch: Mapping[str, Tensor]) -> float:
    model.eval()
    return float(model(**batch).loss)


# What rounding explains


def gamma(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at `values`."""
    bits, lowest = {torch.float32: (23, -126), torch.float16: (10, -14), torch.bfloat16: (7, -126)}[dtype]
    return 2.0 ** (torch.floor(torch.log2(values.double().abs().clamp(min=2.0**lowest))) - bits)


def deltas(layer: Any) -> tuple[Tensor, Tensor, int]:
    """`sum of scale * B @ A` of the active adapters in float64, as the weight is stored; the same of absolute values;
    and the sum of their ranks."""
    total, magnitude, rank = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for name in layer.active_adapters:
        if name in layer.scaling:
            a, b = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            total = total + layer.scaling[name] * (b @ a)
            magnitude = magnitude + abs(layer.scaling[name]) * (b.abs() @ a.abs())
            rank += a.shape[0]
    return (total.mT, magnitude.mT, rank) if layer.fan_in_fan_out and total.dim() else (total, magnitude, rank)


def weight_bounds(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """How far each merged weight may be from the exact one: `ulp/2 + gamma(r+2) * (|W| + scale * sum |b||a|)`."""
    bounds = {}
    for name, layer in lora_layers(model).items():
        weight = layer.base_layer.weight.detach().double()
        delta, magnitude, rank = deltas(layer)
        # A little above the exact result, for one that rounds up into the next binade.
        half = spacing((weight + delta) * 1.001, dtype) / 2
        bounds[name] = half + gamma(rank + 2) * (weight.abs() + magnitude)
    return bounds


def slopes(model: Any, weights: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each number of the first output, its derivatives by the weights; all in float64."""
    outputs = model(**{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})[0].flatten()
    for number in outputs:
        yield torch.autograd.grad(number, weights, retain_graph=True)


def float32_noise(life: Life, model: Any) -> float:
    """What computing in float32 and not in float64 changes in the first output."""
    return float((life.output(model) - life.output(copy.deepcopy(model).double())).abs().max())


def output_tolerance(life: Life, model: Any, dtype: torch.dtype) -> float:
    """How far an output of the merged model, stored in `dtype`, may be from that of PEFT's unmerged one.

    6 standard deviations, to first order, of what rounding the stored weights does (d output / d w times an error
    within the bound on w, for every w), and 4 times the noise of computing in float32.
    """
    exact = copy.deepcopy(model).double().requires_grad_(False)
    bounds = weight_bounds(model, dtype)
    allowed = [(lora_layers(exact)[name].base_layer.weight, bound) for name, bound in bounds.items()]
    if dtype != torch.float32:  # which keeps a saved head as it is
        heads = [m.modules_to_save["default"] for m in exact.modules() if isinstance(m, ModulesToSaveWrapper)]
        allowed += [(w, spacing(w.detach(), dtype) / 2) for head in heads for w in head.parameters()]
    weights = [weight.requires_grad_() for weight, _ in allowed]
    largest = 0.0
    for row in slopes(exact, weights, life.inputs):
        # An error anywhere between -bound and bound has the variance bound^2 / 3.
        variance = sum(float((g * b).square().sum()) / 3 for g, (_, b) in zip(row, allowed, strict=True))
        largest = max(largest, 6 * math.sqrt(variance))
    return largest + 4 * float32_noise(life, model)
