"""Names of adapters against names of bases: prefixes, orientation, and what is refused."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import Adapter, Replacement
from loratools.errors import MismatchError
from loratools.matching import Matches, match
from loratools.naming.language import aliases
from loratools.naming.places import Place
from loratools.naming.renaming import Renaming
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA
from loratools.updates.shira import SHiRA


def lora(out: int, in_: int, rank: int = 3) -> LoRA:
    return LoRA(from_torch(torch.ones(rank, in_)), from_torch(torch.ones(out, rank)), alpha=6.0, alpha_source="config")


def adapter(*names: str, out: int = 10, in_: int = 6, flag: bool | None = None, **replaced: tuple[int, ...]) -> Adapter:
    replacements = {
        n.replace("__", "."): Replacement(from_torch(torch.ones(s)), "modules_to_save") for n, s in replaced.items()
    }
    return Adapter({n: lora(out, in_) for n in names}, replacements, fan_in_fan_out=flag)


def places(found: Matches) -> dict[str, str]:
    return {target: place.weight for target, (place,) in found.updates.items()}


def test_names_of_the_base_are_taken_as_they_are() -> None:
    found = match(adapter("model.layers.0.q"), {"model.layers.0.q.weight": (10, 6), "layers.0.q.weight": (10, 6)})

    assert found.updates == {"model.layers.0.q": (Place("model.layers.0.q.weight"),)}
    assert not found.renaming


@pytest.mark.parametrize(
    ("target", "weight", "renaming"),
    [
        ("layers.0.q", "model.layers.0.q.weight", Renaming(add="model.")),
        ("model.layers.0.q", "layers.0.q.weight", Renaming(strip="model.")),
        ("bert.encoder.layer.0.q", "encoder.layer.0.q.weight", Renaming(strip="bert.")),
        ("transformer.h.0.c_attn", "h.0.c_attn.weight", Renaming(strip="transformer.")),
        ("model.language_model.layers.0.q", "text.model.layers.0.q.weight",
         Renaming("model.language_model.", "text.model.")),
    ],
)  # fmt: skip
def test_a_prefix_that_explains_every_name_is_found_and_told(target: str, weight: str, renaming: Renaming) -> None:
    shapes = {weight.replace("0", str(i)): (10, 6) for i in range(3)}
    targets = [target.replace("0", str(i)) for i in range(3)]

    found = match(adapter(*targets), shapes)

    assert places(found) == dict(zip(targets, shapes, strict=True))
    assert found.renaming == renaming
    assert not found.leftovers


def test_two_prefixes_that_lead_to_the_same_weights_are_one() -> None:
    # `model.language_model.` is what memory calls the stored `language_model.model.`.
    found = match(adapter("layers.0.q"), {"language_model.model.layers.0.q.weight": (10, 6)})

    assert places(found) == {"layers.0.q": "language_model.model.layers.0.q.weight"}


def test_a_layer_number_is_never_part_of_a_prefix() -> None:
    found = match(adapter("layers.5.q"), {"layers.0.q.weight": (10, 6), "layers.1.q.weight": (10, 6)})

    assert [left.name for left in found.leftovers] == ["layers.5.q"]
    assert found.leftovers[0].nearest


def test_two_prefixes_that_fit_equally_well_are_refused_with_both_named() -> None:
    shapes = {"encoder.layers.0.q.weight": (10, 6), "decoder.layers.0.q.weight": (10, 6)}

    with pytest.raises(MismatchError) as caught:
        match(adapter("layers.0.q"), shapes)

    assert "2 ways" in caught.value.message
    assert "decoder." in caught.value.details[0]
    assert "encoder." in caught.value.details[1]


def test_shapes_choose_between_two_prefixes() -> None:
    shapes = {"encoder.layers.0.q.weight": (11, 6), "decoder.layers.0.q.weight": (10, 6)}

    assert places(match(adapter("layers.0.q"), shapes)) == {"layers.0.q": "decoder.layers.0.q.weight"}


def test_a_misfit_names_both_sizes() -> None:
    found = match(adapter("m.q"), {"m.q.weight": (10, 4)})

    assert str(found.leftovers[0]) == "m.q   adapter 6 -> 10, base 4 -> 10"


def test_a_weight_stored_as_in_out_is_recognised_by_its_shape() -> None:
    # The flag is wrong on purpose: it counts for square weights only.
    found = match(adapter("m.q", flag=False), {"m.q.weight": (6, 10)})

    assert found.updates["m.q"][0].transposed


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_weight_is_stored_as_the_flag_says(flag: bool) -> None:
    found = match(adapter("m.q", out=6, flag=flag), {"m.q.weight": (6, 6)})

    assert found.updates["m.q"][0].transposed is flag


@pytest.mark.parametrize(("model_type", "transposed"), [("gpt2", True), ("llama", False), (None, False)])
def test_a_square_weight_without_a_flag_is_stored_as_its_model_stores_it(
    model_type: str | None, transposed: bool
) -> None:
    shapes = {"h.0.attn.c_proj.weight": (6, 6)}

    found = match(adapter("h.0.attn.c_proj", out=6), shapes, config={"model_type": model_type})

    assert found.updates["h.0.attn.c_proj"][0].transposed is transposed


def test_a_flag_that_all_other_weights_contradict_is_warned_of() -> None:
    both = Adapter({"m.a": lora(6, 6), "m.b": lora(10, 6)}, fan_in_fan_out=True)

    found = match(both, {"m.a.weight": (6, 6), "m.b.weight": (10, 6)})

    assert "fan_in_fan_out=True" in found.warnings[0]


def test_a_head_that_the_base_has_not_got_is_new() -> None:
    found = match(adapter("bert.q", score__weight=(2, 6)), {"q.weight": (10, 6)})

    assert found.added == {"score.weight": "score.weight"}
    assert not found.leftovers


def test_a_replaced_weight_goes_through_the_same_prefix() -> None:
    found = match(adapter("bert.q", bert__pooler__weight=(6, 6)), {"q.weight": (10, 6), "pooler.weight": (6, 6)})

    assert found.replacements == {"bert.pooler.weight": (Place("pooler.weight"),)}


def test_a_tensor_for_a_module_that_the_base_has_without_it_is_a_leftover() -> None:
    found = match(adapter("q", norm__bias=(6,)), {"q.weight": (10, 6), "norm.weight": (6,)})

    assert [left.name for left in found.leftovers] == ["norm.bias"]
    assert not found.added


def test_two_names_for_one_weight_are_refused() -> None:
    with pytest.raises(MismatchError, match="named by the adapter more than once"):
        match(
            adapter("q", a__weight=(5,), model__a__weight=(5,)),
            {"model.q.weight": (10, 6), "model.a.weight": (5,)},
        )


def test_what_depends_on_its_whole_weight_is_not_cut_into_pieces() -> None:
    # The halves of this weight stand in the other order in the base.
    shapes = {"final_layer.adaLN_modulation.1.weight": (12, 6), "double_blocks.0.img_attn.qkv.weight": (18, 6)}
    plain = lora(12, 6)
    scaled = LoRA(plain.a, plain.b, 6.0, "config", magnitude=from_torch(torch.ones(12)))

    found = match(Adapter({"transformer.norm_out.linear": plain}), shapes)
    refused = match(Adapter({"transformer.norm_out.linear": scaled}), shapes)

    assert len(found.updates["transformer.norm_out.linear"]) == 2
    assert "depends on a whole weight" in refused.leftovers[0].why


def test_what_does_not_tell_its_shape_is_named_by_its_parts_where_it_does_not_fit() -> None:
    update = SHiRA(from_torch(torch.ones(32)), from_torch(torch.zeros(2, 32, dtype=torch.int64)), rank=2)

    found = match(Adapter({"model.layers.0.q": update}), {"model.layers.0.q.weight": (10, 8)})

    assert [leftover.why for leftover in found.leftovers] == ["adapter shira with values 32, places 2x32, base 8 -> 10"]


def test_other_names_of_experts_are_made_only_where_an_adapter_means_one(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {
        f"model.layers.0.mlp.experts.{i}.{role}.weight": (10, 6) for i in range(3) for role in ("up_proj", "gate_proj")
    }
    shapes = {**experts, **{f"model.layers.0.mlp.experts.{i}.down_proj.weight": (6, 10) for i in range(3)}}
    shapes["model.layers.0.self_attn.q_proj.weight"] = (10, 6)
    made: list[int] = []
    expert_aliases = aliases.expert_aliases
    monkeypatch.setattr(aliases, "expert_aliases", lambda *given: made.append(1) or expert_aliases(*given))

    attention = match(adapter("model.layers.0.self_attn.q_proj"), shapes)
    one_by_one = match(adapter("model.layers.0.mlp.experts.1.up_proj"), shapes)
    assert not made
    replaced = match(adapter(model__layers__0__mlp__experts__gate_up_proj=(3, 20, 6)), shapes)

    assert places(attention) == {"model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj.weight"}
    assert places(one_by_one) == {"model.layers.0.mlp.experts.1.up_proj": "model.layers.0.mlp.experts.1.up_proj.weight"}
    assert made
    assert len(replaced.replacements["model.layers.0.mlp.experts.gate_up_proj"]) == len(experts)
