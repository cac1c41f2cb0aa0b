"""Facts about the repository itself: what a clone contains, and that its scripts do what they say."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    files = [ROOT / os.fsdecode(name) for name in names.split(b"\0") if name]
    return [file for file in files if file.is_file()]


def load(path: Path) -> ModuleType:
    """A script of the repository that is in no package, as a module."""
    name = f"loratools_repository_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# What is tracked


def test_no_tracked_file_names_a_folder_of_somebodys_machine(tracked: list[Path]) -> None:
    folders = re.compile(rb"(?<![\w.~-])/(?:%s)/" % b"|".join([b"work", b"root", b"home", b"Users"]))
    found = []
    for file in tracked:
        content = file.read_bytes()
        if b"\0" in content:  # not text
            continue
        found += [
            f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]!r}"
            for number, line in enumerate(content.splitlines(), 1)
            if folders.search(line)
        ]
    assert found == []


def test_fixtures_stay_small(tracked: list[Path]) -> None:
    sizes = {file: file.stat().st_size for file in tracked if ROOT / "fixtures" in file.parents}
    assert sum(sizes.values()) < 12e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_benchmark_data_is_not_tracked(tracked: list[Path]) -> None:
    assert [file for file in tracked if ROOT / "benchmarks" / "data" in file.parents] == []


def test_version_is_in_one_place(tracked: list[Path]) -> None:
    assert "version" in PROJECT["dynamic"]
    assignment = re.compile(r"^(?:__version__|version)\s*(?::\s*\w+\s*)?=\s*[\"']\d", re.MULTILINE)
    sources = [file for file in tracked if file.suffix in {".py", ".toml", ".cfg"}]
    places = [file for file in sources if assignment.search(file.read_text(encoding="utf-8"))]
    assert places == [ROOT / "loratools" / "_version.py"]


def test_license_is_apache_2_verbatim() -> None:
    text = (ROOT / "LICENSE").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PROJECT["license"] == "Apache-2.0"


# What is installed


@pytest.fixture(scope="module")
def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


# Extras for people who work on the package: what they name is imported by tests, or is run.
NOT_OF_THE_PACKAGE = {
    "test": "what the tests import and run with",
    "oracles": "other tools that results are compared with",
    "lint": "programs that read the code",
    "docs": "programs that build the site",
}


def imported_names(folder: Path) -> set[str]:
    """First parts of the names of all modules that the files of a folder import, at the top or in functions."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return names


def modules_of(requirement: str) -> set[str]:
    """Names under which Python imports the package of a requirement; where it is not installed, its own name."""
    name = canonicalize_name(Requirement(requirement).name)
    provided = importlib.metadata.packages_distributions()
    modules = {module for module, owners in provided.items() if name in map(canonicalize_name, owners)}
    return modules or {name.replace("-", "_")}


def unused(groups: dict[str, list[str]], imported: set[str]) -> list[str]:
    return [
        f"{group}: {requirement}"
        for group, requirements in sorted(groups.items())
        if group not in NOT_OF_THE_PACKAGE
        for requirement in requirements
        if not modules_of(requirement) & imported
    ]


def test_every_package_of_an_extra_is_imported_by_code() -> None:
    assert set(NOT_OF_THE_PACKAGE) < set(EXTRAS)
    assert unused(EXTRAS, imported_names(ROOT / "loratools")) == []


def test_an_extra_that_no_code_imports_is_noticed() -> None:
    groups = {"plot": ["matplotlib>=3.8"], "recipes": ["pyyaml>=6"], "lint": ["mypy>=1"]}

    assert unused(groups, {"yaml", "torch"}) == ["plot: matplotlib>=3.8"]


@pytest.mark.parametrize("group", ["dependencies", "test", "oracles", "lint", "docs"])
def test_constraints_pin_everything_that_tests_need(group: str, pins: dict[str, list[Requirement]]) -> None:
    wanted = PROJECT["dependencies"] if group == "dependencies" else EXTRAS[group]
    for requirement in map(Requirement, wanted):
        known = pins.get(canonicalize_name(requirement.name), [])
        assert known, f"{requirement.name} is not in constraints.txt"
        for pin in known:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{pin} is not within {requirement}"


def test_constraints_are_exact_and_leave_one_version_for_every_python(pins: dict[str, list[Requirement]]) -> None:
    for name, known in pins.items():
        for python in ("3.10", "3.11", "3.12", "3.13"):
            applying = [pin for pin in known if pin.marker is None or pin.marker.evaluate({"python_version": python})]
            assert len(applying) <= 1, f"{name}: several versions for Python {python}"
        for pin in known:
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin}: one exact, public version"
            assert pin.url is None


def test_oracles_are_installed_one_by_one_when_not_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load(ROOT / ".ci" / "install_oracles.py")
    declared = [
        "click>=8.1",
        'good>=1; extra == "oracles"',
        'bad[cpu]>=2; sys_platform == "linux" and extra == "oracles"',
        'other; extra == "test"',
    ]
    monkeypatch.setattr(script, "requires", lambda name: declared)
    assert script.oracles() == ["good>=1", 'bad[cpu]>=2; sys_platform == "linux"']

    calls: list[tuple[str, ...]] = []

    def install(*requirements: str) -> bool:
        calls.append(requirements)
        return not any(requirement.startswith("bad") for requirement in requirements)

    monkeypatch.setattr(script, "install", install)
    assert script.main() == 0
    assert calls == [tuple(script.oracles()), *((one,) for one in script.oracles())]
    warning = capsys.readouterr().err
    assert "NOT INSTALLED: bad[cpu]>=2" in warning
    assert "NOT INSTALLED: good" not in warning


# What is typed


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/architecture.md"])
def test_documents_name_only_targets_that_the_makefile_has(page: str) -> None:
    path = ROOT / page
    if not path.exists():
        pytest.skip(f"there is no {page}")
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= make_targets()


def test_makefile_helps_with_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    shown = set(re.findall(r"make ([a-z]+)", text.partition("help:\n")[2].partition("\n\n")[0]))
    assert shown == make_targets() - {"help"}


needs_bash = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="runs a bash script against a stand-in for make"
)


STAGES = ["1-clean-clone", "2-oracles", "3-lint", "4-lowest-versions", "5-every-python", "6-wheel"]


def run_ci(folder: Path, failing: str, *wanted: str) -> tuple[int, list[str]]:
    """Exit code of .ci/run, and the stages that it ran: each a stand-in, of which one may fail."""
    stages = folder / ".ci" / "stages"
    stages.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    log = folder / "log"
    for name in STAGES:
        (stages / f"{name}.sh").write_text(f'echo "{name}" >> "{log}"\n[ "{name}" != "{failing}" ]\n')
    command = ["bash", str(folder / ".ci" / "run"), *wanted]
    done = subprocess.run(command, env={**os.environ, "CI": "true"}, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, log.read_text().split()


def test_ci_has_its_stages_and_they_name_targets_of_the_makefile() -> None:
    files = sorted((ROOT / ".ci" / "stages").iterdir())
    assert [file.stem for file in files] == STAGES
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "\nset -euo pipefail\n" in text
        assert set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= make_targets()


@needs_bash
def test_ci_runs_every_stage_in_order(tmp_path: Path) -> None:
    assert run_ci(tmp_path, "none") == (0, STAGES)


@needs_bash
def test_ci_runs_the_stages_that_are_asked_for_after_the_clone(tmp_path: Path) -> None:
    assert run_ci(tmp_path, "none", "3", "5") == (0, [STAGES[0], STAGES[2], STAGES[4]])


@needs_bash
@pytest.mark.parametrize("stage", STAGES)
def test_ci_ends_with_the_first_stage_that_fails(tmp_path: Path, stage: str) -> None:
    code, stages = run_ci(tmp_path, stage)
    assert code != 0
    assert stages == STAGES[: STAGES.index(stage) + 1]


# What the benchmarks measure with


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    module = load(ROOT / "benchmarks" / "generate.py")
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def tiny(generate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, adapter and both fine-tunes at a toy size."""
    data = tmp_path_factory.mktemp("data")
    for line in (
        "base {}/base --shape tiny",
        "adapter {}/adapter --shape tiny --rank 4",
        "tuned {}/decaying --base {}/base --kind decaying",
        "tuned {}/power --base {}/base --kind power",
    ):
        generate.main(line.format(data, data).split())
    return data


def test_generated_model_is_one_that_transformers_and_peft_load(tiny: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(tiny / "base", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(list((tiny / "base").glob("*.safetensors"))) == 3
    assert model.dtype == torch.bfloat16
    tuned = PeftModel.from_pretrained(model, tiny / "adapter")
    factors = {name: value for name, value in tuned.named_parameters() if ".lora_" in name}
    assert len(factors) == 2 * 7 * 2
    assert all(value.abs().max() > 0 for value in factors.values())
    assert torch.isfinite(tuned(torch.arange(8)[None]).logits).all()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_generated_tensors_do_not_depend_on_the_number_of_layers(
    tiny: Path, generate: ModuleType, tmp_path: Path
) -> None:
    generate.main(["base", str(tmp_path / "base"), "--shape", "tiny", "--layers", "1", "--shards", "1"])
    two, one = read(tiny / "base"), read(tmp_path / "base")
    assert set(one) < set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["decaying", "power"])
def test_generated_delta_is_as_stated(tiny: Path, kind: str, generate: ModuleType) -> None:
    base, tuned = read(tiny / "base"), read(tiny / kind)
    assert set(base) == set(tuned)
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {f"{name}.weight" for name, _, _ in generate.SHAPES["tiny"].linear()}
    stated = generate.spectrum(kind)
    for name in changed:
        delta = tuned[name].double() - base[name].double()
        ratio = torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(base[name].double())
        assert ratio == pytest.approx(stated["rms_delta_over_rms_weight"], rel=0.1)


def test_generated_spectrum_before_storing_is_as_stated(generate: ModuleType) -> None:
    sigma = torch.linalg.svdvals(generate.delta("power", 96, 64, generate.stream(0, "test")).double())
    ranks = torch.arange(1, 65, dtype=torch.float64)
    assert torch.allclose(sigma / sigma[0], ranks**-0.7, rtol=1e-4)

    rows, columns = 600, 500
    sigma = torch.linalg.svdvals(generate.delta("decaying", rows, columns, generate.stream(0, "test")).double())
    decay = torch.exp(-torch.arange(16, dtype=torch.float64) / 16)
    assert torch.allclose(sigma[:16] / sigma[0], decay, rtol=0.03)  # the noise moves them a little
    assert float(sigma.square().sum()) == pytest.approx(rows * columns * generate.DELTA_RMS**2, rel=0.02)


def test_benchmark_scripts_do_not_hide_the_standard_library() -> None:
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert names & set(sys.stdlib_module_names) == set()


def test_measured_memory_is_the_childs(tmp_path: Path) -> None:
    """The harness reports the peak of the child, in bytes, and starts from little itself."""
    if sys.platform == "win32":
        pytest.skip("the benchmarks need os.wait4")
    code = (
        "import json, pathlib, sys; sys.path.insert(0, sys.argv[1]); import _harness as h\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "eat = [sys.executable, '-c', 'held = bytearray(200_000_000)']\n"
        "idle = [sys.executable, '-c', 'pass']\n"
        "log = pathlib.Path(sys.argv[2]) / 'log'\n"
        "print(json.dumps([h.run(h.Side('x', command), log).peak_bytes for command in (eat, idle)]))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    eating, idle = json.loads(done.stdout)
    assert 200e6 < eating < 260e6
    assert idle < 60e6
