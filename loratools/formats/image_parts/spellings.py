"""How files of image models spell the tensors of a module: what follows its name, in one table for all kinds.

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight    LoRA, factor A       kohya, LyCORIS, OneTrainer
    transformer.proj_out.lora_A.weight                           LoRA, factor A       PEFT, diffusers, ai-toolkit
    ….hada_w1_a                                                  LoHa                 LyCORIS

Sources: the `weight_list` of each module of LyCORIS (f49d30d), and diffusers, ComfyUI and OneTrainer as read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from loratools.tensors.lazy import LazyTensor

# kind, by its file in `updates/` where it has one -> suffix -> part. A part may be spelled in several ways, and belongs
# to one kind; `any` goes with each.
KINDS: Mapping[str, Mapping[str, str]] = {
    "any": {
        ".alpha": "alpha",
        ".dora_scale": "magnitude",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector.default.weight": "magnitude",
        ".magnitude": "magnitude",
    },
    "lora": {
        ".lora_down.weight": "A",
        ".lora_up.weight": "B",
        ".lora_mid.weight": "mid",
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_A.default.weight": "A",
        ".lora_B.default.weight": "B",
        ".lora_A": "A",
        ".lora_B": "B",
        ".lora.down.weight": "A",
        ".lora.up.weight": "B",
        ".lora_linear_layer.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        "_lora.down.weight": "A",
        "_lora.up.weight": "B",
        ".lora_B.bias": "bias",
        ".lora_B.default.bias": "bias",
    },
    "loha": {f".hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f".lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    "lycoris-glora": {f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")} | {".bm.weight": "core"},
    "lycoris-oft": {".oft_blocks": "blocks", ".rescale": "rescale"},
    "onetrainer-oft": {".oft_R.weight": "R", ".oft_R.scaled_oft": "scaled"},
    "tlora": {".q_layer.weight": "q", ".p_layer.weight": "p", ".lambda_layer": "lambda"},
    "ia3": {".on_input": "on_input"},
    "full": {".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff", ".w_norm": "diff", ".b_norm": "diff_b"},
    "replacement": {".set_weight": "weight"},
    "padding": {".reshape_weight": "shape"},
}
# LightX2V's spelling of a difference of the parameter `modulation` that a block of Wan has: `BLOCK.diff_m`.
_OF_MODULATION, _MODULATION = ".diff_m", ".modulation"
_SUFFIXES = {suffix: (kind, part) for kind, parts in KINDS.items() for suffix, part in parts.items()}
_LONGEST = tuple(sorted(_SUFFIXES, key=len, reverse=True))
# What follows the last dot: of a name that ends as no part does, the set says so at once.
_LAST_PARTS = frozenset(suffix.rpartition(".")[2] for suffix in _SUFFIXES)


@dataclass
class Module:
    """What a file has for one module: `parts` and the keys that they are stored under."""

    name: str
    parts: dict[str, LazyTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)

    @property
    def stored_name(self) -> str:
        """The name of the file, letter by letter: with the suffix where that names the parameter."""
        difference = self.keys.get("diff", "")
        return difference if difference.endswith(_OF_MODULATION) else self.name

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Outputs and inputs, where the parts tell them."""
        if self.kinds >= {"lora"}:
            return self._product("B", "A")
        if self.kinds >= {"loha"}:
            return self._product("w1_a", "w1_b") if "t1" not in self.parts else (None, None)
        if self.kinds >= {"lokr"}:
            (m, n), (p, q) = self._factor("w1"), self._factor("w2")
            return (None if m is None or p is None else m * p), (None if n is None or q is None else n * q)
        diff = self.parts.get("diff")
        return (diff.shape[0], diff.shape[1]) if diff is not None and len(diff.shape) > 1 else (None, None)

    def _factor(self, name: str) -> tuple[int | None, int | None]:
        """Rows and columns of a factor of a Kronecker product, stored whole or as a product; not of a core's."""
        stored = self.parts.get(name)
        if stored is not None:
            return (stored.shape[0], stored.shape[1]) if len(stored.shape) > 1 else (None, None)
        return self._product(f"{name}_a", f"{name}_b") if name.replace("w", "t") not in self.parts else (None, None)

    def _product(self, left: str, right: str) -> tuple[int | None, int | None]:
        a, b = self.parts.get(left), self.parts.get(right)
        if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
            return None, None
        return a.shape[0], b.shape[1]


# Each format that looks at a file asks of its keys, and files of a kind have the same keys.
@lru_cache(maxsize=1 << 14)
def split(key: str) -> tuple[str, str, str] | None:
    """Module, kind and part of a key; None if no spelling of a part ends it."""
    # Asked at once of keys that end as none of them does: nearly every key of a model.
    if key.rpartition(".")[2] not in _LAST_PARTS or not key.endswith(_LONGEST):
        return None
    for suffix in _LONGEST:
        if key.endswith(suffix) and len(key) > len(suffix):
            module = key[: -len(suffix)] + (_MODULATION if suffix == _OF_MODULATION else "")
            return (module, *_SUFFIXES[suffix])
    return None


def difference_key(name: str) -> str:
    """The key of a whole difference of a module, or of a parameter: of one that is named with its suffix, its name."""
    return name if name.endswith(_OF_MODULATION) else f"{name}.diff"


def is_learnt_token(key: str) -> bool:
    """Whether the key is an embedding of textual inversion: bundled with a LoRA (`bundle_emb.WORD.clip_l`), under its
    token (`<s1>`), or in a file of its own (`emb_params`, `clip_l`, `clip_g`)."""
    token = key.startswith("<") and key.endswith(">")
    return token or key.startswith("bundle_emb.") or key in ("emb_params", "clip_l", "clip_g", "t5xxl")


def is_spelled(key: str) -> bool:
    """Whether the key ends as a part of an update does, and not only as one that goes with any kind."""
    name_kind_part = split(key)
    return name_kind_part is not None and name_kind_part[1] != "any"


def grouped(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, Module], list[str], list[str]]:
    """Modules by name; keys that are no part of one; keys that say again what another has said."""
    modules: dict[str, Module] = {}
    unparsed: list[str] = []
    twice: list[str] = []
    for key, tensor in tensors.items():
        name_kind_part = split(key)
        if name_kind_part is None:
            unparsed.append(key)
            continue
        name, kind, part = name_kind_part
        module = modules.setdefault(name, Module(name))
        if part in module.parts:
            twice.append(key)
            continue
        module.parts[part] = tensor
        module.keys[part] = key
        if kind != "any":
            module.kinds.add(kind)
    _with_ia3(modules, unparsed, tensors)
    return modules, unparsed, twice


def _with_ia3(modules: Mapping[str, Module], unparsed: list[str], tensors: Mapping[str, LazyTensor]) -> None:
    # Its vector is called `weight`, like anything else: it counts only beside `on_input`.
    scales = set()
    for key in unparsed:
        if not key.endswith(".weight"):
            continue
        module = modules.get(key.removesuffix(".weight"))
        if module is not None and module.kinds == {"ia3"}:
            module.parts["scales"] = tensors[key]
            module.keys["scales"] = key
            scales.add(key)
    if scales:
        unparsed[:] = [key for key in unparsed if key not in scales]
