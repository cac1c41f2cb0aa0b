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
    """The base class of every error that loratools raises on purpose.

    Attributes:
        message: What is wrong, and about which file, tensor or argument.
        details: One line for each thing that is wrong, if there are several.
        hint: What to do about it; None if nothing is known.
        defect: The id of the rule of `loratools check` that explains it; None if there is no such rule.
        code: The name of the class of error in JSON documents.
        exit_code: The exit code of the command line.

    Example:
        >>> import loratools
        >>> try:
        ...     loratools.load("no-such-folder")
        ... except loratools.LoraToolsError as error:
        ...     print(error.code, error.exit_code)
        usage 2
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
    """An argument is invalid, or an input does not exist."""

    exit_code = 2
    code = "usage"


class OutputExistsError(UsageError):
    """The output exists and may not be replaced, or it is one of the inputs."""

    code = "output-exists"


class UnknownModuleError(UsageError, KeyError):
    """The adapter has no module of this name. It is also a `KeyError`."""

    code = "unknown-module"


class UndecidedError(LoraToolsError):
    """The input is ambiguous, and an argument has to decide."""

    exit_code = 3
    code = "undecided"


class InputError(LoraToolsError, ValueError):
    """An input is damaged, unsafe or not supported, or its values are invalid."""

    exit_code = 4
    code = "input"


class FormatError(InputError):
    """A file does not follow its format, or it is not what was expected."""

    code = "format"


class UnsupportedError(InputError):
    """The input is recognised, but loratools does not support it; the message names the feature."""

    code = "unsupported"


class UnreadTensorsError(UnsupportedError):
    """An adapter has tensors that its format does not read.

    Attributes:
        tensors: The keys of all of these tensors in the file.
    """

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
    """Each input is valid, but they do not fit together."""

    code = "mismatch"


class MachineError(LoraToolsError, OSError):
    """The disk, the permissions or the memory of the machine, or a missing program, prevented the work."""

    exit_code = 5
    code = "machine"

    def __init__(
        self, message: str, *, hint: str | None = None, details: Sequence[str] = (), defect: str | None = None
    ) -> None:
        # OSError would take several positional arguments as errno and strerror.
        LoraToolsError.__init__(self, message, hint=hint, details=details, defect=defect)


class ChangedInputError(MachineError):
    """An input changed after it was first read."""

    code = "changed-input"
