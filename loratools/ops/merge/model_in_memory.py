"""A model of torch in memory, with its weights under the names that its files have, as a checkpoint.

transformers 5 holds some weights differently from how it stores them: the experts of a layer in one parameter, modules
under other names. It provides the mapping to the stored form; the place of each stored weight in the parameters follows
from the tables that matching uses for the other direction.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.checkpoints import Checkpoint, Component
from loratools.errors import UnsupportedError, UsageError
from loratools.naming.language.aliases import aliases
from loratools.naming.places import Part, Place
from loratools.tensors.dtypes import dtype_name
from loratools.tensors.files import ByteRange
from loratools.tensors.lazy import LazyTensor
from loratools.tensors.views import Span

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True, eq=False)
class ParameterSource:
    """Source of values that are a parameter, or a part of one; they are brought to the CPU when they are read."""

    values: Tensor

    @property
    def location(self) -> ByteRange | None:
        return None

    def read_rows(self, start: int, stop: int) -> Tensor:
        values = self.values if self.values.dim() else self.values.reshape(1)
        return values[start:stop].cpu()

    def scalar(self) -> float:
        return float(self.values.cpu())


@dataclass(frozen=True, eq=False)
class ModelInMemory:
    """A model, and the weights in it by the names that its files have: views of its parameters and buffers."""

    model: Module
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Module) -> ModelInMemory:
        """The weights of a model.

        Raises:
            UsageError: It has adapters around its layers, or values that are not in memory.
            UnsupportedError: It is quantised.
        """
        config = _config_of(model)
        if config.get("quantization_config") or getattr(model, "is_quantized", False):
            raise UnsupportedError(
                "the model is quantised, and nothing can be added to its parameters",
                hint="load it in a float dtype, or merge into its files: merge(..., dequantize=True) or "
                "requantize=True",
            )
        parameters = {name: values.detach() for name, values in model.state_dict(keep_vars=True).items()}
        for name, values in parameters.items():
            if ".base_layer." in name:
                raise UsageError(
                    f"the model has adapters of PEFT around its layers ('{name}')",
                    hint="take them off first: model = model.unload()",
                )
            if values.is_meta:
                raise UsageError(
                    f"the values of '{name}' are not in memory (meta device)", hint="load the model's weights first"
                )
        return cls(model, config, _as_stored(model, config, parameters))

    def checkpoint(self) -> Checkpoint:
        """The weights as a checkpoint; one that shares its values with an earlier one is tied to it."""
        stored: dict[str, LazyTensor] = {}
        tied: dict[str, str] = {}
        names: dict[tuple[object, ...], str] = {}
        for name, values in self.weights.items():
            key = (values.device, values.data_ptr(), values.shape, values.stride()) if values.numel() else (name,)
            first = names.setdefault(key, name)
            if first != name:
                tied[name] = first
            else:
                stored[name] = LazyTensor(tuple(values.shape), dtype_name(values.dtype), ParameterSource(values))
        return Checkpoint(
            path=Path(str(self.config.get("_name_or_path") or type(self.model).__name__)),
            layout="in memory",
            components=(Component(files=()),),
            stored=stored,
            weights=stored,
            config=self.config,
            tied=tied,
        )

    def set_values(self, values: Mapping[str, Tensor], *, apart: Sequence[str]) -> None:
        """Put new values into the parameters.

        Args:
            values: New values by the names of `weights`, on the CPU.
            apart: Names that shared their values with others, and become parameters of their own.
        """
        from torch.nn import Parameter

        untied = {}
        for name in apart:
            before = self.weights[name]
            untied[name] = values[name].to(before.device) if name in values else before.clone()
        for name, parameter in untied.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            setattr(module, attribute, Parameter(parameter, requires_grad=getattr(module, attribute).requires_grad))
        config: Any = getattr(self.model, "config", None)
        if untied and hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False
        for name, new in values.items():
            if name not in untied:
                self.weights[name].copy_(new)


def _config_of(model: Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return {**config.to_dict(), "_name_or_path": getattr(config, "_name_or_path", "")}
    return dict(config) if isinstance(config, Mapping) else {}


def _as_stored(model: Module, config: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights by the names that files have; by those of the parameters where these are the same, or where it is
    not known how all of them lie in the parameters."""
    stored = _stored_shapes(model, parameters)
    if stored.keys() <= parameters.keys():
        return parameters
    by_name = aliases(config, stored)
    weights: dict[str, Tensor] = {}
    for name, values in parameters.items():
        if name in by_name and by_name[name].shape == tuple(values.shape):
            for place in by_name[name].places:
                view = _part_of(values, place)
                if view is None:
                    return parameters
                weights[place.weight] = view
        else:
            weights[name] = values
    fits = stored.keys() <= weights.keys() and all(tuple(weights[n].shape) == shape for n, shape in stored.items())
    return weights if fits else parameters


def _stored_shapes(model: Module, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of what the library of the model would store, by name; empty if it stores parameters as they are.

    It is asked with tensors without values.
    """
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before its version 5, which converts nothing
        return {}
    described = revert_weight_conversion(model, {name: values.to("meta") for name, values in parameters.items()})
    return {name: tuple(values.shape) for name, values in described.items()}


def _part_of(values: Tensor, place: Place) -> Tensor | None:
    """The view of a parameter that a stored weight is; None if it is no view of it."""
    if place.at != Part() or place.order is not None:
        return None
    part = values if place.of.expert is None else values[place.of.expert]
    if place.of.rows is not None:
        part = part[_slice(place.of.rows)]
    if place.of.columns is not None:
        part = part[:, _slice(place.of.columns)]
    return part.mT if place.transposed else part


def _slice(span: Span) -> slice:
    return span.slice
