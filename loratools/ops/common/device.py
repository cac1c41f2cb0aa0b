"""The device that a verb computes on, as a person names it."""

from __future__ import annotations

import re

from loratools.errors import UsageError

_NAMES = re.compile(r"auto|cpu|mps|cuda(:(?P<index>\d{1,4}))?", re.ASCII)


def ensure_device(name: str) -> None:
    """Refuse a device that cannot be computed on, before anything is read. torch is imported for a GPU only.

    Raises:
        UsageError: There is no such device here, or it has no float64.
    """
    parsed = _NAMES.fullmatch(name)
    if parsed is None:
        raise UsageError(
            f"device '{name}' cannot be used: there is no device of that name",
            hint="name one of cpu, cuda, cuda:N, mps and auto",
        )
    if name in ("auto", "cpu"):
        return
    import torch

    if name == "mps":
        present = torch.backends.mps.is_available()
        why = "it has no float64, which is computed in" if present else "there is no MPS device here"
        raise UsageError(f"device 'mps' cannot be used: {why}", hint="use --device cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(parsed["index"] or 0) >= count:
        devices = f"the CUDA devices here are numbered up to {count - 1}" if count else "there is no CUDA device here"
        raise UsageError(f"device '{name}' cannot be used: {devices}", hint="use --device cpu")


def device_named(name: str) -> str:
    """The name of a device in torch; `auto` is the first CUDA device, where there is one, and else the CPU.

    Raises:
        UsageError: There is no such device here, or it has no float64.
    """
    ensure_device(name)
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def computed_on(device: str = "cpu") -> str:
    """A device of torch, and the instructions that torch uses of the processor, on which the last bits depend."""
    import torch

    return f"{device} {torch.backends.cpu.get_cpu_capability()}"
