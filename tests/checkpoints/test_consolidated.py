from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints.merging import assert_added, save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.checkpoints import open_checkpoint
from loratools.errors import FormatError, MismatchError, UnsupportedError

WIDTH, HEADS, KEYS, HEAD, INNER, WORDS = 24, 6, 2, 8, 14, 17
PARAMS = {"dim": WIDTH, "n_layers": 1, "n_heads": HEADS, "n_kv_heads": KEYS, "vocab_size": WORDS}
LAYER = "model.layers.0"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (HEADS * HEAD, WIDTH),
    f"{LAYER}.self_attn.k_proj": (KEYS * HEAD, WIDTH),
    f"{LAYER}.self_attn.v_proj": (KEYS * HEAD, WIDTH),
    f"{LAYER}.self_attn.o_proj": (WIDTH, HEADS * HEAD),
    f"{LAYER}.mlp.gate_proj": (INNER, WIDTH),
    f"{LAYER}.mlp.up_proj": (INNER, WIDTH),
    f"{LAYER}.mlp.down_proj": (WIDTH, INNER),
    "lm_head": (WORDS, WIDTH),
}
META = {
    "lm_head": "output",
    f"{LAYER}.self_attn.q_proj": "layers.0.attention.wq",
    f"{LAYER}.self_attn.k_proj": "layers.0.attention.wk",
    f"{LAYER}.self_attn.v_proj": "layers.0.attention.wv",
    f"{LAYER}.self_attn.o_proj": "layers.0.attention.wo",
    f"{LAYER}.mlp.gate_proj": "layers.0.feed_forward.w1",
    f"{LAYER}.mlp.down_proj": "layers.0.feed_forward.w2",
    f"{LAYER}.mlp.up_proj": "layers.0.feed_forward.w3",
}


def weights() -> dict[str, Tensor]:
    """By the authors' names."""
    g = torch.Generator().manual_seed(4)
    found = {f"{META[name]}.weight": torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    norms = ("norm.weight", "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight")
    return (
        {"tok_embeddings.weight": torch.randn(WORDS, WIDTH, generator=g)}
        | found
        | {name: torch.randn(WIDTH, generator=g) for name in norms}
    )


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of transformers, as its conversion of Llama's first weights describes it: of each head, the
    even rows before the odd ones."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def in_transformers(name: str, weight: Tensor) -> Tensor:
    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.rpartition(".")[2])
    return permute(weight, heads) if heads is not None else weight


def meta(folder: Path) -> Path:
    folder.mkdir()
    torch.save(weights(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "tokenizer.model").write_bytes(b"words")
    return folder


def mistral(folder: Path) -> Path:
    folder.mkdir()
    save_file(weights(), folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


@pytest.mark.parametrize("make", [meta, mistral])
def test_an_adapter_of_transformers_finds_every_module_and_the_order_of_heads(make: object, tmp_path: Path) -> None:
    base = make(tmp_path / "base")  # type: ignore[operator]
    deltas = save_adapter(tmp_path / "adapter", SHAPES)

    report = loratools.merge(base, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert merged.keys() == weights().keys()
    assert report.merged_weights == len(SHAPES)
    for name, delta in deltas.items():
        stored = f"{META[name]}.weight"
        assert_added(in_transformers(name, merged[stored]), in_transformers(name, weights()[stored]), delta)
    for name in weights().keys() - {f"{META[n]}.weight" for n in SHAPES}:
        assert torch.equal(merged[name], weights()[name])
    assert json.loads((tmp_path / "out" / "params.json").read_text()) == PARAMS
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_pickle_is_said_to_become_safetensors_and_can_be_opened_again(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", SHAPES)

    report = loratools.merge(meta(tmp_path / "base"), [tmp_path / "adapter"], tmp_path / "out")

    assert any("written as safetensors" in w for w in report.warnings)
    assert open_checkpoint(tmp_path / "out").layout == "consolidated"


def test_what_transformers_computes_with_the_converted_weights_is_what_peft_computes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sizes = {"vocabulary": WORDS, "width": WIDTH, "inner": INNER, "heads": HEADS, "key_heads": KEYS, "layers": 1}
    names = META | {"model.embed_tokens": "tok_embeddings", "model.norm": "norm"}
    names |= {f"{LAYER}.input_layernorm": "layers.0.attention_norm", f"{LAYER}.post_attention_layernorm":
              "layers.0.ffn_norm"}  # fmt: skip

    def loaded(stored: dict[str, Tensor]) -> object:
        model = tiny_models.llama(**sizes, head_dim=HEAD)
        model.load_state_dict({f"{n}.weight": in_transformers(n, stored[f"{m}.weight"]) for n, m in names.items()})
        return model

    save_adapter(tmp_path / "adapter", SHAPES)
    loratools.merge(meta(tmp_path / "base"), [tmp_path / "adapter"], tmp_path / "out")

    ids = torch.tensor([[3, 9, 1, 16, 5]])
    unmerged = peft.PeftModel.from_pretrained(loaded(weights()), tmp_path / "adapter").eval()
    with torch.no_grad():
        merged = loaded(load_file(tmp_path / "out" / "consolidated.safetensors"))(ids).logits  # type: ignore[operator]
        torch.testing.assert_close(merged, unmerged(ids).logits, rtol=1e-4, atol=1e-3)


def test_pieces_for_several_devices_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(weights(), meta(tmp_path / "base") / "consolidated.01.pth")

    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(tmp_path / "base")

    assert "2 pieces" in caught.value.message
    assert "convert_llama_weights_to_hf" in str(caught.value.hint)


def test_heads_must_be_known(tmp_path: Path) -> None:
    folder = mistral(tmp_path / "base")
    (folder / "params.json").unlink()
    with pytest.raises(FormatError, match=r"params\.json"):
        open_checkpoint(folder)

    # Rows that are no such heads: what depends on them is refused, not put somewhere.
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_heads": 5}))
    save_adapter(tmp_path / "adapter", SHAPES)
    with pytest.raises(MismatchError) as caught:
        loratools.merge(folder, [tmp_path / "adapter"], tmp_path / "out")
    assert [d.split()[0] for d in caught.value.details] == [f"{LAYER}.self_attn.q_proj"]


def test_experts_of_mistrals_own_mixtral_are_found_by_both_of_their_names(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(8)
    experts = {
        f"layers.0.feed_forward.experts.{i}.{w}.weight": torch.randn(
            (WIDTH, INNER) if w == "w2" else (INNER, WIDTH), generator=g
        )
        for i in range(3)
        for w in ("w1", "w2", "w3")
    }
    dense = {name: t for name, t in weights().items() if ".feed_forward." not in name}
    folder = mistral(tmp_path / "base")
    save_file(dense | experts, folder / "consolidated.safetensors")
    deltas = save_adapter(
        tmp_path / "adapter", {f"{LAYER}.block_sparse_moe.experts.{i}.w3": (INNER, WIDTH) for i in (0, 2)}
    )

    loratools.merge(folder, [tmp_path / "adapter"], tmp_path / "out")

    merged = load_file(tmp_path / "out" / "consolidated.safetensors")
    for i in (0, 2):
        name = f"layers.0.feed_forward.experts.{i}.w3.weight"
        assert_added(merged[name], experts[name], deltas[f"{LAYER}.block_sparse_moe.experts.{i}.w3"])
    untouched = "layers.0.feed_forward.experts.1.w3.weight"
    assert torch.equal(merged[untouched], experts[untouched])


def test_a_folder_for_transformers_wins_over_the_copy_in_it(tmp_path: Path) -> None:
    folder = mistral(tmp_path / "base")
    save_file({"model.norm.weight": torch.ones(WIDTH)}, folder / "model.safetensors")

    base = open_checkpoint(folder)

    assert base.layout == "huggingface"
    assert "consolidated.safetensors" in {left.name for left in base.left_out}
