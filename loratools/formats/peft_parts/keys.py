"""How PEFT spells the names of tensors, parsed by their dots.

    base_model.model.<module>.lora_A[.<adapter>].weight         a factor
    base_model.model.<module>[.modules_to_save.<adapter>].weight   a weight that is replaced
    base_model.model.<module>.base_layer.weight                 the same, of a module that has factors too
    base_model.model.<module>.lora_embedding_A[.<adapter>]      a factor of an embedding; likewise lora_magnitude_vector

What PEFT stores for other kinds is in one table, so that it can be refused by name where it does not belong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PREFIX = "base_model.model."
# The ends of nearly all keys, and the parts that they are.
_USUAL_ENDS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}
_USUAL_END_LENGTH = len(".lora_A.weight")


@dataclass(frozen=True)
class Factor:
    """A key that names one part of an update of a module.

    `part` is `lora_A`, `lora_B`, `lora_B.bias`, ...; `adapter` is the adapter's name where the key has one.

    depth: of fused experts with several parameters, how many wrappers this one is inside of.
    """

    module: str
    part: str
    adapter: str | None
    depth: int = 0


@dataclass(frozen=True)
class WholeWeight:
    """A whole weight; `spelling` is `plain`, or the segment that was taken out of the key.

    `original_module` is the base's own copy of a weight that is replaced; `tokens` are some of its rows.
    """

    name: str
    spelling: str
    adapter: str | None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Foreign:
    """A tensor of a kind that is not read."""

    kind: str


Parsed = Factor | WholeWeight | Foreign


@dataclass(frozen=True)
class ParsedKeys:
    """What the keys of one file mean.

    `pairs`: the keys of lora_A and lora_B, by module, where these two are all the factors that any module of the file
    has. Nearly every adapter is such a file, and one of every expert has 90,000 of them. `others`: what each other key
    means.
    """

    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    others: Mapping[str, Parsed] = field(default_factory=dict)

    def __len__(self) -> int:
        return 2 * len(self.pairs) + len(self.others)

    def every(self, keys: Iterable[str]) -> dict[str, Parsed]:
        """What each of these keys of the file means, pairs as two factors."""
        factors = {
            key: Factor(module, part, None)
            for module, pair in self.pairs.items()
            for key, part in zip(pair, _USUAL_ENDS.values(), strict=True)
        }
        return {key: factors[key] if key in factors else self.others[key] for key in keys}


def parse_keys(keys: Iterable[str]) -> ParsedKeys:
    """What the keys of one file mean, pairs of factors apart."""
    keys = list(keys)
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    others: list[str] = []
    first_end, second_end = _USUAL_ENDS
    for key in keys:
        module = key[len(PREFIX) : -_USUAL_END_LENGTH]
        if not key.startswith(PREFIX) or not module or "base_" in module:
            others.append(key)
        elif key.endswith(first_end):
            first[module] = key
        elif key.endswith(second_end):
            second[module] = key
        else:
            others.append(key)
    parsed = parse_all(others)
    if first.keys() != second.keys() or any(isinstance(meaning, Factor) for meaning in parsed.values()):
        return ParsedKeys(others=parse_all(keys))
    return ParsedKeys({module: (key, second[module]) for module, key in first.items()}, parsed)


def parse_all(keys: Iterable[str]) -> dict[str, Parsed]:
    """What the keys of one file mean."""
    keys = list(keys)
    parsed = {key: parse(key) for key in keys}
    if any(isinstance(meaning, Factor) and meaning.adapter is not None for meaning in parsed.values()):
        # Not saved by PEFT but dumped: then replaced modules have the adapter's name in their keys as well.
        parsed |= {key: parse(key, dumped=True) for key in keys if "modules_to_save" in key}
    return parsed


def parse(key: str, *, dumped: bool = False) -> Parsed:
    """What a key means. Everything but the names in the table below is a whole weight."""
    part = _USUAL_ENDS.get(key[-_USUAL_END_LENGTH:])
    if part is not None and key.startswith(PREFIX):
        module = key[len(PREFIX) : -_USUAL_END_LENGTH]
        # `base_model` and `base_layer` are taken out below.
        if module and "base_" not in module:
            return Factor(module, part, None)
    parts = key.split(".")
    # Twice where a PeftModel was wrapped in another.
    while parts[:2] == ["base_model", "model"] and len(parts) > 2:
        parts = parts[2:]
    for at in range(len(parts) - 1, -1, -1):
        segment = parts[at]
        if segment in ("lora_A", "lora_B"):
            return _factor(parts[:at], segment, parts[at + 1 :])
        if segment in BARE_PARTS and len(parts) - at <= 3:
            tail = [part for part in parts[at + 1 :] if part != "weight"]
            return Factor(".".join(_unwrapped(parts[:at])[0]), segment, tail[0] if tail else None)
        if segment in FOREIGN:
            return Foreign(FOREIGN[segment])
        if segment.startswith("lora_") and at < len(parts) - 1 and parts[-1] == "weight" and at >= len(parts) - 3:
            # `lora_down` and the like are other formats'; `lora_x` may also be a module's own name further up.
            return Foreign(f"'{segment}', which no PEFT known here writes")
    return _whole_weight(parts, dumped)


def _factor(module: list[str], part: str, tail: list[str]) -> Factor | Foreign:
    names, depth = _unwrapped(module)
    match tail:
        case ["weight"]:
            return Factor(".".join(names), part, None, depth)
        case [adapter, "weight"]:
            return Factor(".".join(names), part, adapter, depth)
        case ["bias"] if part == "lora_B":
            return Factor(".".join(names), "lora_B.bias", None, depth)
        case [adapter, "bias"] if part == "lora_B":
            return Factor(".".join(names), "lora_B.bias", adapter, depth)
        case _:
            return Foreign(f"'{part}' that does not end in '.weight', which is not PEFT's spelling")


def _unwrapped(module: list[str]) -> tuple[list[str], int]:
    """The module without the wrappers around it, and how many more it has inside: those of other parameters.

    The wrapper around nn.MultiheadAttention has that of its out_proj inside.
    """
    depth = 0
    while module[-1:] == ["base_layer"]:
        module, depth = module[:-1], depth + 1
    return [part for part in module if part != "base_layer"], depth


def _whole_weight(parts: list[str], dumped: bool) -> WholeWeight | Foreign:
    spelling, adapter = "plain", None
    for segment in ("modules_to_save", "original_module"):
        if segment in parts[:-1]:
            at = parts.index(segment)
            spelling = segment
            # With bias="all" PEFT saves `classifier.modules_to_save.dense.bias`, where `dense` is no adapter's name.
            if segment == "modules_to_save" and at + 2 < len(parts) and (dumped or parts[at + 1] == "default"):
                adapter = parts.pop(at + 1)
            del parts[at]
    if parts[-2:-1] == ["base_layer"]:
        spelling = "base_layer"
        del parts[-2]
    parts = [part for part in parts if part != "base_layer"]
    if parts[-1] == "trainable_tokens_delta":
        module = [part for part in parts[:-1] if part != "token_adapter"]
        return WholeWeight(".".join([*module, "weight"]), "tokens", adapter)
    return WholeWeight(".".join(parts), spelling, adapter)


_BY_KIND: dict[str, tuple[str, ...]] = {
    "VeLoRA": ("lora_velora_embed",),
    "MonteCLoRA": ("lora_monteclora_sampler",),
    "Arrow routing": ("lora_arrow",),
    "AdaLoRA": ("lora_E", "ranknum"),
    "trainable tokens": ("trainable_tokens_original", "token_indices"),
    "AdaMSS": ("adamss_A", "adamss_B"),
    "BEFT": ("beft_bias",),
    "BOFT": ("boft_R", "boft_s"),
    "C3A": ("c3a_kernel",),
    "DEFT": ("deft_P", "deft_R"),
    "DeLoRA": ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    "FourierFT": ("fourierft_spectrum",),
    "FRoD": ("frod_lambda_l", "frod_lambda_s_values", "frod_V", "frod_U", "frod_s_indices"),
    "GLoRA": ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
    "GraLoRA": ("gralora_A", "gralora_A_general", "gralora_B", "gralora_B_general"),
    "HiRA": ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "HRA": ("hra_u",),
    "IA3": ("ia3_l",),
    "Lily": ("lily_A", "lily_B", "lily_router"),
    "LN tuning": ("ln_tuning_layers",),
    "LoHa": ("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_t1", "lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "MiSS": ("miss_block",),
    "Bone": ("bone_block",),
    "OFT": ("oft_R", "oft_r", "oft_s", "oft_embedding_R"),
    "OSF": ("osf_svd_params",),
    "PEANuT": ("peanut_A", "peanut_B", "peanut_decoders", "peanut_encoders"),
    "Poly": ("poly_lora_A", "poly_lora_B", "poly_router"),
    "prompt learning": ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"),
    "adaption prompt": ("adaption_prompt", "adaption_gate"),
    "PSOFT": ("psoft_R",),
    "PVeRA": ("pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"),
    "RandLoRA": ("randlora_gamma", "randlora_lambda", "randlora_A", "randlora_B"),
    "RoAd": ("road_alpha", "road_theta"),
    "Shadow": ("shadow_down", "shadow_dropout", "shadow_up", "shadow_update_gate", "shadow_update_transform"),
    "SHiRA": ("shira_weight", "shira_indices"),
    "SuperTuning": ("supertuning_lora_A", "supertuning_lora_B", "supertuning_values", "supertuning_indices"),
    "TinyLoRA": ("tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P"),
    "UniLoRA": ("unilora_theta_d",),
    "VB-LoRA": ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "WaveFT": ("waveft_spectrum",),
    "X-LoRA": ("internal_xlora_classifier",),
}
# Kinds of tensors that belong to variants of LoRA and play no part once it is trained, and the field that tells.
OF_TRAINING = {"VeLoRA": "velora_config", "MonteCLoRA": "monteclora_config"}
# What is stored beside A and B, without `.weight`.
BARE_PARTS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag")
# Found where the config says that it is LoRA, these are refused.
FOREIGN: dict[str, str] = {segment: kind for kind, segments in _BY_KIND.items() for segment in segments}
