"""The other names that the weights of a base go by: those that its library gives them in memory.

Adapters are trained on models in memory, whose modules need not be called, cut or turned as the files have them.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.places import Alias, Place
from loratools.naming.renaming import Shapes
from loratools.naming.vision import in_memory


def aliases(config: Mapping[str, object], shapes: Shapes) -> dict[str, Alias]:
    """Name in memory -> where it lies, for the weights of a base (stored name -> shape) that have another."""
    model_type = config.get("model_type")
    stored = in_memory(model_type if isinstance(model_type, str) else None, shapes)
    return {name: Alias(shapes[where], (Place(where),)) for name, where in stored.items()}
