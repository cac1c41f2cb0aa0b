"""The adapter that an extraction ends in: updates by kind of layer, replacements, and what PEFT must be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.formats.common.notes import names_digest
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor


def adapter_of(
    base: Checkpoint, pairs: Pairs, factors: Mapping[Pair, Update], replaced: Mapping[str, Replacement]
) -> Adapter:
    """Updates by their targets, replacements, and the fields of a config."""
    updates = {pair.target: update for pair, update in factors.items()}
    linear = [p for p in factors if p.layer == "linear"]
    base_name = base.config.get("_name_or_path")
    config: dict[str, object] = {
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": _target_modules({t for t, u in updates.items() if u.as_lora() is not None}, pairs.modules),
    }
    return Adapter(
        updates=updates,
        replacements=replaced,
        format="peft",
        # Of all modules or of none: PEFT corrects it by the class of each layer, and warns where it must.
        fan_in_fan_out=bool(linear) and all(p.transposed for p in linear),
        task_type=_task_type(base, set(updates)),
        base_model=base_name if isinstance(base_name, str) and base_name else base.path.absolute().name,
        # The list of modules holds as long as the names are these.
        notes={"peft": {"config": config, "metadata": {}, "names": names_digest(updates, replaced)}},
    )


# Where factors are kept until they are written: the same tensors, by the same names.
Keep: TypeAlias = "Callable[[Mapping[str, Tensor]], dict[str, LazyTensor]]"


def kept_in_memory(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors kept in memory."""
    return {name: from_torch(values) for name, values in tensors.items()}


def update_of(pair: Pair, left: Tensor, right: Tensor, keep: Keep) -> Update:
    """Factors of a pair's matrices, `left: (matrices, rows, rank)` and `right: (matrices, rank, columns)`, as an
    adapter has them. Scale is 1: alpha is the rank."""
    rank = left.shape[2]
    if pair.layer == "experts":
        return _experts(left, right, keep, transposed=pair.transposed)
    b, a = left[0], right[0]
    if pair.layer == "embedding":
        # Stored as (tokens, width), which is (in, out) of a layer that takes one-hot tokens.
        a, b = left[0].mT, right[0].mT
    elif pair.layer == "conv":
        _, inputs, *kernel = pair.base.shape
        a, b = a.reshape(rank, inputs, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
    elif pair.transposed:
        a, b = left[0].mT, right[0].mT
    tensors = keep({"a": a.contiguous(), "b": b.contiguous()})
    return LoRA(tensors["a"], tensors["b"], float(rank), "config", embedding=pair.layer == "embedding")


def _experts(left: Tensor, right: Tensor, keep: Keep, *, transposed: bool) -> LoRAExperts:
    """An expert's rows of A together, its columns of B apart, as PEFT packs them."""
    if transposed:
        left, right = right.mT, left.mT
    count, outputs, rank = left.shape
    a = right.reshape(count * rank, right.shape[2]).contiguous()
    b = left.permute(1, 2, 0).reshape(outputs, rank * count).contiguous()
    tensors = keep({"a": a, "b": b})
    side: Literal["in-out", "out-in"] = "in-out" if transposed else "out-in"
    return LoRAExperts(tensors["a"], tensors["b"], count, float(rank), "config", orientation=side)


def _target_modules(targets: set[str], modules: frozenset[str]) -> list[str]:
    """Last parts of names where no other module is called so; whole names of all modules where one is.

    PEFT also accepts a mixture, and takes a short name for every module that ends so, whatever it is.
    """
    leaves = {t.rpartition(".")[2] for t in targets}
    others = {t.rpartition(".")[2] for t in modules - targets}
    return sorted(targets) if leaves & others else sorted(leaves)


# What an architecture's name ends in -> the class that PEFT wraps it in. It adds a trained copy of the head to the last
# three.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"classifier", "score", "qa_outputs"}
# Encoder-decoders of text; those of speech and images take other inputs than PEFT's wrapper passes on.
_SEQ_2_SEQ = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart",
    "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "switch_transformers", "t5", "umt5",
}  # fmt: skip


def _task_type(base: Checkpoint, targets: set[str]) -> str | None:
    architectures = base.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task is None and base.config.get("model_type") in _SEQ_2_SEQ and not name.endswith(("Model", "Classification")):
        task = "SEQ_2_SEQ_LM"
    # PEFT would take the head's own weights for trained ones and ignore its factors.
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and _HEADS & {t.rpartition(".")[2] for t in targets}:
        return None
    return task
