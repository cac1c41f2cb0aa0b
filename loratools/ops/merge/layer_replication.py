"""Layers of a base that an adapter repeats (PEFT's `layer_replication`): a deeper model, before it is merged into.

While training, the copies of a layer share their weights, and each has an update of its own. Merged, they differ, so
that the result has as many layers as the adapter counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint, Component
from loratools.errors import MismatchError
from loratools.tensors.lazy import LazyTensor

_IN_LAYER = re.compile(r"((?:.+\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..+)")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Replication:
    """`order[j]` is the layer of the base that layer j of the result is a copy of."""

    order: tuple[int, ...]

    def config(self, config: dict[str, object]) -> None:
        """Count the layers anew, and repeat what the config lists for each of them."""
        text = config.get("text_config")
        for part in [config, *([text] if isinstance(text, dict) else [])]:
            old = next((part[name] for name in _COUNTS if isinstance(part.get(name), int)), None)
            for name in _COUNTS:
                if name in part:
                    part[name] = len(self.order)
            for name, value in part.items():
                if name.startswith("layer") and isinstance(value, list) and len(value) == old:
                    part[name] = [value[i] for i in self.order]


def replication(adapters: Sequence[Adapter]) -> Replication | None:
    """What the adapters say of repeated layers; None where they say nothing.

    Raises:
        MismatchError: they count the layers in different ways.
    """
    said = [adapter.layer_replication for adapter in adapters]
    if len(set(said)) > 1:
        raise MismatchError(
            "the adapters repeat the layers of their base in different ways, so that their layers are not the same",
            details=[f"'{a.name}'   {list(s) if s else 'as they are'}" for a, s in zip(adapters, said, strict=True)],
            hint="merge them one at a time",
        )
    ranges = said[0] if said else ()
    return Replication(tuple(i for start, stop in ranges for i in range(start, stop))) if ranges else None


def replicated(base: Checkpoint, wanted: Replication) -> Checkpoint:
    """The base with its layers repeated; every copy is the same bytes of the same file.

    Raises:
        MismatchError: the base has no such layers.
    """
    stacks = Counter(found[1] for name in base.weights if (found := _IN_LAYER.fullmatch(name)) is not None)
    stack = stacks.most_common(1)[0][0] if stacks else ""
    numbers = {int(f[2]) for n in base.weights if (f := _IN_LAYER.fullmatch(n)) is not None and f[1] == stack}
    if missing := sorted(set(wanted.order) - numbers):
        raise MismatchError(f"the adapter repeats layer {missing[0]}, and '{base.path}' has {len(numbers)} layers")

    def repeated(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        found: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            layer = _IN_LAYER.fullmatch(name)
            if layer is None or layer[1] != stack:
                found[name] = tensor
                continue
            copies = [j for j, i in enumerate(wanted.order) if i == int(layer[2])]
            found |= {f"{stack}{j}{layer[3]}": tensor for j in copies}
        return found

    def deeper(component: Component) -> Component:
        prefix = component.prefix
        each = [repeated({prefix + name: tensor for name, tensor in f.tensors.items()}) for f in component.files]
        files = [
            replace(f, tensors={name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
            for f, tensors in zip(component.files, each, strict=True)
        ]
        return replace(component, files=tuple(files))

    components = tuple(map(deeper, base.components))
    return replace(base, components=components, stored=repeated(base.stored), weights=repeated(base.weights))
