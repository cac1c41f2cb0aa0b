"""MLX folders: what we write mlx-lm loads to the logits of PEFT, and what mlx-lm stores we read to its products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import factories
import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import formats
from loratools.errors import FormatError, UnsupportedError
from loratools.ops.convert.verb import convert
from loratools.updates.lora import LoRA

LLAMA = {
    "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def mlx_folder(folder: Path, tensors: Mapping[str, Tensor], *, config: Mapping[str, object] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora_config(scale: float, rank: int, **more: object) -> dict[str, object]:
    return {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": rank, "scale": scale, **more}}


def test_factors_are_transposed_and_scale_is_the_multiplier(tmp_path: Path) -> None:
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    tensors = {"model.layers.1.self_attn.q_proj.lora_a": a, "model.layers.1.self_attn.q_proj.lora_b": b}
    folder = mlx_folder(tmp_path / "mlx", tensors, config=lora_config(2.5, 4, dropout=0.0))

    assert formats.detect(folder) == ["mlx"]
    adapter = formats.load(folder)

    (update,) = adapter.updates.values()
    assert (update.shape, update.rank, update.scale, update.alpha_source) == ((10, 6), 4, 2.5, "config")
    factors = update.factors()
    assert factors is not None
    torch.testing.assert_close(factors.b @ factors.a, 2.5 * (a @ b).T, rtol=1e-12, atol=0)


def test_experts_are_stacked_and_not_transposed(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4, 6), torch.randn(3, 10, 4)
    for parent, leaf in (("mlp", "gate_proj"), ("block_sparse_moe", "w1")):
        key = f"model.layers.0.{parent}.switch_mlp.gate_proj"
        folder = mlx_folder(tmp_path / parent, {f"{key}.lora_a": a, f"{key}.lora_b": b}, config=lora_config(2, 4))

        adapter = formats.load(folder)

        assert list(adapter.updates) == [f"model.layers.0.{parent}.experts.{e}.{leaf}" for e in range(3)]
        for e, update in enumerate(adapter.updates.values()):
            factors = update.factors()
            assert factors is not None
            torch.testing.assert_close(factors.b @ factors.a, 2 * b[e].double() @ a[e].double())
        convert(folder, tmp_path / f"{parent}-again", format="mlx")
        before, after = (load_file(f / "adapters.safetensors") for f in (folder, tmp_path / f"{parent}-again"))
        assert {k: t.tolist() for k, t in before.items()} == {k: t.tolist() for k, t in after.items()}


def test_the_npz_of_early_versions_is_read_with_their_default_scale(tmp_path: Path) -> None:
    import numpy as np

    a, b = torch.randn(6, 4), torch.randn(4, 10)
    # In the order of columns, as MLX writes what it has transposed.
    arrays = {"model.layers.0.self_attn.v_proj.lora_a": np.asfortranarray(a.numpy())}
    arrays["model.layers.0.self_attn.v_proj.lora_b"] = b.numpy()
    np.savez(tmp_path / "adapters.npz", **arrays)

    adapter = formats.load(tmp_path)

    (update,) = adapter.updates.values()
    assert isinstance(update, LoRA)
    assert (update.scale, update.alpha_source) == (20.0, "assumed")
    assert torch.equal(update.a.read(), a.T)
    assert torch.equal(update.b.read(), b.T)


@pytest.mark.parametrize(("parameters", "uncertain"), [({"alpha": 16.0}, True), ({"alpha": 4.0}, False), ({}, False)])
def test_alpha_beside_scale_makes_the_scale_uncertain(
    parameters: dict[str, float], uncertain: bool, tmp_path: Path
) -> None:
    tensors = {"q.lora_a": torch.ones(6, 4), "q.lora_b": torch.ones(4, 10)}
    folder = mlx_folder(tmp_path / "mlx", tensors, config=lora_config(10.0, 4, **parameters))

    adapter = formats.load(folder)

    assert bool(adapter.uncertainties) == uncertain
    if uncertain:
        with pytest.raises(UnsupportedError) as raised:
            convert(folder, tmp_path / "out", format="peft")
        assert "first versions, which wrote alpha, with 40" in raised.value.details[0]
        assert "remove alpha" in str(raised.value.hint)


def test_a_full_fine_tune_replaces_weights(tmp_path: Path) -> None:
    folder = mlx_folder(
        tmp_path / "full", {"model.norm.weight": torch.ones(6)}, config={"fine_tune_type": "full", "num_layers": -1}
    )

    adapter = formats.load(folder)

    assert (adapter.format, dict(adapter.updates), list(adapter.replacements)) == ("mlx", {}, ["model.norm.weight"])


def test_faults_are_named(tmp_path: Path) -> None:
    ones = torch.ones
    with pytest.raises(FormatError, match="1 fault") as raised:
        formats.load(mlx_folder(tmp_path / "a", {"q.lora_a": ones(6, 4)}, config=lora_config(2, 4)))
    assert raised.value.details == ("'q' has lora_a alone",)
    with pytest.raises(FormatError) as raised:
        formats.load(mlx_folder(tmp_path / "b", {"q.lora_a": ones(6, 4), "q.lora_b": ones(5, 10)}, config=None))
    assert raised.value.details == ("'q' has lora_a [6, 4] and lora_b [5, 10]",)
    tensors = {"q.lora_a": ones(6, 4), "q.lora_b": ones(4, 10), "q.other": ones(3)}
    with pytest.raises(UnsupportedError) as foreign:
        formats.load(mlx_folder(tmp_path / "c", tensors, config=None))
    assert foreign.value.details == ("'q.other'",)


def test_whole_weights_are_refused_by_name_or_left_out_and_listed(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", extra={"score.weight": torch.ones(3, 6)})

    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out", format="mlx")
    assert raised.value.details == ("score.weight: mlx-lm loads no whole weights beside factors",)
    assert not (tmp_path / "out").exists()

    report = convert(source, tmp_path / "out", format="mlx", allow_partial=True)
    assert [(d.what, d.name) for d in report.dropped if d.what != "metadata"] == [("weight", "score.weight")]
    assert report.max_relative_error == 0.0


def test_there_and_back_keeps_every_value(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", dtype=torch.bfloat16)

    convert(source, tmp_path / "mlx", format="mlx")
    report = convert(tmp_path / "mlx", tmp_path / "back", format="peft")

    assert report.max_relative_error == 0.0
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "back"))
    assert {k: t.tolist() for k, t in before.items()} == {k: t.tolist() for k, t in after.items()}
    scales = [{u.scale for u in formats.load(p).updates.values()} for p in (source, tmp_path / "back")]
    assert scales[0] == scales[1] == {2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("mlx") / "base"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    # Large enough that an adapter that is left out would show.
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@peers.needs("mlx", "mlx_lm")
@pytest.mark.parametrize("case", ["plain", "patterns", "some layers"])
def test_mlx_lm_computes_what_peft_computes(case: str, base: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm.tuner.utils as mlx_tuner
    import mlx_lm.utils as mlx_utils
    import peft
    import transformers

    shapes = {"self_attn.q_proj": (12, 12), "self_attn.v_proj": (4, 12), "mlp.down_proj": (12, 20)}
    options: dict[str, object] = {"config": {"target_modules": ["q_proj", "v_proj", "down_proj"]}}
    modules = factories.layered(2, shapes)
    if case == "patterns":
        options = {
            "ranks": {"model.layers.1.mlp.down_proj": 2},
            "config": {"use_rslora": True, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}},
        }
    elif case == "some layers":
        modules = {name: shape for name, shape in modules.items() if "layers.1" in name or "v_proj" in name}
    source = factories.adapter_folder(tmp_path / "peft", modules=modules, rank=4, alpha=5, **options)  # type: ignore[arg-type]

    report = convert(source, tmp_path / "mlx", format="mlx")

    tokens = [[1, 5, 9, 22, 7]]
    plain = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untouched = plain(torch.tensor(tokens)).logits
        wanted = peft.PeftModel.from_pretrained(plain, source)(torch.tensor(tokens)).logits
    model, _ = mlx_utils.load_model(base)
    mlx_tuner.load_adapters(model, str(tmp_path / "mlx"))
    found = torch.tensor(model(mx.array(tokens)).tolist())
    assert float((untouched - wanted).abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 2.0**-23
    # Nothing but these modules has become a LoRA layer.
    turned = {name.rpartition(".")[0] for name, _ in mlx_leaves(model) if name.endswith("lora_a")}
    assert turned == set(modules)


def mlx_leaves(model: object) -> list[tuple[str, object]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(model.parameters()))  # type: ignore[attr-defined]


@peers.needs("mlx", "mlx_lm")
def test_what_mlx_lm_saves_is_read_to_what_it_computes(base: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm.tuner.utils as mlx_tuner
    import mlx_lm.utils as mlx_utils
    import peft
    import transformers
    from mlx.utils import tree_flatten
    from mlx_lm.utils import save_config

    model, _ = mlx_utils.load_model(base)
    model.freeze()
    config = {"rank": 3, "scale": 1.7, "dropout": 0.0}
    mlx_tuner.linear_to_lora_layers(model, 1, config)
    mx.random.seed(1)
    trained = {name: mx.random.normal(p.shape) * 0.3 for name, p in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(trained.items()), strict=False)
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    save_config({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": config}, folder / "adapter_config.json")

    convert(folder, tmp_path / "peft", format="peft")

    tokens = [[2, 4, 21]]
    plain = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")(torch.tensor(tokens)).logits
    torch.testing.assert_close(found, torch.tensor(model(mx.array(tokens)).tolist()), rtol=1e-4, atol=1e-4)


@peers.needs("mlx", "mlx_lm")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_of_what_mlx_lm_saves_is_what_mlx_lm_computes(kind: str, base: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm.tuner.utils as mlx_tuner
    import mlx_lm.utils as mlx_utils
    from mlx.utils import tree_flatten

    from loratools.ops.merge.verb import merge

    model, _ = mlx_utils.load_model(base)
    model.freeze()
    keys = ["self_attn.k_proj", "mlp.up_proj", "model.embed_tokens"]
    config = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": keys}
    mlx_tuner.linear_to_lora_layers(model, -1, config, use_dora=kind == "dora")
    mx.random.seed(1)
    trained = {name: mx.random.normal(p.shape) * 0.3 for name, p in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(trained.items()), strict=False)
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    said = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": config}
    (folder / "adapter_config.json").write_text(json.dumps(said))

    merge(base, [folder], tmp_path / "merged")

    tokens = mx.array([[2, 4, 21]])
    merged, _ = mlx_utils.load_model(tmp_path / "merged")
    wanted = torch.tensor(model(tokens).tolist())
    torch.testing.assert_close(torch.tensor(merged(tokens).tolist()), wanted, rtol=1e-4, atol=1e-4)
    # And through our own writing of it.
    report = convert(folder, tmp_path / "again", format="mlx")
    assert report.max_relative_error == 0.0
    fresh, _ = mlx_utils.load_model(base)
    mlx_tuner.load_adapters(fresh, str(tmp_path / "again"))
    assert fresh(tokens).tolist() == model(tokens).tolist()


def test_dora_is_for_all_modules_or_for_none(tmp_path: Path) -> None:
    from loratools.adapter import Adapter
    from loratools.tensors.lazy import from_torch

    a, b = from_torch(torch.ones(4, 6)), from_torch(torch.ones(10, 4))
    plain, dora = LoRA(a, b, 4.0, "config"), LoRA(a, b, 4.0, "config", magnitude=from_torch(torch.ones(10)))
    inward = LoRA(a, b, 4.0, "config", magnitude=from_torch(torch.ones(6)), magnitude_of="in")

    with pytest.raises(UnsupportedError) as raised:
        convert(Adapter({"p": plain, "q": dora, "r": inward}), tmp_path / "out", format="mlx")

    assert raised.value.details == (
        "p: no magnitude, and mlx-lm has DoRA for all modules or for none",
        "r: mlx-lm has no magnitude of each input here",
    )
