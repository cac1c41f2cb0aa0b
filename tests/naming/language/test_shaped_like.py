"""An adapter that names no base is said to be shaped like the published models of its sizes, and like no others.

What models there are and their sizes are those of `published_sizes`; what must be told apart is worked out here, from
the sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loratools.naming.language.published_sizes import PUBLISHED, ModelSizes
from loratools.naming.language.shaped_like import ModuleShape, shaped_like

_IDS = [model.names[0] for model in PUBLISHED]


def blocks(model: ModelSizes, *, only: tuple[str, ...] = (), first: int = 0) -> Iterator[ModuleShape]:
    prefix = {"gpt_neox": "gpt_neox.layers", "falcon": "transformer.h"}.get(model.style, "model.layers")
    for layer in range(first, model.layers):
        for name, shape in model.modules().items():
            if not only or name.endswith(only):
                yield ModuleShape(f"{prefix}.{layer}.{name.replace('*', '3')}", *shape)


def same_sizes(model: ModelSizes, *, vocabulary: bool) -> list[str]:
    """Every name of a model whose block, depth and, if it counts, vocabulary are those of this one."""
    return [
        name
        for other in PUBLISHED
        if other.modules() == model.modules() and other.layers == model.layers
        if not vocabulary or other.vocabulary == model.vocabulary
        for name in other.names
    ]


def said(names: list[str]) -> str:
    return f"{names[0]}-shaped" if len(names) == 1 else f"shaped like {', '.join(names[:-1])} or {names[-1]}"


@pytest.mark.parametrize("model", PUBLISHED, ids=_IDS)
def test_every_linear_layer_of_a_model_names_it_and_those_of_its_sizes_alone(model: ModelSizes) -> None:
    names = same_sizes(model, vocabulary=False)
    assert set(model.names) <= set(names)
    assert len(names) <= 6  # so that all are named
    assert shaped_like(blocks(model)) == said(names)


@pytest.mark.parametrize("model", PUBLISHED, ids=_IDS)
def test_the_vocabulary_tells_models_of_one_size_apart(model: ModelSizes) -> None:
    with_head = [*blocks(model), ModuleShape("lm_head", model.vocabulary, model.hidden)]
    assert shaped_like(with_head) == said(same_sizes(model, vocabulary=True))


@pytest.mark.parametrize("model", PUBLISHED, ids=_IDS)
def test_the_last_layers_alone_tell_the_depth(model: ModelSizes) -> None:
    assert shaped_like(blocks(model, first=model.layers // 2)) == said(same_sizes(model, vocabulary=False))


@pytest.mark.parametrize("model", PUBLISHED, ids=_IDS)
@pytest.mark.parametrize("change", ["wider", "deeper", "another name"])
def test_another_width_depth_or_name_is_no_published_model(model: ModelSizes, change: str) -> None:
    modules = list(blocks(model))
    last = modules[-1]
    if change == "wider":
        assert last.outputs is not None
        modules[-1] = last._replace(outputs=last.outputs + 1)
    elif change == "deeper":
        modules.append(last._replace(name=last.name.replace(f".{model.layers - 1}.", ".999.")))
    else:
        modules.append(last._replace(name=last.name + "_extra"))
    assert shaped_like(modules) is None


def test_llama_and_mistral_have_the_same_blocks_and_are_named_together() -> None:
    llama = next(model for model in PUBLISHED if "Llama-3-8B" in model.names)
    assert shaped_like(blocks(llama)) == (
        "shaped like Llama-3-8B, Llama-3.1-8B, Mistral-7B-v0.1, Mistral-7B-v0.2, Mistral-7B-v0.3 or Mathstral-7B-v0.1"
    )
    embedded = [*blocks(llama), ModuleShape("model.embed_tokens", 128256, 4096)]
    assert shaped_like(embedded) == "shaped like Llama-3-8B or Llama-3.1-8B"


def test_a_vocabulary_that_tokens_were_added_to_tells_nothing() -> None:
    tiny = next(model for model in PUBLISHED if "TinyLlama-1.1B" in model.names)
    assert shaped_like([*blocks(tiny), ModuleShape("lm_head", 32003, 2048)]) == "TinyLlama-1.1B-shaped"


def test_attention_alone_fits_more_models_which_are_counted() -> None:
    llama = next(model for model in PUBLISHED if "Llama-3-8B" in model.names)
    text = shaped_like(blocks(llama, only=("q_proj", "v_proj")))
    # Also salamandra-7b and Mixtral-8x7B, which have other feed-forward layers.
    assert text is not None
    assert text.endswith("or 3 others")


def test_modules_without_a_block_tell_nothing() -> None:
    assert shaped_like([]) is None
    assert shaped_like([ModuleShape("lm_head", 128256, 4096)]) is None
    assert shaped_like([ModuleShape("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768, 768)]) is None
