"""What PEFT saves is read with the scales that PEFT holds, and what is written PEFT loads to the same model."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

warnings.filterwarnings("ignore", category=DeprecationWarning)
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

from loratools import formats  # noqa: E402
from loratools.adapter import Adapter  # noqa: E402
from loratools.formats.peft_parts.config import FIELDS  # noqa: E402
from loratools.formats.peft_parts.keys import BARE_PARTS, FOREIGN  # noqa: E402
from loratools.formats.peft_parts.patterns import matches  # noqa: E402
from loratools.storage.untrusted_regex import UntrustedRegexes  # noqa: E402
from loratools.updates.lora import LoRA  # noqa: E402

VOCABULARY = 23
TOKENS = torch.tensor([[1, 5, 2, 7, 3]])


def llama() -> torch.nn.Module:
    sizes = {"vocabulary": VOCABULARY, "width": 12, "inner": 20, "heads": 2, "key_heads": 1}
    return tiny_models.llama(seed=1, **sizes, max_position_embeddings=16, attention_bias=True)


def bert() -> torch.nn.Module:
    torch.manual_seed(2)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=3,
        )
    ).eval()


def trained(base: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """As after training: every trainable value is moved, so that B is not zero."""
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def scales(model: PeftModel, adapter: str = "default") -> dict[str, float]:
    return {
        name.removeprefix("base_model.model."): float(module.scaling[adapter])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }


def ranks(model: PeftModel, adapter: str = "default") -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): int(module.r[adapter])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def loaded(base: torch.nn.Module, folder: Path) -> PeftModel:
    """PEFT's own loading, which says what it missed and did not expect only here."""
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    config = peft.PeftConfig.from_pretrained(str(folder))
    model = PeftModel.from_pretrained(base, str(folder))
    said = set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    assert said.unexpected_keys == []
    adapter_keys = [k for k in said.missing_keys if "lora_" in k or "modules_to_save" in k]
    assert adapter_keys == []
    assert config.peft_type == "LORA"
    return model.eval()


def values(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in adapter.tensors().items()}


def assert_equal_values(one: Adapter, other: Adapter) -> None:
    ours, theirs = values(one), values(other)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": (llama, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "all_linear": (llama, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")),
    "targets_by_regex": (llama, LoraConfig(r=4, lora_alpha=6, target_modules=r".*\.1\..*(q|down)_proj")),
    "layers_to_transform": (
        llama,
        LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, layers_to_transform=[1], layers_pattern="layers"),
    ),
    "rslora": (llama, LoraConfig(r=5, lora_alpha=7, target_modules=LINEARS, use_rslora=True)),
    "rank_pattern": (
        llama,
        LoraConfig(
            r=4,
            lora_alpha=9,
            target_modules=LINEARS,
            rank_pattern={"layers.0.mlp.up_proj": 2, "q_proj": 3, "up_proj": 7},
        ),
    ),
    "rslora_with_patterns": (
        llama,
        LoraConfig(
            r=4,
            lora_alpha=9,
            target_modules=LINEARS,
            use_rslora=True,
            rank_pattern={r".*\.0\..*_proj": 3},
            alpha_pattern={"down_proj": 5.5},
        ),
    ),
    "alpha_pattern_of_regexes": (
        llama,
        LoraConfig(
            r=4,
            lora_alpha=9,
            target_modules=LINEARS,
            alpha_pattern={
                "(q|k)_proj": 2,
                r"^model\.layers\.0\.self_attn\.v_proj": 1,
                r"layers\.\d+\.mlp\.(up|down)_pro.*": 3,
                "o_proj": 4,
            },
        ),
    ),
    "bias_all": (llama, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], bias="all")),
    "bias_lora_only": (llama, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], bias="lora_only")),
    "modules_to_save": (
        llama,
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    ),
    "lm_head": (llama, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"])),
    "head_of_a_classifier": (
        bert,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["query", "dense"],
            exclude_modules=["pooler.dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "bias_of_a_classifier": (
        bert,
        LoraConfig(r=4, lora_alpha=6, target_modules=["query"], bias="all", task_type="SEQ_CLS"),
    ),
    "bias_of_a_module_of_modules": (
        bert,
        LoraConfig(
            r=4, lora_alpha=6, target_modules=["query"], bias="all", modules_to_save=["pooler", "layer.1.output"]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_scales_are_those_that_peft_holds(case: str, tmp_path: Path) -> None:
    base, config = CASES[case]
    model = trained(base(), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "saved")

    adapter = formats.load(tmp_path / "saved")

    assert {name: update.scale for name, update in adapter.updates.items()} == scales(model)
    assert {name: update.rank for name, update in adapter.updates.items()} == ranks(model)
    assert adapter.uncertainties == ()
    assert [w for w in adapter.warnings if "base weights that are replaced anyway" not in w] == []


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_peft_loads_to_the_same_model(case: str, tmp_path: Path) -> None:
    base, config = CASES[case]
    model = trained(base(), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "saved")
    adapter = formats.load(tmp_path / "saved")

    assert formats.save(adapter, tmp_path / "written") == ()

    again = loaded(base(), tmp_path / "written")
    assert scales(again) == scales(model)
    assert ranks(again) == ranks(model)
    # The same operations on the same float32 values.
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_reading_what_is_written_gives_the_same_adapter_and_the_same_bytes(case: str, tmp_path: Path) -> None:
    base, config = CASES[case]
    trained(base(), copy.deepcopy(config)).save_pretrained(tmp_path / "saved")
    adapter = formats.load(tmp_path / "saved")

    formats.save(adapter, tmp_path / "once")
    once = formats.load(tmp_path / "once")
    formats.save(once, tmp_path / "twice")

    assert_equal_values(adapter, once)
    assert {n: u.scale for n, u in once.updates.items()} == {n: u.scale for n, u in adapter.updates.items()}
    assert {n: r.declared for n, r in once.replacements.items()} == {
        n: r.declared for n, r in adapter.replacements.items()
    }
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_keys_of_alpha_pattern_whose_order_peft_loses_are_warned_about(tmp_path: Path) -> None:
    # PEFT sorts the keys when it saves, so that it does not load the scales that it trained with.
    pattern = {"q_proj": 2, "layers.0.self_attn.q_proj": 9}
    model = trained(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"], alpha_pattern=pattern))
    model.save_pretrained(tmp_path)

    adapter = formats.load(tmp_path)

    reloaded = scales(PeftModel.from_pretrained(llama(), str(tmp_path)))
    assert {name: u.scale for name, u in adapter.updates.items()} == reloaded != scales(model)
    assert adapter.warnings == (
        "alpha_pattern: keys with different values match 1 module, such as 'model.layers.0.self_attn.q_proj'; the "
        "first counts, but PEFT sorts them when it saves: training may have used another",
    )


@pytest.mark.parametrize(
    ("case", "declared"),
    [
        ("bias_lora_only", {f"model.layers.{n}.self_attn.{m}_proj.bias": "bias" for n in (0, 1) for m in "oq"}),
        ("modules_to_save", {"lm_head.weight": "modules_to_save", "model.embed_tokens.weight": "modules_to_save"}),
        ("head_of_a_classifier", {"classifier.bias": "modules_to_save", "classifier.weight": "modules_to_save"}),
        ("lm_head", {"lm_head.weight": "embedding"}),
    ],
)  # fmt: skip
def test_replaced_weights_say_what_declares_them(case: str, declared: dict[str, str], tmp_path: Path) -> None:
    base, config = CASES[case]
    trained(base(), copy.deepcopy(config)).save_pretrained(tmp_path)

    adapter = formats.load(tmp_path)

    assert {name: r.declared for name, r in adapter.replacements.items()} == declared


def test_saved_embeddings_of_a_resized_vocabulary_are_read_and_written(tmp_path: Path) -> None:
    base = llama()
    base.resize_token_embeddings(VOCABULARY + 2)
    model = trained(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=True)

    adapter = formats.load(tmp_path / "saved")
    formats.save(adapter, tmp_path / "written")

    assert {n: (r.declared, r.tensor.shape) for n, r in adapter.replacements.items()} == {
        "lm_head.weight": ("embedding", (VOCABULARY + 2, 12)),
        "model.embed_tokens.weight": ("embedding", (VOCABULARY + 2, 12)),
    }
    again = llama()
    again.resize_token_embeddings(VOCABULARY + 2)
    assert torch.equal(logits(loaded(again, tmp_path / "written")), logits(model))


def test_each_of_two_adapters_of_one_model_is_read_from_its_own_folder(tmp_path: Path) -> None:
    model = trained(llama(), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "q_proj"]))
    model.save_pretrained(tmp_path)

    first, second = formats.load(tmp_path), formats.load(tmp_path / "second")

    assert {n: u.scale for n, u in first.updates.items()} == scales(model)
    assert {n: u.scale for n, u in second.updates.items()} == scales(model, "second")
    assert first.warnings == ("1 adapter in folders below is not read: 'second'",)
    assert formats.find_adapters(tmp_path) == [tmp_path, tmp_path / "second"]


def test_a_dump_of_the_adapter_with_its_name_in_the_keys_is_the_saved_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, config = CASES["modules_to_save"]
    model = trained(base(), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "dump")
    state = {k: v.clone() for k, v in model.state_dict().items() if ".lora_" in k or ".modules_to_save." in k}
    assert any(".default." in key for key in state)
    save_file(state, tmp_path / "dump" / "adapter_model.safetensors")

    assert_equal_values(formats.load(tmp_path / "dump"), formats.load(tmp_path / "saved"))


def test_a_torch_pickle_of_peft_is_the_same_adapter(tmp_path: Path) -> None:
    base, config = CASES["rank_pattern"]
    model = trained(base(), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled" / "adapter_model.safetensors").exists()

    assert_equal_values(formats.load(tmp_path / "pickled"), formats.load(tmp_path / "saved"))


def test_a_part_of_an_adapter_is_written_so_that_peft_loads_that_part(tmp_path: Path) -> None:
    base, config = CASES["head_of_a_classifier"]
    trained(base(), copy.deepcopy(config)).save_pretrained(tmp_path / "saved")
    part = formats.load(tmp_path / "saved").selected(include=["*layer.1*", "classifier.*"])

    formats.save(part, tmp_path / "part")

    again = loaded(base(), tmp_path / "part")
    assert sorted(scales(again)) == sorted(part.updates)
    assert len(part.updates) == 4


def test_modules_of_rslora_and_plain_scale_in_one_adapter_keep_their_scales_in_peft(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.self_attn.{m}" for n in (0, 1) for m in ("q_proj", "k_proj")]
    updates = {name: update(4 - (at % 2), 6, 12, 3 + at, rslora=at > 1) for at, name in enumerate(names)}
    for name, u in updates.items():
        if name.endswith("q_proj"):
            updates[name] = update(u.rank, 12, 12, u.alpha, rslora=u.rslora)

    formats.save(Adapter(updates), tmp_path / "out")

    found = scales(loaded(llama(), tmp_path / "out"))
    assert found == pytest.approx({name: u.scale for name, u in updates.items()}, rel=1e-15)


def test_an_adapter_without_factors_loads_in_peft(tmp_path: Path) -> None:
    base, config = CASES["modules_to_save"]
    model = trained(base(), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "saved")
    head = formats.load(tmp_path / "saved").selected(include=["lm_head.weight"])

    formats.save(head, tmp_path / "head")

    again = loaded(llama(), tmp_path / "head")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)


def update(rank: int, out: int, into: int, alpha: float, *, rslora: bool = False) -> LoRA:
    from loratools.tensors.lazy import from_torch

    generator = torch.Generator().manual_seed(rank * 100 + out)
    a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return LoRA(from_torch(a), from_torch(b), alpha, "config", rslora)


def test_every_field_of_peft_is_known() -> None:
    import dataclasses

    assert {field.name for field in dataclasses.fields(LoraConfig)} <= set(FIELDS)


def test_every_tensor_that_a_layer_of_peft_registers_is_known() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    def below(cls: type) -> list[type]:
        return [c for inner in cls.__subclasses__() for c in (inner, *below(inner))]

    layers = [c for c in below(BaseTunerLayer) if c.__module__.startswith("peft.")]
    names = {name for layer in layers for name in layer.adapter_layer_names}
    assert len(names) > 60
    assert names - {"lora_A", "lora_B", "trainable_tokens_delta", *BARE_PARTS} <= set(FOREIGN)


SEGMENT = st.sampled_from(
    ["layers", "0", "1", "11", "q_proj", "k_proj", "proj", "a+b", "q", "x-y", "[0]", "mlp", "a\n"]
)
NAMES = st.lists(st.lists(SEGMENT, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
PIECE = st.sampled_from(
    ["layers", "0", "1", "q_proj", "proj", "q", ".", r"\.", "x-y", "[01]", "(q|k)", "_proj", "^", "$", "|", r"\d"]
)
REGEX = st.sampled_from([".*", r"\d+", "q?", "(?:0|1)+", ".+"])


def _is_regex(key: str) -> bool:
    try:
        re.compile(f"({key})")
    except re.error:
        return False
    return True


KEYS = st.one_of(
    st.lists(PIECE, min_size=1, max_size=5).map("".join), st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
).filter(_is_regex)


@settings(max_examples=150, deadline=None)
@given(NAMES, st.lists(KEYS, min_size=1, max_size=5, unique=True))
def test_the_key_of_a_pattern_is_the_one_that_peft_takes(names: list[str], keys: list[str]) -> None:
    assert_same_as_peft(names, keys)


@settings(max_examples=25, deadline=None)
@given(NAMES, st.lists(st.tuples(KEYS, REGEX, KEYS).map("".join), min_size=1, max_size=4, unique=True))
def test_the_key_of_a_pattern_with_quantifiers_is_the_one_that_peft_takes(names: list[str], keys: list[str]) -> None:
    assert_same_as_peft(names, [key for key in keys if _is_regex(key)] + ["q_proj"])


def assert_same_as_peft(names: list[str], keys: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    pattern = dict.fromkeys(keys, 0)
    theirs = {name: key if (key := get_pattern_key(pattern, name)) in pattern else None for name in names}
    ours = {
        name: keys[0] if keys else None
        for name, keys in matches(pattern, UntrustedRegexes(names), subject="rank_pattern").items()
    }
    assert ours == theirs


def test_a_written_config_has_peft_s_own_style(tmp_path: Path) -> None:
    base, config = CASES["plain"]
    trained(base(), copy.deepcopy(config)).save_pretrained(tmp_path / "saved")

    formats.save(formats.load(tmp_path / "saved"), tmp_path / "written")

    theirs = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert ours == theirs | {"rank_pattern": {}, "alpha_pattern": {}}
    assert list(ours) == sorted(theirs)
    assert '"lora_alpha": 16,' in (tmp_path / "written" / "adapter_config.json").read_text()
