"""The public surface: complete, sorted, resolved on first use."""

from __future__ import annotations

import inspect as python_inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import loratools

VERBS = ("combine", "compare", "convert", "extract", "inspect", "merge", "resize", "spectrum")


def test_all_is_sorted_and_without_repeats() -> None:
    assert loratools.__all__ == sorted(set(loratools.__all__))


@pytest.mark.parametrize("name", loratools.__all__)
def test_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(loratools, name)

    assert name == "__version__" or python_inspect.getdoc(value)


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
