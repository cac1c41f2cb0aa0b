"""The adapter that an extraction ends in: updates by kind of layer, replacements, and what PEFT must be told."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.formats._notes import names_digest
from loratools.ops._delta import Extracted
from loratools.ops._pairs import Pair, Pairs
from loratools.tensors import held
from loratools.updates import Update
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts


def adapter_of(
    base: Checkpoint, pairs: Pairs, factors: Mapping[Pair, Extracted], replaced: Mapping[str, Replacement]
) -> Adapter:
    """Scale is 1: alpha is the rank."""
    updates = {pair.target: _update(pair, found) for pair, found in factors.items()}
    linear = [p for p in factors if p.layer == "linear"]
    own = base.config.get("_name_or_path")
    config: dict[str, object] = {
        # Of all modules or of none: PEFT corrects it by the class of each layer, and warns where it must.
        "fan_in_fan_out": bool(linear) and all(p.turned for p in linear),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": _target_modules({t for t, u in updates.items() if isinstance(u, LoRA)}, pairs.modules),
        "task_type": _task_type(base, set(updates)),
    }
    return Adapter(
        updates=updates,
        replacements=replaced,
        format="peft",
        base_model=own if isinstance(own, str) and own else base.path.absolute().name,
        # The list of modules holds as long as the names are these.
        notes={"peft": {"config": config, "metadata": {}, "names": names_digest(updates, replaced)}},
    )


def _update(pair: Pair, found: Extracted) -> Update:
    alpha = float(found.rank)
    if pair.layer == "experts":
        return _experts(found, alpha, turned=pair.turned)
    left, right = found.left[0], found.right[0]
    if pair.layer == "embedding":
        # Stored as (tokens, width), which is (in, out) of a layer that takes one-hot tokens.
        return LoRA(held(left.mT.contiguous()), held(right.mT.contiguous()), alpha, "config", embedding=True)
    if pair.layer == "conv":
        _, inputs, *kernel = pair.base.shape
        a, b = right.reshape(found.rank, inputs, *kernel), left.reshape(*left.shape, *(1 for _ in kernel))
        return LoRA(held(a), held(b), alpha, "config")
    if pair.turned:
        left, right = right.mT.contiguous(), left.mT.contiguous()
    return LoRA(held(right), held(left), alpha, "config")


def _experts(found: Extracted, alpha: float, *, turned: bool) -> LoRAExperts:
    """An expert's rows of A together, its columns of B apart, as PEFT packs them."""
    left, right = (found.right.mT, found.left.mT) if turned else (found.left, found.right)
    count, outputs, rank = left.shape
    a = right.reshape(count * rank, right.shape[2]).contiguous()
    b = left.permute(1, 2, 0).reshape(outputs, rank * count).contiguous()
    return LoRAExperts(held(a), held(b), count, alpha, "config", orientation="in-out" if turned else "out-in")


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
