"""Docstrings of the public names: every parameter is explained, every example runs, and docs/api.md has them all."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import loratools

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in loratools.__all__ if inspect.isfunction(getattr(loratools, name))]
# The classes that people make, index and ask; the others are fields of reports.
CLASSES = ("AdaptedModule", "Adapter", "Checkpoint", "LazyTensor")


def callables() -> dict[str, object]:
    """Public functions, and the public methods of the classes that people use, by their names."""
    found: dict[str, object] = {name: getattr(loratools, name) for name in FUNCTIONS}
    for cls in CLASSES:
        for name, value in vars(getattr(loratools, cls)).items():
            method = getattr(value, "__func__", value)
            if inspect.isfunction(method) and not name.startswith("_"):
                found[f"{cls}.{name}"] = method
    return found


def section(doc: str, title: str) -> str:
    """The indented lines below `Args:`, `Returns:`, ..."""
    found = re.search(rf"^{title}:\n((?:(?:    .*)?\n?)*)", doc, re.M)
    return found[1] if found else ""


@pytest.mark.parametrize("name", callables())
def test_every_parameter_is_in_the_docstring(name: str) -> None:
    value = callables()[name]
    parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]  # type: ignore[arg-type]

    explained = re.findall(r"^    (\w+): \S", section(inspect.getdoc(value) or "", "Args"), re.M)

    assert explained == parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_returns_and_has_an_example(name: str) -> None:
    doc = inspect.getdoc(getattr(loratools, name)) or ""

    assert section(doc, "Returns")
    assert ">>> " in section(doc, "Example")
    assert re.match(r"[A-Z][a-z]+ .*[.,]", doc), "the first line is a sentence"


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES, *(n for n in callables() if "." in n)])
def test_examples_print_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = callables().get(name) or getattr(loratools, name)
    example = inspect.getdoc(value) or ""
    if ">>> " not in example:
        return
    if not (ROOT / "fixtures" / "llama-tiny").exists():
        pytest.skip("the fixtures are not here")
    pytest.importorskip("torch", reason="most examples compute with it")
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(example, {}, name, None, None)

    result = doctest.DocTestRunner(verbose=False).run(test)

    assert result.attempted > 1
    assert result.failed == 0


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

    missing = [n for n in loratools.__all__ if n != "__version__" and not re.search(rf"^#+ .*\b{n}\b", reference, re.M)]
    assert missing == []
