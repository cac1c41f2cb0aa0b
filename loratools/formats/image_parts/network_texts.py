"""What kohya's trainers say in a header of the network: its rank and alpha, which a change of rank makes untrue.

`ss_network_dim` and `ss_network_alpha` are of linear layers, `conv_dim` and `conv_alpha` in `ss_network_args` of
convolutions with a kernel. sd-scripts writes `Dynamic` where modules differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from loratools.adapter import Adapter
from loratools.formats.common.header_keys import NETWORK_ALPHA, NETWORK_RANK
from loratools.updates.lora import LoRA

_DYNAMIC = "Dynamic"


def network_texts(texts: Mapping[str, str], adapter: Adapter) -> dict[str, str]:
    """Those of `texts` that are no longer true of `adapter`, as they are now.

    Args:
        texts: Of the header that the adapter was read with.
        adapter: As it is to be written; of other kinds than LoRA nothing is known, and nothing changed.

    Returns:
        New texts by name; empty if all still hold.
    """
    loras = [lora for update in adapter.updates.values() if (lora := update.as_lora()) is not None]
    kernels = [u for u in loras if u.mid is not None or any(size > 1 for size in u.a.shape[2:])]
    linear = [u for u in loras if not any(u is kernel for kernel in kernels)] or kernels
    if not linear:
        return {}
    changes = _changed(texts, NETWORK_RANK, NETWORK_ALPHA, linear)
    args = _arguments(texts.get("ss_network_args"))
    if kernels and (changed := _changed(args, "conv_dim", "conv_alpha", kernels)):
        changes["ss_network_args"] = json.dumps({**args, **changed})
    return changes


def _changed(texts: Mapping[str, str], dim: str, alpha: str, loras: Iterable[LoRA]) -> dict[str, str]:
    """Rank and alpha of these modules, where the texts say others: no module is larger than a rank that holds."""
    ranks = [u.rank for u in loras]
    alphas = [u.scale * u.rank for u in loras]
    changes: dict[str, str] = {}
    if dim in texts and _number(texts[dim]) != max(ranks):
        changes[dim] = str(ranks[0]) if len(set(ranks)) == 1 else _DYNAMIC
    stated = _number(texts.get(alpha, ""))
    # Trainers take an alpha of 0 for the rank.
    if alpha in texts and (changes or (stated or max(ranks)) not in alphas):
        changes[alpha] = f"{alphas[0]}" if len(set(alphas)) == 1 else _DYNAMIC
    return changes


def _arguments(text: str | None) -> dict[str, str]:
    try:
        values = json.loads(text or "{}")
    except ValueError:
        return {}
    return (
        {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        if isinstance(values, dict)
        else {}
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
