"""The public surface: complete, sorted, resolved on first use."""

from __future__ import annotations

import inspect as python_inspect
import json
import pkgutil
import re
import subprocess
import sys
import types
import typing
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

import loratools
from loratools.cli import verbs

VERBS = ("clean", "combine", "compare", "convert", "extract", "inspect", "merge", "resize", "spectrum")


def test_all_is_sorted_and_without_repeats() -> None:
    assert loratools.__all__ == sorted(set(loratools.__all__))


@pytest.mark.parametrize("name", loratools.__all__)
def test_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(loratools, name)

    # Aliases of types (`RankFrom`) have none of their own; docs/api.md says what they stand for.
    assert not callable(value) or not isinstance(value, (type, types.FunctionType)) or python_inspect.getdoc(value)


def test_names_resolve_one_by_one_in_a_fresh_process() -> None:
    # One process, each name looked up before any other has been: nothing rests on an earlier import.
    probe = (
        "import loratools, sys\n"
        "for name in loratools.__all__:\n"
        "    for module in [m for m in sys.modules if m.startswith('loratools.')]: del sys.modules[module]\n"
        "    for key in [k for k in loratools._HOMES if k in vars(loratools)]: del vars(loratools)[key]\n"
        "    assert getattr(loratools, name) is not None, name\n"
    )

    subprocess.run([sys.executable, "-c", probe], check=True, timeout=120)


def test_table_of_homes_is_complete() -> None:
    assert sorted(loratools._HOMES) == loratools.__all__
    assert set(loratools.__all__) <= set(dir(loratools))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loratools' has no attribute 'mrege'"):
        _ = loratools.mrege


def test_no_public_name_is_the_name_of_a_submodule() -> None:
    # Importing the submodule would rebind the attribute to the module.
    submodules = {m.name for m in pkgutil.iter_modules([str(Path(loratools.__file__).parent)])}

    assert not submodules & set(loratools.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_verb_is_a_function_after_its_module_was_imported(verb: str) -> None:
    import_module(f"loratools.ops.{verb}")

    assert python_inspect.isfunction(getattr(loratools, verb))


@pytest.mark.parametrize("verb", VERBS)
def test_verb_has_a_command_of_the_same_name(verb: str) -> None:
    assert import_module(f"loratools.cli.{verb}").command.name == verb


FUNCTIONS = [name for name in loratools.__all__ if python_inspect.isfunction(getattr(loratools, name))]
CLASSES = [name for name in loratools.__all__ if isinstance(getattr(loratools, name), type)]
# Names of the standard library and of numpy and torch that annotations use.
FOREIGN = {"Any", "Callable", "Iterable", "Iterator", "Literal", "Mapping", "None", "NoReturn", "Path", "Sequence"}
FOREIGN |= {"ClassVar", "False", "Module", "True", "Tensor", "TypeAlias"}
# What these are made of is for the merge and for the checkpoints alone; `to_dict` and `name` are their public form.
INSIDES = {"MergePlan", "Quantisation"}


def types_in(hint: object) -> set[type]:
    """The classes of this package in an annotation, at any depth."""
    if typing.get_origin(hint) is not None:
        return set().union(*(types_in(inner) for inner in typing.get_args(hint)))
    return {hint} if isinstance(hint, type) and hint.__module__.startswith("loratools") else set()


def names_known() -> dict[str, object]:
    """What annotations may name: the public names, and those that are imported for type checkers alone."""
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from loratools.algebra.lowrank import Factors
    from loratools.algebra.rounding import Floats
    from loratools.updates.full import Full
    from loratools.updates.lora_experts import LoRAExperts
    from loratools.updates.parts.deltas import Index

    inner = {"Index": Index, "Factors": Factors, "Floats": Floats, "Full": Full, "LoRAExperts": LoRAExperts}
    public = {name: getattr(loratools, name) for name in loratools.__all__}
    return {
        **public,
        **inner,
        "Array": np.ndarray,
        # matplotlib's, which is not installed everywhere.
        "Figure": object,
        "NDArray": NDArray,
        "Module": torch.nn.Module,
        "Tensor": torch.Tensor,
        "np": np,
        "torch": torch,
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_that_a_public_function_mentions_is_public(name: str) -> None:
    function = python_inspect.unwrap(getattr(loratools, name))

    hints = typing.get_type_hints(function, localns=names_known())

    assert {t.__name__ for hint in hints.values() for t in types_in(hint)} <= set(loratools.__all__)
    # Aliases (`Globs`, `Size`) leave no trace in a hint that is resolved.
    written = {w for text in function.__annotations__.values() for w in re.findall(r"\b[A-Z]\w+", str(text))}
    assert written <= {*loratools.__all__, *FOREIGN}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in INSIDES])
def test_everything_that_a_public_class_mentions_is_public(name: str) -> None:
    cls = getattr(loratools, name)
    public = [v for k, v in vars(cls).items() if not k.startswith("_")]
    functions = [v.fget if isinstance(v, property) else getattr(v, "__func__", v) for v in public]
    known = names_known()
    hints = [typing.get_type_hints(v, localns=known) for v in [cls, *filter(python_inspect.isfunction, functions)]]

    mentioned = {t.__name__ for each in hints for hint in each.values() for t in types_in(hint)}

    # Kinds that the protocol of updates can be asked for are reached by an update's methods, not by name.
    assert mentioned - {"Full", "LoRAExperts", "Factors"} <= set(loratools.__all__)


def test_lists_of_formats_and_methods_are_what_the_commands_print() -> None:
    printed = {verb: json.loads(CliRunner().invoke(verbs, [verb, "--json"]).stdout) for verb in ("formats", "methods")}

    assert [f.to_dict() for f in loratools.list_formats()] == printed["formats"]["formats"]
    assert [f.to_dict() for f in loratools.list_layouts()] == printed["formats"]["layouts"]
    assert [m.to_dict() for m in loratools.list_methods()] == printed["methods"]["methods"]
    assert {"peft", "gguf"} <= {f.name for f in loratools.list_formats() if f.write}
