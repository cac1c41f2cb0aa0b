"""The inputs of the benchmarks by what they are: made by generate.py the first time, in a process of its own."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from _harness import call


def path(given: Namespace, name: str) -> Path:
    """A file or folder of this run; those of `--tiny` never mix with the real ones."""
    folder: Path = given.data / "tiny" if given.tiny else given.data
    return folder / name


def shape(given: Namespace) -> str:
    return "tiny" if given.tiny else "1.1b"


def base(given: Namespace, layers: int) -> Path:
    out = path(given, f"base-{layers}")
    call("generate.py", "base", out, "--shape", shape(given), "--layers", layers)
    return out


def adapter(given: Namespace, layers: int, rank: int = 16, dtype: str = "float32", seed: int = 1) -> Path:
    out = path(given, f"adapter-{layers}-r{rank}-{dtype}" + (f"-seed{seed}" if seed != 1 else ""))
    size = ("--shape", shape(given), "--layers", layers)
    call("generate.py", "adapter", out, *size, "--rank", rank, "--dtype", dtype, "--seed", seed)
    return out


def tuned(given: Namespace, base: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The folder, and what its spectrum is."""
    out = path(given, f"{base.name.replace('base', 'tuned')}-{kind}")
    return out, call("generate.py", "tuned", out, "--base", base, "--kind", kind)


def nf4(given: Namespace, base: Path) -> Path:
    out = path(given, f"{base.name}-nf4")
    call("generate.py", "nf4", out, "--base", base)
    return out
