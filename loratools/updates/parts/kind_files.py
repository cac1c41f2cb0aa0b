"""What a file in `updates/` provides besides its class, as types; and the typed look-up of such a file by its name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loratools import registry
from loratools.hints import DAMAGED_ADAPTER

if TYPE_CHECKING:
    from loratools.tensors.lazy import LazyTensor
    from loratools.updates.parts.peft_module import PeftModule
    from loratools.updates.parts.protocol import Update


@runtime_checkable
class PeftVariant(Protocol):
    """A kind that PEFT stores, as LoRA and its variants are: how the tensors of one module become updates."""

    def from_peft(self, module: PeftModule) -> Mapping[str, Update]:
        """Updates by what is to be added to the module's name: nothing, or `.bias`.

        Raises:
            FormatError: The tensors do not fit each other.
            UnsupportedError: The config sets something that is not supported.
        """


@runtime_checkable
class PeftKind(PeftVariant, Protocol):
    """A kind with a `peft_type` of its own."""

    @property
    def PEFT_PARTS(self) -> tuple[str, ...]:
        """Names of its tensors below a module."""

    @property
    def PEFT_FIELDS(self) -> tuple[str, ...]:
        """Fields of its config that it interprets, or that have no part in the result."""


@runtime_checkable
class SharesTensors(Protocol):
    """A kind with tensors that all modules share."""

    @property
    def PEFT_SHARED(self) -> tuple[str, ...]:
        """Names of these tensors, below no module."""


@runtime_checkable
class ExplainsSharedAlone(Protocol):
    """A kind that can be saved with its shared tensors alone."""

    @property
    def PEFT_SHARED_ALONE(self) -> str:
        """What a person can do about such a file."""


@runtime_checkable
class MayBeEmpty(Protocol):
    """A kind whose tensors may have no values, as after all ranks of a module were pruned."""

    @property
    def PEFT_MAY_BE_EMPTY(self) -> bool: ...


@runtime_checkable
class LycorisKind(Protocol):
    """A kind that LyCORIS and compatible programs store."""

    def from_lycoris(self, parts: Mapping[str, LazyTensor], alpha: float | None, *, name: str) -> Mapping[str, Update]:
        """Updates by what is to be added to the module's name; `parts` by the ends of their keys.

        Raises:
            FormatError: The tensors do not fit each other.
            UnsupportedError: They are of a variant that is not supported.
        """


def peft_variant(name: str) -> PeftVariant:
    """The file of a kind that PEFT stores."""
    entry = registry.load("updates", name)
    assert isinstance(entry, PeftVariant), f"updates/{name} has no from_peft"
    return entry


def peft_kind(name: str) -> PeftKind | None:
    """The file of this name; None if it is no kind with a `peft_type` of its own."""
    entry = registry.load("updates", name)
    return entry if isinstance(entry, PeftKind) else None


# To ask a module whether it satisfies a protocol takes longer than to make an update.
@cache
def lycoris_kind(name: str) -> LycorisKind | None:
    """The file of this name; None if there is none, or LyCORIS does not store its kind."""
    if name not in registry.names("updates"):
        return None
    entry = registry.load("updates", name)
    return entry if isinstance(entry, LycorisKind) else None


def shared_parts(kind: PeftKind) -> tuple[str, ...]:
    """Names of the tensors that the modules of this kind share."""
    return kind.PEFT_SHARED if isinstance(kind, SharesTensors) else ()


def may_be_empty(kind: PeftKind) -> bool:
    """Whether tensors of this kind may have no values."""
    return isinstance(kind, MayBeEmpty) and kind.PEFT_MAY_BE_EMPTY


def shared_alone_hint(kind: PeftKind) -> str:
    """What a person can do about a file that has only the tensors which modules of this kind share."""
    if isinstance(kind, ExplainsSharedAlone):
        return kind.PEFT_SHARED_ALONE
    return DAMAGED_ADAPTER
