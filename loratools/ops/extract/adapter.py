"""The adapter that an extraction ends in: updates by kind of layer, replacements, and settings that PEFT needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.formats.common.notes import names_digest
from loratools.ops.finetune.pairs import Pair, Pairs
from loratools.sources.cache import cached_repository
from loratools.tensors.lazy import LazyTensor
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
        base_model=_name_of(base),
        # The list of modules holds as long as the names are these.
        notes={"peft": {"config": config, "metadata": {}, "names": names_digest(updates, replaced)}},
    )


def _name_of(base: Checkpoint) -> str:
    """What the adapter calls its base: its id on the hub, what its config says, or the name of its folder."""
    if (cached := cached_repository(base.path)) is not None:
        return cached.repository
    named = base.config.get("_name_or_path")
    return named if isinstance(named, str) and named else base.path.absolute().name


def factor_tensors(pair: Pair, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Factors of a pair's matrices as an adapter stores them, by the names `a` and `b`.

    Args:
        pair: The pair.
        left: (matrices, rows, rank).
        right: (matrices, rank, columns).
    """
    rank = left.shape[2]
    if pair.layer == "experts":
        # An expert's rows of A together, its columns of B apart, as PEFT packs them.
        if pair.transposed:
            left, right = right.mT, left.mT
        count, outputs, _ = left.shape
        a = right.reshape(count * rank, right.shape[2])
        b = left.permute(1, 2, 0).reshape(outputs, rank * count)
    else:
        b, a = left[0], right[0]
        if pair.layer == "conv":
            _, inputs, *kernel = pair.base.shape
            a, b = a.reshape(rank, inputs, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        elif pair.layer == "embedding" or pair.transposed:
            # An embedding is stored as (tokens, width), which is (in, out) of a layer that takes one-hot tokens.
            a, b = left[0].mT, right[0].mT
    return {"a": a.contiguous(), "b": b.contiguous()}


def update_of(pair: Pair, tensors: Mapping[str, LazyTensor], rank: int) -> Update:
    """The update that has these factors, as `factor_tensors` gives them. Scale is 1: alpha is the rank."""
    if pair.layer == "experts":
        side: Literal["in-out", "out-in"] = "in-out" if pair.transposed else "out-in"
        return LoRAExperts(tensors["a"], tensors["b"], pair.matrices[0], float(rank), "config", orientation=side)
    return LoRA(tensors["a"], tensors["b"], float(rank), "config", embedding=pair.layer == "embedding")


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
