"""Which family names are of, with shapes and depths of published models: the right one or a question."""

from __future__ import annotations

import pytest

from loratools.errors import LoraToolsError, MismatchError, UndecidedError, UnsupportedError
from loratools.naming.image.evidence import Sizes, decide, denoisers, families_in, family_named
from loratools.naming.image.family import Family
from loratools.naming.image.given_base import GivenBase, decide_for
from loratools.naming.image.resolving import base_family

# Blocks of published models: family -> (where blocks stand, how many, modules of one of them with outputs and inputs).
# Numbers are those of the configs that the models were published with.
SQUARE = ("to_q", "to_k", "to_v", "to_out.0")


def attention(block: str, width: int, leaves: tuple[str, ...] = SQUARE) -> dict[str, tuple[int, int]]:
    return {f"{block}.{leaf}": (width, width) for leaf in leaves}


def grouped(block: str, width: int, share: int) -> dict[str, tuple[int, int]]:
    return {f"{block}.{leaf}": (width // (share if leaf in ("to_k", "to_v") else 1), width) for leaf in SQUARE}


# family -> (name of the blocks, depth, attention of a block, the rest of a block)
PUBLISHED: dict[str, tuple[str, int, dict[str, tuple[int, int]], dict[str, tuple[int, int]]]] = {
    "flux": ("transformer_blocks", 19, attention("attn", 3072), {"ff.net.0.proj": (12288, 3072)}),
    "flux2": ("transformer_blocks", 8, attention("attn", 6144), {"ff.linear_in": (36864, 6144)}),
    "sd3": ("transformer_blocks", 24, attention("attn", 1536), {"ff.net.0.proj": (6144, 1536)}),
    "wan": ("blocks", 40, attention("attn1", 5120) | attention("attn2", 5120), {"ffn.net.0.proj": (13824, 5120)}),
    "hunyuan-video": ("transformer_blocks", 20, attention("attn", 3072), {"ff.net.0.proj": (12288, 3072)}),
    "qwen-image": ("transformer_blocks", 60, attention("attn", 3072), {"img_mlp.net.0.proj": (12288, 3072)}),
    "krea2": ("transformer_blocks", 28, grouped("attn", 6144, 4), {"ff.gate": (16384, 6144)}),
    "z-image": ("layers", 30, attention("attention", 3840), {"feed_forward.w1": (10240, 3840)}),
    "lumina2": ("layers", 26, grouped("attn", 2304, 3), {"feed_forward.linear_1": (9216, 2304)}),
    "omnigen2": ("layers", 32, grouped("attn", 2520, 3), {"feed_forward.linear_1": (10240, 2520)}),
    "ideogram4": ("layers", 34, attention("attention", 4608), {"feed_forward.w1": (12288, 4608)}),
}


def sample(family: str, kind: str) -> dict[str, tuple[int | None, int | None]]:
    blocks, depth, inner, rest = PUBLISHED[family]
    modules = inner if kind == "attention only" else inner | rest
    numbers = [depth // 2] if kind == "one block" else range(depth)
    return {f"{blocks}.{i}.{name}": shape for i in numbers for name, shape in modules.items()}


@pytest.mark.parametrize("kind", ["full", "attention only", "one block"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_sample_is_of_its_family_or_a_question(name: str, kind: str) -> None:
    decision = decide(sample(name, kind), denoisers())
    assert name in [family.name for family in decision.families]
    # Where others are left, they call these modules the same.
    for family in decision.families:
        assert {n: family.find(n) for n in decision.places} == dict(decision.places)
    if kind == "full":
        assert decision.family is not None


@pytest.mark.parametrize("kind", ["full", "attention only", "one block"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_without_its_table_a_sample_gets_no_other_meaning(name: str, kind: str) -> None:
    others = [family for family in denoisers() if family.name != name]
    try:
        decision = decide(sample(name, kind), others)
    except LoraToolsError:
        return
    # Modules that several models call the same are the same modules, whichever of them is left.
    right = family_named(name)
    assert right is not None
    assert dict(decision.places) == {n: right.find(n) for n in decision.places}


def test_a_header_decides_between_families_of_the_same_names() -> None:
    names: Sizes = {"double_blocks.5.img_attn.qkv": (9216, 3072), "double_blocks.5.img_mlp.0": (18432, 3072)}
    assert decide(names, denoisers(), header="flux_2_klein_4b").family is family_named("flux2")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("flux_2_klein_9b", "flux2"), ("flux-1-dev/lora", "flux"), ("z_image", "z-image"), ("Z-Image/lora", "z-image"),
        ("sdxl_base_v1-0", "sdxl"), ("sd_v1", "sd"), ("stable-diffusion-xl-v1-base/lora", "sdxl"), ("sd3m", "sd3"),
        ("qwen_image_edit", "qwen-image"), ("wan2.1", "wan"), ("ideogram4", "ideogram4"), ("krea2", "krea2"),
        ("hunyuan_video", "hunyuan-video"), ("lumina2", "lumina2"), ("hunyuan_video_1_5", "hunyuan-video15"),
        ("framepack", "hunyuan-video"), ("hunyuan-image-2.1/lora", "hunyuan-image"), ("kandinsky5", "kandinsky5"),
        ("flux_2_dev", "flux2"), ("flux_2_klein_4b", "flux2"), ("flux_kontext", "flux"), ("wan", "wan"),
        ("qwen_image", "qwen-image"), ("qwen_image_layered", "qwen-image"), ("anima-preview", "cosmos"),
        ("ltx2", "ltx2"), ("ltxv-13b", "ltx"), ("hidream", "hidream"), ("pixart-sigma", "pixart"),
        ("AuraFlow-v0.3", "auraflow"), ("cogvideox-5b", "cogvideox"), ("mochi-1", "mochi"), ("Sana_1600M", "sana"),
        ("HunyuanDiT-v1.2", "hunyuan-dit"), ("ace-step-v1.5", "ace-step"),
    ],
)  # fmt: skip
def test_words_of_headers_name_their_family(text: str, name: str) -> None:
    assert [family.name for family in families_in(text, denoisers())] == [name]


def test_a_word_in_the_middle_of_another_names_nothing() -> None:
    assert families_in("a swan in taiwan", denoisers()) == []


def test_a_header_that_shapes_contradict_is_a_question() -> None:
    names: Sizes = {"layers.0.attention.qkv": (3840, 2304), "layers.0.attention.out": (2304, 2304)}
    assert decide(names, denoisers()).family is family_named("lumina2")
    with pytest.raises(UndecidedError, match="z-image"):
        decide(names, denoisers(), header="z_image")


def test_only_names_are_no_proof() -> None:
    names: Sizes = {f"layers.{i}.attention.{leaf}": (64, 64) for i in range(3) for leaf in ("qkv", "out")}
    with pytest.raises(UndecidedError) as caught:
        decide(dict.fromkeys(names, (None, None)), [f for f in denoisers() if f.name == "z-image"])
    assert caught.value.hint is not None
    assert "--base" in caught.value.hint


def test_a_given_family_decides_and_must_know_the_names() -> None:
    given = family_named("krea2")
    assert given is not None
    names: Sizes = {"transformer_blocks.0.attn.to_q": (48, 48)}
    assert decide_for(GivenBase(given), names, denoisers()).family is given
    with pytest.raises(MismatchError, match="of no module of krea2"):
        decide_for(GivenBase(given), {"double_blocks.0.img_attn.mix": (9, 3)}, denoisers())


def test_a_config_names_the_family_of_a_base() -> None:
    assert base_family({}, {"_class_name": "QwenImageTransformer2DModel", "num_layers": 60}) is family_named(
        "qwen-image"
    )
    assert base_family({}, {"transformer": {"_class_name": "Krea2Transformer2DModel"}}) is family_named("krea2")
    unet = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 2048}
    assert base_family({}, unet) is family_named("sdxl")
    assert base_family({}, {"model_type": "llama"}) is None


def test_names_of_no_family_are_unknown() -> None:
    with pytest.raises(UnsupportedError, match="its one module name is not known"):
        decide({"tower.3.mix": (4, 4)}, denoisers())


def test_names_and_words_of_families_are_their_own() -> None:
    names = [family.name for family in denoisers()]
    assert len(set(names)) == len(names)
    words = [word for family in denoisers() for word in family.words]
    assert len(set(words)) == len(words)
    classes = [c for family in denoisers() if family.component == "transformer" for c in family.classes]
    assert len(set(classes)) == len(classes)
    family: Family
    for family in denoisers():
        assert family.words
        assert family.classes
        assert family.exclusive
