"""The order of the rows of attention heads: the two halves of a rotary embedding interleaved, or one after the other.

Meta's own checkpoints, torchtune and llama.cpp interleave them; transformers keeps one half after the other. And the
heads of fused queries, keys and values: all queries first, or the queries of a group with its key and its value.
"""

from __future__ import annotations


def heads_field(module: str) -> str | None:
    """Which count of heads the rows of a module are interleaved by: query heads, key heads, or none."""
    leaf = module.rpartition(".")[2]
    return {"attn_q": "queries", "attn_k": "keys", "q_proj": "queries", "k_proj": "keys"}.get(leaf)


def interleaving(rows: int, heads: int) -> tuple[int, ...]:
    """For each row as its first authors stored it, its number in transformers: halves of each head, row by row in turn.

    Raises:
        ValueError: These rows are no such heads.
    """
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows cannot be {heads} heads of an even size")
    half = rows // heads // 2
    return tuple(h * 2 * half + i * half + j for h in range(heads) for j in range(half) for i in range(2))


def ungrouped(rows: int, queries: int, keys: int) -> tuple[int, ...]:
    """For each row of all queries, then all keys, then all values, its number where each group has its own queries
    first, then its key, then its value, as in Falcon.

    Raises:
        ValueError: These rows are no such heads.
    """
    if queries % keys or rows % (queries + 2 * keys):
        raise ValueError(f"{rows} rows cannot be {queries} heads of queries and {keys} of keys and of values")
    size, each = rows // (queries + 2 * keys), queries // keys
    of_queries = [group * (each + 2) + head for group in range(keys) for head in range(each)]
    of_keys = [group * (each + 2) + each for group in range(keys)]
    heads = [*of_queries, *of_keys, *(key + 1 for key in of_keys)]
    return tuple(head * size + row for head in heads for row in range(size))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes an order."""
    positions = [0] * len(order)
    for position, row in enumerate(order):
        positions[row] = position
    return tuple(positions)
