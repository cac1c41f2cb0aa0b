"""Schemes of quantised weights, one file each: they recognise packed weights and dequantise them.

The file of a scheme has `recognise(tensors, config)`: the weights that it has packed, by logical name, each with its
stored tensors and typed parameters that dequantise it (`common/protocol.py`). Each weight is recognised on its own, by
dtypes, shapes and names: a config may be missing, or outdated since the weights were dequantised. A model may mix
schemes and plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools import registry
from loratools.quantization.common.config import declared_method
from loratools.quantization.common.dequantised import dequantised
from loratools.quantization.common.protocol import PackedWeight, Unreadable
from loratools.tensors.dtypes import DTYPE_BITS
from loratools.tensors.lazy import LazyTensor

UNKNOWN = "unknown packed"

_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
# The last part of the name of packed values, if it is not `weight`.
_PACKED_NAMES = ("weight", "qweight", "weight_packed")


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a model are quantised.

    Attributes:
        weights: The weights that can be unpacked, by logical name.
        unreadable: The weights that are recognised but cannot be unpacked, by logical name.
        markers: Names of stored tensors that describe the whole model and belong to no weight.
        declared: The scheme in the config, if no tensor confirms it; the meaning of the tensors is unknown then. Else
            None.
    """

    weights: Mapping[str, PackedWeight] = field(default_factory=dict)
    unreadable: Mapping[str, Unreadable] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    declared: str | None = None

    @property
    def name(self) -> str:
        """The names of the schemes, joined by ` + `."""
        schemes = {weight.scheme for weight in self.weights.values()}
        schemes |= {weight.scheme for weight in self.unreadable.values()}
        return " + ".join(sorted(schemes - {UNKNOWN}) + [UNKNOWN] * (UNKNOWN in schemes)) or str(self.declared)

    @property
    def refused(self) -> tuple[str, ...]:
        """One line for each weight that cannot be unpacked, and one for a config that no tensor confirms."""
        lines = [f"{name}   {weight.scheme}: {weight.why}" for name, weight in sorted(self.unreadable.items())]
        if self.declared is not None:
            lines.append(f"the config declares {self.declared}, and no tensor shows which weights that are")
        return tuple(lines)

    def with_prefix(self, prefix: str) -> Quantisation:
        """Return the same quantisation for a component whose names get a prefix.

        Args:
            prefix: The prefix, such as `unet.`.

        Returns:
            The quantisation, with the prefix before all names.
        """
        return Quantisation(
            {prefix + name: weight.with_prefix(prefix) for name, weight in self.weights.items()},
            {prefix + name: weight.with_prefix(prefix) for name, weight in self.unreadable.items()},
            tuple(prefix + name for name in self.markers),
            self.declared,
        )

    def logical(self, stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Return the logical weights: packed ones are dequantised on access, and tensors that are their parts left out.

        Args:
            stored: The stored tensors by name.

        Returns:
            The weights by logical name, in the order of the stored tensors.
        """
        first = {weight.stored_names[0]: name for name, weight in self.weights.items()}
        parts = {part for weight in self.weights.values() for part in weight.stored_names}
        parts |= {part for weight in self.unreadable.values() for part in weight.stored} | set(self.markers)
        logical: dict[str, LazyTensor] = {}
        for stored_name, tensor in stored.items():
            if (name := first.get(stored_name)) is not None:
                logical[name] = dequantised(self.weights[name])
            elif stored_name not in parts:
                logical[stored_name] = tensor
        return logical


def recognise(tensors: Mapping[str, LazyTensor], config: Mapping[str, object]) -> Quantisation | None:
    """How the weights are quantised; None if they are plain numbers and the config names no scheme.

    Tensors take precedence over the config. If the config names a scheme that no tensor confirms, the result has that
    name and no weights: it is not known what the tensors mean.
    """
    weights: dict[str, PackedWeight] = {}
    unreadable: dict[str, Unreadable] = {}
    markers: tuple[str, ...] = ()
    # Most checkpoints are plain. HQQ may store its integers as the bits of floats, under a name of its own.
    if any(t.dtype not in _PLAIN or name.endswith(".W_q") for name, t in tensors.items()):
        endings: tuple[str, ...] = ()
        for scheme in registry.names("quantization"):
            module = registry.load("quantization", scheme)
            endings += getattr(module, "MARKERS", ())
            for name, weight in module.recognise(tensors, config).items():
                if isinstance(weight, PackedWeight):
                    weights[name] = weight
                else:
                    unreadable[name] = weight
        parts = {part for weight in weights.values() for part in weight.stored_names}
        parts |= {part for weight in unreadable.values() for part in weight.stored}
        if endings and (weights or unreadable):
            markers = tuple(name for name in tensors if name.endswith(endings) and name not in parts)
        unreadable |= {
            name: Unreadable(UNKNOWN, (name,), f"values of dtype {tensor.dtype} in an unknown layout")
            for name, tensor in tensors.items()
            if name not in parts and name not in markers and _is_packed(name, tensor)
        }
    if weights or unreadable:
        return Quantisation(weights, unreadable, markers)
    declared = declared_method(config)
    return None if declared is None else Quantisation(declared=declared)


def _is_packed(name: str, tensor: LazyTensor) -> bool:
    """Whether a tensor cannot be a plain weight: less than a byte per value, or an integer matrix."""
    if DTYPE_BITS[tensor.dtype] < 8:
        return True
    integer = tensor.dtype[0] in "IU"
    return integer and len(tensor.shape) >= 2 and name.rpartition(".")[2] in _PACKED_NAMES
