"""Layers of a base that an adapter repeats (PEFT's `layer_replication`): a deeper model, before it is merged into.

While training, the copies of a layer share their weights, and each has an update of its own. Merged, they differ, so
that the result has as many layers as the adapter counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint, Component
from loratools.naming.language.repeated_layers import stack_to_repeat, with_repeated_layers
from loratools.ops.common.same_layers import require_same_layers
from loratools.tensors.lazy import LazyTensor

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Replication:
    """The order in which the layers of the base are repeated in the result.

    `order[j]` is the layer of the base that layer j of the result is a copy of.
    """

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
    """What the adapters say of repeated layers; None if they say nothing.

    Raises:
        MismatchError: They count the layers in different ways.
    """
    require_same_layers(adapters, hint="merge them one at a time")
    order = adapters[0].layer_order if adapters else ()
    return Replication(order) if order else None


def replicated(base: Checkpoint, replication: Replication) -> Checkpoint:
    """The base with its layers repeated; every copy is the same bytes of the same file.

    Raises:
        MismatchError: The base has no such layers.
    """
    stack = stack_to_repeat(base.weights, replication.order, base.name)

    def repeated(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        return with_repeated_layers(tensors, stack, replication.order)

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
