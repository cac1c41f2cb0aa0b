"""PEANuT: `dW` is what a small network without biases makes of the weight, each column of W an input of its own.

Zhong et al., 2024, https://arxiv.org/abs/2410.01870. `h = act(A w)`, through encoders, then decoders that each add the
state of the encoder opposite, then `scale * B h`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratools.errors import FormatError
from loratools.storage.arrays import read_array
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.defaults import UpdateDefaults
from loratools.updates.parts.deltas import FactorDelta
from loratools.updates.parts.low_rank import weighted
from loratools.updates.parts.peft_fields import chosen, integer, number, shaped
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Delta, Shape, Update, fits_shape

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.algebra.lowrank import Factors

PEFT_PARTS = ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders")
PEFT_FIELDS = ("depth", "act_fn", "scaling", "init_weights")
# By transformers' names; `gelu_new` and similar names are the approximation with tanh.
ACTIVATIONS = (
    "relu", "relu2", "relu6", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish",
    "tanh", "sigmoid", "mish", "leaky_relu", "linear",
)  # fmt: skip


@dataclass(frozen=True)
class PEANuT(UpdateDefaults):
    """A PEANuT update: the delta is what a small network makes of the columns of the weight.

    Attributes:
        a: The first layer A, unread: (rank, out).
        b: The last layer B, unread: (out, rank).
        encoders: The layers after A, unread: (rank, rank) each.
        decoders: As many layers before B, unread: (rank, rank) each.
        activation: The activation function by the name that PEFT gives it.
        scale: What the output of B is multiplied with.
    """

    kind: ClassVar[str] = "peanut"
    needs_base: ClassVar[bool] = True
    alpha: ClassVar[None] = None
    alpha_source: ClassVar[str] = "assumed"

    a: LazyTensor
    b: LazyTensor
    encoders: Sequence[LazyTensor]
    decoders: Sequence[LazyTensor]
    activation: str
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> Shape:
        return self.b.shape[0], None

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        encoders = {f"encoder{i}": t for i, t in enumerate(self.encoders)}
        return {"A": self.a, "B": self.b, **encoders, **{f"decoder{i}": t for i, t in enumerate(self.decoders)}}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return fits_shape(self.shape, shape)

    def factors(self) -> Factors | None:
        """None: it depends on the base."""
        return None

    def prepare(self, base: LazyTensor, *, weight: float, dtype: str) -> Delta:
        import torch

        def read(tensor: LazyTensor) -> Tensor:
            return torch.from_numpy(read_array(tensor, "F64"))

        act = _activation(self.activation)
        state = act(read(self.a) @ read(base))
        skipped = []
        for encoder in self.encoders:
            skipped.append(state)
            state = act(read(encoder) @ state)
        for decoder in self.decoders:
            state = act(read(decoder) @ state) + skipped.pop()
        delta: FactorDelta = weighted(read_array(self.b, "F64") * self.scale, state.numpy(), weight, dtype)
        return delta


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    import torch
    from torch.nn import functional

    by_name: dict[str, Callable[[Tensor], Tensor]] = {
        "relu2": lambda x: torch.relu(x).square(),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "swish": functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "linear": lambda x: x,
    }
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return lambda x: functional.gelu(x, approximate="tanh")
    activation: Callable[[Tensor], Tensor] = by_name.get(name) or getattr(functional, name)
    return activation


def from_peft(module: PeftModule) -> Mapping[str, Update]:
    """Raises:
    UnsupportedError: an activation not known here.
    FormatError: parts are missing, or do not fit each other.
    """
    depth = integer(module, "depth", 0)
    layers = {side: [f"peanut_{side}.{i}" for i in range(depth)] for side in ("encoders", "decoders")}
    a, b = module.need("peanut_A", "peanut_B")
    encoders, decoders = (module.need(*names) for names in layers.values())
    if more := sorted(set(module.parts) - {"peanut_A", "peanut_B", *layers["encoders"], *layers["decoders"]}):
        raise FormatError(f"'{module.name}' has {', '.join(more)}, and a depth of {depth} in adapter_config.json")
    shaped(module, peanut_A=(None, None))
    rank, out = a.shape
    inner = {name: (rank, rank) for names in layers.values() for name in names}
    shaped(module, peanut_B=(out, rank), **inner)
    activation = chosen(module, "act_fn", ACTIVATIONS, "relu")
    return {"": PEANuT(a, b, tuple(encoders), tuple(decoders), activation, number(module, "scaling", 1.0))}
