"""Every error that loratools raises on purpose.

    LoraToolsError                 what is wrong, about which thing, and what to do next
    ├── UsageError        exit 2   the command line asks for something that makes no sense
    │   ├── OutputExistsError      the output is there already, or is one of the inputs
    │   └── UnknownModuleError     the adapter has no module of this name (also a KeyError)
    ├── UndecidedError    exit 3   the question could not be answered
    ├── InputError        exit 4   what was given is bad or unsafe
    │   ├── FormatError            a file is not what its format says
    │   ├── UnsupportedError       recognised, and refused by name
    │   │   └── UnreadTensorsError  tensors of an adapter that its format does not read
    │   └── MismatchError          each input is good, but they do not fit each other
    └── MachineError      exit 5   disk, permission, network, a file that changes meanwhile
        └── ChangedInputError      an input is no longer what was read first

The exit codes are a contract (README, "Exit codes"). Anything else that escapes is a bug of ours and ends with 70.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraToolsError(Exception):
    """What is wrong (`message`), one line per thing concerned (`details`), and what to do (`hint`).

    `defect`: the id of the rule of `checks/` that explains it; None if no rule is about it in particular.
    """

    exit_code = 70
    code = "internal"

    def __init__(
        self, message: str, *, hint: str | None = None, details: Sequence[str] = (), defect: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.defect = defect

    def __str__(self) -> str:
        return "\n".join([self.message, *self.details] + ([f"hint: {self.hint}"] if self.hint else []))


class UsageError(LoraToolsError, ValueError):
    exit_code = 2
    code = "usage"


class OutputExistsError(UsageError):
    code = "output-exists"


class UnknownModuleError(UsageError, KeyError):
    code = "unknown-module"


class UndecidedError(LoraToolsError):
    exit_code = 3
    code = "undecided"


class InputError(LoraToolsError, ValueError):
    exit_code = 4
    code = "input"


class FormatError(InputError):
    code = "format"


class UnsupportedError(InputError):
    code = "unsupported"


class UnreadTensorsError(UnsupportedError):
    """Tensors that are not read, by their keys in the file (`tensors`), all of them."""

    def __init__(
        self,
        message: str,
        tensors: Sequence[str],
        *,
        hint: str | None = None,
        details: Sequence[str] = (),
        defect: str | None = "keys-unknown",
    ) -> None:
        super().__init__(message, hint=hint, details=details, defect=defect)
        self.tensors = tuple(tensors)


class MismatchError(InputError):
    code = "mismatch"


class MachineError(LoraToolsError, OSError):
    exit_code = 5
    code = "machine"

    def __init__(
        self, message: str, *, hint: str | None = None, details: Sequence[str] = (), defect: str | None = None
    ) -> None:
        # OSError would take several positional arguments as errno and strerror.
        LoraToolsError.__init__(self, message, hint=hint, details=details, defect=defect)


class ChangedInputError(MachineError):
    code = "changed-input"
