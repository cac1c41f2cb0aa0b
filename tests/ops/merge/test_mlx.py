"""A merge into a quantised MLX folder is what mlx-lm's `fuse` makes of it, and mlx-lm loads and runs the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest

import loratools
from loratools.checkpoints import open_checkpoint

pytestmark = peers.needs("mlx.core", "mlx_lm")
mx = peers.load("mlx.core")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
}  # fmt: skip
AFFINE, MXFP4 = {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}
# Model, scheme, modules with an adapter, and how it is trained.
CASES = {
    "affine": ("llama", AFFINE, ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], "lora"),
    "eight-bits": ("llama", {"group_size": 64, "bits": 8}, ["self_attn.k_proj", "mlp.up_proj"], "lora"),
    "mxfp4": ("llama", MXFP4, ["self_attn.q_proj", "mlp.up_proj"], "lora"),
    "dora": ("llama", AFFINE, ["self_attn.q_proj", "mlp.up_proj"], "dora"),
    "mixtral": ("mixtral", AFFINE, ["self_attn.q_proj", "block_sparse_moe.switch_mlp.gate_proj"], "lora"),
    # Its routers are stored in 8 bits in groups of 64, as the config says of each by its name.
    "qwen3-moe": ("qwen3_moe", AFFINE, ["mlp.gate", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"], "lora"),
    "embedding": ("llama", AFFINE, ["self_attn.o_proj", "model.embed_tokens", "lm_head"], "lora"),
}  # fmt: skip
TOKENS = [[3, 14, 15, 9, 26, 5]]


def save_base(folder: Path, model_type: str, scheme: dict[str, Any], dtype: str) -> None:
    """A tiny model as `mlx_lm.convert -q` stores it."""
    from importlib import import_module

    from mlx_lm.utils import quantize_model, save_config, save_model

    mx.random.seed(1)
    config = {"model_type": model_type, "tie_word_embeddings": False, **SIZES, **EXPERTS.get(model_type, {})}
    module = import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    model, config = quantize_model(model, config, **scheme)
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")


def save_adapter(folder: Path, base: Path, keys: list[str], kind: str) -> Any:
    """An adapter with random values in the layers of mlx-lm; returns the model with it."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, SIZES["num_hidden_layers"], parameters, use_dora=kind == "dora")
    mx.random.seed(5)
    values = {
        name: mx.random.normal(value.shape) * 0.04 if name.endswith("lora_b") else value
        for name, value in tree_flatten(model.parameters())
        if "lora_" in name or name.endswith(".m")
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), values)
    config = {"fine_tune_type": kind, "num_layers": SIZES["num_hidden_layers"], "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return load_adapters(load_model(base)[0], str(folder))


def fused(model: Any, *, dequantize: bool) -> dict[str, Any]:
    """The parameters that `mlx_lm.fuse` stores."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import dequantize_model

    layers = [(n, m.fuse(dequantize=dequantize)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return dict(tree_flatten((dequantize_model(model) if dequantize else model).parameters()))


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def packed(folder: Path) -> dict[str, Any]:
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    return stored


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Any]:
    model_type, scheme, keys, kind = CASES[request.param]
    save_base(tmp_path / "base", model_type, scheme, "float32")
    return tmp_path / "base", tmp_path / "a", save_adapter(tmp_path / "a", tmp_path / "base", keys, kind)


def test_dequantised_it_is_what_fuse_stores_and_computes_what_the_adapter_did(
    case: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    base, adapter, adapted = case
    wanted, plain = logits(adapted), logits(load_model(base)[0])

    loratools.merge(base, adapter, tmp_path / "out", dequantize=True)

    merged, config = load_model(tmp_path / "out")
    assert np.abs(wanted - plain).max() > 0.1
    # MXFP4 gives bfloat16, in which a merged weight is stored and the sum with an adapter is not rounded.
    np.testing.assert_allclose(logits(merged), wanted, rtol=0, atol=5e-3 if base_is_mxfp4(base) else 1e-5)
    assert not {"quantization", "quantization_config"} & config.keys()
    theirs, ours = fused(adapted, dequantize=True), packed(tmp_path / "out")
    assert {n: (v.shape, v.dtype) for n, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in theirs.items()}


def base_is_mxfp4(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text())["quantization"]["mode"] == "mxfp4")


def test_quantised_again_it_has_the_layers_the_config_and_the_scales_of_the_base(
    case: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    base, adapter, adapted = case
    wanted, plain = logits(adapted), logits(load_model(base)[0])
    touched = {n for n, m in adapted.named_modules() if hasattr(m, "fuse")}

    report = loratools.merge(base, adapter, tmp_path / "out", requantize=True)

    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert {w.name.removesuffix(".weight") for w in report.requantized} == touched
    before, after = packed(base), packed(tmp_path / "out")
    changed = {n for n in before if not np.array_equal(bits(before[n]), bits(after[n]))}
    assert changed == {f"{name}.weight" for name in touched}
    merged, _ = load_model(tmp_path / "out")
    # On a grid of 4 bits it comes nearer, and no more than that.
    assert np.linalg.norm(logits(merged) - wanted) < np.linalg.norm(plain - wanted)
    theirs = fused(adapted, dequantize=False)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {n: (v.shape, v.dtype) for n, v in theirs.items()}


def bits(array: Any) -> np.ndarray:
    return np.array(array.view(mx.uint8))


def test_mlx_dequantises_the_result_to_what_is_read_here(case: tuple[Path, Path, Any], tmp_path: Path) -> None:
    base, adapter, _ = case
    loratools.merge(base, adapter, tmp_path / "out", requantize=True)
    config = json.loads((base / "config.json").read_text())["quantization"]
    stored = packed(tmp_path / "out")

    for name, ours in open_checkpoint(tmp_path / "out").weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" not in stored:
            continue
        scheme = {key: config.get(stem, config)[key] for key in ("group_size", "bits")}
        mode = config.get("mode", "affine")
        theirs = mx.dequantize(
            stored[name], stored[f"{stem}.scales"], stored.get(f"{stem}.biases"), **scheme, mode=mode
        )
        np.testing.assert_array_equal(ours.read().float().numpy(), np.array(theirs.astype(mx.float32)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantised_weights_have_the_dtype_that_fuse_gives_them(tmp_path: Path, dtype: str) -> None:
    save_base(tmp_path / "base", "llama", AFFINE, dtype)
    adapted = save_adapter(tmp_path / "a", tmp_path / "base", ["self_attn.q_proj"], "lora")

    loratools.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", dequantize=True)

    theirs, ours = fused(adapted, dequantize=True), packed(tmp_path / "out")
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    one, other = (np.array(v[name].astype(mx.float32)) for v in (ours, theirs))
    # fuse rounds the update before it is added, and then the sum; here the sum alone is rounded.
    unit = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    assert (np.abs(one - other) <= 2 * unit * np.abs(other).max()).all()
    untouched = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(bits(ours[untouched]), bits(theirs[untouched]))
