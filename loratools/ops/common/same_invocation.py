"""Where adapters act: on every token, or after certain ones (aLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.adapter import Adapter
from loratools.errors import MismatchError, UnsupportedError
from loratools.storage.files import quoted


def require_same_invocation(adapters: Sequence[Adapter]) -> None:
    """Raise MismatchError where the adapters do not act after the same tokens.

    Args:
        adapters: Those that become one adapter, which acts after one sequence of tokens or on all.
    """
    if len({adapter.invocation_tokens for adapter in adapters}) > 1:
        raise MismatchError(
            "the adapters act after different tokens (alora_invocation_tokens), and one adapter cannot do both",
            details=[
                f"{quoted(adapter.name)}   {list(adapter.invocation_tokens) or 'on every token'}"
                for adapter in adapters
            ],
            hint="combine those that act after the same tokens",
        )


def refuse_invoked(adapters: Sequence[Adapter]) -> None:
    """Raise UnsupportedError where an adapter acts after certain tokens only: weights of a merged model always act."""
    if invoked := [adapter for adapter in adapters if adapter.invocation_tokens]:
        raise UnsupportedError(
            "what acts after certain tokens only (aLoRA) cannot be merged, as merged weights act on every token",
            details=[f"{quoted(a.name)}   acts after the tokens {list(a.invocation_tokens)}" for a in invoked],
            hint="serve it beside its base: vLLM and llama.cpp switch it on where the tokens appear",
        )
