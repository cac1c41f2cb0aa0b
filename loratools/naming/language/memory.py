"""The names of a base's weights in the model that its library makes of it, where files call them otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.naming.language.renamed import names_in_memory
from loratools.naming.renaming import Renaming, Shapes

# What the models of transformers call the model inside of them that has no head; many have their type's own name.
_INNER = frozenset({"model", "transformer", "bert", "deberta", "electra", "esm", "gpt_neox", "roberta", "vit"})


@dataclass(frozen=True)
class NamesInMemory:
    """The names that the modules of a base have in memory.

    `by_stored`: name in the files -> name in memory. `stored`: any former name in memory -> name in the files.

    `headless`: whether the base's class is the inner model alone. `model_type`: of its config. `roots`: the first
    segments of the names in its files.
    """

    by_stored: Mapping[str, str]
    stored: Mapping[str, str]
    headless: bool
    model_type: str
    roots: frozenset[str]

    @classmethod
    def of(cls, config: Mapping[str, object], shapes: Shapes) -> NamesInMemory:
        """The names of a base's weights, from its config and the shapes of its weights as stored."""
        stored = names_in_memory(config, shapes)
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else ""
        return cls(
            {old: new for new, old in stored.items()},  # of several the last, which is the one of today
            stored,
            str(first).endswith("Model") and not str(first).endswith(("HeadModel", "HeadsModel")),
            str(config.get("model_type", "")),
            frozenset(name.split(".")[0] for name in shapes),
        )

    def of_class(self, name: str, renaming: Renaming) -> str:
        """The name in memory of a weight that the adapter calls `name` and that `renaming` brings to the base's names.

        Files of a model without its head leave out the prefix that the model with it has in memory: there the
        adapter's own prefix is right.
        """
        stored_name = renaming(name)
        old = stored_name if stored_name in self.by_stored else self.stored.get(stored_name, stored_name)
        new = self.by_stored.get(old, old)
        outer = renaming.strip.removesuffix(".")
        of_inner_model = outer in _INNER or outer == self.model_type.replace("-", "_")
        if outer and not renaming.add and of_inner_model and not self.headless and outer not in self.roots:
            return new if name == stored_name else f"{renaming.strip}{new}"
        return new
