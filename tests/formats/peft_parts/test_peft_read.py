from pathlib import Path

import pytest
import torch
from peft_folders import CONFIG, Stored, factors

from loratools import formats
from loratools.errors import FormatError, UnsupportedError

Q, V = "layers.0.q_proj", "layers.1.v_proj"


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "base_model.model." + key,
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A.", "lora_A.weight.").replace("lora_B.", "lora_B.weight."),
    ],
    ids=["plain", "no prefix", "prefix twice", "adapter name", "adapter named weight"],
)
def test_every_spelling_of_a_key_means_the_same_module(rename, stored: Stored) -> None:
    plain = factors(Q) | factors(V)

    adapter = formats.load(stored({rename(key): tensor for key, tensor in plain.items()}))

    assert sorted(adapter.updates) == [Q, V]
    assert torch.equal(adapter.updates[Q].parts["A"].read(), plain[f"base_model.model.{Q}.lora_A.weight"])
    assert adapter.updates[Q].shape == (10, 6)


def test_a_module_named_like_the_adapter_keeps_its_name(stored: Stored) -> None:
    adapter = formats.load(stored(factors("default.weight.q_proj")))

    assert list(adapter.updates) == ["default.weight.q_proj"]


def test_two_adapters_in_one_file_are_refused_by_their_names(stored: Stored) -> None:
    with pytest.raises(FormatError) as raised:
        formats.load(stored(factors(Q, infix=".first") | factors(V, infix=".second")))

    assert raised.value.message.endswith("holds 2 adapters")
    assert raised.value.details == ("first", "second")


def test_keys_that_mean_the_same_module_are_refused(stored: Stored) -> None:
    once = factors(Q)

    with pytest.raises(FormatError) as raised:
        formats.load(stored(once | {k.removeprefix("base_model.model."): v.clone() for k, v in once.items()}))

    assert raised.value.details == (f"'{Q}' has more than one lora_A", f"'{Q}' has more than one lora_B")


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"lora_alpha": 3.0}, 0.75),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"v_proj": 2}}, 2.0),
        ({"lora_alpha": -8}, -2.0),
    ],
)
def test_scale_comes_from_the_config(fields: dict[str, object], scale: float, stored: Stored) -> None:
    adapter = formats.load(stored(**fields))

    assert (adapter.updates[Q].scale, adapter.updates[Q].alpha_source, adapter.uncertainties) == (scale, "config", ())


def test_without_a_config_alpha_is_assumed_to_be_the_rank(stored: Stored) -> None:
    path = stored(config=None) / "adapter_model.safetensors"

    adapter = formats.load(path)

    update = adapter.updates[Q]
    assert (update.scale, update.alpha, update.alpha_source) == (1.0, 4.0, "assumed")
    assert adapter.warnings == (f"'{path}' has no adapter_config.json beside it; alpha is assumed to be the rank",)


def test_without_lora_alpha_peft_s_default_is_assumed(stored: Stored) -> None:
    adapter = formats.load(stored(config={"peft_type": "LORA", "r": 4}))

    assert (adapter.updates[Q].alpha, adapter.updates[Q].alpha_source) == (8.0, "assumed")
    assert adapter.warnings == ("adapter_config.json has no lora_alpha; it is assumed to be 8, PEFT's default",)


def test_a_rank_that_differs_from_the_tensors_is_a_doubt_until_someone_decides(stored: Stored) -> None:
    folder = stored(r=16, rank_pattern={"v_proj": 4})

    undecided = formats.load(folder)

    assert undecided.uncertainties == (f"'{Q}': rank 4 in the tensors, 16 in adapter_config.json",)
    with pytest.raises(UnsupportedError, match=r"scale of .* is uncertain"):
        formats.save(undecided, folder.parent / "out")
    tensors, config = formats.load(folder, rank_from="tensors"), formats.load(folder, rank_from="config")
    assert (tensors.uncertainties, config.uncertainties) == ((), ())
    assert (tensors.updates[Q].scale, config.updates[Q].scale) == (8 / 4, 8 / 16)
    assert (tensors.updates[V].scale, config.updates[V].scale) == (2.0, 2.0)


def test_rank_from_config_divides_by_its_square_root_with_rslora(stored: Stored) -> None:
    adapter = formats.load(stored(r=16, use_rslora=True), rank_from="config")

    assert adapter.updates[Q].scale == 8 / 16**0.5


def test_pattern_keys_that_no_module_uses_are_warned_about(stored: Stored) -> None:
    adapter = formats.load(stored(alpha_pattern={"k_proj": 3, "q_proj": 8, "layers.0.q_proj": 8}))

    assert adapter.warnings == ("alpha_pattern: 2 of 3 keys used by no module: 'k_proj', 'layers.0.q_proj'",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", -1), ("r", 8.0), ("r", True), ("r", "4"), ("r", None), ("r", 1 << 21), ("r", [4, 2]),
        ("lora_alpha", True), ("lora_alpha", "16"), ("lora_alpha", None), ("lora_alpha", [1]),
        ("rank_pattern", {"q_proj": 0}), ("rank_pattern", [4]), ("alpha_pattern", {"q_proj": True}),
        ("alpha_pattern", "q_proj"), ("use_rslora", "yes"), ("bias", "some"), ("modules_to_save", "head"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused_by_the_name_of_the_field(
    field: str, value: object, stored: Stored
) -> None:
    with pytest.raises(FormatError) as raised:
        formats.load(stored(**{field: value}))

    assert len(raised.value.details) == 1
    assert raised.value.details[0].startswith(field)


def test_all_values_that_cannot_be_meant_are_named_at_once(stored: Stored) -> None:
    with pytest.raises(FormatError) as raised:
        formats.load(stored(r=0, lora_alpha="16", bias="some"))

    assert [line.split(" ")[0] for line in raised.value.details] == ["r", "lora_alpha", "bias"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_an_alpha_that_is_not_finite_is_refused(number: str, stored: Stored) -> None:
    folder = stored()
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {number}'))

    with pytest.raises(FormatError):
        formats.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arrow_config", {"top_k": 3}),
        ("enable_lora", [True, False]), ("init_lora_weights", "loftq"), ("init_lora_weights", "something new"),
        ("peft_type", "NEXT_YEARS"), ("peft_type", None), ("use_next_year", True),
    ],
)  # fmt: skip
def test_what_changes_the_mathematics_is_refused_by_field_and_value(field: str, value: object, stored: Stored) -> None:
    import json

    with pytest.raises(UnsupportedError) as raised:
        formats.load(stored(**{field: value}))

    assert len(raised.value.details) == 1
    assert raised.value.details[0].replace("'", "").startswith(f"{field} = {json.dumps(value)}")
    assert raised.value.hint


def test_every_unsupported_field_and_tensor_is_named_at_once(stored: Stored) -> None:
    diagonals = {f"base_model.model.{module}.lora_E": torch.ones(4, 1) for module in (Q, V)}

    with pytest.raises(UnsupportedError) as raised:
        formats.load(stored(factors(Q) | factors(V) | diagonals, use_next_year=True, arrow_config={"top_k": 3}))

    assert [line.partition(":")[0] for line in raised.value.details] == [
        "'use_next_year' = true",
        'arrow_config = {"top_k"',
        f"tensor 'base_model.model.{Q}.lora_E' and 1 more",
    ]


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_initialisations_that_leave_the_base_alone_are_read(value: object, stored: Stored) -> None:
    assert len(formats.load(stored(init_lora_weights=value)).updates) == 2


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_field_that_is_not_set_is_kept(value: object, stored: Stored) -> None:
    adapter = formats.load(stored(use_next_year=value))

    assert adapter.notes["peft"]["config"] == {**CONFIG, "use_next_year": value}


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("lora_E", "AdaLoRA"), ("ranknum", "AdaLoRA"), ("hada_w1_a", "LoHa"), ("lokr_w2_b", "LoKr"), ("ia3_l", "IA3"),
        ("oft_R.weight", "OFT"), ("boft_R", "BOFT"), ("vera_lambda_b", "VeRA"), ("miss_block", "MiSS"),
        ("token_adapter.trainable_tokens_original", "trainable tokens"), ("lora_monteclora_sampler.x.y", "MonteCLoRA"),
        ("lora_A", "does not end in '.weight'"), ("lora_new.weight", "'lora_new'"), ("alpha", "beside factors"),
        ("original_module.weight", "dump of a whole model"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_kind_is_refused_by_name_and_kind(suffix: str, kind: str, stored: Stored) -> None:
    key = f"base_model.model.{Q}.{suffix}"

    with pytest.raises(UnsupportedError) as raised:
        formats.load(stored(factors(Q) | {key: torch.ones(4, 6)}))

    (line,) = raised.value.details
    assert line.startswith(f"tensor '{key}': ")
    assert kind in line


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_moves_the_base_is_told(value: str, stored: Stored) -> None:
    assert formats.load(stored(init_lora_weights=value)).initialisation_changed_base == value


def test_lora_of_a_grouped_convolution_is_refused_with_the_reason(stored: Stored) -> None:
    a, b = torch.ones(4, 6, 3, 3), torch.ones(10, 2, 1, 1)
    keys = {f"base_model.model.conv.lora_{name}.weight": value for name, value in (("A", a), ("B", b))}

    with pytest.raises(UnsupportedError) as raised:
        formats.load(stored(factors(Q) | keys))

    assert raised.value.details == ("'conv' in 2 groups",)
    assert "sees all channels" in str(raised.value.hint)


@pytest.mark.parametrize("with_magnitude", [True, False])
def test_a_magnitude_and_its_flag_go_together(with_magnitude: bool, stored: Stored) -> None:
    magnitude = {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(10)} if with_magnitude else {}

    with pytest.raises(FormatError, match="use_dora"):
        formats.load(stored(factors(Q) | magnitude, use_dora=not with_magnitude))


def test_all_faults_of_the_factors_are_named_at_once(stored: Stored) -> None:
    broken = {
        **factors("a.good"),
        "base_model.model.b.lora_A.weight": torch.ones(4, 6),
        "base_model.model.c.lora_B.weight": torch.ones(10, 4),
        "base_model.model.d.lora_A.weight": torch.ones(4, 6),
        "base_model.model.d.lora_B.weight": torch.ones(10, 3),
        "base_model.model.e.lora_A.weight": torch.ones(0),
        "base_model.model.e.lora_B.weight": torch.ones(10, 4),
    }

    with pytest.raises(FormatError) as raised:
        formats.load(stored(broken))

    assert raised.value.message.endswith("has 4 faults in its factors")
    assert raised.value.details == (
        "'base_model.model.e.lora_A.weight' has shape [0]: empty, or a shard that was not gathered",
        "'b' has lora_A without lora_B",
        "'c' has lora_B without lora_A",
        "'d' has lora_A [4, 6] and lora_B [10, 3], which have different ranks",
    )


def test_of_many_faults_five_are_shown_and_the_rest_counted(stored: Stored) -> None:
    with pytest.raises(FormatError) as raised:
        formats.load(stored({f"base_model.model.{n}.lora_A.weight": torch.ones(4, 6) for n in range(9)}))

    assert raised.value.message.endswith("has 9 faults in its factors")
    assert len(raised.value.details) == 6
    assert raised.value.details[-1] == "… and 4 more"


def test_factors_of_integers_are_refused(stored: Stored) -> None:
    tensors = {key: tensor.to(torch.int32) for key, tensor in factors(Q).items()}

    with pytest.raises(FormatError, match="a floating-point tensor is needed"):
        formats.load(stored(tensors))


def test_whole_weights_are_named_like_the_weight_that_they_replace(stored: Stored) -> None:
    whole = {
        f"base_model.model.{Q}.base_layer.bias": torch.ones(10),
        "base_model.model.embed.base_layer.weight": torch.ones(9, 6),
        "base_model.model.lm_head.weight": torch.ones(9, 6),
        "base_model.model.score.modules_to_save.default.weight": torch.ones(2, 6),
        "base_model.model.norm.weight": torch.ones(6),
    }

    adapter = formats.load(stored(factors(Q) | whole, bias="lora_only", target_modules=["q_proj"]))

    assert {name: r.declared for name, r in adapter.replacements.items()} == {
        "embed.weight": "embedding",
        f"{Q}.bias": "bias",
        "lm_head.weight": "embedding",
        "norm.weight": "unlisted",
        "score.weight": "modules_to_save",
    }


def test_a_weight_with_two_values_is_refused(stored: Stored) -> None:
    whole = {"base_model.model.head.weight": torch.ones(2, 6), "head.weight": torch.zeros(2, 6)}

    with pytest.raises(FormatError) as raised:
        formats.load(stored(factors(Q) | whole))

    assert raised.value.details == ("head.weight",)


def test_a_plain_weight_of_an_adapted_module_is_read_with_a_warning(stored: Stored) -> None:
    adapter = formats.load(stored(factors("lm_head") | {"base_model.model.lm_head.weight": torch.ones(10, 6)}))

    assert list(adapter.replacements) == ["lm_head.weight"]
    assert adapter.warnings == (
        "1 weight of adapted modules not spelled '.base_layer.': PEFT would not load what is replaced here: "
        "'lm_head.weight'",
    )


def test_config_and_metadata_are_kept_as_they_were(stored: Stored) -> None:
    folder = stored(metadata={"format": "pt", "who": "me"}, base_model_name_or_path="tiny", fan_in_fan_out=True)

    adapter = formats.load(folder)

    assert (adapter.base_model, adapter.format, adapter.path) == ("tiny", "peft", folder)
    notes = adapter.notes["peft"]
    assert notes["config"] == {**CONFIG, "base_model_name_or_path": "tiny", "fan_in_fan_out": True}
    assert notes["metadata"] == {"format": "pt", "who": "me"}


def test_target_modules_are_never_run_as_a_regex(stored: Stored) -> None:
    adapter = formats.load(stored(target_modules="(a+)+$(", exclude_modules="((a*)*)*b"))

    assert len(adapter.updates) == 2


def test_what_a_pickle_holds_besides_tensors_is_named(tmp_path: Path) -> None:
    torch.save(factors(Q) | {"epoch": 3}, tmp_path / "adapter_model.bin")

    adapter = formats.load(tmp_path)

    assert list(adapter.updates) == [Q]
    assert "1 entry besides the tensors not read: 'epoch'" in adapter.warnings
