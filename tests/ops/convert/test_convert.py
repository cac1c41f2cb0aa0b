"""convert: what is written is what was read, and a mistake of a writer is never committed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import factories
import pytest
import torch
from cli_runner import CliRunner
from safetensors.torch import load_file, save_file

from loratools import formats
from loratools.adapter import Adapter
from loratools.cli import verbs
from loratools.errors import InputError, OutputExistsError, UnsupportedError, UsageError
from loratools.formats import peft
from loratools.ops.convert.verb import convert
from loratools.ops.convert.verify import Piece, compare
from loratools.tensors.lazy import from_torch
from loratools.updates.lora import LoRA


def test_a_conversion_to_the_same_format_keeps_every_byte(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", ranks={"model.layers.1.self_attn.v_proj": 2}, alpha=5)

    report = convert(source, tmp_path / "out", format="peft")

    assert report.max_relative_error == 0.0
    assert (report.tensors_in, report.tensors_out, report.dropped) == (8, 8, ())
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    convert(tmp_path / "out", tmp_path / "again", format="peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_error_printed_is_that_of_the_stored_values(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")

    report = convert(source, tmp_path / "out", format="peft", dtype="bfloat16")

    before, after = formats.load(source), formats.load(tmp_path / "out")
    x = {}
    for module in report.modules:
        f, g = (a.updates[module.name].factors() for a in (before, after))
        assert f is not None
        assert g is not None
        wanted = f.b @ f.a
        x[module.name] = float((g.b @ g.a - wanted).norm() / wanted.norm())
        # A norm of a few products with random x is that of the matrix, within a small factor.
        assert x[module.name] / 2 < module.error < 2 * x[module.name]
    assert report.max_relative_error == max(m.error for m in report.modules)
    assert 1e-4 < report.max_relative_error < 2**-7


@pytest.mark.parametrize("fault", ["scale", "transposed", "lost", "one entry"])
def test_a_writer_that_makes_a_mistake_commits_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={"a": (6, 6), "b": (10, 6)})
    honest = peft.write

    def wrong(adapter: Adapter, out: Path, **options: object) -> tuple[str, ...]:
        first = adapter.updates["a"]
        assert isinstance(first, LoRA)
        updates = {**adapter.updates}
        if fault == "scale":
            updates["a"] = replace(first, alpha=first.alpha * 1.001)
        elif fault == "transposed":
            updates["a"] = replace(
                first, a=from_torch(first.b.read().T.contiguous()), b=from_torch(first.a.read().T.contiguous())
            )
        elif fault == "one entry":
            b = first.b.read()
            b[3, 1] *= 1.0001
            updates["a"] = replace(first, b=from_torch(b))
        else:
            del updates["a"]
        return honest(replace(adapter, updates=updates), out, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(peft, "write", wrong)

    with pytest.raises(RuntimeError, match="'a': relative error"):
        convert(source, tmp_path / "out", format="peft")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_rows_of_several_modules_are_compared_in_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    b, a, c = (torch.randn(*s, generator=generator) for s in ((10, 4), (4, 6), (7, 4)))
    parts = Adapter(
        {"q": LoRA(from_torch(a), from_torch(b), 4.0, "config"), "v": LoRA(from_torch(a), from_torch(c), 4.0, "config")}
    )
    fused = Adapter({"qkv": LoRA(from_torch(a), from_torch(torch.cat([b, torch.zeros(5, 4), c])), 4.0, "config")})
    pieces = {"q": (Piece("qkv", None, (0, 10)),), "v": (Piece("qkv", None, (15, 22)),)}

    assert [(c.name, c.explained) for c in compare(parts, fused, pieces)] == [("qkv", True)]
    # And back: each part is some rows of the whole.
    back = {"qkv": (Piece("q", (0, 10)), Piece("v", (15, 22)))}
    assert [(c.name, c.explained) for c in compare(fused, parts, back)] == [("q", True), ("v", True)]
    # What nobody accounts for is an error: here, rows of k that are not zero.
    more = Adapter({"qkv": LoRA(from_torch(a), from_torch(torch.cat([b, torch.ones(5, 4), c])), 4.0, "config")})
    assert [c.explained for c in compare(parts, more, pieces)] == [False]


def test_alpha_can_be_given_only_where_the_file_has_none(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")
    with pytest.raises(UsageError, match="states its own alpha"):
        convert(source, tmp_path / "out", format="peft", alpha=3)
    (source / "adapter_config.json").unlink()

    assumed = convert(source, tmp_path / "assumed", format="peft")
    convert(source, tmp_path / "told", format="peft", alpha=12)

    assert any("give it with --alpha" in w for w in assumed.warnings)
    scales = [{u.scale for u in formats.load(tmp_path / name).updates.values()} for name in ("assumed", "told")]
    assert scales == [{1.0}, {3.0}]


def test_names_that_cannot_be_written_are_mistakes_of_usage(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")

    with pytest.raises(UsageError, match="no format named 'pefft'"):
        convert(source, tmp_path / "out", format="pefft")
    with pytest.raises(UsageError, match="peft writes a folder"):
        convert(source, tmp_path / "out.safetensors", format="peft")
    with pytest.raises(OutputExistsError):
        convert(source, source, format="peft", overwrite=True)


def test_command_prints_the_error_and_what_became_of_the_metadata(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", config={"task_type": "CAUSAL_LM"})

    done = CliRunner().invoke(verbs, ["convert", str(source), "-o", str(tmp_path / "out"), "--to", "peft", "--json"])

    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["verb"] == "convert"
    assert (document["source_format"], document["target_format"]) == ("peft", "peft")
    assert document["max_relative_error"] == 0.0
    assert document["metadata"] == {"kept": ["base model", "task_type"], "recomputed": []}
    plain = CliRunner().invoke(verbs, ["convert", str(source), "-o", str(tmp_path / "b"), "--to", "peft"])
    assert (plain.exit_code, plain.stdout) == (0, "")
    assert "none; 4 parts read back and compared" in plain.stderr


def test_what_began_by_changing_its_base_is_no_delta_anywhere_but_in_peft(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", config={"init_lora_weights": "pissa"})

    with pytest.raises(UnsupportedError, match="was initialised with"):
        convert(source, tmp_path / "out", format="mlx")
    with pytest.raises(UnsupportedError, match="was initialised with"):
        convert(source, tmp_path / "out", format="peft", serve="vllm")
    convert(source, tmp_path / "out", format="peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"


def test_plan_writes_nothing(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")

    report = convert(source, tmp_path / "out", format="peft", dtype="float16", plan=True)

    assert not (tmp_path / "out").exists()
    assert (report.output, report.max_relative_error) == (None, None)
    assert report.bytes == 2 * sum(t.numel() for t in load_file(source / "adapter_model.safetensors").values())


def _files(path: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes()} if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("first", ["peft", "mlx", "gguf"])
@pytest.mark.parametrize("second", ["peft", "mlx", "gguf"])
def test_every_two_formats_of_language_models_convert_there_and_back(first: str, second: str, tmp_path: Path) -> None:
    shapes = {"self_attn.q_proj": (12, 12), "self_attn.k_proj": (4, 12), "mlp.up_proj": (20, 12)}
    ranks = {"model.layers.1.mlp.up_proj": 2}
    peft_folder = factories.adapter_folder(
        tmp_path / "in", modules=factories.layered(2, shapes), ranks=ranks, alpha=5, config={"use_rslora": True}
    )
    base = formats.Base({}, {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1})

    def step(source: Path, name: str, to: str) -> Path:
        out = tmp_path / (f"{name}.gguf" if to == "gguf" else name)
        # Without a model card, which names the source.
        report = convert(source, out, format=to, base=base, card=False)
        assert report.max_relative_error is not None
        assert report.max_relative_error < 2.0**-22
        return out

    one = step(peft_folder, "one", first)
    two = step(one, "two", second)
    back = step(two, "back", first)

    wanted, found = formats.load(peft_folder, base=base), formats.load(back, base=base)
    assert found.updates.keys() == wanted.updates.keys()
    for name, update in wanted.updates.items():
        f, g = update.factors(), found.updates[name].factors()
        assert f is not None
        assert g is not None
        torch.testing.assert_close(g.b @ g.a, f.b @ f.a, rtol=1e-6, atol=1e-6)
    # What has been there once comes back with the same bytes, and the same conversion makes the same file.
    again = step(step(back, "third", second), "fourth", first)
    assert _files(again) == _files(back)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_the_inputs_mistake_and_named(value: float, tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in", modules={"a": (6, 5), "b": (10, 5)})
    tensors = load_file(source / "adapter_model.safetensors")
    next(t for key, t in tensors.items() if ".b.lora_B" in key)[3, 1] = value
    save_file(tensors, source / "adapter_model.safetensors")

    with pytest.raises(InputError, match=r"1 tensor of .* has values that are not finite") as caught:
        convert(source, tmp_path / "out", format="mlx")

    assert caught.value.details == ("b.B",)
    assert not (tmp_path / "out").exists()


def _kohya(path: Path, parts: dict[str, tuple[int, ...]]) -> Path:
    generator = torch.Generator().manual_seed(3)
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{module}.{part}": torch.randn(shape, generator=generator) for part, shape in parts.items()}, path)
    return path


@pytest.mark.parametrize(
    ("parts", "warned"),
    [
        ({"diff": (6, 5)}, False),
        ({"lokr_w1": (2, 3), "lokr_w2": (3, 2)}, False),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}, True),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, True),
    ],
)
def test_an_alpha_is_assumed_and_can_be_given_where_it_counts(
    parts: dict[str, tuple[int, ...]], warned: bool, tmp_path: Path
) -> None:
    source = _kohya(tmp_path / "in.safetensors", parts)

    report = convert(source, tmp_path / "plain.safetensors", format="comfy")

    assert [w for w in report.warnings if "alpha" in w] == [w for w in report.warnings if "alpha 2:" in w]
    assert any("alpha 2:" in w for w in report.warnings) == warned
    if not warned:
        with pytest.raises(UsageError, match="does not apply"):
            convert(source, tmp_path / "given.safetensors", format="comfy", alpha=3)
        return
    convert(source, tmp_path / "given.safetensors", format="comfy", alpha=3)
    (alpha,) = (t for key, t in load_file(tmp_path / "given.safetensors").items() if key.endswith(".alpha"))
    assert float(alpha) == 3.0


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_8_bits_are_read_exactly(tmp_path: Path, kind: torch.dtype) -> None:
    source = factories.adapter_folder(tmp_path / "in")
    file = source / "adapter_model.safetensors"
    short = {name: tensor.to(kind) for name, tensor in load_file(file).items()}
    save_file(short, file, {"format": "pt"})

    report = convert(source, tmp_path / "out", format="peft")

    assert report.max_relative_error == 0.0
    assert any("are read as float16" in text for text in report.warnings)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.float16}
    for name, tensor in written.items():
        assert torch.equal(tensor.double(), short[name].double())


def test_modules_that_were_not_chosen_are_listed_as_dropped(tmp_path: Path) -> None:
    source = factories.adapter_folder(tmp_path / "in")

    report = convert(source, tmp_path / "out", format="peft", exclude=["*.v_proj"])

    left = [n for n in formats.load(source).updates if n.endswith("v_proj")]
    assert left
    assert [(d.what, d.name, d.why) for d in report.dropped] == [
        ("module", name, "left out by --include or --exclude") for name in sorted(left)
    ]
