"""GGUF: the adapter file of llama.cpp, with its names, its order of rows, and one alpha for all modules.

Facts from llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp. `lora_a`: (r, in), `lora_b`: (out, r) on
`<tensor of the base>.weight`; what is added is alpha / r * lora_b @ lora_a with the tensor's own rank, or lora_b @
lora_a where alpha is 0. Experts are stacked: (E, r, in) and (E, out, r). Of the embedding `lora_a` is transposed:
(tokens, r).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.errors import FormatError, MismatchError, UnsupportedError, UsageError
from loratools.formats.common.base import Base
from loratools.formats.common.scale import at_rank, at_scale, most_common
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.formats.common.stacked_experts import items, stacked
from loratools.naming import gguf as names
from loratools.naming.gguf_weights import heads_of, row_order
from loratools.naming.heads import inverse
from loratools.naming.language.experts import Expert, expert_name, parse_expert
from loratools.storage.casting import cast
from loratools.storage.files import quoted
from loratools.storage.ownership import MARK
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import reordered, rows, transposed
from loratools.updates.lora import LoRA
from loratools.updates.parts.row_blocks import stacked_rows

WRITES = ".gguf"
HAS_TEXTS = False

_EMBEDDING = "token_embd"
_INVOCATION_TOKENS = "adapter.alora.invocation_tokens"


def detect(source: AdapterSource) -> bool:
    """By the type that the file itself declares, or by its factors where it declares none."""
    if source.container != "gguf":
        return False
    declared = source.other.get("general.type")
    return declared == "adapter" or (declared is None and any(name.endswith(".lora_a") for name in source.tensors))


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """The adapter in `source`, under its Hugging Face names.

    The order of rows of queries and keys can be undone only where the base says how many heads they are: without one
    the adapter is uncertain.

    Raises:
        UnsupportedError: Tensors or an architecture that are not read, named.
        FormatError: Factors that do not make a product.
        MismatchError: It is for another architecture than the base's.
    """
    architecture = _architecture(source)
    alpha = source.other.get("adapter.lora.alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise FormatError(f"{quoted(source.file)} has the alpha {alpha!r}; a number is needed")
    counts = _heads(source.base)
    updates: dict[str, LoRA] = {}
    unordered: list[str] = []
    halves: dict[str, dict[int, LoRA]] = {}
    for module, (a, b) in _pairs(source).items():
        rank = b.shape[-1]
        # Written as alpha 0, the scale is 1 whatever the rank.
        module_alpha, alpha_source = (
            (float(alpha), "metadata") if alpha else (float(rank), "assumed" if alpha is None else "metadata")
        )
        if len(a.shape) == 2 and (half := names.hf_of_half(architecture, module)) is not None:
            halves.setdefault(half[0], {})[half[1]] = LoRA(a, b, module_alpha, alpha_source)
            continue
        stack = names.hf_stack(architecture, module)
        if len(a.shape) == 3 and stack is not None:
            for e, (down, up) in enumerate(zip(items(a), items(b), strict=True)):
                updates[expert_name(Expert(stack[0], e, stack[1]))] = LoRA(down, up, module_alpha, alpha_source)
            continue
        name = names.hf_module(architecture, module)
        if name is None or len(a.shape) == 3:
            raise UnsupportedError(
                f"{quoted(source.file)} has {quoted(module)}, no module of {architecture.name} known here"
            )
        if architecture.reorders(module) and counts is None:
            unordered.append(name)
        elif architecture.reorders(module):
            b = reordered(b, inverse(_order(architecture, module, b.shape[0], counts)))
        embedding = module == _EMBEDDING
        updates[name] = LoRA(transposed(a) if embedding else a, b, module_alpha, alpha_source, embedding=embedding)
    updates |= {name: _joined(parts) for name, parts in halves.items()}
    base_model = source.other.get("general.base_model.0.name")
    uncertainties = []
    if unordered:
        uncertainties.append(
            f"{counted(len(unordered), 'module')}, such as {quoted(unordered[0])}, have their rows in the order of "
            "llama.cpp; how many heads they are is said in the config of the base alone"
        )
    return Adapter(
        updates,
        format="gguf",
        path=source.path,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        invocation_tokens=_invocation_tokens(source),
        notes={"gguf": {"metadata": _texts(source.other)}},
        uncertainties=tuple(uncertainties),
        warnings=_warnings(source),
        remedy="convert it first: loratools convert ADAPTER -o OUT --to peft --base BASE",
    )


def unwritable(adapter: Adapter, *, base: Base | None = None) -> dict[str, str]:
    """What GGUF has no place for."""
    architecture = _architecture_of(base)
    problems = dict.fromkeys(adapter.replacements, "a GGUF adapter holds factors and no whole weights")
    tied = base is not None and base.config.get("tie_word_embeddings") is True
    for name, update in adapter.updates.items():
        lora = update.as_lora()
        if lora is None:
            problems[name] = f"a GGUF adapter has no {update.kind}"
        elif lora.magnitude is not None:
            problems[name] = "a GGUF adapter has no magnitude (DoRA): merge it into the base and extract a plain LoRA"
        elif lora.mid is not None or len(lora.a.shape) != 2:
            problems[name] = "a GGUF adapter has no LoRA of convolutions"
        elif names.gguf_halves(architecture, name) is not None:
            pass
        elif _written_name(architecture, name) is None:
            problems[name] = architecture.reason_absent(name)
        elif _written_name(architecture, name) == "output" and tied:
            problems[name] = "the base ties its head to the embedding, so that a GGUF of it has no such weight"
        elif lora.embedding != (_written_name(architecture, name) == _EMBEDDING):
            problems[name] = "an embedding's factors on another module, or a linear layer's on the embedding"
    return problems


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that llama.cpp adds to the base of this architecture. Equal input, equal bytes.

    Raises:
        UsageError: No base is given, or one without its config.
        UnsupportedError: An architecture that is not written, values that `dtype` cannot hold.
        MismatchError: Rows that are not the base's heads.
    """
    from loratools.storage.gguf_writer import write_gguf

    architecture = _architecture_of(base)
    assert base is not None
    counts = _heads(base)
    updates = {n: lora for n, u in adapter.updates.items() if (lora := u.as_lora()) is not None and lora.rank > 0}
    if not updates:
        raise UnsupportedError(f"{quoted(adapter.name)} has no factors to write")
    common = most_common(_alpha(u) for u in updates.values())
    # As it will be stored.
    alpha = float(struct.unpack("<f", struct.pack("<f", common))[0])
    folded = [n for n, u in updates.items() if _alpha(u) != common]
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    experts: dict[tuple[str, str], dict[int, LoRA]] = {}
    for name, update in updates.items():
        # The difference between alpha and alpha in float32 is a rounding of alpha, and none of B.
        rescaled = replace(update, alpha=alpha, rslora=False) if name not in folded else update
        rescaled = at_scale(name, rescaled, alpha / update.rank, dtype)
        if (expert := parse_expert(name)) is not None:
            experts.setdefault((expert.parent, expert.role), {})[expert.number] = rescaled
            continue
        if (of_halves := names.gguf_halves(architecture, name)) is not None:
            count = rescaled.b.shape[0] // len(of_halves)
            for i, half in enumerate(of_halves):
                pairs[half] = rescaled.a, rows(rescaled.b, i * count, (i + 1) * count)
            continue
        written = _written_name(architecture, name)
        assert written is not None
        b = rescaled.b
        if architecture.reorders(written):
            if counts is None:
                raise UsageError(f"the config of {quoted(base.name)} does not say how many attention heads there are")
            b = reordered(b, _order(architecture, written, b.shape[0], counts))
        pairs[written] = (transposed(rescaled.a) if rescaled.embedding else rescaled.a), b
    for (parent, role), members in experts.items():
        rank = max(u.rank for u in members.values())
        level = {e: at_scale(parent, at_rank(u, rank), alpha / rank, dtype) for e, u in members.items()}
        count = base.whole_number("num_local_experts", "num_experts", "n_routed_experts") or max(members) + 1
        written = names.gguf_stack(architecture, parent, role)
        assert written is not None
        pairs[written] = (
            stacked({e: u.a for e, u in level.items()}, count),
            stacked({e: u.b for e, u in level.items()}, count),
        )
    tensors = {
        f"{name}.weight.{part}": _storable(f"{name}.{part}", tensor, dtype)
        for name, pair in sorted(pairs.items())
        for part, tensor in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    fields: dict[str, str | int | float | tuple[int, ...]] = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        MARK: __version__,
    }
    if adapter.invocation_tokens:
        fields[_INVOCATION_TOKENS] = adapter.invocation_tokens
    if adapter.base_model is not None:
        fields |= {"general.base_model.count": 1, "general.base_model.0.name": adapter.base_model}
    write_gguf(out, fields, tensors)
    if not folded:
        return ()
    return (f"the scale of {counted(len(folded), 'module')} is folded into B: GGUF has one alpha, {alpha:g}, for all",)


# Names and orders


def _joined(halves: Mapping[int, LoRA]) -> LoRA:
    """The update of a module of which llama.cpp has the two halves of the rows apart, or one of them."""
    count = next(iter(halves.values())).shape[0]
    return stacked_rows([(half * count, lora) for half, lora in halves.items()], 2 * count)


def _architecture(source: AdapterSource) -> names.Architecture:
    declared = source.other.get("general.architecture")
    kind = source.other.get("adapter.type")
    if kind != "lora":
        raise UnsupportedError(f"{quoted(source.file)} is an adapter of type {kind!r}; only lora is read")
    of_base = None if source.base is None else _architecture_of(source.base)
    if of_base is not None and of_base.name == declared:
        return of_base
    architecture = names.BY_NAME.get(declared) if isinstance(declared, str) else None
    if architecture is None:
        raise UnsupportedError(
            f"{quoted(source.file)} is for the architecture {declared!r}, whose names and orders are not known here",
            hint=f"known are {', '.join(sorted(names.BY_NAME))}",
        )
    if source.base is not None and of_base is not None:
        raise MismatchError(
            f"{quoted(source.file)} is for {architecture.name}, and {quoted(source.base.name)} is {of_base.name}"
        )
    return architecture


def _invocation_tokens(source: AdapterSource) -> tuple[int, ...]:
    """The tokens after which the adapter acts, where it is an aLoRA."""
    tokens = source.other.get(_INVOCATION_TOKENS)
    if tokens is None:
        return ()
    if not isinstance(tokens, list | tuple) or not all(type(token) is int and token >= 0 for token in tokens):
        raise FormatError(f"{quoted(source.file)} has {_INVOCATION_TOKENS}, which are no numbers of tokens")
    return tuple(tokens)


def _architecture_of(base: Base | None) -> names.Architecture:
    if base is None:
        raise UsageError(
            "gguf needs the config of the base: names and the order of rows depend on it",
            hint="give the model, or its config.json, with --base",
        )
    architecture = names.architecture_of(base.model_type, base.config)
    if architecture is None and (why := names.REFUSED.get(base.model_type or "")) is not None:
        raise UnsupportedError(f"{quoted(base.name)} is of model_type {base.model_type!r}: {why}")
    if architecture is None:
        raise UnsupportedError(
            f"{quoted(base.name)} is of model_type {base.model_type!r}, which is not written as gguf",
            hint=f"those that are: {', '.join(sorted(names.BY_MODEL_TYPE))}",
        )
    return architecture


def _written_name(architecture: names.Architecture, name: str) -> str | None:
    expert = parse_expert(name)
    if expert is not None:
        return names.gguf_stack(architecture, expert.parent, expert.role)
    return names.gguf_module(architecture, name)


def _heads(base: Base | None) -> tuple[int, int] | None:
    """How many heads queries and keys have."""
    if base is None:
        return None
    counts = {key: base.whole_number(key) for key in ("num_attention_heads", "num_key_value_heads")}
    return heads_of({**base.config, **{key: count for key, count in counts.items() if count is not None}})


def _order(architecture: names.Architecture, module: str, rows: int, heads: tuple[int, int] | None) -> tuple[int, ...]:
    order = row_order(architecture, module, heads)
    assert order is not None, "asked only where the heads are known"
    try:
        return tuple(order(rows).tolist())
    except ValueError as error:
        raise MismatchError(f"{quoted(module)} does not fit the base: {error}") from error


# Reading


def _pairs(source: AdapterSource) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """lora_a and lora_b of every module, by its GGUF name without `.weight`."""
    problems = [f"{quoted(name)} is {kind}, which is not decoded" for name, kind in source.packed.items()]
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b") and module.endswith(".weight"):
            parts.setdefault(module.removesuffix(".weight"), {})[part] = tensor
        else:
            problems.append(f"{quoted(name)} is no factor of a weight")
    if problems:
        raise UnsupportedError(
            f"{quoted(source.file)} has {counted(len(problems), 'tensor')} that are not read", details=shown(problems)
        )
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    for module, factors in sorted(parts.items()):
        if len(factors) < 2:
            problems.append(f"{quoted(module)} has {next(iter(factors))} alone")
            continue
        a, b = factors["lora_a"], factors["lora_b"]
        inner = -1 if module == _EMBEDDING else -2
        fits = len(a.shape) == len(b.shape) in (2, 3) and a.shape[inner] == b.shape[-1] and a.shape[:-2] == b.shape[:-2]
        if not fits:
            problems.append(f"{quoted(module)} has lora_a {list(a.shape)} and lora_b {list(b.shape)}")
        pairs[module] = a, b
    if problems:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(problems), 'fault')} in its factors", details=shown(problems)
        )
    return pairs


def _warnings(source: AdapterSource) -> tuple[str, ...]:
    if source.other.get("adapter.lora.alpha") is None:
        return (f"{quoted(source.file)} has no alpha; it is assumed to be the rank",)
    return ()


_SAID_OTHERWISE = ("general.architecture", "general.type", "adapter.type", "general.base_model.0.name")


def _texts(fields: Mapping[str, object]) -> dict[str, str]:
    return {k: v for k, v in fields.items() if isinstance(v, str) and k not in _SAID_OTHERWISE}


# Writing


def _alpha(update: LoRA) -> float:
    return update.scale * update.rank if update.rslora else update.alpha


def _storable(name: str, tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    # llama.cpp does not compute with float64.
    return cast(name, tensor, dtype if dtype is not None else "F32" if tensor.dtype == "F64" else None)
