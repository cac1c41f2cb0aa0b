"""The one way in which a test uses a peer: a package of the `oracles` extra, such as diffusers, LyCORIS or gguf.

A clean clone has the `test` extra only, so a test that computes with a peer says so, is skipped where the peer is not
installed, and is counted at the end of the run. The rules, which `tests/test_peers.py` holds by walking every file
of the tests:

1. A test that needs a peer has the mark ``@peers.needs("diffusers")``: the names are those that Python imports,
   several are allowed. For all tests of a file: ``pytestmark = peers.needs("gguf")``. For one case of a parametrised
   test: ``pytest.param(..., marks=peers.needs("lycoris"))``. The mark is also due when the test reaches the peer
   through a fixture, a helper function or a table.
2. Inside a function, a peer is imported as any package is: ``from diffusers import UNet2DConditionModel``.
3. At the top of a file, ``gguf = peers.load("gguf")`` takes the place of the import. Without the peer it gives a
   stand-in, with which tables and parameters can be written, so that the tests are still collected and counted.
4. What tests import is declared: by the package itself, by the `test` extra, or by the `oracles` extra.

``pytest -m oracle`` runs the tests that need a peer and no others, ``pytest -m "not oracle"`` all others.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NoReturn

import pytest

# The reason of a skipped test ends with this; the summary at the end of a run counts by it.
REMEDY = "run `make oracles`"


def needs(*names: str) -> pytest.MarkDecorator:
    """The mark of a test that computes with these peers, which skips the test where one is not installed.

    Args:
        names: Modules or packages as Python imports them, such as ``"diffusers"`` or ``"mlx.core"``.

    Example:
        >>> @peers.needs("diffusers")
        ... def test_names_are_those_of_diffusers() -> None: ...
    """
    return pytest.mark.oracle(*names)


def load(name: str) -> Any:
    """The peer as a module, for the top of a file; where it is not installed, a stand-in that skips when it is used.

    Args:
        name: A module or package as Python imports it, such as ``"lycoris.modules.locon"``.

    Raises:
        ImportError: If the peer is installed and cannot be imported.
    """
    return importlib.import_module(name) if is_installed(name) else Absent(name)


def is_installed(name: str) -> bool:
    """Whether Python finds the module; it is not imported, its packages are."""
    package, _, _ = name.rpartition(".")
    return (not package or is_installed(package)) and importlib.util.find_spec(name) is not None


def reason(name: str) -> str:
    """Why a test that needs this peer is skipped."""
    return f"{name} is not installed: {REMEDY}"


class Absent:
    """Stands for a peer that is not installed, or for anything in it. Using it skips the test."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Absent:
        if attribute.startswith("__"):  # pytest asks every object in a file for some of these
            raise AttributeError(attribute)
        return Absent(f"{self._name}.{attribute}")

    def __call__(self, *args: object, **options: object) -> NoReturn:
        pytest.skip(reason(self._name), allow_module_level=True)

    def __iter__(self) -> NoReturn:
        self()

    def __getitem__(self, key: object) -> NoReturn:
        self()
