"""Docstrings: each parameter, result and error is explained in sentences, examples run, docs/api.md has them all."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import inspect
import re
from functools import cached_property
from pathlib import Path

import pytest

import loratools
from loratools import errors, registry
from loratools.updates.parts.defaults import UpdateDefaults

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
ROOT = Path(__file__).parents[1]
EXPORTED = {name: getattr(loratools, name) for name in loratools.__all__ if name != "__version__"}
FUNCTIONS = [name for name, value in EXPORTED.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in EXPORTED.items() if isinstance(value, type)]
# The classes that people make, open, index or get from a function; the others are fields of reports.
SHOWN_BY_EXAMPLE = [name for name in CLASSES if name.endswith("Report")]
SHOWN_BY_EXAMPLE += ["AdaptedModule", "Adapter", "Base", "Checkpoint", "ComparisonMatrix", "LazyTensor", "LoRA"]
SHOWN_BY_EXAMPLE += ["LoraToolsError", "MergePlan"]
# Lists of what is installed: there is nothing that they could refuse.
CANNOT_FAIL = {"list_formats", "list_layouts", "list_methods", "list_rules"}
# A description may begin with code, a number, a name of several parts, or a word that is always written small.
SMALL = r"`|\d|\(|[\w*]+[_.\d]|(kohya|nearest|numpy|torch|out|in|ids?)\b"
# Elliptic or archaic turns, each with the plain one.
RIDDLES = {
    r"\bwhere (there (is|are)|it has|they have) none\b": "if there is none",
    r"\bwhere none (is|are|was|were)\b": "if none is given",
    r"\bwhere it is (None|not given)\b": "if None",
    r"\b(is|are|was|were|be) told\b(?! apart)": "printed, reported, known",
    r"\bas of `|^As `": "as in, like",
    r"\bsave for\b": "except for",
    r"\bin so far as\b": "as far as",
    r"\bfor want of\b": "because there is no",
    r"\bto speak of\b": "say what there is none of",
    r"\bas (not )?asked for\b": "as requested",
    r"\ba (text|number|line) each\b": "one text for each",
    r"\bbears? (it )?out\b": "confirms",
    r"\bwhosoever\b|\bwhatsoever\b": "say who or what",
    r"\bis no more\b(?! than)": "no longer exists",
    r"\bNone of a\b": "None for a",
    r"\bits like\b": "name what is meant",
}


def members(cls: type) -> dict[str, object]:
    """The public methods and properties that a class of this package has, also those that it inherits."""
    return {
        name: inspect.getattr_static(cls, name)
        for name in dir(cls)
        if not name.startswith("_")
        and next(c for c in cls.__mro__ if name in vars(c)).__module__.startswith("loratools")
        and (is_method(value := inspect.getattr_static(cls, name)) or isinstance(value, (property, cached_property)))
    }


def is_method(value: object) -> bool:
    return inspect.isfunction(getattr(value, "__func__", value))


def documentation(cls: type, name: str) -> str:
    """The docstring of a member; of a kind of update also what the protocol says of it."""
    protocol = getattr(loratools.Update, name, None) if issubclass(cls, UpdateDefaults) else None
    return inspect.getdoc(inspect.getattr_static(cls, name)) or inspect.getdoc(protocol) or ""


def callables() -> dict[str, object]:
    """Public functions, and the public methods of exported classes, by their names."""
    public: dict[str, object] = {name: EXPORTED[name] for name in FUNCTIONS}
    for name in CLASSES:
        for member, value in members(EXPORTED[name]).items():
            if is_method(value) and inspect.getdoc(getattr(value, "__func__", value)):
                public[f"{name}.{member}"] = getattr(value, "__func__", value)
    return public


def section(doc: str, title: str) -> str:
    """The indented lines below `Args:`, `Returns:`, ..."""
    match = re.search(rf"^{title}:\n((?:(?:    .*)?\n?)*)", doc, re.M)
    return match[1] if match else ""


def entries(doc: str, title: str) -> list[tuple[str, str]]:
    """`name: description` of a section, each on one line."""
    joined = re.sub(r"\n {8,}", " ", section(doc, title))
    return [(name.strip("*`"), about) for name, about in re.findall(r"^    ([^\s:][^:]*): (.+)$", joined, re.M)]


def unfinished(doc: str) -> list[str]:
    """Descriptions in sections that do not begin with a capital letter, or end without a full stop."""
    described = [(title, *entry) for title in ("Args", "Attributes", "Raises") for entry in entries(doc, title)]
    returns = " ".join(section(doc, "Returns").split())
    described += [("Returns", "", returns)] if returns else []
    return [
        f"{title} {name}: {about}"
        for title, name, about in described
        if not re.match(rf"[A-Z]|{SMALL}", about) or not about.rstrip().endswith((".", "?", "`"))
    ]


def raised(doc: str) -> list[str]:
    """Names in `Raises:` that are no errors of this package or of Python."""
    names = [name for name, _ in entries(doc, "Raises")]
    known = {**vars(builtins), **vars(errors)}
    return [n for n in names if not (isinstance(known.get(n), type) and issubclass(known[n], BaseException))]


def riddles(text: str) -> list[str]:
    """Turns of `RIDDLES` in a text, quoted names and code aside."""
    return [f"{match[0]} -> {plain}" for turn, plain in RIDDLES.items() if (match := re.search(turn, text, re.M))]


def prose(path: Path) -> list[tuple[str, str]]:
    """Every docstring and every block of comments of a file, on one line each, with its place."""
    source = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    texts = [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in nodes]
    for match in re.finditer(r"(?:^ *# .*\n)+", source, re.M):
        texts.append((source.count("\n", 0, match.start()) + 1, re.sub(r"^ *# ", "", match[0], flags=re.M)))
    return [(f"{path.name}:{line}", re.sub(r"\s*\n\s*", " ", text)) for line, text in texts if text]


def every_docstring() -> dict[str, str]:
    """The docstrings of the exported functions and classes, and of their methods, by name."""
    own = {name: inspect.cleandoc(vars(EXPORTED[name]).get("__doc__") or "") for name in CLASSES}
    return {**{name: inspect.getdoc(value) or "" for name, value in callables().items()}, **own}


PACKAGE_FILES = sorted(Path(loratools.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", callables())
def test_every_parameter_is_in_the_docstring(name: str) -> None:
    value = callables()[name]
    parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]  # type: ignore[arg-type]

    assert [entry for entry, _ in entries(inspect.getdoc(value) or "", "Args")] == parameters


@pytest.mark.parametrize("name", callables())
def test_what_is_returned_is_in_the_docstring(name: str) -> None:
    value = callables()[name]
    doc = inspect.getdoc(value) or ""
    parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]  # type: ignore[arg-type]

    # What a method without parameters returns is its first line.
    if str(inspect.unwrap(value).__annotations__["return"]) != "None" and (parameters or "." not in name):  # type: ignore[arg-type]
        assert section(doc, "Returns")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_and_its_errors(name: str) -> None:
    doc = inspect.getdoc(EXPORTED[name]) or ""

    assert ">>> " in section(doc, "Example")
    assert bool(section(doc, "Raises")) == (name not in CANNOT_FAIL)
    assert re.match(r"[A-Z][a-z]+ .*[.,]", doc), "the first line is a sentence"


@pytest.mark.parametrize("name", SHOWN_BY_EXAMPLE)
def test_every_class_that_people_meet_has_an_example(name: str) -> None:
    assert ">>> " in section(inspect.cleandoc(vars(EXPORTED[name])["__doc__"]), "Example")


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_of_a_public_class_is_documented(name: str) -> None:
    cls = EXPORTED[name]

    assert vars(cls).get("__doc__")
    assert [member for member in members(cls) if not documentation(cls, member)] == []


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: path.relative_to(PACKAGE_FILES[0].parent).as_posix())
def test_sections_of_docstrings_are_sentences_and_name_real_errors(path: Path) -> None:
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, DOCUMENTED)]
    docs = [ast.get_docstring(node) or "" for node in nodes]

    assert [fault for doc in docs for fault in unfinished(doc)] == []
    assert [name for doc in docs for name in raised(doc)] == []


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: path.relative_to(PACKAGE_FILES[0].parent).as_posix())
def test_docstrings_and_comments_are_without_riddles(path: Path) -> None:
    assert [(where, fault) for where, text in prose(path) for fault in riddles(text)] == []


@pytest.mark.parametrize(
    "doc",
    [
        "F.\n\nArgs:\n    x: the value.\n",
        "F.\n\nArgs:\n    x: The value\n",
        "F.\n\nRaises:\n    UsageError: there is none.\n",
        "F.\n\nReturns:\n    The sum of\n    all values\n",
        "F.\n\nAttributes:\n    x: The value, which is\n        long\n",
    ],
)
def test_a_section_that_is_no_sentence_is_noticed(doc: str) -> None:
    assert len(unfinished(doc)) == 1


def test_sections_that_are_sentences_pass() -> None:
    doc = """F.

    Args:
        x: `a` or `b`.
        y: float32, or something
            longer.
        **more: (rows, columns).

    Returns:
        The sum.

    Raises:
        UsageError: There is none.
        ValueError: It is negative.
    """

    assert unfinished(inspect.cleandoc(doc)) == []
    assert [name for name, _ in entries(inspect.cleandoc(doc), "Args")] == ["x", "y", "more"]
    assert raised(inspect.cleandoc(doc)) == []
    assert raised("F.\n\nRaises:\n    UseError: There is none.\n    section: It is no error.\n") == [
        "UseError",
        "section",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "All are taken where there is none.",
        "The method, linear where none is given.",
        "The threads; one per CPU where it is None.",
        "What is told on stderr.",
        "The same errors as of `load`.",
        "As `load`, of an open file.",
        "All names, save for experts.",
        "The rank; None of a plan.",
        "What LyCORIS and its like store.",
        "Warnings about the result, a text each.",
    ],
)
def test_each_riddle_is_noticed(text: str) -> None:
    assert len(riddles(text)) == 1


def test_plain_sentences_are_no_riddles() -> None:
    assert (
        riddles(
            "Two dtypes that are told apart by size. None if there is none. As in `load`, the error is no more than 1."
        )
        == []
    )


@pytest.mark.parametrize("name", [n for n, doc in every_docstring().items() if ">>> " in doc])
def test_examples_print_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = every_docstring()[name]
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
