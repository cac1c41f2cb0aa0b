"""What the fields of `adapter_config.json` mean to the mathematics, one row each; reading and checking their values.

PEFT ignores a field that it does not know. Here it is the other way round: what is not known to be harmless, and is
set to something, is refused, because the next variant of LoRA will be a flag as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratools import registry
from loratools.errors import FormatError
from loratools.formats.peft_parts import kinds
from loratools.storage.files import quoted

# A rank above this is damage, not a rank.
MAX_RANK = 1 << 20
# What PEFT takes where the field is absent.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
# No model has as many layers; what says so is damage.
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class Field:
    """What a field means, and for which values the adapter cannot be read; `refused` is None if it can for all."""

    meaning: str
    refused: Callable[[object], bool] | None = None
    hint: str | None = None


def _set(value: object) -> bool:
    return bool(value)


def _is_set(value: object) -> bool:
    # PEFT takes even an empty mapping for "with default settings".
    return value is not None and value is not False


def _without(kind: str) -> Callable[[object], bool]:
    """Set, and this installation has no such kind."""
    return lambda value: _is_set(value) and value != [] and kind not in registry.names("updates")


# The file in `updates/` for a variant, by the field that asks for it.
VARIANTS = {"use_qalora": "qalora", "use_bdlora": "bdlora", "kasa_config": "kasa"}


def variant(config: Mapping[str, object]) -> str:
    """The file in `updates/` that knows what the factors mean."""
    return next((kind for name, kind in VARIANTS.items() if _is_set(config.get(name))), "lora")


def initialisation_changed_base(config: Mapping[str, object]) -> str | None:
    """The initialisation that also changed the base, so that the factors alone are no delta of the plain one."""
    value = config.get("init_lora_weights")
    return str(value) if isinstance(value, str) and _changes_base(value) else None


_INITIAL = (
    "give as the base the model as the initialisation left it, saved without the adapter before training, and set "
    "init_lora_weights to true in adapter_config.json; PEFT converts only PiSSA, CorDA and OLoRA to plain LoRA"
)


def _changes_base(value: object) -> bool:
    harmless = ("gaussian", "eva", "orthogonal", "mica")
    return not (value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in harmless))


# Those whose base is W - scale * B0 @ A0 for the factors at the start, so that these undo them.
_UNDONE = ("pissa", "olora", "corda", "lora_ga")


def _has_no_undoing(value: object) -> bool:
    can_be_undone = isinstance(value, str) and value.lower().startswith(_UNDONE)
    return _changes_base(value) and not can_be_undone


FIELDS: dict[str, Field] = {
    # the scale
    "r": Field("rank of the modules that rank_pattern does not name"),
    "lora_alpha": Field("alpha of the modules that alpha_pattern does not name"),
    "rank_pattern": Field("rank by module"),
    "alpha_pattern": Field("alpha by module"),
    "use_rslora": Field("scale is alpha / sqrt(rank)"),
    # what is adapted: the tensors say it, so it is only written back
    "target_modules": Field("modules with factors"),
    "exclude_modules": Field("modules without"),
    "layers_to_transform": Field("numbers of the layers with factors"),
    "layers_pattern": Field("where the layer number stands"),
    "modules_to_save": Field("modules that are replaced"),
    "bias": Field("biases that are replaced"),
    "fan_in_fan_out": Field("the base stores (in, out)"),
    "ensure_weight_tying": Field("adapters of tied weights are tied"),
    "modules_to_tie": Field("a value of a running model"),
    "target_modules_to_tie": Field("a value of a running model"),
    # what kind of LoRA it is
    "use_dora": Field("DoRA: a magnitude for every output"),
    "lora_bias": Field("a bias of its own in B"),
    "use_qalora": Field("QALoRA: inputs pooled in groups", _without("qalora")),
    "use_bdlora": Field("BD-LoRA: block-diagonal factors", _without("bdlora")),
    "kasa_config": Field("KaSA: truncates the base", _without("kasa")),
    "trainable_token_indices": Field("rows of an embedding replaced"),
    "layer_replication": Field("layers of the base repeated; the numbers in names count them so"),
    "target_parameters": Field("parameters adapted that belong to no linear layer, as in fused experts"),
    "velora_config": Field("VeLoRA: compresses activations in training"),
    "monteclora_config": Field("MonteCLoRA: samples in training"),
    # records
    "peft_type": Field("the kind of adapter"),
    "task_type": Field("the head of the base"),
    "auto_mapping": Field("class and library of the base"),
    "peft_version": Field("who wrote it"),
    "base_model_name_or_path": Field("the base"),
    "revision": Field("version of the base"),
    "base_model_class": Field("class of the base"),
    "parent_library": Field("library of the base"),
    "inference_mode": Field("whether it was being trained"),
    "runtime_config": Field("settings of a running model"),
    "unsloth_fixed": Field("Unsloth trained it, which has packed fused experts in two ways"),
    # training only
    "lora_dropout": Field("dropout in training"),
    "loftq_config": Field("settings of an initialisation"),
    "eva_config": Field("settings of an initialisation"),
    "corda_config": Field("settings of an initialisation"),
    "lora_ga_config": Field("settings of an initialisation"),
    "qalora_group_size": Field("a setting of QALoRA"),
    "megatron_config": Field("parallel layers in training"),
    "megatron_core": Field("parallel layers in training"),
    "lora_dtype": Field("dtype in training (ms-swift)"),
    "lorap_lr_ratio": Field("learning rates (ms-swift)"),
    "lorap_emb_lr": Field("learning rates (ms-swift)"),
    "merge_weights": Field("a setting of a running model (PEFT before 0.3)"),
    # changes the mathematics, and is not read
    "init_lora_weights": Field("an initialisation that also changes the base", _has_no_undoing, _INITIAL),
    "arrow_config": Field("Arrow: routes tokens, so that there is nothing to merge", _is_set),
    "alora_invocation_tokens": Field("aLoRA: acts after these tokens only, so that it cannot be merged"),
    "enable_lora": Field("merged linear layers of PEFT before 0.3: B is a grouped convolution", _set),
}


def refusals(config: Mapping[str, object]) -> list[tuple[str, str, str | None]]:
    """Every field whose value cannot be read: its name, a line that says so, and a hint."""
    refused: list[tuple[str, str, str | None]] = []
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        if (why := kinds.refusal(kind)) is not None:
            refused.append(("peft_type", f"peft_type = {shown_value(kind)}: {why}", None))
        # The fields of another kind of adapter are that kind's business.
        if why is None:
            known = kinds.known_fields(kind)
            refused += [_unknown(name, value) for name, value in config.items() if value and name not in FIELDS | known]
        return refused
    for name, value in config.items():
        field = FIELDS.get(name)
        if field is None:
            if value:
                refused.append(_unknown(name, value))
        elif field.refused is not None and field.refused(value):
            refused.append((name, f"{name} = {shown_value(value)}: {field.meaning}", field.hint))
    return refused


def _unknown(name: str, value: object) -> tuple[str, str, str]:
    line = f"{quoted(name)} = {shown_value(value)}: not a field known here, and it may change the result"
    return name, line, "if it is harmless, remove it from adapter_config.json"


def shown_value(value: object) -> str:
    """A value as it stands in the file, on one line and not too long."""
    return quoted(json.dumps(value, ensure_ascii=False))[1:-1]


@dataclass(frozen=True)
class Scaling:
    """The fields that the scale is made of. `alpha` is None if the config says nothing.

    An alpha of 0 is kept as it is: PEFT trains and changes nothing with it, so the writer of the file did not know the
    alpha.
    """

    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool


def scaling(config: Mapping[str, object], *, subject: str = "adapter_config.json") -> Scaling:
    """The fields that the scale is made of.

    Args:
        config: The fields of a LoraConfig.
        subject: What holds them, for the message.

    Raises:
        FormatError: Invalid values, all of them named.
    """
    wrong: list[str] = []

    def rank(subject: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
            wrong.append(f"{subject} = {shown_value(value)}: a rank is a whole number from 1 to {MAX_RANK:,}")
            return 1
        return value

    def alpha(subject: str, value: object) -> float:
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            wrong.append(f"{subject} = {shown_value(value)}: an alpha is a finite number")
        return number

    def mapping(subject: str) -> Mapping[str, object]:
        value = config.get(subject)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            wrong.append(f"{subject} = {shown_value(value)}: an object of names and numbers is needed")
            return {}
        return value

    def flag(subject: str) -> bool:
        value = config.get(subject, False)
        if value is not None and not isinstance(value, bool):
            wrong.append(f"{subject} = {shown_value(value)}: true or false is needed")
        return bool(value)

    result = Scaling(
        rank=rank("r", config["r"]) if "r" in config else None,
        alpha=next((alpha(name, config[name]) for name in ("lora_alpha", "alpha") if name in config), None),
        ranks={key: rank(f"rank_pattern[{quoted(key)}]", value) for key, value in mapping("rank_pattern").items()},
        alphas={key: alpha(f"alpha_pattern[{quoted(key)}]", value) for key, value in mapping("alpha_pattern").items()},
        rslora=flag("use_rslora"),
    )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        wrong.append(f"bias = {shown_value(config['bias'])}: none, all or lora_only is needed")
    for name in ("modules_to_save",):
        value = config.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            wrong.append(f"{name} = {shown_value(value)}: a list of names is needed")
    if wrong:
        raise FormatError(
            f"{subject} has {len(wrong)} invalid value{'s' if len(wrong) > 1 else ''}",
            details=wrong[:20],
            defect="config-values",
        )
    return result


def fan_in_fan_out(config: Mapping[str, object]) -> bool | None:
    """What the config says of how the base stores square weights; None if it does not say."""
    if config.get("peft_type") == "HIRA":
        return None  # PEFT transposes the weight where it must, and saves the flag as the user had it
    flag = config.get("fan_in_fan_out")
    return flag if isinstance(flag, bool) else None


# No model has as many layers; a config that says so is damaged.
_MOST_LAYERS = 100_000


def layer_replication(config: Mapping[str, object]) -> tuple[tuple[int, int], ...]:
    """Ranges of layers of the base that the trained model repeats; none where it has those of the base.

    Raises:
        FormatError: Ranges that name no layers.
    """
    ranges = config.get("layer_replication")
    if not ranges:
        return ()
    entries = ranges if isinstance(ranges, list | tuple) else ()
    pairs = [(p[0], p[1]) for p in entries if isinstance(p, list | tuple) and len(p) == 2]
    layers = tuple((start, stop) for start, stop in pairs if type(start) is int and type(stop) is int)
    if (
        len(layers) != len(entries)
        or not layers
        or any(not 0 <= start < stop <= _MOST_LAYERS for start, stop in layers)
        or sum(stop - start for start, stop in layers) > _MOST_LAYERS
    ):
        raise FormatError(
            f"adapter_config.json has layer_replication = {shown_value(ranges)}, which names no layers",
            hint="it lists [first layer, layer after the last]; where the base's own layers were trained, remove it",
            defect="config-values",
        )
    return layers


def invocation_tokens(config: Mapping[str, object]) -> tuple[int, ...]:
    """The tokens after which an aLoRA acts; none where an adapter acts on all.

    Raises:
        FormatError: What is no list of numbers of tokens.
    """
    tokens = config.get("alora_invocation_tokens")
    if not tokens:
        return ()
    numbers = tuple(token for token in tokens if type(token) is int and token >= 0) if isinstance(tokens, list) else ()
    if not isinstance(tokens, list) or len(numbers) != len(tokens):
        raise FormatError(
            f"adapter_config.json has alora_invocation_tokens = {shown_value(tokens)}, which are no numbers of tokens",
            defect="config-values",
        )
    return numbers


def base_class(config: Mapping[str, object]) -> str | None:
    """The class of the model that was trained, after its module where that is known."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if not isinstance(mapping, Mapping) or not isinstance(name, str) or not name:
        return None
    library = mapping.get("parent_library")
    return f"{library}.{name}" if isinstance(library, str) and library else name


def trained_by_unsloth(config: Mapping[str, object]) -> bool:
    """Whether Unsloth has left its mark, beside the fields or in the record of the base's class."""
    mapping = config.get("auto_mapping")
    return bool(config.get("unsloth_fixed") or (isinstance(mapping, Mapping) and mapping.get("unsloth_fixed")))


def task_type(config: Mapping[str, object]) -> str | None:
    """The task of the model that was trained, as PEFT spells it."""
    task = config.get("task_type")
    return task if isinstance(task, str) and task else None


def saved_modules(config: Mapping[str, object]) -> list[str]:
    """The entries of `modules_to_save`, with those that PEFT adds by itself for a task."""
    value = config.get("modules_to_save")
    entries = [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        entries += [head for head in ("classifier", "score") if head not in entries]
    return entries


def covers(entry: str, module: str) -> bool:
    """Whether PEFT finds `module`, or a module that it is part of, by an entry of `modules_to_save`.

    PEFT compares ends of names, not whole segments: `score` also finds `my_score`.
    """
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(entry) for n in range(len(parts)))
