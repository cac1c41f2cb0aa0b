"""What formats claim a file is asked once for all files with the same names, and for no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from loratools import formats
from loratools.errors import LoraToolsError
from loratools.formats.common.detection_key import detection_key
from loratools.formats.common.source import AdapterSource, open_source
from loratools.tensors.lazy import LazyTensor

FIXTURES = Path(__file__).parents[2] / "fixtures"


class _FieldsWithoutValues(Mapping[str, str]):
    """A header whose fields are there and cannot be read."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        raise AssertionError(f"a format read '{name}' of a header, which is not what files are told apart by")

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def with_kohya_names(rank: int, *, modules: int = 3, suffix: str = "lora_down") -> AdapterSource:
    tensors = {}
    for block in range(modules):
        name = f"lora_unet_down_blocks_1_attentions_{block}_proj_in"
        tensors[f"{name}.{suffix}.weight"] = LazyTensor((rank, 6), "F32", None)  # type: ignore[arg-type]
        tensors[f"{name}.lora_up.weight"] = LazyTensor((10, rank), "F32", None)  # type: ignore[arg-type]
    path = Path("some.safetensors")
    return AdapterSource(path, path.parent, path, None, tensors)


# How formats spell two factors of a module.
PAIRS = (
    (
        "diffusion_model.input_blocks.4.1.proj_in.lora_down.weight",
        "diffusion_model.input_blocks.4.1.proj_in.lora_up.weight",
    ),
    ("lora_transformer_blocks_0_attn_to_q.lora_down.weight", "lora_transformer_blocks_0_attn_to_q.lora_up.weight"),
    ("lycoris_down_blocks_1_proj_in.lora_down.weight", "lycoris_down_blocks_1_proj_in.lora_up.weight"),
    ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight"),
    ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"),
    ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
    ("transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"),
    ("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"),
    ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
    ("thing.0.values", "thing.1.values"),
)


def pair(first: str, second: str) -> AdapterSource:
    path = Path("some.safetensors")
    shapes = {first: (2, 6), second: (10, 2)}
    tensors = {name: LazyTensor(shape, "F32", None) for name, shape in shapes.items()}  # type: ignore[arg-type]
    return AdapterSource(path, path.parent, path, None, tensors)


def files_of_many_formats() -> list[AdapterSource]:
    sources = [pair(*names) for names in PAIRS]
    for path in sorted(FIXTURES.rglob("*.safetensors")):
        try:
            source = replace(open_source(path), config=None)
        except LoraToolsError:
            continue
        if detection_key(source) is not None:
            sources.append(source)
    return sources


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    formats._claims_of_names.clear()
    yield
    formats._claims_of_names.clear()


def test_answers_of_many_files_are_those_that_each_gives_by_itself() -> None:
    sources = [*files_of_many_formats(), with_kohya_names(2), with_kohya_names(4), with_kohya_names(2, suffix="other")]
    each = [formats._detected(source) for source in sources]

    first = [formats.claims_of(source) for source in sources]
    again = [formats.claims_of(source) for source in reversed(sources)][::-1]

    assert first == each
    assert again == each
    # Of several formats and of none, or nothing would be shown.
    assert len({tuple(claims) for claims in each}) > 4


def test_formats_look_at_nothing_but_what_files_are_told_apart_by() -> None:
    for source in files_of_many_formats():
        elsewhere = replace(
            source,
            path=Path("/elsewhere"),
            folder=Path("/"),
            file=Path("/elsewhere.bin"),
            metadata=_FieldsWithoutValues(source.metadata),
        )

        assert formats._detected(elsewhere) == formats._detected(source), source.path


@pytest.mark.parametrize(
    "other",
    [
        with_kohya_names(2, modules=4),
        with_kohya_names(5),
        with_kohya_names(2, suffix="other"),
        replace(with_kohya_names(2), metadata={"lora_adapter_metadata": "{}"}),
        replace(with_kohya_names(2), tensors=dict(reversed(with_kohya_names(2).tensors.items()))),
        replace(
            with_kohya_names(2),
            tensors={name: replace(t, dtype="I32") for name, t in with_kohya_names(2).tensors.items()},
        ),
    ],
    ids=["more modules", "another rank", "other names", "header", "another order", "another dtype"],
)
def test_file_that_differs_in_anything_is_asked_again(other: AdapterSource) -> None:
    assert formats.claims_of(with_kohya_names(2)) == ["kohya"]

    assert detection_key(other) not in formats._claims_of_names
    assert formats.claims_of(other) == formats._detected(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {}},
        {"container": "pickle"},
        {"other": {"epoch": 3}},
        {"base": formats.Base({}, {})},
        {"packed": {"w": "Q4_0"}},
    ],
)
def test_source_with_more_than_named_tensors_is_always_asked(changes: dict[str, object]) -> None:
    assert detection_key(replace(with_kohya_names(2), **changes)) is None


def test_known_answers_do_not_grow_without_end() -> None:
    for rank in range(1, 200):
        formats.claims_of(with_kohya_names(rank))

    assert len(formats._claims_of_names) <= formats._MOST_KNOWN


def test_answer_that_a_caller_changes_stays_as_it_was() -> None:
    formats.claims_of(with_kohya_names(2)).append("changed")
    formats.claims_of(with_kohya_names(2)).append("changed")

    assert formats.claims_of(with_kohya_names(2)) == ["kohya"]
