import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import Stored, factors
from safetensors import safe_open

from loratools import formats
from loratools.adapter import Adapter, Replacement
from loratools.errors import OutputExistsError, UnsupportedError, UsageError
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA
from loratools.updates.parts.defaults import UpdateDefaults


def lora(rank: int = 4, alpha: float = 8.0, *, rslora: bool = False, seed: int = 0) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 6, generator=generator), torch.randn(10, rank, generator=generator)
    return LoRA(from_torch(a), from_torch(b), alpha, "config", rslora)


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def keys_of(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sorted(file.keys())


NAME = st.lists(st.sampled_from(["layers", "0", "1", "q", "q_proj", "a+b", "x-y"]), min_size=1, max_size=3)
MODULES = st.dictionaries(
    NAME.map(".".join),
    st.tuples(
        st.integers(1, 5), st.floats(1e-6, 1e6).flatmap(lambda f: st.sampled_from([f, 8.0, 16.0, -2.5])), st.booleans()
    ),
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(MODULES, st.sets(st.sampled_from(["head.weight", "head.bias", "norm.weight", "layers.0.q.bias"])))
def test_what_is_written_is_read_as_the_same_adapter(
    modules: dict[str, tuple[int, float, bool]], replaced: set[str]
) -> None:
    updates = {
        name: lora(rank, alpha, rslora=rslora, seed=at)
        for at, (name, (rank, alpha, rslora)) in enumerate(modules.items())
    }
    replacements = {
        name: Replacement(from_torch(torch.full((3,), 2.0)), "modules_to_save") for name in sorted(replaced)
    }
    adapter = Adapter(updates, replacements)

    with TemporaryDirectory() as folder:
        if not updates and not replacements:
            return
        formats.save(adapter, Path(folder) / "once")
        once = formats.load(Path(folder) / "once", from_format="peft")
        formats.save(once, Path(folder) / "twice")

        assert once.tensors().keys() == adapter.tensors().keys()
        assert all(torch.equal(once.tensors()[n].read(), t.read()) for n, t in adapter.tensors().items())
        mixed = len({u.rslora for u in updates.values()}) > 1
        for name, update in updates.items():
            found = once.updates[name]
            assert found.rank == update.rank
            # alpha * sqrt(rank) / rank is two more roundings than alpha / sqrt(rank).
            assert math.isclose(found.scale, update.scale, rel_tol=4 * 2**-53 if mixed else 0)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (Path(folder) / "once" / file).read_bytes() == (Path(folder) / "twice" / file).read_bytes()


def test_the_most_common_rank_and_alpha_are_the_defaults(tmp_path: Path) -> None:
    updates = {"a.q": lora(4, 8.0), "b.q": lora(4, 16.0), "c.q": lora(3, 16.0), "c.v": lora(2, 0.5)}

    formats.save(Adapter(updates, base_model="tiny"), tmp_path / "out")

    assert config_of(tmp_path / "out") == {
        "alpha_pattern": {"a.q": 8, "c.v": 0.5},
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {"c.q": 3, "c.v": 2},
        "target_modules": ["a.q", "b.q", "c.q", "c.v"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert '"lora_alpha": 16,' in (tmp_path / "out" / "adapter_config.json").read_text()


def test_a_name_that_ends_another_is_written_with_an_anchor(tmp_path: Path) -> None:
    updates = {"q": lora(2), "layers.0.q": lora(4), "layers.1.q": lora(4)}

    formats.save(Adapter(updates), tmp_path / "out")

    assert config_of(tmp_path / "out")["rank_pattern"] == {"^q": 2}
    assert {n: u.rank for n, u in formats.load(tmp_path / "out").updates.items()} == {
        n: u.rank for n, u in updates.items()
    }


def test_rslora_is_kept_where_all_have_it_and_folded_into_alpha_otherwise(tmp_path: Path) -> None:
    formats.save(Adapter({"a": lora(4, 8.0, rslora=True), "b": lora(2, 8.0, rslora=True)}), tmp_path / "all")
    formats.save(Adapter({"a": lora(4, 8.0, rslora=True), "b": lora(2, 8.0)}), tmp_path / "some")

    kept, folded = config_of(tmp_path / "all"), config_of(tmp_path / "some")
    assert (kept["use_rslora"], kept["lora_alpha"], kept["alpha_pattern"]) == (True, 8, {})
    assert (folded["use_rslora"], folded["lora_alpha"], folded["alpha_pattern"]) == (False, 8, {"a": 16})


def test_the_source_s_own_config_is_kept_where_nothing_contradicts_it(stored: Stored, tmp_path: Path) -> None:
    own = {
        "task_type": "CAUSAL_LM",
        "peft_version": "0.17.0",
        "lora_dropout": 0.1,
        "auto_mapping": {"parent_library": "x"},
        "later": None,
        "runtime_config": {"ephemeral_gpu_offload": True},
        "init_lora_weights": "gaussian",
    }

    formats.save(formats.load(stored(**own, metadata={"format": "pt", "who": "me"})), tmp_path / "out")

    written = config_of(tmp_path / "out")
    del own["runtime_config"]
    assert written | own == written
    assert written["target_modules"] == ["q_proj", "v_proj"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": None},
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": ".*v_proj"},
    ],
)
def test_target_modules_that_may_not_find_the_same_are_written_out(
    fields: dict[str, object], stored: Stored, tmp_path: Path
) -> None:
    formats.save(formats.load(stored(**fields)), tmp_path / "out")

    written = config_of(tmp_path / "out")
    assert written["target_modules"] == ["layers.0.q_proj", "layers.1.v_proj"]
    assert [written.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")] == [None] * 3


def test_a_part_of_the_modules_is_written_out_by_name(stored: Stored, tmp_path: Path) -> None:
    formats.save(formats.load(stored()).selected(include=["*.q_proj"]), tmp_path / "out")

    assert config_of(tmp_path / "out")["target_modules"] == ["layers.0.q_proj"]


def test_only_weights_declared_so_become_modules_to_save(tmp_path: Path) -> None:
    kinds = {
        "head.weight": "modules_to_save",
        "norm.weight": "unlisted",
        "q.bias": "bias",
        "q.weight": "modules_to_save",
    }
    replacements = {name: Replacement(from_torch(torch.ones(3)), declared) for name, declared in kinds.items()}

    formats.save(Adapter({"q": lora()}, replacements), tmp_path / "out")

    config = config_of(tmp_path / "out")
    assert (config["modules_to_save"], config["bias"]) == (["head"], "lora_only")
    parts = ("base_layer.bias", "base_layer.weight", "lora_A.weight", "lora_B.weight")
    names = ["head.weight", "norm.weight", *(f"q.{part}" for part in parts)]
    assert keys_of(tmp_path / "out") == [f"base_model.model.{name}" for name in names]


def test_an_entry_of_modules_to_save_goes_with_the_last_of_its_weights(stored: Stored, tmp_path: Path) -> None:
    heads = {f"base_model.model.{name}.weight": torch.ones(3, 6) for name in ("first.dense", "second")}
    adapter = formats.load(stored(factors("q_proj") | heads, modules_to_save=["second", "first", "unused"]))

    formats.save(adapter, tmp_path / "all")
    formats.save(adapter.selected(exclude=["second.weight"]), tmp_path / "part")

    assert config_of(tmp_path / "all")["modules_to_save"] == ["second", "first", "unused"]
    assert config_of(tmp_path / "part")["modules_to_save"] == ["first"]


def test_modules_of_rank_zero_are_left_out_and_named(tmp_path: Path) -> None:
    nothing = LoRA(from_torch(torch.ones(0, 6)), from_torch(torch.ones(10, 0)), 1.0, "config")

    said = formats.save(Adapter({"a": lora(), "b": nothing}), tmp_path / "out")

    assert said == ("1 module of rank 0 left out, where nothing changes: 'b'",)
    assert list(formats.load(tmp_path / "out").updates) == ["a"]


@pytest.mark.parametrize(("name", "stored_as"), [("bfloat16", "BF16"), ("fp16", "F16"), ("float64", "F64")])
def test_dtype_casts_the_floating_tensors_and_no_others(name: str, stored_as: str, tmp_path: Path) -> None:
    replacements = {"head.position_ids": Replacement(from_torch(torch.arange(3)), "modules_to_save")}

    formats.save(Adapter({"q": lora()}, replacements), tmp_path / "out", dtype=name)

    assert {n: t.dtype for n, t in formats.load(tmp_path / "out").tensors().items()} == {
        "q.A": stored_as, "q.B": stored_as, "head.position_ids": "I64"
    }  # fmt: skip


def test_each_tensor_keeps_its_own_dtype_without_one(tmp_path: Path) -> None:
    update = lora()
    mixed = replace(update, a=from_torch(update.a.read().bfloat16()))

    formats.save(Adapter({"q": mixed}), tmp_path / "out")

    assert {n: t.dtype for n, t in formats.load(tmp_path / "out").tensors().items()} == {"q.A": "BF16", "q.B": "F32"}


def test_values_that_a_dtype_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    large = replace(lora(), a=from_torch(torch.full((4, 6), 1e6)))

    match = "'base_model.model.q.lora_A.weight' has values beyond the range of float16"
    with pytest.raises(UnsupportedError, match=match):
        formats.save(Adapter({"q": large}), tmp_path / "out", dtype="float16")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["int8", "float12", ""])
def test_an_unknown_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights cannot be stored as"):
        formats.save(Adapter({"q": lora()}), tmp_path / "out", dtype=dtype)


def test_an_output_that_exists_or_is_an_input_is_refused(stored: Stored, tmp_path: Path) -> None:
    folder = stored()
    adapter = formats.load(folder)

    with pytest.raises(OutputExistsError):
        formats.save(adapter, folder)
    with pytest.raises(OutputExistsError):
        formats.save(adapter, folder, overwrite=True, inputs=[folder])

    assert sorted(formats.load(folder).updates) == sorted(adapter.updates)


@dataclass(frozen=True)
class Other(UpdateDefaults):
    kind: str = "loha"
    shape: tuple[int, ...] = (6, 4)


def test_an_update_that_is_no_lora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as raised:
        formats.save(Adapter({"a": lora(), "b": Other()}), tmp_path / "out")  # type: ignore[dict-item]

    assert raised.value.details == ("b: loha",)


@pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
def test_an_alpha_that_would_not_be_read_is_not_written(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="alpha that is 0 or not finite"):
        formats.save(Adapter({"a": lora(4, alpha)}), tmp_path / "out")
