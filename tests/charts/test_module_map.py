"""Where modules stand in a map, and the numbers in it."""

from __future__ import annotations

import pytest

from loratools.charts.module_map import NO_LAYER, Cell, cells, limits_of, module_map
from loratools.charts.values import HeatMap

LLAMA = [
    f"model.layers.{layer}.{kind}"
    for layer in (0, 2, 10)
    for kind in ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj", "self_attn.q_proj")
]


def built(numbers: dict[str, float | None], **options: object) -> HeatMap:
    chart = module_map(numbers.items(), title="title", unit="unit", **options)  # type: ignore[arg-type]
    assert chart is not None
    return chart


def test_layers_are_rows_in_natural_order_and_kinds_columns_with_attention_first() -> None:
    chart = built({name: float(i) for i, name in enumerate(LLAMA)})

    assert chart.rows == ("layers.0", "layers.2", "layers.10")
    assert chart.columns == ("q_proj", "k_proj", "gate_proj", "down_proj")
    assert chart.values == ((3.0, 2.0, 1.0, 0.0), (7.0, 6.0, 5.0, 4.0), (11.0, 10.0, 9.0, 8.0))
    assert chart.limits == (0.0, 11.0)


def test_a_module_that_is_missing_or_has_no_number_leaves_an_empty_place() -> None:
    numbers: dict[str, float | None] = dict.fromkeys(LLAMA, 1.0)
    del numbers["model.layers.2.self_attn.q_proj"]
    numbers["model.layers.10.mlp.gate_proj"] = None

    chart = built(numbers)

    assert chart.values == ((1.0, 1.0, 1.0, 1.0), (None, 1.0, 1.0, 1.0), (1.0, 1.0, None, 1.0))


def test_numbers_that_are_not_finite_leave_an_empty_place() -> None:
    chart = built({"h.0.q": 1.0, "h.1.q": float("nan"), "h.2.q": 2.0, "h.3.q": float("inf")})

    assert chart.values == ((1.0,), (None,), (2.0,), (None,))
    assert chart.limits == (0.0, 2.0)


def test_experts_of_a_layer_share_a_column_with_their_mean() -> None:
    numbers = {f"model.layers.{n}.mlp.experts.{e}.up_proj": float(10 * n + e) for n in (0, 1) for e in (1, 2, 6)}

    chart = built(numbers | {"model.layers.0.mlp.gate": 5.0})

    assert chart.columns == ("gate", "mlp.experts.*.up_proj")
    assert chart.values == ((5.0, 3.0), (None, 13.0))
    assert "mean of several modules" in chart.note


def test_blocks_of_a_unet_are_rows_down_through_the_middle_and_up() -> None:
    blocks = ["up_blocks.0.attentions.2", "mid_block.attentions.0", "down_blocks.10.attentions.1"]
    kinds = ["attn2.to_out.0", "attn1.to_k", "ff.net.0.proj", "attn1.to_q", "ff.net.2"]

    chart = built({f"{b}.transformer_blocks.{n}.{k}": 1.0 for b in blocks for n in (0, 3) for k in kinds})

    assert chart.rows == (
        "down_blocks.10.attentions.1.transformer_blocks.0",
        "down_blocks.10.attentions.1.transformer_blocks.3",
        "mid_block.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.3",
        "up_blocks.0.attentions.2.transformer_blocks.0",
        "up_blocks.0.attentions.2.transformer_blocks.3",
    )
    assert chart.columns == ("attn1.to_q", "attn1.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert all(value == 1.0 for row in chart.values for value in row)


def test_layers_within_the_blocks_of_a_t5_are_kinds_and_not_rows() -> None:
    names = [f"encoder.block.{n}.layer.{tail}" for n in (0, 1) for tail in ("0.SelfAttention.q", "1.DenseReluDense.wo")]

    assert cells(names) == [
        Cell("block.0", "layer.0.SelfAttention.q"),
        Cell("block.0", "layer.1.DenseReluDense.wo"),
        Cell("block.1", "layer.0.SelfAttention.q"),
        Cell("block.1", "layer.1.DenseReluDense.wo"),
    ]


def test_modules_in_no_layer_have_a_row_of_their_own_at_the_end() -> None:
    chart = built({"lm_head": 2.0, "model.layers.0.mlp.up_proj": 1.0, "model.embed_tokens": 3.0})

    assert chart.rows == ("layers.0", NO_LAYER)
    assert chart.columns == ("up_proj", "embed_tokens", "lm_head")
    assert chart.values == ((1.0, None, None), (None, 3.0, 2.0))


def test_names_whose_dots_were_written_as_underscores_have_layers_too() -> None:
    names = [f"lora_unet_{b}_attentions_{n}_attn1_to_q" for b in ("mid_block", "up_blocks_3") for n in (0, 1)]

    assert [c.row for c in cells(names)] == [
        "lora_unet_mid_block_attentions.0",
        "lora_unet_mid_block_attentions.1",
        "lora_unet_up_blocks.3.attentions.0",
        "lora_unet_up_blocks.3.attentions.1",
    ]
    assert {c.column for c in cells(names)} == {"attn1_to_q"}


def test_last_words_that_two_kinds_share_are_not_shortened() -> None:
    names = ["blocks.0.self_attn.q", "blocks.0.cross_attn.q", "blocks.0.ffn.gate"]

    assert [c.column for c in cells(names)] == ["self_attn.q", "cross_attn.q", "gate"]


def test_a_neutral_number_is_in_the_middle_of_the_limits() -> None:
    assert limits_of([0.25, 1.5], neutral=1.0) == (0.25, 1.75)
    # Rounding alone does not fill the scale.
    assert limits_of([1.0, 1.0 + 1e-9], neutral=1.0) == (0.99, 1.01)
    assert limits_of([0.5, 3.0]) == (0.0, 3.0)
    assert limits_of([0.0]) == (0.0, 1.0)


def test_there_is_no_map_of_fewer_than_two_numbers() -> None:
    assert module_map([("h.0.q", 1.0), ("h.1.q", None)], title="", unit="") is None


def test_values_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 1 rows of 2 numbers"):
        HeatMap("t", "u", ("a",), ("b", "c"), ((1.0,),))
    with pytest.raises(ValueError, match="not in ascending order"):
        HeatMap("t", "u", ("a",), ("b",), ((1.0,),), limits=(1.0, 1.0))
