"""The order of the rows of attention heads, held against the reshaping that llama.cpp's conversion does."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.naming.heads import interleaving, inverse
from loratools.naming.places import HeadOrder


def test_rows_are_interleaved_as_llama_cpp_permutes_them() -> None:
    heads, size = 3, 8
    weights = np.arange(heads * size)

    order = interleaving(heads * size, heads)

    # LlamaModel.permute of llama.cpp's conversion.
    permuted = weights.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(weights.shape)
    assert weights[list(order)].tolist() == permuted.tolist()
    assert weights[HeadOrder(heads)(heads * size)].tolist() == permuted.tolist()
    assert permuted[list(inverse(order))].tolist() == weights.tolist()
    with pytest.raises(ValueError, match="cannot be 5 heads"):
        interleaving(24, 5)
