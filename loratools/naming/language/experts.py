"""Experts of a mixture: as modules of their own, by number, and as one stacked module.

model.layers.0.mlp.experts.7.gate_proj             Hugging Face before transformers 5, and most adapters
model.layers.0.mlp.switch_mlp.gate_proj            MLX, all experts in one tensor
model.layers.0.block_sparse_moe.experts.7.w1       Mixtral: w1 is gate, w3 is up, w2 is down

model.layers.0.mlp.experts.gate_up_proj            transformers 5 in memory, and some files: all experts fused
model.layers.0.mlp.experts.gate_up_projs.7         gpt-oss loaded in 4 bits by Unsloth: one linear layer for each

Fused, they are (experts, out, in), or (experts, in, out); gate and up one after the other, or their rows in turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Shapes
from loratools.tensors.views import Span

_STACK = re.compile(r"(?P<parent>.+)\.switch_mlp\.(?P<leaf>gate_proj|up_proj|down_proj)")
_PLAIN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ROLES = {**{role: role for role in _PLAIN.values()}, **_PLAIN}
_MIXTRAL = {plain: name for name, plain in _PLAIN.items()}
_MIXTRAL_PARENT = "block_sparse_moe"


class Expert(NamedTuple):
    """One matrix of one expert of a mixture.

    `parent` is the mixture's own name, `role` is gate_proj, up_proj or down_proj.
    """

    parent: str
    number: int
    role: str


def parse_expert(module: str) -> Expert | None:
    """One expert's module, by its Hugging Face name."""
    # By its dots and not by a pattern, which takes three times as long: a model has 45,000 of them.
    of_experts, _, leaf = module.rpartition(".")
    role = _ROLES.get(leaf)
    if role is None:
        return None
    experts, _, number = of_experts.rpartition(".")
    parent = experts.removesuffix(".experts")
    if not parent or parent == experts or len(number) > 6 or not (number.isascii() and number.isdigit()):
        return None
    return Expert(parent, int(number), role)


def role_of(leaf: str) -> str:
    """Return gate_proj, up_proj or down_proj, by the last part of a module's name in any of its spellings."""
    return _PLAIN.get(leaf, leaf)


def expert_name(expert: Expert) -> str:
    """The Hugging Face name of one expert's module."""
    of_mixtral = expert.parent.rpartition(".")[2] == _MIXTRAL_PARENT
    return f"{expert.parent}.experts.{expert.number}.{_MIXTRAL[expert.role] if of_mixtral else expert.role}"


def parse_stack(module: str) -> tuple[str, str] | None:
    """Parent and role of a stacked module of MLX."""
    parsed = _STACK.fullmatch(module)
    return None if parsed is None else (parsed["parent"], parsed["leaf"])


def stack_name(parent: str, role: str) -> str:
    """The name that MLX gives the stacked module."""
    return f"{parent}.switch_mlp.{role}"


_NUMBERED = re.compile(r"(?P<parent>.+)\.experts\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<number>\d{1,6})")


def parse_numbered(module: str) -> tuple[str, str, int] | None:
    """Parent, name of the fused parameter and number of an expert, of a layer that is one expert's part of it."""
    parsed = _NUMBERED.fullmatch(module)
    return None if parsed is None else (parsed["parent"], parsed["leaf"], int(parsed["number"]))


# Those whose layers say `is_transposed` in transformers 5, by `model_type`; the others compute with (out, in).
_IN_OUT = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})


def stored_in_out(model_type: str | None) -> bool:
    """Whether the layers of experts of such a model say that they keep (experts, in, out)."""
    return model_type in _IN_OUT


# Those whose files have experts one by one, and whose layers have them fused since transformers 5, by `model_type`.
_FUSED_IN_MEMORY = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm5_next_text", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba",
    "kimi_k25", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "longcat_flash", "mellum", "mimo_v2_flash", "minimax",
    "minimax_m2", "minimax_m3_vl", "mistral_large4_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
    "qwen4_exp_text", "solar_open",
})  # fmt: skip


def fused_in_memory(config: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """The fused experts that layers of transformers 5 have in place of those that are stored one by one."""
    if config.get("model_type") not in _FUSED_IN_MEMORY:
        return {}
    aliases = expert_aliases(config, shapes)
    return {name: alias for name, alias in aliases.items() if len(alias.shape) == 3 and _FUSED.fullmatch(name)}


_FUSED = re.compile(r"(?P<parent>.+)\.experts\.(?P<leaf>gate_up_proj|up_proj|down_proj)")
# Those whose gate and up stand in turn, row by row, where the others have one after the other.
_IN_TURN = frozenset({"gpt_oss", "openai_privacy_filter"})
# Model types whose original files have fused experts as (experts, in, out); memory has them transposed, and so do the
# files that transformers 5 saves. Only the shape decides.
_TRANSPOSED_AT_FIRST = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})


def gate_and_up_in_turn(model_type: str | None) -> bool:
    """Whether the outputs of gate and up stand in turn in the fused experts of such a model."""
    return model_type in _IN_TURN


_WIDE, _NARROW = ("gate_proj", "up_proj"), "down_proj"


class _Matrix(NamedTuple):
    """One expert's matrix (out, in), and where the files have it."""

    shape: tuple[int, int]
    place: Place


def expert_aliases(config: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """Every name that experts go by, other than the stored one: one by one, and fused as in transformers 5."""
    model_type = config.get("model_type")
    type_ = model_type if isinstance(model_type, str) else None
    aliases: dict[str, Alias] = {}
    for parent, experts in _mixtures(config, shapes).items():
        aliases |= _apart(parent, experts, shapes)
        aliases |= _fused(parent, experts, type_)
    aliases = {name: alias for name, alias in aliases.items() if name not in shapes}
    for name, shape in shapes.items():
        if len(shape) == 3 and (fused := _FUSED.fullmatch(name)) and _transposed_in_file(fused["leaf"], shape, config):
            aliases[name] = Alias((shape[0], *shape[:0:-1]), (Place(name, True),))
        if type_ in _IN_TURN and len(shape) == 3 and (fused := _FUSED.fullmatch(name)):
            # Gate and up stand in turn there as in the parameter that the layers are cut from.
            for i in range(shape[0]):
                place = Place(name, transposed=True, at=Part(i))
                aliases[f"{fused['parent']}.experts.{fused['leaf']}s.{i}.weight"] = Alias(shape[:0:-1], (place,))
    return aliases


def _transposed_in_file(leaf: str, shape: tuple[int, ...], config: Mapping[str, object]) -> bool:
    """Whether a fused parameter lies in the file the other way round than in memory."""
    if config.get("model_type") not in _TRANSPOSED_AT_FIRST:
        return False
    text = config.get("text_config")
    width = (text if isinstance(text, Mapping) else config).get("hidden_size")
    outputs, inputs = shape[1:] if leaf != _NARROW else shape[:0:-1]
    return outputs == width != inputs


def _mixtures(config: Mapping[str, object], shapes: Shapes) -> dict[str, dict[str, dict[int, _Matrix]]]:
    """Mixture -> role -> number -> the expert's matrix, however the files have it."""
    model_type = str(config.get("model_type"))
    mixtures: dict[str, dict[str, dict[int, _Matrix]]] = {}

    def add_matrix(parent: str, role: str, number: int, shape: tuple[int, ...], place: Place) -> None:
        mixtures.setdefault(parent, {}).setdefault(role, {})[number] = _Matrix((shape[0], shape[1]), place)

    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and (expert := parse_expert(module)) is not None:
            add_matrix(expert.parent, expert.role, expert.number, shape, Place(name))
        elif len(shape) == 3 and module != name and (stack := parse_stack(module)) is not None:
            for i in range(shape[0]):
                add_matrix(*stack, i, shape[1:], Place(name, at=Part(i)))
        elif len(shape) == 3 and (fused := _FUSED.fullmatch(module)) is not None:
            transposed = model_type in _IN_OUT or _transposed_in_file(fused["leaf"], shape, config)
            for role, span in _shares(fused["leaf"], shape[2 if transposed else 1], model_type).items():
                size = (len(span) if span else shape[2 if transposed else 1], shape[1 if transposed else 2])
                for i in range(shape[0]):
                    at = Part(i, columns=span) if transposed else Part(i, rows=span)
                    add_matrix(fused["parent"], role, i, size, Place(name, transposed, at))
    return mixtures


def _shares(leaf: str, outputs: int, model_type: str | None) -> dict[str, Span | None]:
    """Which outputs of a fused parameter belong to which role; None for all."""
    if leaf != "gate_up_proj":
        return {leaf: None}
    if model_type in _IN_TURN:
        return {role: Span(i, outputs, 2) for i, role in enumerate(_WIDE)}
    half = outputs // 2
    return {role: Span(i * half, (i + 1) * half) for i, role in enumerate(_WIDE)}


def _apart(parent: str, roles: Mapping[str, Mapping[int, _Matrix]], shapes: Shapes) -> dict[str, Alias]:
    return {
        name: Alias(matrix.shape, (matrix.place,))
        for role, experts in roles.items()
        for number, matrix in experts.items()
        if (name := f"{expert_name(Expert(parent, number, role))}.weight") not in shapes
    }


def _fused(parent: str, roles: Mapping[str, Mapping[int, _Matrix]], model_type: str | None) -> dict[str, Alias]:
    """The parameters that hold all experts, where these are as many, and as large, in every role."""
    if len({frozenset(experts) for experts in roles.values()}) > 1:
        return {}
    numbers = set(next(iter(roles.values())))
    if numbers != set(range(len(numbers))):
        return {}
    wide = [role for role in _WIDE if role in roles]
    aliases: dict[str, Alias] = {}
    for name, parts in (("gate_up_proj" if len(wide) == 2 else "up_proj", wide), (_NARROW, [_NARROW])):
        matrices = [roles[role] for role in parts if role in roles]
        sizes = {matrix.shape for experts in matrices for matrix in experts.values()}
        if not matrices or len(sizes) != 1:
            continue
        (out, width) = sizes.pop()
        total = out * len(matrices)
        spans = list(_shares(name, total, model_type).values())
        parts_of = list(zip(matrices, spans, strict=True))
        places = [_filling(experts[i].place, i, span) for i in sorted(numbers) for experts, span in parts_of]
        aliases[f"{parent}.experts.{name}"] = Alias((len(numbers), total, width), tuple(places))
    return aliases


def _filling(place: Place, expert: int, outputs: Span | None) -> Place:
    """The place of one expert's matrix, as a part of the parameter that holds all of them."""
    return Place(place.weight, place.transposed, place.at, Part(expert, rows=outputs))
