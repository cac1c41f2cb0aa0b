"""Kinds of LyCORIS in the image formats: files made by LyCORIS itself, through the formats and back, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from formats.image_parts.test_image_clients import UNET, unet
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats

NAMES = [r".*mid_block.*conv1", r".*attn1\.to_q", r".*ff\.net\.2"]
# What LyCORIS calls otherwise than we.
OWN = {"glora": "lycoris-glora", "diag-oft": "lycoris-oft", "boft": "lycoris-oft"}
# case -> what LyCORIS calls it, and options
ALGORITHMS = {
    "loha": ("loha", {}),
    "loha with cores": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"factor": 2}),
    "lokr with cores": ("lokr", {"factor": 2, "use_tucker": True, "decompose_both": True}),
    "loha with magnitudes": ("loha", {"weight_decompose": True}),
    "ia3": ("ia3", {}),
    "glora": ("glora", {}),
    "diag-oft": ("diag-oft", {"rescaled": True, "constraint": 0.5}),
    "boft": ("boft", {"names": [r".*down_blocks\.[01].*attn1\.to_q"]}),
    "whole": ("full", {}),
}


def trained(
    algo: str, path: Path, prefix: str, names: list[str] | None = None, **options: object
) -> dict[str, torch.Tensor]:
    """A file of LyCORIS on a tiny UNet, all of it random."""
    from lycoris import LycorisNetwork, create_lycoris

    base = unet(UNET).float()
    LycorisNetwork.apply_preset({"target_module": [], "target_name": names or NAMES})
    net = create_lycoris(base, 1.0, linear_dim=2, linear_alpha=1.0, conv_dim=2, conv_alpha=1, algo=algo, **options)
    net.apply_to()
    generator = torch.Generator().manual_seed(8)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    stored = {k.replace("lycoris_", prefix): v.detach().float().contiguous() for k, v in net.state_dict().items()}
    save_file(stored, path, {"ss_base_model_version": "sd_v1"})
    return stored


@peers.needs("diffusers", "lycoris")
@pytest.mark.parametrize(
    ("case", "prefix"), [(case, ("lycoris_", "lora_unet_")[i % 2]) for i, case in enumerate(ALGORITHMS)]
)
def test_kinds_of_lycoris_go_through_the_formats_and_back(tmp_path: Path, case: str, prefix: str) -> None:
    algo, options = ALGORITHMS[case]
    stored = trained(algo, tmp_path / "one.safetensors", prefix, **options)
    found = formats.load(tmp_path / "one.safetensors")
    assert {u.kind for u in found.updates.values()} == {OWN.get(algo, algo)}
    assert found.format == ("lycoris" if prefix == "lycoris_" else "kohya")
    other = "kohya" if prefix == "lycoris_" else "lycoris"
    for between in (other, "comfy"):
        loratools.convert(tmp_path / "one.safetensors", tmp_path / f"{between}.safetensors", format=between)
        back = tmp_path / f"{between}-back.safetensors"
        loratools.convert(tmp_path / f"{between}.safetensors", back, format=found.format)
        again = load_file(back)
        assert set(again) == set(stored)
        assert all(torch.equal(again[key].reshape(stored[key].shape), stored[key]) for key in stored)


@pytest.mark.parametrize("name", ["anima_lora_lokr", "qwen_image_lora_kohya"])
def test_names_of_public_lokr_files_are_found(tmp_path: Path, name: str) -> None:
    from formats.image_parts.test_image_read import KEY_SHAPES

    if KEY_SHAPES is None:
        pytest.skip("the key lists of public files lie in ../shared, which is not here")
    shapes = json.loads((KEY_SHAPES / f"{name}.json").read_text())
    # Only the names are meant: factors of 4 x 3 and 2 x 5 make a weight of 8 x 15.
    sizes = {"lokr_w1": (4, 3), "lokr_w2": (2, 5), "dora_scale": (8,), "alpha": ()}
    tensors = {key: torch.ones(sizes[key.rpartition(".")[2]]) for key in shapes}
    save_file(tensors, tmp_path / "one.safetensors")
    (format,) = formats.detect(tmp_path / "one.safetensors")
    assert format == ("comfy" if name.startswith("anima") else "kohya")
    found = formats.load(tmp_path / "one.safetensors")
    prefix = "transformer.transformer_blocks."
    assert all(target.startswith(prefix) and update.kind == "lokr" for target, update in found.updates.items())
    loratools.convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors", format=format)
    again = load_file(tmp_path / "two.safetensors")
    # A magnitude of one axis is written with the axis of the outputs.
    assert {k: v.numel() for k, v in again.items()} == {k: v.numel() for k, v in tensors.items()}
