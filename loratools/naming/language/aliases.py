"""The other names that the weights of a base go by: those that its library gives them in memory.

Adapters are trained on models in memory, whose modules need not be called, cut or transposed as the files have them.
Everything here follows from names and shapes, so that it holds for every model of a kind; what only the type of a model
determines is in tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools.naming.gguf_weights import gguf_aliases, is_gguf, model_type_of
from loratools.naming.image.original import is_original, original_aliases
from loratools.naming.language.consolidated import consolidated_aliases, is_consolidated
from loratools.naming.language.experts import expert_aliases
from loratools.naming.language.renamed import names_in_memory
from loratools.naming.language.split import split_aliases
from loratools.naming.places import Alias, Part, Place
from loratools.naming.renaming import Shapes


def aliases(config: Mapping[str, object], shapes: Shapes, *, experts: bool = True) -> dict[str, Alias]:
    """Name in memory -> where it lies, for the weights of a base (stored name -> shape) that have another.

    A stored name may be among them, where memory calls something else so, or has it the other way round.

    Args:
        config: The config of the base.
        shapes: Its weights, stored name -> shape.
        experts: Whether the other names of experts, fused or one by one, are among them. A model has 45,000 experts,
            and most adapters mean none of them by another name.
    """
    if is_gguf(shapes):
        by_name = gguf_aliases(config, shapes)
        shapes_by_name = {name: alias.shape for name, alias in by_name.items()}
        has_experts = any(".block_sparse_moe." in name for name in by_name)
        of_type = {**config, "model_type": "mixtral" if has_experts else model_type_of(config)}
        return by_name | {
            name: through
            for name, alias in _aliases(of_type, shapes_by_name, experts).items()
            if (through := _inside(alias, by_name)) is not None
        }
    if is_consolidated(shapes):
        by_name = consolidated_aliases(config, shapes)
        # Experts are fused in memory whatever the files are.
        shapes_by_name = {name: alias.shape for name, alias in by_name.items()}
        return by_name | {
            name: _through(alias, by_name)
            for name, alias in _aliases({"model_type": "mixtral"}, shapes_by_name, experts).items()
        }
    by_name = _aliases(config, shapes, experts)
    if is_original(shapes):
        by_name |= original_aliases(shapes)
    for part, part_config in config.items():
        if not isinstance(part_config, Mapping):
            continue
        # A component of a pipeline, whose names begin with its own.
        prefix = f"{part}."
        inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if inside:
            in_part = aliases(part_config, inside, experts=experts)
            by_name |= {prefix + name: _under(part, alias) for name, alias in in_part.items()}
    return by_name


def _aliases(config: Mapping[str, object], shapes: Shapes, experts: bool) -> dict[str, Alias]:
    by_name = expert_aliases(config, shapes) if experts else {}
    by_name |= split_aliases(config, shapes)
    shapes_by_name = {**shapes, **{name: alias.shape for name, alias in by_name.items()}}
    renamed = {
        new: by_name.get(old) or Alias(shapes[old], (Place(old),))
        for new, old in names_in_memory(config, shapes_by_name).items()
    }
    return by_name | renamed


def _under(part: str, alias: Alias) -> Alias:
    return Alias(alias.shape, tuple(replace(place, weight=f"{part}.{place.weight}") for place in alias.places))


def _through(alias: Alias, names: Mapping[str, Alias]) -> Alias:
    """An alias of what are aliases themselves, each of one whole weight."""
    inner = [names[place.weight].places[0] for place in alias.places]
    places = [replace(p, weight=i.weight, order=p.order or i.order) for p, i in zip(alias.places, inner, strict=True)]
    return Alias(alias.shape, tuple(places))


def _inside(alias: Alias, names: Mapping[str, Alias]) -> Alias | None:
    """An alias of what are aliases themselves, each of one place; None if both cut, or an order is cut."""
    places = []
    for outer in alias.places:
        inner = names[outer.weight].places[0]
        outer_is_whole, cut = outer.at == Part(), inner.at != Part() or inner.transposed
        if not outer_is_whole and (cut or inner.order is not None):
            return None
        at = inner.at if outer_is_whole else outer.at
        transposed = outer.transposed != inner.transposed
        places.append(replace(outer, weight=inner.weight, at=at, transposed=transposed, order=inner.order))
    return Alias(alias.shape, tuple(places))
