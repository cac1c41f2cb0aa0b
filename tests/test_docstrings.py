"""Docstrings of the public names: every parameter is explained, every example runs, and docs/api.md has them all."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
from pathlib import Path

import pytest

import loratools
from loratools import registry

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
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

    explained = re.findall(r"^    \*{0,2}(\w+): \S", section(inspect.getdoc(value) or "", "Args"), re.M)

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


def record_fields(cls: type) -> list[str]:
    """The fields of a dataclass or a named tuple, by name; of any other class none."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "_fields", ()))


def fields_without_a_word(cls: type) -> list[str]:
    """Fields that neither the class nor one that it is derived from names in an `Attributes:` section."""
    sections = [section(inspect.cleandoc(vars(c).get("__doc__") or ""), "Attributes") for c in cls.__mro__]
    named = {name for text in sections for name in re.findall(r"^    (\w+): \S", text, re.M)}
    return [name for name in record_fields(cls) if name not in named and not name.startswith("_")]


def public_records() -> dict[str, type]:
    """Classes with fields: those that are exported, and every kind of update."""
    exported = [getattr(loratools, name) for name in loratools.__all__ if name != "__version__"]
    kinds = [
        value
        for name in registry.names("updates")
        for value in vars(registry.load("updates", name)).values()
        if isinstance(value, type) and value.__module__ == f"loratools.updates.{name.replace('-', '_')}"
    ]
    classes = [value for value in [*exported, *kinds] if isinstance(value, type) and not value.__name__.startswith("_")]
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes if record_fields(cls)}


def test_a_field_without_a_word_is_noticed() -> None:
    @dataclasses.dataclass
    class Sized:
        """A thing with a size.

        Attributes:
            size: Its size in bytes.
        """

        size: int

    @dataclasses.dataclass
    class Named(Sized):
        """A thing with a size and a name: its name is text."""

        name: str

    assert fields_without_a_word(Sized) == []
    assert fields_without_a_word(Named) == ["name"]


def test_every_field_of_a_public_class_is_in_its_docstring() -> None:
    records = public_records()

    assert {"loratools.updates.lokr.LoKr", "loratools.ops.compare.report.CompareReport"} <= records.keys()
    assert {name: missing for name, cls in records.items() if (missing := fields_without_a_word(cls))} == {}


def starts_with_a_sentence(doc: str) -> bool:
    """Whether the first paragraph is a sentence with a capital, or one after a name: `peft: what it is.`"""
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    return re.match(r"[A-Z]|[\w/., ()-]+: ", paragraph) is not None and paragraph.endswith((".", ":", "?"))


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Docstrings of a module, and of the classes and functions in it that are not private, by their lines."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, DOCUMENTED)]
    named = [(getattr(n, "name", ""), getattr(n, "lineno", 1), ast.get_docstring(n)) for n in nodes]
    return [(f"{path.name}:{line} {name}", doc) for name, line, doc in named if doc and not name.startswith("_")]


def test_docstrings_begin_with_a_sentence() -> None:
    package = Path(loratools.__file__).parent
    every = [entry for path in sorted(package.rglob("*.py")) for entry in docstrings(path)]

    assert len(every) > 1000
    assert [where for where, doc in every if not starts_with_a_sentence(doc)] == []


@pytest.mark.parametrize("riddle", ['`density=0.3` -> ("density", "0.3").', "as of `load`", "Without an end"])
def test_a_docstring_that_begins_with_no_sentence_is_noticed(riddle: str) -> None:
    assert not starts_with_a_sentence(riddle)
