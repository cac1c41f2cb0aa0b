"""The updates in a PEFT file whose config says LORA: which tensors belong together, and what rank and alpha they have.

The rank of a module is its tensors', its scale is the config's. Factors of fused experts say nothing of how many
experts there are, so there the rank is the config's too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from loratools.errors import FormatError, UnsupportedError
from loratools.formats.common.source import CONFIG, AdapterSource, counted, shown
from loratools.formats.peft_parts import config as fields
from loratools.formats.peft_parts import kinds
from loratools.formats.peft_parts.keys import Factor, Parsed, ParsedKeys
from loratools.hints import DAMAGED_ADAPTER
from loratools.storage.files import quoted
from loratools.storage.untrusted_regex import UntrustedRegexes
from loratools.tensors.dtypes import is_floating
from loratools.tensors.lazy import LazyTensor
from loratools.updates.lora import LoRA
from loratools.updates.lora_experts import LoRAExperts, Orientation
from loratools.updates.parts.kind_files import peft_variant
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Update

_A = ("lora_A", "lora_embedding_A")
_B = ("lora_B", "lora_embedding_B")
_MATRICES = _A + _B
# Parameters of one module in the order in which layers of experts register them: the first is wrapped innermost.
_REGISTERED = ("gate_up_proj", "gate_proj", "w1", "input_linear", "up_proj", "w3", "down_proj", "w2", "output_linear")
_OUT_PROJ = ".base_layer.out_proj.lora_A"


@dataclass(frozen=True)
class _Group:
    """The tensors of one wrapper. `target` is what its weight is called; `parameter` where it is no `.weight`."""

    target: str
    parameter: bool
    parts: Mapping[str, LazyTensor]


def lora_updates(
    source: AdapterSource, parsed: ParsedKeys, rank_from: str | None
) -> tuple[dict[str, Update], list[str], list[str]]:
    """Updates by target, uncertainties about their scale, and warnings.

    Raises:
        FormatError: Factors that do not make a product, invalid values.
        UnsupportedError: Grouped convolutions; parameters whose order in their module is not known.
    """
    config = source.config or {}
    numbers = fields.scaling(config)
    variant = fields.variant(config)
    if variant == "lora" and (pairs := _sound_pairs(source, parsed, config)) is not None:
        return _updates_of_pairs(pairs, numbers, source.config, rank_from)
    meanings = parsed.every(source.tensors)
    groups = _groups(source, meanings, config, plain=variant == "lora")
    ranks = {g.target: None if g.parameter else _rank(g) for g in groups}
    alphas, declared_ranks, uncertainties, warnings = _alphas(ranks, numbers, source.config, rank_from)
    updates: dict[str, Update] = {}
    kind = peft_variant(variant)
    no_patterns = UntrustedRegexes([])
    for group in groups:
        alpha, origin = alphas[group.target]
        if group.parameter:
            updates[group.target] = _experts(group, declared_ranks[group.target], alpha, origin, numbers.rslora, config)
            continue
        rank = declared_ranks[group.target]
        module = PeftModule(group.target, group.parts, config, rank, alpha, origin, regexes=no_patterns)
        by_suffix = kind.from_peft(module)
        for suffix, update in by_suffix.items():
            updates[group.target + suffix] = update
    if any(_OUT_PROJ in key for key in meanings):
        warnings.append(
            "PEFT adds the delta of an attention's out_proj twice, in training as in its merge; here it is added once"
        )
    return updates, uncertainties, warnings


_Pairs = Mapping[str, tuple[LazyTensor, LazyTensor]]


def _sound_pairs(source: AdapterSource, parsed: ParsedKeys, config: Mapping[str, object]) -> _Pairs | None:
    """The factors of each linear layer, sorted, where all updates of the file are of such layers and none has a fault.

    None if anything else has to be looked at: of 90,000 tensors, one after the other.
    """
    if not parsed.pairs or config.get("use_dora") or config.get("target_parameters"):
        return None
    tensors = source.tensors
    pairs = {module: (tensors[a], tensors[b]) for module, (a, b) in sorted(parsed.pairs.items())}
    # A handful of shapes and dtypes.
    kinds_of_pair = {(a.shape, a.dtype, b.shape, b.dtype) for a, b in pairs.values()}
    return pairs if all(_makes_product(*kind) for kind in kinds_of_pair) else None


def _makes_product(a: tuple[int, ...], a_dtype: str, b: tuple[int, ...], b_dtype: str) -> bool:
    """Whether factors of these shapes and dtypes are those of a linear layer, and their product has values."""
    return len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a + b and is_floating(a_dtype) and is_floating(b_dtype)


def _updates_of_pairs(
    pairs: _Pairs, numbers: fields.Scaling, config: Mapping[str, object] | None, rank_from: str | None
) -> tuple[dict[str, Update], list[str], list[str]]:
    ranks: dict[str, int | None] = {module: a.shape[0] for module, (a, _) in pairs.items()}
    alphas, _, uncertainties, warnings = _alphas(ranks, numbers, config, rank_from)
    updates: dict[str, Update] = {
        module: LoRA(a, b, *alphas[module], numbers.rslora) for module, (a, b) in pairs.items()
    }
    return updates, uncertainties, warnings


def _groups(
    source: AdapterSource, parsed: Mapping[str, Parsed], config: Mapping[str, object], *, plain: bool
) -> list[_Group]:
    """Parts by module, checked to make a product; all problems are raised at once."""
    problems: list[str] = []
    grouped: list[str] = []
    by_depth: dict[tuple[str, int], dict[str, LazyTensor]] = {}
    for key, factor in parsed.items():
        if not isinstance(factor, Factor):
            continue
        tensor = source.tensors[key]
        parts = by_depth.get((factor.module, factor.depth))
        if parts is None:
            parts = by_depth[factor.module, factor.depth] = {}
        if factor.part in parts:
            problems.append(f"{quoted(factor.module)} has more than one {factor.part}")
        parts[factor.part] = tensor
        matrix = factor.part in _MATRICES
        if not factor.module:
            problems.append(f"{quoted(key)} names no module")
        elif (len(tensor.shape) < 2 and matrix) or 0 in tensor.shape:
            problems.append(f"{quoted(key)} has shape {list(tensor.shape)}: empty, or a shard that was not gathered")
        elif not is_floating(tensor.dtype):
            problems.append(f"{quoted(key)} has dtype {tensor.dtype}; a floating-point tensor is needed")
    ordered = sorted(by_depth.items(), key=itemgetter(0))
    for (module, _), parts in ordered:
        if plain and _is_usual_pair(parts):
            continue
        for first, second in zip(_A, _B, strict=True):
            if (first in parts) != (second in parts):
                has, lacks = (first, second) if first in parts else (second, first)
                problems.append(f"{quoted(module)} has {has} without {lacks}")
        if not any(name in parts for name in _MATRICES):
            problems.append(f"{quoted(module)} has {', '.join(sorted(parts))} without lora_A and lora_B")
        for first, second in zip(_A, _B, strict=True):
            if first in parts and second in parts and plain:
                a, b = parts[first].shape, parts[second].shape
                if len(a) > 2 and len(b) >= 2 and b[1] and a[0] != b[1] and a[0] % b[1] == 0:
                    grouped.append(f"{quoted(module)} in {a[0] // b[1]} groups")
                elif len(a) >= 2 and len(b) >= 2 and a[0] != b[1]:
                    problems.append(
                        f"{quoted(module)} has {first} {list(a)} and {second} {list(b)}, which have different ranks"
                    )
                elif math.prod(b[2:]) != 1:
                    problems.append(f"{quoted(module)} has {second} {list(b)}; a matrix is needed")
    if problems:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(problems), 'fault')} in its factors",
            details=shown(problems),
            hint=DAMAGED_ADAPTER,
        )
    if grouped:
        raise UnsupportedError(
            f"{quoted(source.file)} has LoRA of {counted(len(grouped), 'grouped convolution')}",
            details=shown(grouped),
            hint="A sees all channels, and the weight only those of its group: no change of the weight equals it",
        )
    by_module: dict[str, dict[int, Mapping[str, LazyTensor]]] = {}
    for (module, depth), parts in ordered:
        by_module.setdefault(module, {})[depth] = parts
    listed = config.get("target_parameters")
    parameters = _TargetParameters([str(name) for name in listed] if isinstance(listed, list) else [])
    adapted = _adapted_modules(list(by_module), config) if listed else by_module
    return [
        group
        for module, wrappers in by_module.items()
        for group in _of_module(module, wrappers, parameters.of(module, list(wrappers), module in adapted))
    ]


def _is_usual_pair(parts: Mapping[str, LazyTensor]) -> bool:
    """Whether these are the two factors of a linear layer, and make a product: there is nothing more to look for."""
    if len(parts) != 2 or "lora_A" not in parts or "lora_B" not in parts:
        return False
    a, b = parts["lora_A"].shape, parts["lora_B"].shape
    return len(a) == len(b) == 2 and a[0] == b[1]


class _TargetParameters:
    """What `target_parameters` names, by the ends of the names of modules.

    PEFT looks for a parameter by the end of its name, so an entry may be a parameter's own name without any path
    (`gate_up_proj`), as PEFT 0.21 itself writes for models of experts. Such an entry can only mean a module that has
    several wrappers, or that no entry of `target_modules` explains.
    """

    def __init__(self, listed: Sequence[str]) -> None:
        self._without_path = {name for name in listed if "." not in name}
        self._by_end: dict[str, set[str]] = {}
        for name in listed:
            module, _, parameter = name.rpartition(".")
            if module:
                self._by_end.setdefault(module, set()).add(parameter)

    def of(self, module: str, depths: Sequence[int], adapted: bool) -> list[str]:
        """The parameters of one module, in the order in which it registers them.

        depths: of its wrappers, how many others each is inside of. adapted: whether `target_modules` explains it.
        """
        if not self._by_end and not self._without_path:
            return []
        named = {name for end in _ends_of(module) for name in self._by_end.get(end, ())} if self._by_end else set()
        if len(named) < len(depths) and (depths != [0] or not adapted):
            named |= self._without_path
        return sorted(named, key=registered)


def _of_module(module: str, wrappers: Mapping[int, Mapping[str, LazyTensor]], parameters: list[str]) -> list[_Group]:
    """The wrapper of one module; or those of its parameters, which `target_parameters` names.

    wrappers: the parts of each, by how many others it is inside of, ascending.
    """
    depths = list(wrappers)
    if not parameters:
        if depths != [0]:
            raise FormatError(
                f"'{module}' has factors of {len(depths)} parameters, and target_parameters names none of them"
            )
        return [_Group(module, False, wrappers[0])]
    if len(parameters) != len(depths):
        raise FormatError(
            f"'{module}' has factors of {len(depths)} parameters, and target_parameters names {len(parameters)}: "
            + ", ".join(parameters)
        )
    if len(parameters) > 1 and (unknown := [name for name in parameters if name not in _REGISTERED]):
        raise UnsupportedError(
            f"'{module}' has several parameters with factors, and it is not known which is whose: {', '.join(unknown)}",
            hint="their names are not in the file; train each in an adapter of its own",
        )
    return [
        _Group(module if name == "weight" else f"{module}.{name}", name != "weight", wrappers[depth])
        for name, depth in zip(parameters, reversed(depths), strict=True)
    ]


def _adapted_modules(modules: Sequence[str], config: Mapping[str, object]) -> Collection[str]:
    """The modules that `target_modules` names: by their last segments where it is a list, whole where it is a regex."""
    listed = config.get("target_modules")
    if isinstance(listed, str):
        (matched,) = UntrustedRegexes(modules).match([listed], subject="target_modules")
        return matched
    names = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    return {module for module in modules if not names.isdisjoint(_ends_of(module))}


def _ends_of(module: str) -> list[str]:
    """The name of a module, and what follows each of its dots."""
    return [module, *(module[at + 1 :] for at, character in enumerate(module) if character == ".")]


def registered(name: str) -> tuple[int, str]:
    """Sorts the parameters of one module as it registers them."""
    return (_REGISTERED.index(name) if name in _REGISTERED else len(_REGISTERED)), name


def _rank(group: _Group) -> int:
    return next(group.parts[name].shape[0] for name in _A if name in group.parts)


def _experts(
    group: _Group, rank: int | None, alpha: float, origin: str, rslora: bool, config: Mapping[str, object]
) -> Update:
    a, b = group.parts["lora_A"], group.parts["lora_B"]
    rank = rank or fields.DEFAULT_RANK
    if a.shape[0] % rank:
        raise FormatError(
            f"'{group.target}' has {a.shape[0]} rows in lora_A, which is no multiple of its rank {rank} in {CONFIG}"
        )
    experts = a.shape[0] // rank
    # Of one expert, or of rank 1, both packings are the same.
    either = fields.trained_by_unsloth(config) and experts > 1 and rank > 1
    orientation = orientation_of(config.get("peft_version"))
    return LoRAExperts(a, b, experts, alpha, origin, rslora, None if either else "peft", orientation)


def orientation_of(version: object) -> Orientation | None:
    """How the PEFT that trained the adapter took a parameter of three axes; it writes its version since 0.18."""
    if version is None:
        return "in-out"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    if numbers is None:
        return None
    version_numbers = tuple(map(int, numbers.groups()))
    if version_numbers < (0, 19, 0):
        return "in-out"
    return "inverted" if version_numbers == (0, 19, 0) else "module"


def _alphas(
    ranks: Mapping[str, int | None],
    numbers: fields.Scaling,
    config: Mapping[str, object] | None,
    rank_from: str | None,
) -> tuple[dict[str, tuple[float, str]], dict[str, int | None], list[str], list[str]]:
    """Alpha of every module and where it is from; the ranks that the config says; uncertainties; warnings.

    ranks: those of the tensors; None if these do not tell.
    """
    names = list(ranks)
    declared_ranks: dict[str, int | None] = {}
    regexes = UntrustedRegexes(names)
    rank_keys = _keys("rank_pattern", numbers.ranks, regexes)
    alpha_keys = _keys("alpha_pattern", numbers.alphas, regexes)
    alphas: dict[str, tuple[float, str]] = {}
    differing: dict[tuple[int, int], list[str]] = {}
    for module, rank in ranks.items():
        if keys := alpha_keys.get(module):
            alpha, origin = numbers.alphas[keys[0]], "config"
        elif numbers.alpha is not None:
            alpha, origin = numbers.alpha, "config"
        else:
            alpha, origin = float(rank if config is None and rank else fields.DEFAULT_ALPHA), "assumed"
        if alpha == 0:
            origin = "assumed"  # nobody trains with it: the real one is for a person to say
        declared_ranks[module] = declared = numbers.ranks[keys[0]] if (keys := rank_keys.get(module)) else numbers.rank
        if declared is not None and rank is not None and declared != rank:
            differing.setdefault((declared, rank), []).append(module)
            if rank_from == "config":
                # The scale is the config's; the rank stays the tensors'.
                alpha = alpha * math.sqrt(rank) / math.sqrt(declared) if numbers.rslora else alpha * rank / declared
        alphas[module] = alpha, origin
    uncertainties = []
    for (declared, rank), modules in sorted(differing.items()):
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        uncertainties.append(f"{quoted(modules[0])}{more}: rank {rank} in the tensors, {declared} in {CONFIG}")
    warnings = _unused("rank_pattern", numbers.ranks, rank_keys) + _unused("alpha_pattern", numbers.alphas, alpha_keys)
    torn = [module for module, keys in alpha_keys.items() if len({numbers.alphas[key] for key in keys}) > 1]
    if torn and list(numbers.alphas) == sorted(numbers.alphas):
        warnings.append(
            f"alpha_pattern: keys with different values match {counted(len(torn), 'module')}, such as "
            f"{quoted(torn[0])}; the first counts, but PEFT sorts them when it saves: training may have used another"
        )
    return alphas, declared_ranks, [] if rank_from is not None else uncertainties, warnings


def _keys(subject: str, values: Mapping[str, float], regexes: UntrustedRegexes) -> Mapping[str, tuple[str, ...]]:
    if not values:
        return {}
    from loratools.formats.peft_parts.patterns import matches

    return matches(values, regexes, subject=subject)


def _unused(subject: str, values: Mapping[str, float], matched: Mapping[str, tuple[str, ...]]) -> list[str]:
    used = {keys[0] for keys in matched.values() if keys}
    unused = [quoted(key) for key in values if key not in used]
    if not unused:
        return []
    return [f"{subject}: {len(unused)} of {counted(len(values), 'key')} used by no module: {', '.join(shown(unused))}"]


def _is_numbers(values: object) -> bool:
    return isinstance(values, Mapping) and all(type(v) in (int, float) and v > 0 for v in values.values())


def kind_updates(source: AdapterSource, kind_modules: kinds.Modules, peft_type: str) -> dict[str, Update]:
    """The updates of an adapter of another kind than LoRA; rank and alpha by the patterns that several of them have."""
    if peft_type in kinds.REPLACING:
        return {}
    config = source.config or {}
    # Other kinds use these names for other things as well: what is no rank or alpha is the kind's to read.
    patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern") if _is_numbers(config.get(name))}
    single = {name: config[name] for name in ("r", "lora_alpha", "alpha") if _is_numbers({"": config.get(name)})}
    single |= {
        name: 0 for name in ("lora_alpha", "alpha") if type(config.get(name)) in (int, float) and not config[name]
    }
    numbers = fields.scaling(patterns | single)
    alphas, declared_ranks, _, _ = _alphas(dict.fromkeys(kind_modules.parts), numbers, config, None)
    return kinds.updates(kind_modules, source.config or {}, peft_type, alphas, declared_ranks, source.path)
