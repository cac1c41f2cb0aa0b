"""Names of vision transformers in memory and in files, against what transformers itself loads and saves."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
from safetensors.torch import load_file

from loratools.naming.language import vision
from loratools.ops.merge.verb import merge

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "tubelet_size": [2, 4, 4],
}
ON_DISK = {
    "encoder.layer.0.attention.attention.query": (10, 6),
    "encoder.layer.0.output.dense": (6, 14),
    "encoder.layer.1.attention.output.dense": (6, 10),
}
IN_MEMORY = ["layers.0.attention.q_proj", "layers.0.mlp.fc2", "layers.1.attention.o_proj"]


@pytest.mark.parametrize("model_type", sorted(vision._TYPES))
def test_names_in_memory_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **SMALL))
    model.save_pretrained(tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    names = {name for name, _ in model.named_parameters()}
    if names <= stored:
        pytest.skip(f"this version of transformers names {model_type} in memory as in files")

    found = vision.in_memory(model_type, stored)

    assert (stored - set(found.values())) | found.keys() == names


@pytest.mark.parametrize("names", [list(ON_DISK), IN_MEMORY], ids=["as_in_files", "as_in_memory"])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_an_adapter_with_either_names_changes_the_same_weights(names: list[str], prefix: str, tmp_path: Path) -> None:
    weights = factories.base_weights(ON_DISK)
    base = factories.checkpoint_folder(tmp_path / "base", weights=weights, config={"model_type": "vit"})
    values = dict(zip([prefix + name for name in names], factories.factors(ON_DISK).values(), strict=True))
    adapter = factories.adapter_folder(tmp_path / "a", values=values)

    report = merge(base, [adapter], tmp_path / "out")

    assert [t.name for t in report.tensors] == [f"{name}.weight" for name in ON_DISK]
    assert report.verified


def test_other_models_have_one_name() -> None:
    assert vision.in_memory("bert", ["encoder.layer.0.attention.output.dense.weight"]) == {}
    assert vision.in_memory(None, ["encoder.layer.0.output.dense.weight"]) == {}
