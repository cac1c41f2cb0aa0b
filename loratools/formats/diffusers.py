"""diffusers, every generation: names after `unet.`, `transformer.` or `text_encoder.`.

unet.….attn1.processor.to_q_lora.down.weight    until 0.16, also without `unet.`
unet.….attn1.to_q.lora.down.weight              then
unet.….attn1.to_q.lora_A.weight                 since PEFT is inside; an alpha other than the rank is in the header
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import FormatError
from loratools.formats.common.base import Base
from loratools.formats.common.scale import most_common
from loratools.formats.common.source import AdapterSource
from loratools.formats.image_parts.flat_names import empty_modules_warning
from loratools.formats.image_parts.kinds import Scale
from loratools.formats.image_parts.reading import Located, Read
from loratools.formats.image_parts.reading import read as read_image
from loratools.formats.image_parts.spellings import grouped, is_spelled
from loratools.formats.image_parts.writing import (
    Layout,
    Stored,
    Written,
    header_of,
    lay_out,
    lora_parts,
    pieces_alone,
    plain_alpha,
    write_file,
)
from loratools.formats.peft_parts import config as fields
from loratools.formats.peft_parts.config_to_write import pattern
from loratools.formats.peft_parts.keys import Factor, parse
from loratools.formats.peft_parts.patterns import matches
from loratools.naming.image.evidence import denoisers
from loratools.naming.image.pipeline import PIPELINE_PARTS
from loratools.storage.casting import cast, rounded
from loratools.storage.files import quoted
from loratools.storage.json_file import parse_json
from loratools.storage.untrusted_regex import UntrustedRegexes
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.tensors.views import reshaped
from loratools.updates.parts.protocol import Update

WRITES = ".safetensors"
# Families whose loaders in diffusers read LoKr, since 0.42; a test asks the installed one.
LOKR_FAMILIES = ("flux2", "z-image")
_METADATA = "lora_adapter_metadata"
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)")
_OLD_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def detect(source: AdapterSource) -> bool:
    """By the parts of a pipeline before the names. `transformer.` begins names of language models too, and counts only
    where a table of image models knows what follows, or the header is diffusers' own."""
    if source.config is not None and "peft_type" in source.config and source.file.name.startswith("adapter_model."):
        return False
    modules = [name for name, module in grouped(source.tensors)[0].items() if module.kinds]
    located = [at for name in modules if (at := _locate(name)) is not None]
    if not located:
        return False
    if _METADATA in source.metadata or any(at.part != "transformer" for at in located):
        return True
    if any(family.find(at.name) is not None for at in located for family in denoisers()):
        return True
    # What PEFT does not spell so is of no language model.
    return any(is_spelled(key) and not isinstance(parse(key), Factor) for key in source.tensors)


def read(source: AdapterSource, *, rank_from: str | None = None) -> Adapter:
    """Read the adapter; raises the errors of `image_parts.reading.read`. Names that no table has are still names of
    diffusers.
    """
    # Attention processors and LoRA layers of old releases are written with today's names.
    names = [name for name, module in grouped(source.tensors)[0].items() if module.kinds]
    current = all((at := _locate(name)) is None or f"{at.part}.{at.name}" == name for name in names)
    source = replace(source, stored_names=source.stored_names and current)
    return read_image(source, Read("diffusers", _locate, scale=_scales(source)))


def unwritable(adapter: Adapter, *, base: Base | None = None) -> Mapping[str, str]:
    """Names that cannot be written, and why: diffusers reads LoRA, with magnitudes of outputs and biases, and LoKr of
    some families."""
    layout = lay_out(adapter, "diffusers", base=base, dry=True)
    problems = dict(layout.problems)
    for module in layout.modules:
        name = module.target
        if (lora := module.lora) is not None:
            if lora.magnitude is not None and lora.magnitude_of == "in":
                problems[name] = "DoRA with a magnitude of inputs; diffusers has them of outputs only"
            if lora.embedding:
                problems[name] = "LoRA of an embedding"
        elif module.weight is not None:
            if why := _why_not_read(module.weight, layout, adapter):
                problems[name] = why
        else:
            problems[f"{name}.bias"] = "a bias without factors beside it"
    return problems | dict.fromkeys(adapter.replacements, "a whole weight in place of the base's")


def _why_not_read(update: Update, layout: Layout, adapter: Adapter) -> str | None:
    """Why diffusers does not read an update that is no LoRA; None if it does."""
    remedy = "'loratools resize' makes LoRA of it"
    if update.kind != "lokr":
        return f"{update.kind}, which diffusers does not read; {remedy}"
    of_family = layout.family.name in LOKR_FAMILIES if layout.family is not None else adapter.stored_names
    if not of_family:
        return f"lokr, which diffusers reads for {' and '.join(LOKR_FAMILIES)} only; {remedy}"
    if any(
        module.weight is None or module.weight.kind != "lokr" or module.bias is not None for module in layout.modules
    ):
        return f"lokr beside other kinds, which diffusers does not read from one file; {remedy}"
    if {"t2", "magnitude"} & {*update.parts} or any(len(tensor.shape) != 2 for tensor in update.parts.values()):
        return f"lokr of a convolution or with a magnitude, which diffusers does not read; {remedy}"
    return None


def _kronecker_parts(update: Update) -> dict[str, LazyTensor]:
    """The parts of a LoKr with the scale in the first of them: diffusers has no alpha of it."""
    parts = dict(update.parts)
    first = "w1" if "w1" in parts else "w1_a"
    if update.scale != 1:
        parts[first] = from_torch(rounded(parts[first].read().double() * update.scale, parts[first].dtype))
    return {f"lokr_{part}": tensor for part, tensor in parts.items()}


def write(adapter: Adapter, out: Path, *, dtype: str | None, base: Base | None = None) -> tuple[str, ...]:
    """Write the file that `load_lora_weights` reads. Scales other than 1 go into its header."""
    layout = lay_out(adapter, "diffusers", base=base)
    modules, empty = pieces_alone(_in_parts(layout.modules))
    parts: dict[str, LazyTensor] = {}
    for module in modules:
        name = module.named(f"{module.part}.")
        if (lora := module.lora) is None:
            assert module.weight is not None, "a bias alone is refused before"
            parts |= {f"{name}.{part}": tensor for part, tensor in _kronecker_parts(module.weight).items()}
            continue
        factors = lora_parts(lora, keep_mid=False)
        parts |= {f"{name}.lora_{part}.weight": tensor for part, tensor in factors.items()}
        if lora.magnitude is not None:
            outputs, kernel = lora.shape[0], len(lora.shape) - 2
            shape = (1, outputs, *(1,) * kernel) if kernel else (outputs,)
            parts[f"{name}.lora_magnitude_vector"] = reshaped(lora.magnitude, shape)
        if module.bias is not None:
            parts[f"{name}.lora_B.bias"] = module.bias.diff
    stored: Stored = {key: cast(key, tensor, dtype) for key, tensor in parts.items()}
    metadata = header_of(adapter, layout.family)
    warnings = empty_modules_warning(empty)
    scaled = [m for m in modules if (lora := m.lora) is not None and plain_alpha(lora) != lora.rank]
    if scaled:
        metadata[_METADATA] = json.dumps(_configs(modules), indent=2, sort_keys=True)
        warnings += (
            f"alpha is in the header of the file, as diffusers 0.34 and later read it; other programs take "
            f"{len(scaled)} of {len(modules)} modules at another strength: for ComfyUI, --to comfy",
        )
    write_file(out, stored, metadata)
    return warnings


def _in_parts(modules: Iterable[Written]) -> Iterator[Written]:
    """Modules that keep their names of the file are in the part of the pipeline that it says."""
    for module in modules:
        part, _, name = module.name.partition(".")
        yield replace(module, part=part, name=name) if not module.part and part in PIPELINE_PARTS else module


def _locate(name: str) -> Located | None:
    part, _, module = name.partition(".")
    if part not in PIPELINE_PARTS:
        # The oldest files hold a UNet's processors and nothing else.
        old = _PROCESSOR.fullmatch(name)
        return None if old is None else Located("unet", f"{old[1]}.{_processed(old[2])}")
    if processor := _PROCESSOR.fullmatch(module):
        return Located(part, f"{processor[1]}.{_processed(processor[2])}")
    head, _, leaf = module.rpartition(".")
    if part.startswith("text_encoder") and leaf in _OLD_ENCODER and head.endswith("self_attn"):
        return Located(part, f"{head}.{_OLD_ENCODER[leaf]}")
    # SimpleTuner saves what PEFT has wrapped.
    module = module.removeprefix("base_model.model.")
    return Located(part, module) if module else None


def _processed(leaf: str) -> str:
    return "to_out.0" if leaf == "to_out" else leaf


# Alpha in the header


def _scales(source: AdapterSource) -> _FromHeader | None:
    text = source.metadata.get(_METADATA)
    if text is None:
        return None
    subject = f"{_METADATA!r} of {quoted(source.file)}"
    flat = parse_json(text.encode(), subject)
    if not isinstance(flat, dict):
        raise FormatError(f"{subject} is no object")
    return _FromHeader(
        flat, subject, [name for name, module in grouped(source.tensors)[0].items() if "lora" in module.kinds]
    )


class _FromHeader:
    """Alpha of each module, as PEFT finds it in the config of the module's part of the pipeline."""

    def __init__(self, flat: Mapping[str, object], subject: str, modules: list[str]) -> None:
        self._scales: dict[str, Scale] = {}
        for part in {name.partition(".")[0] for name in modules}:
            config = {k.removeprefix(f"{part}."): v for k, v in flat.items() if k.startswith(f"{part}.")}
            numbers = fields.scaling(config, subject=subject)
            inside = {name.partition(".")[2]: name for name in modules if name.partition(".")[0] == part}
            regexes = UntrustedRegexes(list(inside))
            matched = matches(numbers.alphas, regexes, subject="alpha_pattern") if numbers.alphas else {}
            for inner, name in inside.items():
                keys = matched.get(inner)
                alpha = numbers.alphas[keys[0]] if keys else numbers.alpha
                if alpha is None and config:
                    alpha = float(fields.DEFAULT_ALPHA)
                source = "assumed" if alpha is None else "metadata"
                self._scales[name] = Scale(alpha, source, numbers.rslora)

    def __call__(self, module: str) -> Scale:
        return self._scales.get(module, Scale(None, "assumed"))


def _configs(modules: list[Written]) -> dict[str, object]:
    """`<part>.<field of LoraConfig>` for every part: one that is not told gets PEFT's defaults."""
    flat: dict[str, object] = {}
    for part in sorted({module.part for module in modules}):
        # Without `text_model.`, which later transformers have not: PEFT also finds names by their ends.
        loras = {
            m.name.removeprefix("text_model."): lora for m in modules if m.part == part and (lora := m.lora) is not None
        }
        ranks = {name: u.rank for name, u in loras.items()}
        alphas = {name: plain_alpha(u) for name, u in loras.items()}
        rank, alpha = most_common(ranks.values(), 0), most_common(alphas.values(), 0.0)
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": pattern(ranks, rank),
            "alpha_pattern": pattern(alphas, alpha),
            "target_modules": sorted(loras),
            "use_dora": any(u.magnitude is not None for u in loras.values()),
            "lora_bias": any(m.part == part and m.bias is not None for m in modules),
        }
        flat |= {f"{part}.{field}": value for field, value in config.items()}
    return flat
