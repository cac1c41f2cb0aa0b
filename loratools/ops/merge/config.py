"""The `config.json` of a merged model: the base's own, changed only where the weights now say something else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.ops.common.vocabulary import vocabulary_config, vocabulary_size
from loratools.ops.merge.layer_replication import Replication
from loratools.quantization.common.config import without_quantisation

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# Heads of one row per label, as transformers names them.
_LABEL_HEADS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")


def merged_configs(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str | None,
    dequantize: bool = False,
    untied: Sequence[str],
    deeper: Replication | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Texts of the result's configs by file, and warnings; without those of the base that can be copied as they are.

    `shapes`: name -> shape of every tensor of the result. `untied`: names that are no longer tied.
    `dequantize`: whether the result has no quantised weights. `deeper`: how layers are repeated.
    """
    if base.config_file is None:
        return _component_configs(base, dtype, dequantize), []
    if not base.config:
        return {}, []
    config = copy.deepcopy(without_quantisation(base.config) if dequantize else dict(base.config))
    warnings: list[str] = []
    _set_dtype(config, dtype)
    if untied:
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict) and text.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = False
    if deeper is not None:
        deeper.config(config)
    _resize_vocabulary(config, base, shapes)
    _add_head(config, base, adapters, shapes, warnings)
    return ({base.config_file: _text(config)} if config != dict(base.config) else {}), warnings


def _component_configs(base: Checkpoint, dtype: str | None, dequantize: bool) -> dict[str, str]:
    """Of a pipeline: its weights keep their shapes and ties, but their dtype may be another."""
    texts: dict[str, str] = {}
    for component in base.components:
        component_config = base.config[component.prefix.removesuffix(".")]
        assert isinstance(component_config, Mapping)
        config = without_quantisation(component_config) if dequantize else dict(component_config)
        _set_dtype(config, dtype)
        if config != component_config:
            texts[f"{component.folder}config.json"] = _text(config)
    return texts


def _set_dtype(config: dict[str, object], dtype: str | None) -> None:
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = _DTYPE_NAMES[dtype]


def _text(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _resize_vocabulary(config: dict[str, object], base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    old = vocabulary_size(base)
    part = vocabulary_config(config)
    if old is None or part is None:
        return
    sizes = {
        shapes[name][0]
        for name, tensor in base.weights.items()
        if tensor.shape and tensor.shape[0] == old and shapes[name] != tensor.shape
    }
    if sizes and isinstance(part, dict):
        part["vocab_size"] = max(sizes)  # one size: the plan has refused several


def _add_head(
    config: dict[str, object],
    base: Checkpoint,
    adapters: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
    warnings: list[str],
) -> None:
    """Name the model class that has the new head, and as many labels as it has rows."""
    changed = {n for n, shape in shapes.items() if n not in base.weights or base.weights[n].shape != shape}
    heads = [f"{head}.weight" for head in _LABEL_HEADS if f"{head}.weight" in changed]
    if not heads:
        return
    labels = shapes[heads[-1]][0]
    labels_of_base = config.get("id2label")
    if not (isinstance(labels_of_base, Mapping) and len(labels_of_base) == labels) and (
        labels_of_base is not None or labels != 2
    ):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    if all(n in base.weights for n in heads):
        return
    name = next((c for c in (_class_of(a, config) for a in adapters) if c is not None), None)
    if name is None:
        warnings.append(
            f"the head {heads[-1]} is new; name the model class that has it in config.json, 'architectures'"
        )
    else:
        config["architectures"] = [name]


def _class_of(adapter: Adapter, config: Mapping[str, object]) -> str | None:
    """The transformers class that the adapter was trained on; None if nothing tells."""
    if adapter.base_class is not None:
        return adapter.base_class.rpartition(".")[2]
    suffix = _TASK_CLASSES.get(adapter.task_type or "")
    architectures = config.get("architectures")
    if suffix is None or not isinstance(architectures, list) or not architectures:
        return None
    stem = re.match(r"(.+?)(?:Model|LMHeadModel|For[A-Z]\w*)$", str(architectures[0]))
    return stem[1] + suffix if stem is not None else None
