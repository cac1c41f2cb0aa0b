"""One wording for stored parts that cannot be what their kind needs."""

from __future__ import annotations

from loratools.errors import FormatError
from loratools.hints import DAMAGED_ADAPTER
from loratools.tensors.lazy import LazyTensor


def faulty(module: str, fault: str) -> FormatError:
    """Return the error of a module whose tensors do not make an update.

    `fault` begins with a verb: has no ...
    """
    return FormatError(f"'{module}' {fault}", hint=DAMAGED_ADAPTER)


def require_one_rank(module: str, a: LazyTensor, b: LazyTensor, diagonal: LazyTensor, *, called: str) -> None:
    """Check two factors of a linear layer and a diagonal between them; `called` is PEFT's name of the diagonal.

    Raises:
        FormatError: They are of different ranks, or no matrices.
    """
    if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == diagonal.elements:
        return
    raise faulty(
        module,
        f"has lora_A {list(a.shape)}, lora_B {list(b.shape)} and {called} {list(diagonal.shape)}, "
        "which have different ranks",
    )
