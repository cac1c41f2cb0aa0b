"""For every rule of `check`, an adapter or a model that is almost what the rule is about, and is not.

Each lies just inside of the rule's threshold, or has the same look for a good reason. `also` names other rules that the
same bytes set off, each with the reason beside it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import torch
from check_samples import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Sample,
    as_pickle,
    base,
    changed,
    edited,
    first_of,
    sharded,
    sound,
    with_header,
    with_tensors,
)
from safetensors.torch import load_file, save_file


def kohya_file(path: Path) -> Path:
    """A file of kohya with one module of SDXL and its alpha."""
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{name}.lora_down.weight": torch.randn(3, 2048, generator=generator),
            f"{name}.lora_up.weight": torch.randn(640, 3, generator=generator),
            f"{name}.alpha": torch.tensor(2.0),
        },
        path,
    )
    return path


def padded(folder: Path, length: int) -> Path:
    """The folder with a header of this length, filled up with spaces, which the format allows."""

    def change(header: dict[str, Any]) -> bytes:
        return json.dumps(header).encode().ljust(length)

    return with_header(folder, change)


def container_truncated(tmp_path: Path) -> Sample:
    """The end of the file is lost, and zeros have taken its place: its size is right."""
    folder = sound(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-5] + bytes(5))
    return Sample((folder,))


def container_header(tmp_path: Path) -> Sample:
    """The header is written over many lines and ends with spaces."""
    return Sample((with_header(sound(tmp_path), lambda h: json.dumps(h, indent=8).encode() + b" " * 77),))


def container_header_size(tmp_path: Path) -> Sample:
    """The largest header that the format allows."""
    return Sample((padded(sound(tmp_path), 100_000_000),))


def container_type(tmp_path: Path) -> Sample:
    """The length of the header is that whose bytes begin as a zip archive does."""
    folder = padded(sound(tmp_path), int.from_bytes(b"PK", "little"))
    assert (folder / WEIGHTS).read_bytes().startswith(b"PK")
    return Sample((folder,))


def container_entry(tmp_path: Path) -> Sample:
    """A tensor without axes, whose one number is four bytes."""
    return Sample((kohya_file(tmp_path / "ink.safetensors"),))


def container_layout(tmp_path: Path) -> Sample:
    """The header lists tensors in another order than the data, and one of them has no bytes."""
    extra = {"model.norm.weight": torch.zeros(0)}

    def change(header: dict[str, Any]) -> dict[str, Any]:
        return dict(reversed(header.items()))

    folder = sound(tmp_path, extra=extra, config={"modules_to_save": ["norm"]})
    # What is empty is a whole weight.
    return Sample((with_header(folder, change),), also=frozenset({"structure-empty", "structure-replaced"}))


def container_trailing_bytes(tmp_path: Path) -> Sample:
    """The last bytes are those at which an archive begins, and belong to the last tensor."""
    folder = sound(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-8] + b"PK\x03\x04" + b"PK\x03\x04")
    return Sample((folder,))


def container_duplicate_key(tmp_path: Path) -> Sample:
    """The texts of the header have an entry of the same name as a tensor."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] = {first_of(header, "lora_A.weight"): "the first factor"}

    return Sample((with_header(sound(tmp_path), change),))


def container_json(tmp_path: Path) -> Sample:
    """Escapes, letters beyond ASCII, a large number and empty lines are JSON."""
    folder = sound(tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    text = json.dumps({**config, "revision": "größer", "lora_dropout": 0.0, "peft_version": "\ud83d\ude00"}, indent=1)
    (folder / CONFIG).write_text(f"\n\n{text}\n\n", encoding="utf-8")
    return Sample((folder,))


def container_not_read(tmp_path: Path) -> Sample:
    """A folder without weights, in the folder of an adapter."""
    folder = sound(tmp_path)
    (folder / "runs").mkdir()
    return Sample((folder,))


def container_suffix(tmp_path: Path) -> Sample:
    """The suffix is in capital letters."""
    return Sample((kohya_file(tmp_path / "INK.SAFETENSORS"),))


def pickle_code(tmp_path: Path) -> Sample:
    """Parameters in an ordered dict: names of code that only builds tensors."""
    folder = sound(tmp_path)
    tensors = OrderedDict((name, torch.nn.Parameter(value)) for name, value in load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    # It is a pickle, if a harmless one.
    return Sample((folder,), also=frozenset({"pickle-file"}))


def pickle_file(tmp_path: Path) -> Sample:
    """The trainer's own pickles lie beside the weights."""
    folder = sound(tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        torch.save({"lr": 1e-4}, folder / name)
    return Sample((folder,))


def paths_outside(tmp_path: Path) -> Sample:
    """A shard is a link to a file in the same folder."""
    folder = factories.checkpoint_folder(tmp_path / "model", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    (folder / "blobs").mkdir()
    shard.rename(folder / "blobs" / "5f3a")
    shard.symlink_to(Path("blobs") / "5f3a")
    return Sample((folder,))


def paths_base(tmp_path: Path) -> Sample:
    """The owner of the base is called as a folder of many machines is."""
    return Sample((edited(sound(tmp_path), base_model_name_or_path="home/llama-3-8b"),))


def paths_metadata(tmp_path: Path) -> Sample:
    """An address of the web, and a share of two numbers."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"] = {"source": "https://huggingface.co/home/data, 3/4 of train/data/part"}

    return Sample((with_header(sound(tmp_path), change),))


def index_missing_shards(tmp_path: Path) -> Sample:
    """All shards are there, the second as a link."""
    folder = sharded(sound(tmp_path))
    shard = folder / "adapter_model-00002-of-00002.safetensors"
    shard.rename(folder / "second")
    shard.symlink_to("second")
    return Sample((folder,))


def index_stale_shards(tmp_path: Path) -> Sample:
    """What a download keeps about a shard of another count is no shard."""
    folder = sharded(sound(tmp_path))
    (folder / "adapter_model-00003-of-00003.safetensors.metadata").write_text("5f3a", encoding="utf-8")
    return Sample((folder,))


def index_disagrees(tmp_path: Path) -> Sample:
    """The index lists the tensors in another order than the shards."""
    folder = sharded(sound(tmp_path))
    index = folder / "adapter_model.safetensors.index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    document["weight_map"] = dict(reversed(document["weight_map"].items()))
    index.write_text(json.dumps(document), encoding="utf-8")
    return Sample((folder,))


def index_no_weights(tmp_path: Path) -> Sample:
    """The weights are a pickle beside the config."""
    return Sample((as_pickle(sound(tmp_path)),), also=frozenset({"pickle-file"}))


def config_not_read(tmp_path: Path) -> Sample:
    """Fields that are known to change nothing, and an unknown one that is off."""
    return Sample((edited(sound(tmp_path), inference_mode=True, lora_dropout=0.05, spectral_twist=False),))


def config_values(tmp_path: Path) -> Sample:
    """The smallest rank, and an alpha that is no whole number."""
    return Sample((sound(tmp_path, rank=1, config={"lora_alpha": 0.5}),))


def config_missing(tmp_path: Path) -> Sample:
    """A file whose name promises no config."""
    return Sample((kohya_file(tmp_path / "adapter" / "ink.safetensors"),))


def config_rank(tmp_path: Path) -> Sample:
    """r is another rank than that of any tensor, and rank_pattern says theirs."""
    return Sample((edited(sound(tmp_path), r=8, rank_pattern={"q_proj": 4, "v_proj": 4}),))


def config_alpha_zero(tmp_path: Path) -> Sample:
    """A very small alpha."""
    return Sample((edited(sound(tmp_path), lora_alpha=1e-6),))


def config_alpha_assumed(tmp_path: Path) -> Sample:
    """The config says the alpha that would be assumed: the rank."""
    return Sample((edited(sound(tmp_path), lora_alpha=4),))


def config_dora(tmp_path: Path) -> Sample:
    """The config asks for magnitudes, and they are there."""
    extra = {f"{name}.lora_magnitude_vector": torch.ones(out) for name, (out, _) in factories.MODULES.items()}
    return Sample((sound(tmp_path, extra=extra, config={"use_dora": True}),))


def config_scale(tmp_path: Path) -> Sample:
    """The largest scale that people train with: 128."""
    return Sample((edited(sound(tmp_path), lora_alpha=512),))


def config_targets(tmp_path: Path) -> Sample:
    """The config names one module by its end and the others by their whole names."""
    names = [name for name in factories.MODULES if not name.endswith("layers.0.self_attn.q_proj")]
    return Sample((edited(sound(tmp_path), target_modules=["layers.0.self_attn.q_proj", *names]),))


def config_targets_unused(tmp_path: Path) -> Sample:
    """Each entry is the end of a module's name, if with more than one word."""
    return Sample((edited(sound(tmp_path), target_modules=["self_attn.q_proj", "self_attn.v_proj"]),))


def config_patterns(tmp_path: Path) -> Sample:
    """A key that names modules as a regular expression."""
    return Sample((edited(sound(tmp_path), alpha_pattern={r"layers\.1\.self_attn\.[qk]_proj": 16}),))


def keys_unknown(tmp_path: Path) -> Sample:
    """A bias of a factor, where the config says so."""
    extra = {f"{name}.lora_B.bias": torch.ones(out) for name, (out, _) in factories.MODULES.items()}
    return Sample((sound(tmp_path, extra=extra, config={"lora_bias": True}),))


def keys_several_adapters(tmp_path: Path) -> Sample:
    """The names of all tensors have one adapter's name in them."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removesuffix(".weight") + ".default.weight": tensor for name, tensor in tensors.items()}

    return Sample((with_tensors(sound(tmp_path), change),))


def keys_duplicate(tmp_path: Path) -> Sample:
    """Two weights of equal values under names that end alike."""
    extra = {"score.weight": torch.ones(3, 6), "model.score.weight": torch.ones(3, 6)}
    folder = sound(tmp_path, extra=extra, config={"modules_to_save": ["score"]})
    return Sample((folder,), also=frozenset({"structure-head"}))


def keys_half_pair(tmp_path: Path) -> Sample:
    """A module whose factors are in two shards."""
    folder = sound(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where: dict[str, str] = {}
    for number, part in enumerate("AB", 1):
        shard = f"adapter_model-{number:05d}-of-00002.safetensors"
        names = [name for name in tensors if f"lora_{part}" in name]
        save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return Sample((folder,))


def keys_doubled_prefix(tmp_path: Path) -> Sample:
    """A model that is the part `model` of another one."""
    return Sample((sound(tmp_path, prefix=f"{PREFIX}model."),))


def keys_wrappers(tmp_path: Path) -> Sample:
    """A model whose own module has almost the name of a wrapper."""
    return Sample((sound(tmp_path, prefix=f"{PREFIX}orig_mod."),))


def shapes_rank(tmp_path: Path) -> Sample:
    """Two modules have different ranks, and each of them one."""
    name = "model.layers.0.self_attn.q_proj"
    return Sample((sound(tmp_path, ranks={name: 2}, config={"rank_pattern": {name: 2}}),))


def shapes_factor(tmp_path: Path) -> Sample:
    """Factors of a convolution have four axes."""
    values = {"conv": (torch.randn(4, 6, 3, 3), torch.randn(10, 4, 1, 1))}
    return Sample((sound(tmp_path, values=values, config={"target_modules": ["conv"]}),))


def numerics_non_finite(tmp_path: Path) -> Sample:
    """The largest number that float16 has."""

    def change(b: torch.Tensor) -> torch.Tensor:
        b[3, 1] = torch.finfo(torch.float16).max
        return b

    folder = sound(tmp_path, dtype=torch.float16)
    # Beside such a number all others of its module are noise.
    return Sample((changed(folder, "lora_B.weight", change),), {"ignore": ["numerics-noise-ranks"]})


def numerics_no_change(tmp_path: Path) -> Sample:
    """Every update is 0, and the adapter replaces a weight."""
    folder = sound(tmp_path, extra={"model.norm.weight": torch.ones(6)}, config={"modules_to_save": ["norm"]})
    changed(folder, "lora_B.weight", torch.zeros_like, only_first=False)
    return Sample((folder,), also=frozenset({"structure-replaced"}))


def numerics_untrained(tmp_path: Path) -> Sample:
    """A module whose update is very small, and not 0."""
    return Sample((changed(sound(tmp_path), "lora_B.weight", lambda b: b * 1e-20),))


def numerics_lost_rows(tmp_path: Path) -> Sample:
    """Half of the rows are zeros, and not more."""

    def change(b: torch.Tensor) -> torch.Tensor:
        b[5:] = 0
        return b

    return Sample((changed(sound(tmp_path), "q_proj.lora_B.weight", change),))


def numerics_subnormal(tmp_path: Path) -> Sample:
    """Half of the values of a module are subnormal, and not more."""

    def change(b: torch.Tensor) -> torch.Tensor:
        # 8 of the 40 values of B, with the 24 of A, are half of 64.
        b[:2] = b[:2].sign() * 2.0**-16
        return b

    folder = sound(tmp_path, dtype=torch.float16)
    changed(folder, "0.self_attn.q_proj.lora_A.weight", lambda a: (a.sign() * 2.0**-16).half())
    changed(folder, "0.self_attn.q_proj.lora_B.weight", change)
    return Sample((folder,), {"ignore": ["numerics-rank-deficient", "numerics-noise-ranks"]})


def numerics_outlier(tmp_path: Path) -> Sample:
    """A module with six times the update of the others: modules differ by that in usual trainings."""
    modules = factories.layered(6, {"self_attn.q_proj": (10, 6), "self_attn.v_proj": (7, 6)})
    folder = sound(tmp_path, modules=modules)
    return Sample((changed(folder, "3.self_attn.q_proj.lora_B.weight", lambda b: b * 6),))


def numerics_noise_ranks(tmp_path: Path) -> Sample:
    """Half of the rank is there, and not less."""

    def change(b: torch.Tensor) -> torch.Tensor:
        b[:, 2:] = 0
        return b

    # What is lacking is another rule's.
    return Sample((changed(sound(tmp_path), "lora_B.weight", change),), also=frozenset({"numerics-rank-deficient"}))


def numerics_rank_deficient(tmp_path: Path) -> Sample:
    """A column that is nearly the sum of two others, by far more than rounding."""

    def change(b: torch.Tensor) -> torch.Tensor:
        b[:, 3] = b[:, 0] + b[:, 1] + 1e-3 * b[:, 3]
        return b

    return Sample((changed(sound(tmp_path), "lora_B.weight", change),))


def numerics_duplicate(tmp_path: Path) -> Sample:
    """The same update but for a hundredth in one module: another state of the same training."""
    first = sound(tmp_path / "first")
    second = changed(sound(tmp_path / "second"), "lora_B.weight", lambda b: b * 1.01)
    return Sample((first, second))


def structure_router(tmp_path: Path) -> Sample:
    """The gate of a feed-forward layer is no router."""
    modules = factories.MODULES | {"model.layers.0.mlp.gate_proj": (5, 6)}
    return Sample((sound(tmp_path, modules=modules, config={"target_modules": ["q_proj", "v_proj", "gate_proj"]}),))


def structure_head(tmp_path: Path) -> Sample:
    """Modules inside of a model whose names only contain the word."""
    modules = factories.MODULES | {"model.layers.0.self_attn.head_mixer": (5, 6), "model.scores": (3, 6)}
    names = ["q_proj", "v_proj", "head_mixer", "scores"]
    return Sample((sound(tmp_path, modules=modules, config={"target_modules": names}),))


def structure_replaced(tmp_path: Path) -> Sample:
    """Rows of single tokens are no whole weights."""
    extra = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 6)}
    folder = sound(tmp_path, extra=extra, config={"trainable_token_indices": {"embed_tokens": [3, 11]}})
    return Sample((folder,), also=frozenset({"structure-tokens"}))


def structure_tokens(tmp_path: Path) -> Sample:
    """A whole table of tokens."""
    folder = sound(
        tmp_path, extra={"model.embed_tokens.weight": torch.ones(13, 6)}, config={"modules_to_save": ["embed_tokens"]}
    )
    return Sample((folder,), also=frozenset({"structure-replaced"}))


def structure_code(tmp_path: Path) -> Sample:
    """Text about code, and a config that says that there is none."""
    folder = edited(sound(tmp_path), auto_mapping={}, auto_map={})
    (folder / "train.py.txt").write_text("print('run')\n", encoding="utf-8")
    return Sample((folder,))


def structure_companions(tmp_path: Path) -> Sample:
    """Files of a tokenizer and of a training, which hold nothing of a model."""
    folder = sound(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00")
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    torch.save({"step": 7}, folder / "training_args.bin")
    return Sample((folder,))


def structure_empty(tmp_path: Path) -> Sample:
    """A weight of one value."""
    folder = sound(tmp_path, extra={"score.bias": torch.ones(1)}, config={"modules_to_save": ["score"]})
    return Sample((folder,), also=frozenset({"structure-head"}))


def structure_initialisation(tmp_path: Path) -> Sample:
    """An initialisation that leaves the base as it is."""
    return Sample((edited(sound(tmp_path), init_lora_weights="gaussian"),))


def structure_order(tmp_path: Path) -> Sample:
    """torchtune has values in the order of the model."""
    tensors = {
        f"layers.0.attn.v_proj.lora_{part}.weight": torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        for part, shape in {"a": (4, 6), "b": (10, 4)}.items()
    }
    (tmp_path / "torchtune").mkdir()
    torch.save(tensors, tmp_path / "torchtune" / "adapter_0.pt")
    # torchtune writes pickles, and its files do not say alpha.
    also = frozenset({"pickle-file", "config-alpha-assumed"})
    return Sample((tmp_path / "torchtune" / "adapter_0.pt",), also=also)


def structure_two_files(tmp_path: Path) -> Sample:
    """Two files that are shards of one adapter."""
    return Sample((sharded(sound(tmp_path)),))


def keys_base(tmp_path: Path) -> Sample:
    """The base is saved without its head, so that its names lack the first word of the adapter's."""
    weights = {
        name.removeprefix("model."): weight
        for name, weight in factories.base_weights().items()
        if not name.startswith("lm_head")
    }
    folder = base(tmp_path, weights=weights, config={"architectures": ["LlamaModel"]})
    return Sample((sound(tmp_path),), {"base": folder})


def shapes_base(tmp_path: Path) -> Sample:
    """The base stores the weight of a layer as (in, out)."""
    name = "transformer.h.0.attn.c_attn"
    weights = {f"{name}.weight": torch.randn(10, 30), "transformer.wte.weight": torch.ones(13, 10)}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    folder = base(tmp_path, weights=weights, config=config)
    adapter = sound(tmp_path, modules={name: (30, 10)}, config={"target_modules": ["c_attn"], "fan_in_fan_out": True})
    return Sample((adapter,), {"base": folder})


def provenance_base(tmp_path: Path) -> Sample:
    """The recorded base has an owner and capital letters, and the given one is a folder of its name."""
    return Sample((edited(sound(tmp_path), base_model_name_or_path="Tiny/BASE"),), {"base": base(tmp_path)})


def provenance_no_base(tmp_path: Path) -> Sample:
    """A format that has no field for a base."""
    return Sample((kohya_file(tmp_path / "ink.safetensors"),))


def provenance_vocabulary(tmp_path: Path) -> Sample:
    """Two more tokens than the base has, and the tokenizer that knows them."""
    folder = sound(
        tmp_path, extra={"model.embed_tokens.weight": torch.ones(15, 6)}, config={"modules_to_save": ["embed_tokens"]}
    )
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return Sample((folder,), {"base": base(tmp_path)}, also=frozenset({"structure-replaced"}))


def numerics_gain(tmp_path: Path) -> Sample:
    """The same small update, and a base in float32, whose steps are small enough for it."""
    folder = changed(sound(tmp_path), "lora_B.weight", lambda b: b * 1e-4, only_first=False)
    return Sample((folder,), {"base": base(tmp_path)})


def server_format(tmp_path: Path) -> Sample:
    """A format that the program reads beside its own."""
    return Sample((kohya_file(tmp_path / "ink.safetensors"),), {"program": "comfyui"})


def server_config(tmp_path: Path) -> Sample:
    """The fields are there, and others that PEFT writes are not."""
    return Sample((edited(sound(tmp_path), bias=None, task_type=None, rank_pattern=None),), {"program": "vllm"})


def server_part(tmp_path: Path) -> Sample:
    """PEFT itself loads a head that servers do not."""
    folder = sound(tmp_path, extra={"score.weight": torch.ones(3, 6)}, config={"modules_to_save": ["score"]})
    return Sample((folder,), {"program": "peft"}, also=frozenset({"structure-head"}))


def server_rank(tmp_path: Path) -> Sample:
    """The largest rank that vLLM takes without being told: 16."""
    modules = factories.layered(1, {"self_attn.q_proj": (100, 60), "self_attn.v_proj": (70, 60)})
    return Sample((sound(tmp_path, modules=modules, rank=16),), {"program": "vllm"})


def server_scale(tmp_path: Path) -> Sample:
    """vLLM divides by the square root of the rank where the config says rsLoRA."""
    return Sample((edited(sound(tmp_path), use_rslora=True),), {"program": "vllm"})


def server_layers(tmp_path: Path) -> Sample:
    """PEFT itself reads after which tokens an adapter acts."""
    return Sample((edited(sound(tmp_path), alora_invocation_tokens=[5, 7]),), {"program": "peft"})


NEAR_MISSES: dict[str, Callable[[Path], Sample]] = {
    name.replace("_", "-"): function
    for name, function in globals().copy().items()
    if callable(function) and getattr(function, "__annotations__", {}).get("return") == "Sample"
}
