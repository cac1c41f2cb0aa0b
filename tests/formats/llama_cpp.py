"""llama.cpp as an oracle: a base of its own format that a test writes, and what its server computes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

xllamacpp = peers.load("xllamacpp")

VOCABULARY = 263
PROMPT = [1, 70, 100, 33, 259, 90, 200, 14]
# The end of the text, or half of a character, would leave nothing to compare: a test gives their rows of the head
# zeros, so that these are never the most likely.
NOT_COMPARED = [0, 1, 2, *range(3 + 128, 3 + 256)]


def add_vocabulary(writer: Any) -> None:
    """A tokenizer of bytes."""
    writer.add_vocab_size(VOCABULARY)
    bytes_ = [f"<0x{i:02X}>".encode() for i in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *bytes_, b"a", b"b", "▁".encode(), b"c"])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def computed(base: Path, adapter: Path | None = None) -> Tensor:
    """Logarithms of the probabilities of the next token."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": PROMPT, "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0, "cache_prompt": False}
    answer = xllamacpp.Server(params).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    found = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def next_token(model: Any) -> Tensor:
    """The same of a model of transformers or PEFT."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), -1)
