"""The tables of inspect, whole: what a person sees at the widths of a window, a narrow pane and a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import factories
import pytest
import torch

from loratools.cli.common.output import print_rich
from loratools.ops.inspect.verb import inspect
from loratools.report.inspection import inspection_report

SHAPES = {"mlp.down_proj": (6, 22), "self_attn.q_proj": (10, 6), "self_attn.v_proj": (7, 6)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an adapter whose layers differ, one with odd values, a checkpoint, and a folder of several."""
    monkeypatch.chdir(tmp_path)
    factories.adapter_folder(
        Path("style"),
        modules=factories.layered(12, SHAPES),
        ranks={"model.layers.3.self_attn.q_proj": 2},
        extra={"score.weight": torch.zeros(3, 6)},
        config={"modules_to_save": ["score"], "base_model_name_or_path": "meta/\x1b[31mllama [bold]"},
    )
    made = factories.factors(factories.layered(3, {"self_attn.q_proj": (10, 6)}))
    first, second, third = made
    made[first] = (torch.eye(4, 6), torch.eye(10, 4))
    made[second] = (made[second][0], torch.zeros(10, 4))
    made[third] = (made[third][0] * float("nan"), made[third][1])
    factories.adapter_folder(Path("odd"), values=made)
    weights = factories.base_weights(factories.layered(12, SHAPES), dtype=torch.bfloat16)
    weights["model.norm.weight"][0] = float("nan")
    factories.checkpoint_folder(Path("base"), weights=weights, shards=2)
    for name in ("b", "a"):
        factories.adapter_folder(Path("many") / name)
    Path("many/broken").mkdir()
    Path("many/broken/adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def printed(*sources: str, width: int, encoding: str = "utf-8", **options: bool) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    values = options.pop("values", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        print_rich(stream, *inspection_report(inspect(*sources, values=values), **options))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined,no-any-return]


def test_adapter_in_a_wide_window() -> None:
    text = printed("style", width=120)

    assert (
        text
        == """\
╭───────────────────────────────────────╮
│ style                                 │
│ adapter     peft · lora               │
│ base model  meta/\\x1b[31mllama [bold] │
│ modules     36 · rank 2–4 · scale 2–4 │
│ parameters  2,722 in 73 tensors       │
│ size        19.8 kB · F32             │
╰───────────────────────────────────────╯
module                                    count  rank  alpha  scale  shape  parameters
──────────────────────────────────────────────────────────────────────────────────────
model.layers.{0-11}.mlp.down_proj            12     4      8      2   6×22       1,344
model.layers.{0-2,4-11}.self_attn.q_proj     11     4      8      2   10×6         704
model.layers.3.self_attn.q_proj               1     2      8      4   10×6          32
model.layers.{0-11}.self_attn.v_proj         12     4      8      2    7×6         624

replaced weight  count  shape  dtype  parameters
────────────────────────────────────────────────
score.weight         1    3×6  F32            18
"""
    )


def test_adapter_in_a_smaller_window_goes_without_what_can_be_spared() -> None:
    text = printed("style", width=70)

    assert (
        text
        == """\
╭───────────────────────────────────────╮
│ style                                 │
│ adapter     peft · lora               │
│ base model  meta/\\x1b[31mllama [bold] │
│ modules     36 · rank 2–4 · scale 2–4 │
│ parameters  2,722 in 73 tensors       │
│ size        19.8 kB · F32             │
╰───────────────────────────────────────╯
module                                    count  rank  scale  shape
───────────────────────────────────────────────────────────────────
model.layers.{0-11}.mlp.down_proj            12     4      2   6×22
model.layers.{0-2,4-11}.self_attn.q_proj     11     4      2   10×6
model.layers.3.self_attn.q_proj               1     2      4   10×6
model.layers.{0-11}.self_attn.v_proj         12     4      2    7×6

replaced weight  count  shape  dtype  parameters
────────────────────────────────────────────────
score.weight         1    3×6  F32            18
"""
    )


def test_adapter_in_a_narrow_pane() -> None:
    text = printed("style", width=40)

    assert (
        text
        == """\
╭──────────────────────────────────────╮
│ style                                │
│ adapter     peft · lora              │
│ base model  meta/\\x1b[31mllama       │
│             [bold]                   │
│ modules     36 · rank 2–4 · scale    │
│             2–4                      │
│ parameters  2,722 in 73 tensors      │
│ size        19.8 kB · F32            │
╰──────────────────────────────────────╯
model.layers.{0-11}.mlp.down_proj
  count 12  rank 4  alpha 8  scale 2
  shape 6×22  parameters 1,344
model.layers.{0-2,4-11}.self_attn.q_proj
  count 11  rank 4  alpha 8  scale 2
  shape 10×6  parameters 704
model.layers.3.self_attn.q_proj
  count 1  rank 2  alpha 8  scale 4
  shape 10×6  parameters 32
model.layers.{0-11}.self_attn.v_proj
  count 12  rank 4  alpha 8  scale 2
  shape 7×6  parameters 624

score.weight
  count 1  shape 3×6  dtype F32
  parameters 18
"""
    )


def test_adapter_in_ascii() -> None:
    text = printed("style", width=120, encoding="ascii")

    assert (
        text
        == """\
+---------------------------------------+
| style                                 |
| adapter     peft . lora               |
| base model  meta/\\x1b[31mllama [bold] |
| modules     36 . rank 2-4 . scale 2-4 |
| parameters  2,722 in 73 tensors       |
| size        19.8 kB . F32             |
+---------------------------------------+
module                                    count  rank  alpha  scale  shape  parameters
--------------------------------------------------------------------------------------
model.layers.{0-11}.mlp.down_proj            12     4      8      2   6x22       1,344
model.layers.{0-2,4-11}.self_attn.q_proj     11     4      8      2   10x6         704
model.layers.3.self_attn.q_proj               1     2      8      4   10x6          32
model.layers.{0-11}.self_attn.v_proj         12     4      8      2    7x6         624

replaced weight  count  shape  dtype  parameters
------------------------------------------------
score.weight         1    3x6  F32            18
"""
    )


def test_values_name_what_is_untrained_and_not_finite() -> None:
    text = printed("odd", width=120, values=True)

    assert (
        text
        == """\
╭──────────────────────────────────╮
│ odd                              │
│ adapter     peft · lora          │
│ base model  tiny/base            │
│ modules     3 · rank 4 · scale 2 │
│ parameters  192 in 6 tensors     │
│ size        1.53 kB · F32        │
╰──────────────────────────────────╯
                                                                      spectral  stable  effective
module                               count  rank  scale  shape  norm      norm    rank       rank
─────────────────────────────────────────────────────────────────────────────────────────────────
model.layers.{0-2}.self_attn.q_proj      3     4      2   10×6   0–4       0–2     0–4        0–4

warning: values not finite in model.layers.2.self_attn.q_proj
warning: 1 module untrained, changing nothing: model.layers.1.self_attn.q_proj
warning: most rows of B are zeros in 1 module, as a lost shard leaves them: model.layers.0.self_attn.q_proj
"""
    )


def test_checkpoint_with_values() -> None:
    text = printed("base", width=120, values=True)

    assert (
        text
        == """\
╭─────────────────────────────────╮
│ base                            │
│ checkpoint  huggingface         │
│ model       LlamaForCausalLM    │
│ parameters  2,970 in 39 tensors │
│ size        9.8 kB · BF16       │
╰─────────────────────────────────╯
tensor                                       count  shape  dtype  parameters
────────────────────────────────────────────────────────────────────────────
lm_head.weight                                   1   13×6  BF16           78
model.embed_tokens.weight                        1   13×6  BF16           78
model.layers.{0-11}.mlp.down_proj.weight        12   6×22  BF16        1,584
model.layers.{0-11}.self_attn.q_proj.weight     12   10×6  BF16          720
model.layers.{0-11}.self_attn.v_proj.weight     12    7×6  BF16          504
model.norm.weight                                1      6  BF16            6

warning: 1 value not finite, in model.norm.weight
"""
    )


def test_every_module_has_a_row() -> None:
    text = printed("odd", width=120, modules=True)

    assert (
        text
        == """\
╭──────────────────────────────────╮
│ odd                              │
│ adapter     peft · lora          │
│ base model  tiny/base            │
│ modules     3 · rank 4 · scale 2 │
│ parameters  192 in 6 tensors     │
│ size        1.53 kB · F32        │
╰──────────────────────────────────╯
module                           rank  alpha  scale  shape  parameters
──────────────────────────────────────────────────────────────────────
model.layers.0.self_attn.q_proj     4      8      2   10×6          64
model.layers.1.self_attn.q_proj     4      8      2   10×6          64
model.layers.2.self_attn.q_proj     4      8      2   10×6          64
"""
    )


def test_folder_of_many_is_listed() -> None:
    text = printed("many", width=200, overview=True)

    assert (
        text
        == """\
many/
name    base model  kind            modules  rank  alpha  scale  dtype  parameters     size
───────────────────────────────────────────────────────────────────────────────────────────
a       tiny/base   lora                  4     4      8      2  F32           232  1.93 kB
b       tiny/base   lora                  4     4      8      2  F32           232  1.93 kB
broken  –           cannot be read        –     –      –      –  –               –        –

error: 'many/broken/adapter_model.safetensors' is not a safetensors file but a git-LFS pointer, \
not the file itself
"""
    )


def test_bad_source_keeps_its_place() -> None:
    text = printed("odd", "many/broken", width=120)

    assert (
        text
        == """\
╭──────────────────────────────────╮
│ odd                              │
│ adapter     peft · lora          │
│ base model  tiny/base            │
│ modules     3 · rank 4 · scale 2 │
│ parameters  192 in 6 tensors     │
│ size        1.53 kB · F32        │
╰──────────────────────────────────╯
module                               count  rank  alpha  scale  shape  parameters
─────────────────────────────────────────────────────────────────────────────────
model.layers.{0-2}.self_attn.q_proj      3     4      8      2   10×6         192

many/broken
error: 'many/broken/adapter_model.safetensors' is not a safetensors file but a git-LFS pointer, not the file itself
hint: run 'git lfs pull' in its folder
"""
    )
