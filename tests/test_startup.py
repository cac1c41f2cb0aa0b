"""`loratools inspect FILE` reads headers: what costs tens of milliseconds to import is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import factories
import pytest

HEAVY = {"numpy", "torch", "safetensors", "rich.progress", "importlib.metadata"}
HEAVY |= {"huggingface_hub", "httpx", "httpx2", "requests"}

_PROBE = """
import sys
{before}
from loratools.cli import verbs
try:
    verbs.main({args!r})
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


def heavy_imports_of(args: list[str], before: str = "") -> list[str]:
    """Which of HEAVY a fresh process has imported after `loratools ARGS`."""
    probe = _PROBE.format(args=args, heavy=HEAVY, before=before)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout
    return done.stderr.splitlines()[-1].removeprefix("imported:").split()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.adapter_folder(tmp_path_factory.mktemp("startup") / "adapter")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.checkpoint_folder(tmp_path_factory.mktemp("startup") / "base", shards=2)


@pytest.mark.parametrize("flags", [[], ["--json"], ["--modules"]])
def test_inspect_imports_no_torch_or_numpy(adapter: Path, flags: list[str]) -> None:
    assert heavy_imports_of(["inspect", str(adapter), *flags]) == []


def test_inspect_of_a_checkpoint_imports_no_torch_or_numpy(checkpoint: Path) -> None:
    assert heavy_imports_of(["inspect", str(checkpoint)]) == []


@pytest.mark.parametrize(
    "name", ["bitsandbytes-nf4-nested-bfloat16", "compressed-int4-asymmetric-64", "hqq-4-axis1", "model.gguf"]
)
def test_inspect_of_a_quantised_model_imports_no_torch_or_numpy(name: str) -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "quantised"
    assert heavy_imports_of(["inspect", str(fixtures / name)]) == []


@pytest.mark.parametrize("file", ["adapter.gguf", "adapters.npz"])
def test_inspect_of_other_containers_imports_no_torch_or_numpy(file: str, tmp_path: Path) -> None:
    import numpy as np
    import torch

    from loratools.storage.gguf_writer import write_gguf
    from loratools.tensors.lazy import from_torch

    if file == "adapters.npz":
        np.savez(tmp_path / file, **{"q.lora_a": np.ones((6, 4)), "q.lora_b": np.ones((4, 10))})
    else:
        pair = {f"blk.0.ffn_up.weight.lora_{part}": from_torch(torch.ones(4, 4)) for part in "ab"}
        kind = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
        write_gguf(tmp_path / file, kind, pair)

    assert heavy_imports_of(["inspect", str(tmp_path / file)]) == []


@pytest.mark.parametrize("args", [["--help"], ["inspect", "--help"], ["formats"], ["methods"], ["--version"]])
def test_help_and_lists_import_no_torch_or_numpy(args: list[str]) -> None:
    assert heavy_imports_of(args) == []


def test_startup_test_can_fail(adapter: Path) -> None:
    assert heavy_imports_of(["inspect", str(adapter)], before="import numpy") == ["numpy"]
    assert "torch" in heavy_imports_of(["inspect", str(adapter), "--values"])


def test_importing_the_package_imports_nothing_else() -> None:
    probe = "import sys; before = set(sys.modules); import loratools; print(*sorted(set(sys.modules) - before))"

    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {probe}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert done.stdout.split() == ["__future__", "loratools"]
