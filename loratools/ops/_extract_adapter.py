"""The adapter that an extraction ends in: updates by kind of layer, replacements, and what PEFT must be told."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter, Replacement
from loratools.checkpoints import Checkpoint
from loratools.formats._peft_written import names_digest
from loratools.ops._delta import Extracted
from loratools.ops._pairs import Pair, Pairs
from loratools.tensors import held
from loratools.updates import Update
from loratools.updates.lora import LoRA


def adapter_of(
    base: Checkpoint, pairs: Pairs, factors: Mapping[Pair, Extracted], replaced: Mapping[str, Replacement]
) -> Adapter:
    """Scale is 1: alpha is the rank."""
    updates = {pair.target: _update(pair, found) for pair, found in factors.items()}
    own = base.config.get("_name_or_path")
    config: dict[str, object] = {
        # Of all modules or of none: PEFT corrects it by the class of each layer, and warns where it must.
        "fan_in_fan_out": bool(factors) and all(p.turned for p in factors),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(set(updates), pairs.linear),
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
    left, right, alpha = found.left[0], found.right[0], float(found.rank)
    if pair.turned:
        left, right = right.mT.contiguous(), left.mT.contiguous()
    return LoRA(held(right), held(left), alpha, "config")


def _target_modules(targets: set[str], linear: frozenset[str]) -> list[str]:
    """Last parts of names where those name all linear layers so called; whole names of all modules where one does not.

    PEFT also accepts a mixture, and takes a short name for every module that ends so.
    """
    leaves = {t.rpartition(".")[2] for t in targets}
    others = {t.rpartition(".")[2] for t in linear - targets}
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
