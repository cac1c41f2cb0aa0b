"""The names of diffusers for image models in one file, which keep those of their first publication (LDM, BFL, ...).

    model.diffusion_model.input_blocks.4.1.proj_in.weight     unet.down_blocks.1.attentions.0.proj_in.weight
    double_blocks.0.img_attn.qkv.weight, a third of its rows  transformer.transformer_blocks.0.attn.to_q.weight
    conditioner.embedders.1.model.transformer.resblocks...    text_encoder_2.text_model.encoder.layers...

The family is decided by which tables know the file's names. If two do and differ, the names are not translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from loratools.naming.image.evidence import denoisers
from loratools.naming.image.family import sizes
from loratools.naming.image.resolving import base_families
from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Shapes
from loratools.tensors.views import Span

# Where single files keep the denoiser; nothing at all where they hold nothing else.
_DENOISERS = ("model.diffusion_model.", "diffusion_model.", "net.", "")
# The text encoders of single files, and which of a pipeline's they are.
_HF_CLIP = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_T5 = "text_encoders.t5xxl.transformer."
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder",  # the refiner has this one alone
}
_NUMBER = re.compile(r"(?<![^.])(\d+|\{\})(?![^.])")
# A block with nothing before it, which the models of transformers do not have.
_BARE_BLOCK = re.compile(r"\w+\.\d+\.")
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPEN_CLIP_LEAVES = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_OPEN_CLIP_OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def is_original(shapes: Shapes) -> bool:
    """Whether the weights of a base have such names: those of a single file, or with nothing before them, of a family
    that calls them otherwise in diffusers."""
    if any(name.startswith(_DENOISERS[:3]) for name in shapes):
        return True
    checked: set[str] = set()
    for name in shapes:
        if not _BARE_BLOCK.match(name):
            continue  # the tables need not be read to hear that a language model is in none
        template = _NUMBER.sub("{}", name.rpartition(".")[0])
        if template not in checked and template in _only_original():
            return True
        checked.add(template)
    return False


@cache
def _only_original() -> frozenset[str]:
    """Templates of modules, as published, that no model of diffusers has and that alone tell a family."""
    rules = [rule for family in denoisers() for spelled in family.rules.values() for rule in spelled]
    converted = {name for rule in rules for name in rule.diffusers}
    published = {rule.original for rule in rules} - converted
    return frozenset(template for name in published if "{}" in (template := _NUMBER.sub("{}", name)))


def original_aliases(shapes: Shapes) -> dict[str, Alias]:
    """Name in diffusers, its component's in front -> where it lies."""
    prefix = next(p for p in _DENOISERS if any(name.startswith(p) for name in shapes))
    aliases = dict(_denoiser(prefix, {n[len(prefix) :]: shape for n, shape in shapes.items() if n.startswith(prefix)}))
    for start, component in _HF_CLIP.items():
        for name, shape in shapes.items():
            if name.startswith(start):
                aliases[f"{component}.{name[len(start) :]}"] = Alias(shape, (Place(name),))
    # The second encoder of Flux, and the third of Stable Diffusion 3.
    component = (
        "text_encoder_3" if any(name.startswith("text_encoders.clip_g.") for name in shapes) else "text_encoder_2"
    )
    aliases |= {
        f"{component}.{name[len(_T5) :]}": Alias(shape, (Place(name),))
        for name, shape in shapes.items()
        if name.startswith(_T5)
    }
    for start, component in _OPEN_CLIP.items():
        inside = {name[len(start) :]: shape for name, shape in shapes.items() if name.startswith(start)}
        for name, alias in _open_clip(start, inside):
            aliases.setdefault(f"{component}.{name}", alias)
    # transformers 5 has no `text_model` around a text encoder of CLIP in memory.
    return {name.replace(".text_model.", ".", 1): alias for name, alias in aliases.items()} | aliases


def _denoiser(prefix: str, shapes: Shapes) -> Iterator[tuple[str, Alias]]:
    family = next(iter(base_families(shapes, {})), None)
    if family is None:
        return
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        place = family.find(module)
        stored = f"{prefix}{name}"
        if place is None and (parameter := family.find(name)) is not None and len(parameter.targets) == 1:
            yield f"{family.component}.{parameter.targets[0]}", Alias(shape, (Place(stored),))
        if place is None or not shape:
            continue
        weight = shapes.get(f"{module}.weight", shape)
        columns = weight[1] if len(weight) > 1 else 0
        each: tuple[int, ...] | None = (shape[0],)
        if len(place.targets) > 1:
            each = sizes(place.split, shape[0], columns, len(place.targets))
        if each is None:
            continue
        start = 0
        for target, rows in zip(place.targets, each, strict=True):
            span = Span(start, start + rows)
            start += rows
            undivided = len(each) == 1
            places: tuple[Place, ...] = (Place(stored, at=Part() if undivided else Part(rows=span)),)
            if place.halves_swapped(rows, columns):
                half = rows // 2
                places = (
                    Place(stored, at=Part(rows=Span(half, rows)), of=Part(rows=Span(0, half))),
                    Place(stored, at=Part(rows=Span(0, half)), of=Part(rows=Span(half, rows))),
                )
            # Norms of queries and keys have a `scale` in their first publication.
            yield (
                f"{family.component}.{target}.{'weight' if leaf == 'scale' else leaf}",
                Alias((rows, *shape[1:]), places),
            )


def _open_clip(prefix: str, shapes: Shapes) -> Iterator[tuple[str, Alias]]:
    """open_clip keeps the q, k and v of an attention in one weight, as nn.MultiheadAttention does."""
    for name, shape in shapes.items():
        stored = f"{prefix}{name}"
        if name in _OPEN_CLIP_OUTSIDE:
            yield _OPEN_CLIP_OUTSIDE[name], Alias(shape, (Place(stored),))
        elif name == "text_projection" and len(shape) == 2:
            yield "text_projection.weight", Alias(shape[::-1], (Place(stored, transposed=True),))
        block = _RESBLOCK.fullmatch(name)
        if block is None:
            continue
        layer = f"text_model.encoder.layers.{block[1]}"
        module, _, leaf = block[2].rpartition(".")
        if block[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            rows = shape[0] // 3
            for i, part in enumerate("qkv"):
                place = Place(stored, at=Part(rows=Span(i * rows, (i + 1) * rows)))
                yield (
                    f"{layer}.self_attn.{part}_proj.{leaf.removeprefix('in_proj_')}",
                    Alias((rows, *shape[1:]), (place,)),
                )
        elif module in _OPEN_CLIP_LEAVES:
            yield f"{layer}.{_OPEN_CLIP_LEAVES[module]}.{leaf}", Alias(shape, (Place(stored),))
