"""The order of the rows of attention heads: the two halves of a rotary embedding interleaved, or one after the other.

Meta's own checkpoints, torchtune and llama.cpp interleave them; transformers keeps one half after the other.
"""

from __future__ import annotations


def heads_field(module: str) -> str | None:
    """Which count of heads the rows of a module are interleaved by: query heads, key heads, or none."""
    leaf = module.rpartition(".")[2]
    return {"attn_q": "queries", "attn_k": "keys", "q_proj": "queries", "k_proj": "keys"}.get(leaf)


def interleaving(rows: int, heads: int) -> tuple[int, ...]:
    """For each row as its first authors stored it, its number in transformers: halves of each head, row by row in turn.

    Raises:
        ValueError: these rows are no such heads.
    """
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows cannot be {heads} heads of an even size")
    half = rows // heads // 2
    return tuple(h * 2 * half + i * half + j for h in range(heads) for j in range(half) for i in range(2))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes an order."""
    positions = [0] * len(order)
    for position, row in enumerate(order):
        positions[row] = position
    return tuple(positions)
