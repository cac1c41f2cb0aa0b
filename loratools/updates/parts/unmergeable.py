"""What PEFT trains that is no change of weights, or one that its file does not determine, by `peft_type`, and why."""

from __future__ import annotations

_TOKENS = "it trains tokens that are put before the input, and no weights, so there is nothing to merge"
_BY_INPUT = "it weighs its parts by what each input is, so that no one matrix stands for it"

REASONS: dict[str, str] = {
    "ADAMSS": (
        "it trains groups of rows, and which rows a group has is not stored: PEFT finds them anew by k-means on a "
        "randomised decomposition of the base in float32, which differs between machines and devices"
    ),
    "ADAPTION_PROMPT": "it adds attention to trained prompts, gated in each layer, which no change of weights gives",
    "CARTRIDGE": "it trains keys and values of a cache, and no weights, so there is nothing to merge",
    "CPT": _TOKENS,
    "LILY": f"its experts are shared by layers and chosen by a router: {_BY_INPUT}",
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "POLY": f"it mixes a stock of LoRAs by the task of each input: {_BY_INPUT}",
    "PREFIX_TUNING": "it trains keys and values that are put before those of the input, and no weights",
    "PROMPT_TUNING": _TOKENS,
    "PSOFT": (
        "it rotates within singular vectors of the base whose signs the base does not determine and the file does "
        "not store: the result changes with the device and library that decomposed the base in training"
    ),
    "P_TUNING": _TOKENS,
    "SHADOW": "it runs a small network beside the layers, with a state of its own, which no change of weights gives",
    "XLORA": f"it mixes several LoRAs by a classifier of the hidden states: {_BY_INPUT}; merge one of them",
}
