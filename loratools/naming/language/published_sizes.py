"""The sizes of published language models, by which an adapter that names no base tells what model it is for.

The numbers are those of `litgpt/config.py` of Lightning-AI/litgpt at 2685705, which states them for each repository on
the hub; the vocabulary is the number of rows that the embedding has, padding included. Names of modules are those of
transformers. Fine-tunes and instruct versions have the sizes of their models and are not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ModelSizes(NamedTuple):
    """The sizes of one published model, or of several that have the same ones.

    Attributes:
        names: What people call it, by its repository on the hub.
        style: How its modules are called, a key of `MODULES`.
        layers: How many blocks it has.
        hidden: Width between the blocks.
        queries: Outputs of the projection of queries, of all heads.
        keys: Outputs of that of keys, and of that of values.
        intermediate: Width inside the feed-forward layer, or inside each expert.
        vocabulary: Rows of its embedding.
    """

    names: tuple[str, ...]
    style: str
    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int

    def modules(self) -> Mapping[str, tuple[int, int]]:
        """The linear layers of one block: (outputs, inputs) by the name within the block."""
        width = {
            "hidden": self.hidden,
            "queries": self.queries,
            "keys": self.keys,
            "intermediate": self.intermediate,
            "qkv": self.queries + 2 * self.keys,
            "gate and up": 2 * self.intermediate,
        }
        return {name: (width[out], width[inner]) for name, (out, inner) in MODULES[self.style].items()}


_ATTENTION = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
}
# Style -> name of a module in its block -> outputs and inputs; `*` for the number of an expert.
MODULES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "llama": {
        **_ATTENTION,
        "self_attn.o_proj": ("hidden", "queries"),
        "mlp.gate_proj": ("intermediate", "hidden"),
        "mlp.up_proj": ("intermediate", "hidden"),
        "mlp.down_proj": ("hidden", "intermediate"),
    },
    "mixtral": {
        **_ATTENTION,
        "self_attn.o_proj": ("hidden", "queries"),
        "block_sparse_moe.experts.*.w1": ("intermediate", "hidden"),
        "block_sparse_moe.experts.*.w2": ("hidden", "intermediate"),
        "block_sparse_moe.experts.*.w3": ("intermediate", "hidden"),
    },
    "qwen3_moe": {
        **_ATTENTION,
        "self_attn.o_proj": ("hidden", "queries"),
        "mlp.experts.*.gate_proj": ("intermediate", "hidden"),
        "mlp.experts.*.up_proj": ("intermediate", "hidden"),
        "mlp.experts.*.down_proj": ("hidden", "intermediate"),
    },
    "phi": {
        **_ATTENTION,
        "self_attn.dense": ("hidden", "queries"),
        "mlp.fc1": ("intermediate", "hidden"),
        "mlp.fc2": ("hidden", "intermediate"),
    },
    "phi3": {
        "self_attn.qkv_proj": ("qkv", "hidden"),
        "self_attn.o_proj": ("hidden", "queries"),
        "mlp.gate_up_proj": ("gate and up", "hidden"),
        "mlp.down_proj": ("hidden", "intermediate"),
    },
    "gpt_neox": {
        "attention.query_key_value": ("qkv", "hidden"),
        "attention.dense": ("hidden", "queries"),
        "mlp.dense_h_to_4h": ("intermediate", "hidden"),
        "mlp.dense_4h_to_h": ("hidden", "intermediate"),
    },
    "falcon": {
        "self_attention.query_key_value": ("qkv", "hidden"),
        "self_attention.dense": ("hidden", "queries"),
        "mlp.dense_h_to_4h": ("intermediate", "hidden"),
        "mlp.dense_4h_to_h": ("hidden", "intermediate"),
    },
}

# Names, style, layers, hidden, queries, keys, intermediate, vocabulary.
PUBLISHED: tuple[ModelSizes, ...] = (
    ModelSizes(("Llama-3-8B", "Llama-3.1-8B"), "llama", 32, 4096, 4096, 1024, 14336, 128256),
    ModelSizes(("Llama-3-70B", "Llama-3.1-70B", "Llama-3.3-70B"), "llama", 80, 8192, 8192, 1024, 28672, 128256),
    ModelSizes(("Llama-3.1-405B",), "llama", 126, 16384, 16384, 1024, 53248, 128256),
    ModelSizes(("Llama-3.2-1B",), "llama", 16, 2048, 2048, 512, 8192, 128256),
    ModelSizes(("Llama-3.2-3B",), "llama", 28, 3072, 3072, 1024, 8192, 128256),
    ModelSizes(("Llama-2-7b", "open_llama_7b"), "llama", 32, 4096, 4096, 4096, 11008, 32000),
    ModelSizes(("Llama-2-13b", "open_llama_13b"), "llama", 40, 5120, 5120, 5120, 13824, 32000),
    ModelSizes(("Llama-2-70b",), "llama", 80, 8192, 8192, 1024, 28672, 32000),
    ModelSizes(("open_llama_3b",), "llama", 26, 3200, 3200, 3200, 8640, 32000),
    ModelSizes(("CodeLlama-7b",), "llama", 32, 4096, 4096, 4096, 11008, 32016),
    ModelSizes(("CodeLlama-13b",), "llama", 40, 5120, 5120, 5120, 13824, 32016),
    ModelSizes(("CodeLlama-34b",), "llama", 48, 8192, 8192, 1024, 22016, 32000),
    ModelSizes(("CodeLlama-70b",), "llama", 80, 8192, 8192, 1024, 28672, 32016),
    ModelSizes(("TinyLlama-1.1B",), "llama", 22, 2048, 2048, 256, 5632, 32000),
    ModelSizes(("Mistral-7B-v0.1", "Mistral-7B-v0.2"), "llama", 32, 4096, 4096, 1024, 14336, 32000),
    ModelSizes(("Mistral-7B-v0.3", "Mathstral-7B-v0.1"), "llama", 32, 4096, 4096, 1024, 14336, 32768),
    ModelSizes(("Mistral-Large-2407", "Mistral-Large-2411"), "llama", 88, 12288, 12288, 1024, 28672, 32768),
    ModelSizes(("Mixtral-8x7B",), "mixtral", 32, 4096, 4096, 1024, 14336, 32000),
    ModelSizes(("Mixtral-8x22B",), "mixtral", 56, 6144, 6144, 1024, 16384, 32768),
    ModelSizes(("Qwen2.5-0.5B",), "llama", 24, 896, 896, 128, 4864, 151936),
    ModelSizes(("Qwen2.5-1.5B",), "llama", 28, 1536, 1536, 256, 8960, 151936),
    ModelSizes(("Qwen2.5-3B",), "llama", 36, 2048, 2048, 256, 11008, 151936),
    ModelSizes(("Qwen2.5-7B",), "llama", 28, 3584, 3584, 512, 18944, 152064),
    ModelSizes(("Qwen2.5-14B",), "llama", 48, 5120, 5120, 1024, 13824, 152064),
    ModelSizes(("Qwen2.5-32B", "QwQ-32B"), "llama", 64, 5120, 5120, 1024, 27648, 152064),
    ModelSizes(("Qwen2.5-72B",), "llama", 80, 8192, 8192, 1024, 29568, 152064),
    ModelSizes(("Qwen3-0.6B",), "llama", 28, 1024, 2048, 1024, 3072, 151936),
    ModelSizes(("Qwen3-1.7B",), "llama", 28, 2048, 2048, 1024, 6144, 151936),
    ModelSizes(("Qwen3-4B",), "llama", 36, 2560, 4096, 1024, 9728, 151936),
    ModelSizes(("Qwen3-8B",), "llama", 36, 4096, 4096, 1024, 12288, 151936),
    ModelSizes(("Qwen3-14B",), "llama", 40, 5120, 5120, 1024, 17408, 151936),
    ModelSizes(("Qwen3-32B",), "llama", 64, 5120, 8192, 1024, 25600, 151936),
    ModelSizes(("Qwen3-30B-A3B",), "qwen3_moe", 48, 2048, 4096, 512, 768, 151936),
    ModelSizes(("Qwen3-235B-A22B",), "qwen3_moe", 94, 4096, 8192, 512, 1536, 151936),
    ModelSizes(("Gemma-2b",), "llama", 18, 2048, 2048, 256, 16384, 256000),
    ModelSizes(("Gemma-7b", "CodeGemma-7b"), "llama", 28, 3072, 4096, 4096, 24576, 256000),
    ModelSizes(("Gemma-2-2b",), "llama", 26, 2304, 2048, 1024, 9216, 256000),
    ModelSizes(("Gemma-2-9b",), "llama", 42, 3584, 4096, 2048, 14336, 256000),
    ModelSizes(("Gemma-2-27b",), "llama", 46, 4608, 4096, 2048, 36864, 256000),
    ModelSizes(("Gemma-3-1b",), "llama", 26, 1152, 1024, 256, 6912, 262144),
    ModelSizes(("Gemma-3-4b",), "llama", 34, 2560, 2048, 1024, 10240, 262144),
    ModelSizes(("Gemma-3-12b",), "llama", 48, 3840, 4096, 2048, 15360, 262144),
    ModelSizes(("Gemma-3-27b",), "llama", 62, 5376, 4096, 2048, 21504, 262144),
    ModelSizes(("SmolLM2-135M",), "llama", 30, 576, 576, 192, 1536, 49152),
    ModelSizes(("SmolLM2-360M",), "llama", 32, 960, 960, 320, 2560, 49152),
    ModelSizes(("SmolLM2-1.7B",), "llama", 24, 2048, 2048, 2048, 8192, 49152),
    ModelSizes(("OLMo-1B",), "llama", 16, 2048, 2048, 2048, 8192, 50304),
    ModelSizes(("OLMo-7B",), "llama", 32, 4096, 4096, 4096, 11008, 50304),
    ModelSizes(("OLMo-2-7B",), "llama", 32, 4096, 4096, 4096, 11008, 100352),
    ModelSizes(("OLMo-2-13B",), "llama", 40, 5120, 5120, 5120, 13824, 100352),
    ModelSizes(("Falcon3-1B",), "llama", 18, 2048, 2048, 1024, 8192, 131072),
    ModelSizes(("Falcon3-3B",), "llama", 22, 3072, 3072, 1024, 9216, 131072),
    ModelSizes(("Falcon3-7B",), "llama", 28, 3072, 3072, 1024, 23040, 131072),
    ModelSizes(("Falcon3-10B",), "llama", 40, 3072, 3072, 1024, 23040, 131072),
    ModelSizes(("stablelm-3b-4e1t", "stable-code-3b"), "llama", 32, 2560, 2560, 2560, 6912, 50304),
    ModelSizes(("salamandra-2b",), "llama", 24, 2048, 2048, 2048, 5440, 256000),
    ModelSizes(("salamandra-7b",), "llama", 32, 4096, 4096, 1024, 11008, 256000),
    ModelSizes(("phi-1_5",), "phi", 24, 2048, 2048, 2048, 8192, 51200),
    ModelSizes(("phi-2",), "phi", 32, 2560, 2560, 2560, 10240, 51200),
    ModelSizes(("Phi-3-mini", "Phi-3.5-mini"), "phi3", 32, 3072, 3072, 3072, 8192, 32064),
    ModelSizes(("phi-4",), "phi3", 40, 5120, 5120, 1280, 17920, 100352),
    ModelSizes(("Phi-4-mini",), "phi3", 32, 3072, 3072, 1024, 8192, 200064),
    ModelSizes(("pythia-14m",), "gpt_neox", 6, 128, 128, 128, 512, 50304),
    ModelSizes(("pythia-31m",), "gpt_neox", 6, 256, 256, 256, 1024, 50304),
    ModelSizes(("pythia-70m",), "gpt_neox", 6, 512, 512, 512, 2048, 50304),
    ModelSizes(("pythia-160m",), "gpt_neox", 12, 768, 768, 768, 3072, 50304),
    ModelSizes(("pythia-410m",), "gpt_neox", 24, 1024, 1024, 1024, 4096, 50304),
    ModelSizes(("pythia-1b",), "gpt_neox", 16, 2048, 2048, 2048, 8192, 50304),
    ModelSizes(("pythia-1.4b",), "gpt_neox", 24, 2048, 2048, 2048, 8192, 50304),
    ModelSizes(("pythia-2.8b",), "gpt_neox", 32, 2560, 2560, 2560, 10240, 50304),
    ModelSizes(("pythia-6.9b",), "gpt_neox", 32, 4096, 4096, 4096, 16384, 50432),
    ModelSizes(("pythia-12b",), "gpt_neox", 36, 5120, 5120, 5120, 20480, 50688),
    ModelSizes(("falcon-7b",), "falcon", 32, 4544, 4544, 64, 18176, 65024),
    ModelSizes(("falcon-40b",), "falcon", 60, 8192, 8192, 512, 32768, 65024),
    ModelSizes(("falcon-180B",), "falcon", 80, 14848, 14848, 512, 59392, 65024),
)
