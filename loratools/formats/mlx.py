"""MLX: adapters.safetensors (formerly .npz) with adapter_config.json, as mlx-lm trains and loads them.

Facts from mlx-lm 0.32 (tuner/utils.py, tuner/lora.py). `y = W x + scale * (x @ lora_a) @ lora_b` with lora_a: (in, r)
and lora_b: (r, out), both transposed against PEFT; experts are stacked, (E, r, in) and (E, out, r), and not transposed.
`scale` is the multiplier itself, one for the whole adapter, as is the rank. Embeddings have lora_a: (tokens, r) and
lora_b: (r, width). With DoRA every module has its magnitude `m`: one number for each output, or for each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import Adapter, Replacement
from loratools.errors import FormatError, UnsupportedError
from loratools.formats.common.base import Base
from loratools.formats.common.notes import metadata_of, notes_of
from loratools.formats.common.scale import uniform
from loratools.formats.common.source import CONFIG, AdapterSource, counted, shown
from loratools.formats.common.stacked_experts import items, stacked
from loratools.naming.language.experts import Expert, expert_name, parse_expert, parse_stack, stack_name
from loratools.storage.casting import cast
from loratools.storage.files import quoted
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reshaped, transposed
from loratools.updates.lora import LoRA

WRITES = "folder"

# What mlx-lm multiplies with where nobody says: 20, or at first 10 * alpha / rank with alpha 16 and rank 8.
_DEFAULT_SCALE = 20.0
_PARTS = ("lora_a", "lora_b", "m")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")


def detect(source: AdapterSource) -> bool:
    """By factors named `lora_a` and `lora_b` without a `.weight`, or by a config of a full fine-tune with mlx-lm."""
    if source.container not in ("safetensors", "npz"):
        return False
    if any(_parse(key) is not None for key in source.tensors):
        return True
    return _is_full(source)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`.

    Raises:
        UnsupportedError: Tensors that are not read, all of them named.
        FormatError: Factors that do not make a product, an invalid config.
    """
    config = source.config if _is_mlx(source.config) else None
    notes = {"mlx": {"config": None if config is None else dict(config), "metadata": dict(source.metadata)}}
    model = (config or {}).get("model")
    base_model = model if isinstance(model, str) and model else None
    if _is_full(source):
        weights = {name: Replacement(tensor, "modules_to_save") for name, tensor in source.tensors.items()}
        return Adapter({}, weights, format="mlx", path=source.path, base_model=base_model, notes=notes)
    scale, alpha_source, uncertainties = _scale(config)
    updates: dict[str, LoRA] = {}
    for module, factors in _factors(source).items():
        for name, update in _as_updates(module, factors, scale, alpha_source):
            updates[name] = update
    warnings = [] if config is not None else [f"{quoted(source.file)} has no {CONFIG} of MLX beside it"]
    if alpha_source == "assumed":
        warnings.append(f"the scale is not stored; it is assumed to be {_DEFAULT_SCALE:g}, mlx-lm's default")
    if embeddings := [name for name, update in updates.items() if update.embedding]:
        warnings.append(
            f"{quoted(embeddings[0])} has factors: where a model ties its head to it, mlx-lm applies them to both"
        )
    return Adapter(
        updates,
        format="mlx",
        path=source.path,
        base_model=base_model,
        notes=notes,
        uncertainties=tuple(uncertainties),
        warnings=tuple(warnings),
        remedy=f"set the scale that was trained with in {CONFIG}, and remove alpha from it",
    )


def unwritable(adapter: Adapter, *, base: Base | None = None) -> dict[str, str]:
    """What mlx-lm has no place for."""
    problems = dict.fromkeys(adapter.replacements, "mlx-lm loads no whole weights beside factors")
    dora = any((lora := u.as_lora()) is not None and lora.magnitude is not None for u in adapter.updates.values())
    for name, update in adapter.updates.items():
        lora = update.as_lora()
        if lora is None:
            problems[name] = f"mlx-lm has no {update.kind}"
        elif lora.mid is not None or len(lora.a.shape) != 2:
            problems[name] = "mlx-lm has no LoRA of convolutions"
        elif lora.magnitude is None and dora:
            problems[name] = "no magnitude, and mlx-lm has DoRA for all modules or for none"
        elif lora.magnitude is not None and parse_expert(name) is not None:
            problems[name] = "mlx-lm has no DoRA of experts"
        elif lora.magnitude is not None and (lora.magnitude_of == "in") != lora.embedding:
            problems[name] = f"mlx-lm has no magnitude of each {'output' if lora.embedding else 'input'} here"
    return problems


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the folder that mlx-lm loads to the same products. Equal input, equal bytes.

    Smaller ranks are filled up with zeros, which adds size and nothing else; other scales are folded into B.

    Raises:
        UnsupportedError: Values that `dtype` cannot hold.
    """
    from loratools.storage.json_file import write_json
    from loratools.storage.safetensors_writer import write_safetensors

    updates = {n: lora for n, u in adapter.updates.items() if (lora := u.as_lora()) is not None and lora.rank > 0}
    if not updates:
        raise UnsupportedError(f"{quoted(adapter.name)} has no factors to write")
    uniform_updates, rank, scale = uniform(updates, dtype)
    warnings = []
    if padded := [n for n, u in updates.items() if u.rank != rank]:
        warnings.append(f"{counted(len(padded), 'module')} filled up with zeros to rank {rank}: MLX has one for all")
    if folded := [n for n, u in updates.items() if u.scale != scale]:
        warnings.append(
            f"the scale of {counted(len(folded), 'module')} is folded into B: MLX has one, {scale:g}, for all"
        )
    tensors: dict[str, LazyTensor] = {}
    for module, parts in _stacked(uniform_updates, base).items():
        tensors |= {f"{module}.{part}": cast(f"{module}.{part}", t, dtype) for part, t in parts.items()}
    config = {k: v for k, v in (notes_of(adapter, "mlx", "config") or {}).items() if k not in ("lora_layers",)}
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    dropout = _parameters(config).get("dropout", 0.0)
    config |= {
        "fine_tune_type": "dora" if any(u.magnitude is not None for u in uniform_updates.values()) else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": _keys(modules, base)},
    }
    if adapter.base_model is not None:
        config["model"] = adapter.base_model
    metadata = {"format": "mlx", **metadata_of(adapter)}
    write_safetensors(out / "adapters.safetensors", dict(sorted(tensors.items())), dict(sorted(metadata.items())))
    write_json(out / CONFIG, config, sort=True)
    return tuple(warnings)


# Reading


def _is_mlx(config: Mapping[str, object] | None) -> bool:
    return (
        config is not None and "peft_type" not in config and bool({"lora_parameters", "fine_tune_type"} & set(config))
    )


def _is_full(source: AdapterSource) -> bool:
    return (
        source.config_belongs_to_file
        and _is_mlx(source.config)
        and (source.config or {}).get("fine_tune_type") == "full"
    )


def _parse(key: str) -> tuple[str, str] | None:
    """Module and part of a key; None if it is no factor."""
    module, _, part = key.rpartition(".")
    return (module, part) if module and part in ("lora_a", "lora_b") else None


def _parameters(config: Mapping[str, object] | None) -> Mapping[str, object]:
    parameters = (config or {}).get("lora_parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _scale(config: Mapping[str, object] | None) -> tuple[float, str, list[str]]:
    """The multiplier, where it is from, and what makes it uncertain."""
    parameters = _parameters(config)
    numbers: dict[str, float] = {}
    for field in ("scale", "alpha", "rank"):
        value = parameters.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            raise FormatError(f"{CONFIG}: lora_parameters.{field} = {value!r}: a number other than 0 is needed")
        numbers[field] = float(value)
    if "scale" not in numbers:
        return _DEFAULT_SCALE, "assumed", []
    scale, alpha, rank = numbers["scale"], numbers.get("alpha"), numbers.get("rank")
    if alpha is None or alpha == rank:
        return scale, "config", []
    early = f"{scale * alpha / rank:g}" if rank else "scale * alpha / rank"
    return scale, "config", [
        f"{CONFIG} has scale {scale:g} and alpha {alpha:g}: mlx-lm multiplies with {scale:g}, and its first versions, "
        f"which wrote alpha, with {early}"
    ]  # fmt: skip


def _factors(source: AdapterSource) -> dict[str, dict[str, LazyTensor]]:
    """The parts of every module, checked to make a product."""
    parts: dict[str, dict[str, LazyTensor]] = {}
    foreign: list[str] = []
    for key, tensor in source.tensors.items():
        module, _, part = key.rpartition(".")
        if part in _PARTS and module:
            parts.setdefault(module, {})[part] = tensor
        else:
            foreign.append(key)
    if foreign:
        raise UnsupportedError(
            f"{quoted(source.file)} has {counted(len(foreign), 'tensor')} that mlx-lm does not write beside factors",
            details=shown([quoted(key) for key in foreign]),
        )
    if problems := [line for module, factors in sorted(parts.items()) for line in _problems(module, factors)]:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(problems), 'fault')} in its factors", details=shown(problems)
        )
    return dict(sorted(parts.items()))


def _problems(module: str, factors: Mapping[str, LazyTensor]) -> list[str]:
    if "lora_a" not in factors or "lora_b" not in factors:
        return [f"{quoted(module)} has {' and '.join(factors)} alone"]
    a, b, m = factors["lora_a"], factors["lora_b"], factors.get("m")
    if len(a.shape) == 3 and parse_stack(module) is None:
        return [f"{quoted(module)} has factors of three axes, and is no mixture of experts known here"]
    if not (
        (len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0])
        or (len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2])
    ):
        return [f"{quoted(module)} has lora_a {list(a.shape)} and lora_b {list(b.shape)}"]
    if m is not None and m.shape != ((a.shape[0] if _is_embedding(module) else b.shape[1]),):
        return [f"{quoted(module)} has a magnitude of shape {list(m.shape)}"]
    return []


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS


def _as_updates(
    module: str, parts: Mapping[str, LazyTensor], scale: float, alpha_source: str
) -> list[tuple[str, LoRA]]:
    """Name and update: one, or one for every expert."""
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    stack = parse_stack(module)
    if stack is not None and len(a.shape) == 3:
        return [
            (expert_name(Expert(stack[0], e, stack[1])), LoRA(down, up, scale * down.shape[0], alpha_source))
            for e, (down, up) in enumerate(zip(items(a), items(b), strict=True))
        ]
    embedding = _is_embedding(module)
    update = LoRA(
        transposed(a),
        transposed(b),
        scale * a.shape[1],
        alpha_source,
        embedding=embedding,
        magnitude=m,
        magnitude_of="in" if embedding else "out",
    )
    return [(module, update)]


# Writing


def _stacked(updates: Mapping[str, LoRA], base: Base | None) -> dict[str, dict[str, LazyTensor]]:
    """The parts of every module of MLX; experts that the adapter leaves alone get zeros."""
    parts_of: dict[str, dict[str, LazyTensor]] = {}
    experts: dict[tuple[str, str], dict[int, LoRA]] = {}
    for name, update in updates.items():
        expert = parse_expert(name)
        if expert is None:
            parts_of[name] = {"lora_a": transposed(update.a), "lora_b": transposed(update.b)}
            if update.magnitude is not None:
                parts_of[name]["m"] = reshaped(update.magnitude, (update.magnitude.elements,))
        else:
            experts.setdefault((expert.parent, expert.role), {})[expert.number] = update
    for (parent, role), members in experts.items():
        count = max(members) + 1
        if base is not None:
            count = base.whole_number("num_local_experts", "num_experts", "n_routed_experts") or count
        parts_of[stack_name(parent, role)] = {
            "lora_a": stacked({e: u.a for e, u in members.items()}, count),
            "lora_b": stacked({e: u.b for e, u in members.items()}, count),
        }
    return parts_of


_LAYER = re.compile(r"(?P<before>.*?\.)?layers\.(?P<number>\d+)\.(?P<rest>.+)")


def _keys(modules: list[str], base: Base | None) -> list[str]:
    """What mlx-lm is to turn into LoRA layers, so that these modules and no others are.

    By their names within a layer where every layer has the same, otherwise by their whole names.
    """
    layers: dict[int, set[str]] = {}
    outside = []
    for module in modules:
        parsed = _LAYER.fullmatch(module)
        if parsed is None:
            outside.append(module)
        else:
            layers.setdefault(int(parsed["number"]), set()).add(parsed["rest"])
    count = (base.whole_number("num_hidden_layers", "n_layer") if base is not None else None) or max(
        layers, default=-1
    ) + 1
    if len(layers) == count and len({frozenset(names) for names in layers.values()}) == 1:
        return sorted({*outside, *next(iter(layers.values()))})
    return modules
