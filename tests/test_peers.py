"""Every use of a peer by a test is marked, by the rules of `tests/peers.py`; the walk over the files is held itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).resolve().parent
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROVIDERS = packages_distributions()


def packages_of(requirements: list[str]) -> frozenset[str]:
    """Top-level packages that these requirements install, as Python imports them.

    Of a distribution that is not installed, the name is all that is known; its imports could not run here either.
    """
    distributions = {canonicalize_name(Requirement(line).name) for line in requirements}
    provided = {
        package
        for package, providers in PROVIDERS.items()
        if any(canonicalize_name(provider) in distributions for provider in providers)
    }
    known = {canonicalize_name(provider) for package in provided for provider in PROVIDERS[package]}
    return frozenset(provided | {name.replace("-", "_") for name in distributions - known})


EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DECLARED = packages_of([*PROJECT["dependencies"], *EXTRAS["test"]])
LOCAL = {path.stem for path in TESTS.glob("*.py")} | {path.name for path in TESTS.iterdir() if path.is_dir()}
# Some peers install their tests too, as a package named `tests`.
PEERS = packages_of(EXTRAS["oracles"]) - DECLARED - {"tests"}


# What a file says, read from its syntax tree


@dataclass
class Definition:
    """A function, class or assignment at the top of a file."""

    line: int
    imports: set[str] = field(default_factory=set)  # top-level packages
    names: set[str] = field(default_factory=set)  # everything that is read, and the arguments, which may be fixtures
    marked: set[str] = field(default_factory=set)  # peers in `needs(...)`


@dataclass
class TestFile:
    """One file of the tests."""

    __test__ = False  # for pytest: this is no class of tests

    path: Path
    definitions: dict[str, Definition] = field(default_factory=dict)
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> module, name in it
    imports: dict[str, int] = field(default_factory=dict)  # packages imported at the top -> line
    marked: set[str] = field(default_factory=set)  # by `pytestmark`


def imported(node: ast.AST) -> Iterator[str]:
    """Names of the modules that this one node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and (
        called(node) in {"importorskip", "import_module", "__import__"} or ast.unparse(node.func) == "peers.load"
    ):
        yield from strings(node)


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def strings(node: ast.Call) -> Iterator[str]:
    for argument in node.args:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def top(module: str) -> str:
    return module.partition(".")[0]


def definition(statement: ast.stmt) -> Definition:
    result = Definition(statement.lineno)
    for node in ast.walk(statement):
        result.imports |= {top(module) for module in imported(node)}
        if isinstance(node, ast.Name):
            result.names.add(node.id)
        elif isinstance(node, ast.arg):
            result.names.add(node.arg)
        elif isinstance(node, ast.Call):
            if called(node) == "needs":
                result.marked |= {top(name) for name in strings(node)}
            elif called(node) in {"usefixtures", "getfixturevalue"}:
                result.names |= set(strings(node))
    return result


def read(path: Path) -> TestFile:
    file = TestFile(path)
    for statement in flattened(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for module in imported(statement):
                file.imports.setdefault(top(module), statement.lineno)
            if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                for alias in statement.names:
                    file.sources[alias.asname or alias.name] = (statement.module, alias.name)
            continue
        result = definition(statement)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = {statement.name}
        else:
            nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)} or {f"line {statement.lineno}"}
        if "pytestmark" in names:
            file.marked |= result.marked
        for name in names:
            known = file.definitions.setdefault(name, Definition(statement.lineno))
            known.imports |= result.imports
            known.names |= result.names - names
            known.marked |= result.marked
    return file


def flattened(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top of a file, those under `if` and `try` too, those for type checkers not."""
    for statement in statements:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for _, value in ast.iter_fields(statement):
                for part in value if isinstance(value, list) else []:
                    yield from flattened(part.body if isinstance(part, ast.ExceptHandler) else [part])
        else:
            yield statement


class Walk:
    """Peers that each test of some files reaches, through functions, fixtures and tables, also of other files."""

    def __init__(self, folder: Path, wanted: frozenset[str]) -> None:
        self.folder = folder
        self.wanted = wanted
        self.files = {path: read(path) for path in sorted(folder.rglob("*.py"))}

    def problems(self) -> list[str]:
        result = []
        for path, file in self.files.items():
            where = path.relative_to(self.folder).as_posix()
            for package in sorted(self.wanted & set(file.imports)):
                result.append(f"{where}:{file.imports[package]}: imports {package} at the top: use peers.load")
            for name, (module, _) in file.sources.items():
                if module == "peers":
                    result.append(f"{where}: imports {name} from peers: write peers.{name}")
            for name, part in file.definitions.items():
                for package in sorted(part.marked - self.wanted):
                    result.append(f"{where}:{part.line}: {name} needs {package}, which is no peer")
                if not name.startswith(("test_", "Test")):
                    continue
                for package in sorted(self.reached(path, name) - file.marked):
                    result.append(f"{where}:{part.line}: {name} reaches {package}: mark it with peers.needs")
        return result

    def reached(self, path: Path, name: str, above: frozenset[tuple[Path, str]] = frozenset()) -> frozenset[str]:
        if (path, name) in above:
            return frozenset()
        above |= {(path, name)}
        part = self.files[path].definitions[name]
        result = frozenset(part.imports & self.wanted)
        for other in part.names:
            place = self.place(path, other)
            if place is not None:
                result |= self.reached(*place, above)
        return result - part.marked

    def place(self, path: Path, name: str) -> tuple[Path, str] | None:
        """File and name of what a name in a file refers to; None if it is not of the tests."""
        file = self.files[path]
        if name in file.definitions:
            return path, name
        if name in file.sources:
            module, original = file.sources[name]
            other = self.folder.joinpath(*module.split(".")).with_suffix(".py")
            if other in self.files and original in self.files[other].definitions:
                return other, original
            return None
        for folder in path.parents:  # a fixture
            conftest = folder / "conftest.py"
            if conftest in self.files and name in self.files[conftest].definitions and conftest != path:
                return conftest, name
            if folder == self.folder:
                break
        return None


# What holds


@cache
def walk() -> Walk:
    files = Walk(TESTS, PEERS)
    marked = {name for file in files.files.values() for part in file.definitions.values() for name in part.marked}
    # What a distribution that is not installed calls its packages is not known here: the marks are believed.
    files.wanted |= {name for name in marked if name not in PROVIDERS} if missing() else set()
    return files


def missing() -> set[str]:
    """Distributions of the `oracles` extra that are not installed."""
    installed = {canonicalize_name(name) for providers in PROVIDERS.values() for name in providers}
    return {canonicalize_name(Requirement(line).name) for line in EXTRAS["oracles"]} - installed


def test_every_use_of_a_peer_is_marked() -> None:
    assert walk().problems() == []


def test_everything_that_tests_import_is_declared() -> None:
    allowed = DECLARED | PEERS | set(sys.stdlib_module_names) | LOCAL | {"loratools", "tomllib"} | walk().wanted
    unknown: dict[str, list[str]] = {}
    for path, file in walk().files.items():
        packages = set(file.imports).union(*(part.imports for part in file.definitions.values()))
        for package in packages - allowed:
            unknown.setdefault(package, []).append(path.relative_to(TESTS).as_posix())
    assert unknown == {}, "imported by tests, declared nowhere"


def check(folder: Path, files: Mapping[str, str]) -> list[str]:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [problem.partition(": ")[2] for problem in Walk(folder, frozenset({"gguf", "diffusers"})).problems()]


@pytest.mark.parametrize(
    "text",
    [
        "def test_it():\n    import gguf\n",
        "def test_it():\n    from gguf.quants import quantize\n",
        "def test_it():\n    gguf = pytest.importorskip('gguf')\n",
        "def test_it():\n    gguf = importlib.import_module('gguf.quants')\n",
        "gguf = peers.load('gguf.quants')\ndef test_it():\n    gguf.GGUFReader('x')\n",
        "gguf = peers.load('gguf')\ndef f(): return gguf.quants\nTABLE = {1: f}\ndef test_it(): TABLE[1]()\n",
        "@pytest.fixture\ndef reader():\n    import gguf\ndef test_it(reader): pass\n",
        "@pytest.fixture\ndef reader():\n    import gguf\n@pytest.mark.usefixtures('reader')\ndef test_it(): pass\n",
        "def test_it(from_above): pass\n",
        "from helpers import convert\ndef test_it(): convert()\n",
        "@needs('diffusers')\ndef test_it():\n    import gguf, diffusers\n",
        "class TestIt:\n    def test(self):\n        import gguf\n",
    ],
)
def test_use_without_a_mark_is_seen(tmp_path: Path, text: str) -> None:
    others = {"conftest.py": "def from_above():\n    import gguf\n", "helpers.py": "def convert():\n    import gguf\n"}
    name = "TestIt" if "TestIt" in text else "test_it"
    assert check(tmp_path, others | {"room/test_x.py": text}) == [f"{name} reaches gguf: mark it with peers.needs"]


@pytest.mark.parametrize(
    "text",
    [
        "@needs('gguf')\ndef test_it():\n    import gguf\n",
        "@peers.needs('gguf', 'diffusers')\ndef test_it():\n    import gguf.quants, diffusers\n",
        "pytestmark = needs('gguf')\ngguf = peers.load('gguf')\ndef test_it(): gguf.GGUFReader('x')\n",
        "def f():\n    import gguf\nCASES = [pytest.param(f, marks=needs('gguf')), 2]\ndef test_it(): CASES\n",
        "def unused():\n    import gguf\ndef test_it(): pass\n",
        "from loratools.naming import gguf\ndef test_it(): gguf.names\n",
    ],
)
def test_marked_use_is_fine(tmp_path: Path, text: str) -> None:
    assert check(tmp_path, {"test_x.py": text}) == []


def test_import_of_a_peer_at_the_top_and_mark_of_what_is_no_peer_are_seen(tmp_path: Path) -> None:
    imports = "from peers import load\ntry:\n    import gguf\nexcept ImportError: pass\n"
    text = imports + "@needs('torch')\ndef test_it(): pass\n"
    assert check(tmp_path, {"test_x.py": text}) == [
        "imports gguf at the top: use peers.load",
        "imports load from peers: write peers.load",
        "test_it needs torch, which is no peer",
    ]


INNER = """
import peers
import pytest

absent = peers.load("not_a_package.part")
TABLE = {"one": absent.One, "two": absent.deeper.Two}


@peers.needs("not_a_package.part")
@pytest.mark.parametrize("name", TABLE)
def test_marked(name):
    raise AssertionError("not reached")


def test_through_the_stand_in():
    absent.One()


def test_without():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        ((), "3 tests wait for `make oracles`: 3 for not_a_package"),
        (("-m", "oracle"), "2 tests wait for `make oracles`: 2 for not_a_package"),
        (("-m", "not oracle", "-k", "without"), None),
    ],
)
def test_waiting_tests_are_counted_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], summary: str | None
) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {TESTS}\nmarkers = oracle: as in pyproject.toml\naddopts = --strict-markers\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    if summary is None:
        assert "make oracles" not in done.stdout
    else:
        assert lines[-2] == summary
