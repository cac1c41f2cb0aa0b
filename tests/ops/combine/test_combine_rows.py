"""Adapters that replace rows of an embedding, combined: each row is its adapter's; where they differ a policy says."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import Adapter, Replacement
from loratools.errors import MismatchError
from loratools.ops.combine.verb import combine
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA

NAME = "model.embed_tokens.weight"
ONE, TWO = torch.arange(6.0).reshape(2, 3), 10 + torch.arange(9.0).reshape(3, 3)


def _adapter(rows: tuple[int, ...] | None, values: torch.Tensor) -> Adapter:
    update = LoRA(from_torch(torch.ones(2, 4)), from_torch(torch.ones(5, 2)), 2.0, "config")
    return Adapter(
        {"model.q": update}, {NAME: Replacement(from_torch(values), "tokens" if rows else "embedding", rows)}
    )


def _rows(adapter: Adapter | None) -> dict[int, list[float]]:
    assert adapter is not None
    found = adapter.replacements[NAME]
    return {row: values.tolist() for row, values in zip(found.rows or (), found.tensor.read(), strict=True)}


def test_rows_of_different_words_are_put_together() -> None:
    report = combine([_adapter((7, 2), ONE), _adapter((9, 4, 2), torch.cat([TWO[:2], ONE[1:]]))])

    assert _rows(report.adapter) == {
        2: ONE[1].tolist(),
        4: TWO[1].tolist(),
        7: ONE[0].tolist(),
        9: TWO[0].tolist(),
    }
    assert list(_rows(report.adapter)) == [2, 4, 7, 9]
    assert f"rows that only some adapters replace are put together: {NAME}" in report.warnings


@pytest.mark.parametrize(
    ("policy", "shared"), [("first", ONE[1]), ("average", (0.25 * ONE[1] + 0.75 * TWO[2])), ("refuse", None)]
)
def test_a_row_that_two_replace_differently_follows_the_policy(policy: str, shared: torch.Tensor | None) -> None:
    sources = [(_adapter((7, 2), ONE), 0.25), (_adapter((9, 4, 2), TWO), 0.75)]
    if shared is None:
        with pytest.raises(MismatchError, match="different values") as refused:
            combine(sources, heads=policy)
        assert refused.value.details[0].startswith(f"{NAME} (1 of 4 rows)   ")
        return

    report = combine(sources, heads=policy)

    assert any("differ are" in text and text.endswith(f"{NAME} (1 of 4 rows)") for text in report.warnings)
    wanted = {2: shared, 4: TWO[1], 7: ONE[0], 9: TWO[0]}
    assert _rows(report.adapter) == {row: pytest.approx(values.tolist()) for row, values in wanted.items()}


def test_rows_and_a_whole_table_have_no_mean() -> None:
    with pytest.raises(MismatchError, match=r"all of .* and another some of its rows"):
        combine([_adapter((7, 2), ONE), _adapter(None, TWO)], heads="average")
