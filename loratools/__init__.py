"""loratools: inspect, merge, extract, combine and resize LoRA adapters, file to file, in the memory of one tensor.

Importing the package costs nothing: every public name is resolved on first use.
"""

from __future__ import annotations

# Read by type checkers as typing.TYPE_CHECKING; importing typing would be most of the cost of `import loratools`.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from loratools._version import __version__
    from loratools.adapter import Adapter
    from loratools.checkpoints import Checkpoint, open_checkpoint
    from loratools.errors import (
        ChangedInputError,
        FormatError,
        InputError,
        LoraToolsError,
        MachineError,
        MismatchError,
        OutputExistsError,
        UndecidedError,
        UnsupportedError,
        UsageError,
    )
    from loratools.formats import load, save
    from loratools.ops.combine.verb import combine
    from loratools.ops.compare import compare
    from loratools.ops.convert.verb import convert
    from loratools.ops.extract.verb import extract
    from loratools.ops.inspect import InspectReport, inspect
    from loratools.ops.merge.verb import merge
    from loratools.ops.resize import resize
    from loratools.ops.spectrum import spectrum

# Public name -> the module that has it. No key may be the name of a submodule of loratools: importing the submodule
# would rebind the attribute to the module.
_HOMES = {
    "Adapter": "adapter",
    "ChangedInputError": "errors",
    "Checkpoint": "checkpoints",
    "FormatError": "errors",
    "InputError": "errors",
    "InspectReport": "ops.inspect",
    "LoraToolsError": "errors",
    "MachineError": "errors",
    "MismatchError": "errors",
    "OutputExistsError": "errors",
    "UndecidedError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
    "__version__": "_version",
    "combine": "ops.combine.verb",
    "compare": "ops.compare",
    "convert": "ops.convert.verb",
    "extract": "ops.extract.verb",
    "inspect": "ops.inspect",
    "load": "formats",
    "merge": "ops.merge.verb",
    "open_checkpoint": "checkpoints",
    "resize": "ops.resize",
    "save": "formats",
    "spectrum": "ops.spectrum",
}

__all__ = [
    "Adapter",
    "ChangedInputError",
    "Checkpoint",
    "FormatError",
    "InputError",
    "InspectReport",
    "LoraToolsError",
    "MachineError",
    "MismatchError",
    "OutputExistsError",
    "UndecidedError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "combine",
    "compare",
    "convert",
    "extract",
    "inspect",
    "load",
    "merge",
    "open_checkpoint",
    "resize",
    "save",
    "spectrum",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'loratools' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"loratools.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
