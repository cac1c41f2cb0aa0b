"""The loaders of diffusers: each of the installed ones is known here, and reads what is written for it.

A sample has every linear layer of the first blocks of a published model. It is converted, given to the loader of the
model's pipeline, and what the loader makes of it is held against the modules of the model and the product of factors.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from naming.image import published
from naming.image.written import ALSO_READ, documented_names
from safetensors.torch import load_file, save_file

import loratools
from loratools.naming.image.evidence import family_named

pytestmark = peers.needs("diffusers")

# Loader of diffusers, without the end of its name -> families whose pipelines have it.
LOADERS: dict[str, tuple[str, ...]] = {
    "StableDiffusion": ("sd",),
    "StableDiffusionXL": ("sdxl",),
    "SD3": ("sd3",),
    "AuraFlow": ("auraflow",),
    "Flux": ("flux",),
    "CogVideoX": ("cogvideox",),
    "Mochi1": ("mochi",),
    "LTXVideo": ("ltx",),
    "LTX2": ("ltx2",),
    "Sana": ("sana",),
    "HunyuanVideo": ("hunyuan-video", "hunyuan-video15"),
    "Lumina2": ("lumina2",),
    "Kandinsky": ("kandinsky5",),
    "Wan": ("wan",),
    "SkyReelsV2": ("wan",),
    "HiDreamImage": ("hidream",),
    "QwenImage": ("qwen-image",),
    "Krea2": ("krea2",),
    "ZImage": ("z-image",),
    "Flux2": ("flux2",),
    "Ideogram4": ("ideogram4",),
    "Cosmos": ("cosmos",),
}
# Loaders of models without a table of names here, and why: their files keep their names in their own format.
NO_FAMILY = {
    "Amused": "a UViT of one release, for which no trainer writes another format than diffusers",
    "Helios": "loads with the names of Wan; its transformer has layers that no publication names otherwise",
    "CogView4": "has no names but those of diffusers",
    "Anima": "the names of its text conditioner are in no publication beside the converter's own",
    "Flux3": "its names are still those of a preview",
    "BriaFibo2": "has no names but those of diffusers",
    "ErnieImage": "has no names but those of diffusers",
    "AceStep": "audio: its converter reads PEFT folders of the authors' names, which are read as PEFT",
    "MiniMaxH3": "its names are still those of a preview",
    "RFD4Proteina": "a model of proteins, and not of images or video",
    "": "the old name of the loader of Stable Diffusion",
}


def mixins() -> dict[str, Any]:
    from diffusers.loaders import lora_pipeline

    ending = "LoraLoaderMixin"
    return {n.removesuffix(ending): m for n, m in vars(lora_pipeline).items() if n.endswith(ending)}


def test_every_loader_of_the_installed_diffusers_is_known_with_a_family_or_a_reason() -> None:
    assert set(mixins()) == {*LOADERS, *NO_FAMILY}
    assert not {*LOADERS} & {*NO_FAMILY}
    for families in LOADERS.values():
        assert all(family_named(name) is not None for name in families)


def test_every_converter_of_the_installed_diffusers_belongs_to_a_known_loader() -> None:
    from diffusers.loaders import lora_conversion_utils

    converters = {name for name in vars(lora_conversion_utils) if name.startswith("_convert_")}
    # Each class once: its source is looked for in a file of thousands of lines.
    source = "".join(inspect.getsource(mixin) for mixin in mixins().values())
    used = {name for name in converters if name in source}
    # Two are steps of the one for Stable Diffusion.
    assert converters - used == {"_convert_unet_lora_key", "_convert_text_encoder_lora_key"}


@cache
def factors(family: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of rank 1 of the linear layers in the first block of each kind, of a published model."""
    generator = torch.Generator().manual_seed(7)
    sample = {}
    for name, (rows, columns) in published.modules(family).items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if numbers and int(numbers[0]) == 0:
            sample[name] = (
                torch.randn(1, columns, generator=generator),
                torch.randn(rows, 1, generator=generator),
            )
    assert len(sample) > 7
    return sample


def loaded_modules(mixin: Any, file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the loader makes of a file: A and B by the name of the module."""
    result = mixin.lora_state_dict(str(file))
    state = result[0] if isinstance(result, tuple) else result
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".lora_")
        assert name, key
        modules.setdefault(name, {})[part.removesuffix(".weight")] = tensor
    return modules


def reads(family: str, mixin: Any, file: Path) -> bool:
    """Whether the loader finds every module of the sample in the file, no other, and the same products."""
    try:
        modules = loaded_modules(mixin, file)
    except (AssertionError, ValueError, RuntimeError):
        return False
    sample = {f"transformer.{name}": pair for name, pair in factors(family).items()}
    if modules.keys() != sample.keys():
        return False
    for name, (a, b) in sample.items():
        found_a, found_b = modules[name]["A"].float(), modules[name]["B"].float()
        if found_a.shape[1] != a.shape[1] or found_b.shape[0] != b.shape[0]:
            return False
        # Of the two products, what they make of one vector tells them apart.
        want = b @ (a @ a.T)
        if not torch.allclose(found_b @ (found_a @ a.T), want, rtol=1e-5, atol=1e-5 * float(want.abs().max())):
            return False
    return True


@pytest.mark.parametrize(
    ("loader", "family"),
    # Stable Diffusion has tests with whole pipelines of its own: the loader gives its alphas apart.
    [(loader, family) for loader, families in LOADERS.items() for family in families if family in ALSO_READ],
)
def test_a_loader_reads_what_is_written_for_it(tmp_path: Path, loader: str, family: str) -> None:
    stored: dict[str, torch.Tensor] = {}
    for name, (a, b) in factors(family).items():
        stored |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(stored, tmp_path / "source.safetensors", {"loratools.family": family})
    mixin, written = mixins()[loader], {}
    for format in ("comfy", "kohya", "onetrainer"):
        written[format] = tmp_path / f"{format}.safetensors"
        loratools.convert(tmp_path / "source.safetensors", written[format], format=format)
        back = tmp_path / f"from-{format}.safetensors"
        loratools.convert(written[format], back, format="diffusers", base=family)
        assert reads(family, mixin, back), format
    assert {format for format, file in written.items() if reads(family, mixin, file)} == ALSO_READ[family]
    # The names in the docs are among those that have been read here.
    documented = documented_names(family)
    for format, file in {**written, "diffusers": back}.items():
        assert any(key.startswith(f"{documented[format]}.") for key in load_file(file)), format
