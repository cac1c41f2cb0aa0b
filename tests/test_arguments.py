"""What a caller gives: each parameter of each public function refuses a value of another type, and says its name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from loratools.arguments import annotation_of, byte_size
from loratools.errors import LoraToolsError, UsageError

FUNCTIONS = tuple(name for name in loratools.__all__ if inspect.isfunction(getattr(loratools, name)))
# What a function passes on to another one is checked there.
PARAMETERS = [
    (f, name)
    for f in FUNCTIONS
    for name, parameter in inspect.signature(getattr(loratools, f)).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and (f, name) != ("write_page", "report")  # of any class
]
FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTER, BASE = FIXTURES / "llama-tiny-science", FIXTURES / "llama-tiny"


class Stranger:
    """Nothing that any parameter takes."""


def required(function: Any) -> dict[str, object]:
    """Arguments of the right types for the parameters that must be given."""
    values = {name: str(ADAPTER) for name in ("adapter", "adapters", "path", "first", "second", "source")}
    values |= {"merged": str(BASE), "base": str(BASE), "tuned": str(BASE), "out": "nowhere", "format": "peft"}
    values |= {"folder": "nowhere", "file": "nowhere.html"}
    values |= {"model": torch.nn.Linear(3, 2), "report": loratools.InspectReport(())}
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {name: values[name] for name in needed}


@pytest.mark.parametrize(("function", "parameter"), PARAMETERS, ids=[".".join(p) for p in PARAMETERS])
def test_value_of_another_type_is_a_usage_error_that_names_the_parameter(function: str, parameter: str) -> None:
    call = getattr(loratools, function)
    several = inspect.signature(call).parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL
    positional = [*required(call).values(), Stranger()] if several else []
    named = {} if several else {**required(call), parameter: Stranger()}

    with pytest.raises(UsageError, match=f"^{function}: {parameter} is of type Stranger, and .* is expected") as caught:
        call(*positional, **named)

    assert caught.value.hint


@pytest.mark.parametrize(("function", "parameter"), PARAMETERS, ids=[".".join(p) for p in PARAMETERS])
def test_annotation_of_a_parameter_is_a_type_that_can_be_resolved(function: str, parameter: str) -> None:
    assert annotation_of(getattr(loratools, function), parameter) is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loratools.resize(ADAPTER, rank="4"), "resize: rank is '4', and a whole number is expected"),
        (lambda: loratools.resize(ADAPTER, rank=True), "resize: rank is True, and a whole number is expected"),
        (
            lambda: loratools.resize(ADAPTER, rank=2, threads=0),
            "resize: threads is 0, and a whole number of at least 1 is expected",
        ),
        (
            lambda: loratools.extract(BASE, BASE, embeddings="ful"),
            "extract: embeddings is 'ful', and one of auto, lora, rows, full, skip is expected",
        ),
        (lambda: loratools.load(ADAPTER, format="peft"), "load has no parameter 'format'"),
        (lambda: loratools.load(), "load: missing a required argument: 'path'"),
        (lambda: loratools.resize(ADAPTER, max_size="100XB"), "'100XB' is no size"),
        (lambda: loratools.resize(ADAPTER, max_size=0), "0 is no size in bytes"),
        (lambda: loratools.compare(ADAPTER, ADAPTER, include=[1]), "compare: include is of type list"),
    ],
)
def test_what_one_tries_by_mistake_is_a_usage_error_with_a_hint(call: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()

    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_misspelt_choice_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="hint: did you mean 'full'"):
        loratools.extract(BASE, BASE, embeddings="ful")  # type: ignore[arg-type]


def test_single_text_is_one_glob_and_not_a_list_of_letters() -> None:
    pytest.importorskip("torch")
    one = loratools.resize(ADAPTER, rank=1, include="*layers.0*q_proj")
    several = loratools.resize(ADAPTER, rank=1, include=["*layers.0*q_proj"])

    assert [m.name for m in one.modules] == [m.name for m in several.modules] == ["model.layers.0.self_attn.q_proj"]


def test_numbers_of_numpy_are_numbers() -> None:
    pytest.importorskip("torch")
    numpy = pytest.importorskip("numpy")

    assert [m.rank for m in loratools.resize(ADAPTER, rank=numpy.int64(1)).modules] == [
        m.rank for m in loratools.resize(ADAPTER, rank=1).modules
    ]


def test_size_is_a_number_of_bytes_or_a_text_with_its_unit() -> None:
    assert (byte_size(4096), byte_size("5GB"), byte_size("5GiB")) == (4096, 5 * 10**9, 5 * 2**30)


def test_every_verb_takes_a_path_as_text_a_path_and_a_loaded_object() -> None:
    pytest.importorskip("torch")
    adapter, base = loratools.load(str(ADAPTER)), loratools.open_checkpoint(str(BASE))

    for source in (str(ADAPTER), ADAPTER, adapter):
        assert loratools.inspect(source).sources[0].format == "peft"
        assert loratools.compare(source, ADAPTER).cosine == pytest.approx(1, abs=1e-12)
        assert loratools.resize(source, rank=1, plan=True).output is None
        assert loratools.combine([source], plan=True).output is None
        assert loratools.spectrum(source).base is None
    for model in (str(BASE), BASE, base):
        assert loratools.inspect(model).sources[0].layout == base.layout
        assert loratools.merge(model, adapter, "unwritten", plan=True).output is None
        assert loratools.convert(adapter, "unwritten", format="peft", base=model, plan=True).output is None
    assert not Path("unwritten").exists()


def test_plan_of_a_merge_counts_what_the_merge_then_does(tmp_path: Path) -> None:
    planned = loratools.merge(BASE, ADAPTER, tmp_path / "out", plan=True)
    assert not (tmp_path / "out").exists()
    done = loratools.merge(BASE, ADAPTER, tmp_path / "out")

    assert planned.merged_weights == done.merged_weights
    assert (planned.untouched, planned.replaced) == (done.untouched, done.replaced)
    assert planned.merged_weights > 0


@pytest.mark.parametrize("verb", [n for n in FUNCTIONS if not n.startswith("list_") and n != "write_page"])
def test_nothing_but_errors_of_loratools_comes_out_of_a_path_that_is_not_there(verb: str, tmp_path: Path) -> None:
    call = getattr(loratools, verb)
    names = {"adapter", "adapters", "path", "first", "second", "source", "base", "tuned", "merged", "folder"}
    given = {n: str(tmp_path / "absent") if n in names else v for n, v in required(call).items()}

    given |= {"rank": 2} if verb == "resize" else {}
    sources = [tmp_path / "absent"] if verb == "inspect" else []

    with pytest.raises(LoraToolsError):
        call(*sources, **given)
