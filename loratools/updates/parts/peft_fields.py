"""What kinds ask of a PEFT module and its config, with errors that name the module and the field."""

from __future__ import annotations

from loratools.errors import FormatError, UnsupportedError
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.peft_module import PeftModule
from loratools.updates.parts.protocol import Shape, fits_shape


def number(module: PeftModule, name: str, default: float | None = None) -> float:
    """A field of the config that is a number. Without a default it must be there.

    Raises:
        FormatError: It is missing, or no number.
    """
    value = module.config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(
            f"adapter_config.json has no number for {name}, which '{module.name}' needs",
            hint="save the adapter again with PEFT's save_pretrained, which writes every field",
        )
    return value


def integer(module: PeftModule, name: str, default: int | None = None) -> int:
    """A field of the config that is a whole number.

    Raises:
        FormatError: It is missing, or no whole number of 64 bits.
    """
    value = number(module, name, default)
    if value != int(value) or not -(1 << 63) <= value < 1 << 64:
        raise FormatError(f"{name} in adapter_config.json is {value}, which is no whole number of 64 bits")
    return int(value)


def chosen(module: PeftModule, name: str, known: tuple[str, ...], default: str) -> str:
    """A field of the config that is one of some names.

    Raises:
        UnsupportedError: It is none of them.
    """
    value = module.config.get(name, default)
    if value not in known:
        raise UnsupportedError(f"{name} in adapter_config.json is {value!r}; known here are {', '.join(known)}")
    return str(value)


def shaped(module: PeftModule, **expected: Shape) -> None:
    """Check the shapes of parts, of the module's own or shared ones; None stands for any size.

    Raises:
        FormatError: One has another shape.
    """
    tensors = {**module.shared, **module.parts}
    wrong = [
        f"{name}: {tensors[name].shape}, not {_shown(shape)}"
        for name, shape in expected.items()
        if name in tensors and not fits_shape(shape, tensors[name].shape)
    ]
    if wrong:
        raise FormatError(
            f"tensors of '{module.name}' do not fit each other",
            details=wrong,
            hint="the file is damaged, or was edited",
        )


def shared(module: PeftModule, name: str, why: str) -> LazyTensor:
    """A tensor that all modules share, or that the file has under each of them.

    why: what keeps it from being made anew.

    Raises:
        UnsupportedError: The adapter was saved without it.
    """
    tensor = module.parts.get(name, module.shared.get(name))
    if tensor is None:
        raise UnsupportedError(
            f"the adapter was saved without {name}, and {why}",
            hint="load it with PEFT where it was trained, and save it with save_projection=True",
        )
    return tensor


def _shown(shape: Shape) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
