"""Base: the names, shapes and config of the model that an adapter is for, without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.storage.origins import shown


@dataclass(frozen=True)
class Base:
    """A base model without its values: names, shapes and config.

    Attributes:
        shapes: The shape of each weight by name; empty if only the config was given.
        config: The fields of its config.json.
        path: Its path; None if it was not opened.
        family: The name of the family of an image model, if only that was given; else None.

    Example:
        >>> import loratools
        >>> base = loratools.Base(shapes={}, config={"model_type": "llama", "num_hidden_layers": 2})
        >>> base.model_type, base.whole_number("num_hidden_layers")
        ('llama', 2)
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    path: Path | None = None
    family: str | None = None

    @property
    def name(self) -> str:
        """The name of the base in messages."""
        return shown(self.path) if self.path is not None else "the base"

    def whole_number(self, *fields: str) -> int | None:
        """Return the first of some fields of the config that is a positive whole number.

        Args:
            fields: Names of fields, the preferred one first. `text_config` is searched too.

        Returns:
            The number; None if no field has one.
        """
        inner = self.config.get("text_config")
        for config in (self.config, inner if isinstance(inner, Mapping) else {}):
            for name in fields:
                value = config.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    @property
    def model_type(self) -> str | None:
        """The `model_type` of the config; None if the config has none."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None
