"""Train with PEFT, then inspect, merge and extract here: outputs stay those of PEFT's model, the delta comes back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from life.lives import (
    STORIES,
    UNIT,
    Life,
    deltas,
    float32_noise,
    gamma,
    lora_layers,
    output_tolerance,
    slopes,
    weight_bounds,
)
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

import loratools
from loratools.ops.merge.verb import plan_from_headers

every_life = pytest.mark.parametrize("life", STORIES, indirect=True)
WEIGHTS = {"one": (1.0,), "two": (0.7, -0.3)}


@every_life
def test_training_lowers_the_loss_of_both_adapters(life: Life) -> None:
    for before, after in life.losses:
        assert after < 0.9 * before


@every_life
def test_inspect_tells_what_peft_holds(life: Life) -> None:
    command = [sys.executable, "-m", "loratools", "inspect", str(life.adapter), "--json"]

    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["sources"][0]

    model = life.peft()
    held = {
        name: (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"], layer.out_features)
        for name, layer in lora_layers(model).items()
    }
    heads = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert {m["name"]: (m["rank"], m["alpha"], m["scale"], m["out_features"]) for m in told["modules"]} == held
    assert {m["in_features"] for m in told["modules"]} == {a.in_features for a in lora_layers(model).values()}
    assert {m["alpha_source"] for m in told["modules"]} == {"config"}
    assert [r["name"] for r in told["replacements"]] == [
        f"{n.removeprefix('base_model.model.')}.{leaf}" for n in heads for leaf in ("bias", "weight")
    ]
    assert told["kinds"] == {"lora": len(held)}
    assert told["base_model"] == str(life.base)
    assert told["warnings"] == []


@every_life
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_merged_model_gives_the_outputs_of_pefts_unmerged_one(
    life: Life, weights: tuple[float, ...], tmp_path: Path
) -> None:
    pairs = list(zip([life.adapter, life.second], weights, strict=False))

    report = loratools.merge(life.base, pairs, tmp_path / "merged", threads=1)

    # The class that the adapter was trained on finds all its weights, and nothing else.
    merged, told = life.model(tmp_path / "merged", output_loading_info=True)
    assert {what: names for what, names in told.items() if names} == {}
    unmerged = life.peft(weights)
    expected = life.output(unmerged)
    tolerance = output_tolerance(life, unmerged, life.story.dtype)
    difference = float((life.output(merged) - expected).abs().max())
    effect = float((life.output(life.model()) - expected).abs().max())
    assert difference <= tolerance
    assert effect > 30 * tolerance  # or this test would show nothing
    assert report.verified
    assert report.merged_weights == len(lora_layers(unmerged))
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds = {stored[t.dtype] for t in loratools.open_checkpoint(tmp_path / "merged").weights.values()}
    assert kinds == {life.story.dtype}


@pytest.fixture
def extracted(life: Life, tmp_path: Path) -> Path:
    """The adapter that `extract` finds between the base and its merge in float32, of the trained adapter's rank."""
    loratools.merge(life.base, [life.adapter], tmp_path / "merged", dtype="float32", threads=1)
    rank = max(layer.r["default"] for layer in lora_layers(life.peft()).values())
    loratools.extract(life.base, tmp_path / "merged", tmp_path / "extracted", rank=rank, threads=1)
    return tmp_path / "extracted"


def extraction_bounds(life: Life) -> dict[str, float]:
    """For each module, how far in Frobenius norm an extracted delta may be from the trained one.

    What rounding adds to the delta in the merge, and then in subtracting the base. The nearest product of this rank is
    no further from that sum than the trained delta is, hence twice. Then its factors are rounded: of equal norms, as
    `extract` makes them, the product of their absolute values is sqrt(rank) times the delta at most.
    """
    bounds = {}
    for name, bound in weight_bounds(life.peft(), torch.float32).items():
        delta, _, rank = deltas(lora_layers(life.peft())[name])
        moved = float((bound + UNIT * delta.abs()).norm())
        bounds[name] = 2 * moved + gamma(2) * rank**0.5 * float(delta.norm())
    return bounds


@every_life
def test_extract_gives_the_delta_of_a_float32_merge_back(life: Life, extracted: Path) -> None:
    back = loratools.load(extracted).updates

    trained = lora_layers(life.peft())
    places = plan_from_headers(life.base, [life.adapter], extracted.parent / "unwritten").matches[0].updates
    again = plan_from_headers(life.base, [extracted], extracted.parent / "unwritten").matches[0].updates
    found_at = {place.weight: back[name] for name, (place,) in again.items()}
    assert found_at.keys() == {place.weight for (place,) in places.values()}
    for name, allowed in extraction_bounds(life).items():
        update = found_at[places[name][0].weight]
        found = update.scale * (update.b.read().double() @ update.a.read().double())
        delta = deltas(trained[name])[0]
        error = float(((found.mT if places[name][0].transposed else found) - delta).norm())
        assert error <= allowed
        assert allowed < 1e-4 * float(delta.norm())


@every_life
def test_peft_loads_what_was_extracted_to_the_outputs_of_the_merge(life: Life, extracted: Path) -> None:
    # Into the class of the base, whose names it has.
    model = PeftModel.from_pretrained(life.bare(life.base), extracted).eval()

    layers = lora_layers(model)
    expected = life.output(life.bare(extracted.parent / "merged"))
    bounds = {next(n for n in layers if name.endswith(n)): bound for name, bound in extraction_bounds(life).items()}
    # To first order, and in the worst case for each module.
    exact = copy.deepcopy(model).double().requires_grad_(False)
    weights = [lora_layers(exact)[name].base_layer.weight.requires_grad_() for name in bounds]
    tolerance = 4 * float32_noise(life, model) + max(
        sum(float(slope.norm()) * bound for slope, bound in zip(row, bounds.values(), strict=True))
        for row in slopes(exact, weights, life.inputs)
    )
    assert bounds.keys() == layers.keys()
    assert float((life.output(model) - expected).abs().max()) <= tolerance
    assert tolerance < 0.01 * float((life.output(life.bare(life.base)) - expected).abs().max())
