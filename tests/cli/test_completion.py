"""Completion in shells: what the program offers, and bash itself with what `loratools completion bash` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import CliRunner

from loratools import registry
from loratools.cli import verbs


def offered(words: list[str], folder: Path) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = {
        **os.environ,
        "COMP_WORDS": " ".join(["loratools", *words]),
        "COMP_CWORD": str(len(words)),
        "_LORATOOLS_COMPLETE": "bash_complete",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "loratools"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mer"], ["plain,merge"]),
        (["merge", "bas"], ["file,bas"]),
        (["merge", "base", "adap"], ["file,adap"]),
        (["merge", "base", "adapter", "-o", "out"], ["file,out"]),
        (["merge", "--dtype", "b"], ["plain,bfloat16"]),
        (["combine", "--method", "tie"], ["plain,ties"]),
        (["convert", "--to", "ml"], ["plain,mlx"]),
        (["inspect", "--from", "koh"], ["plain,kohya"]),
        (["merge", "--rank-from", "t"], ["plain,tensors"]),
        (["extract", "--noi"], ["plain,--noise-edge"]),
        (["extract", "--device", "cp"], ["plain,cpu"]),
        (["methods", "tie"], ["plain,ties"]),
        (["help", "res"], ["plain,resize"]),
        (["completion", "f"], ["plain,fish"]),
    ],
)
def test_completion_offers(words: list[str], expected: list[str], tmp_path: Path) -> None:
    assert offered(words, tmp_path) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_asks_the_program(shell: str) -> None:
    done = CliRunner().invoke(verbs, ["completion", shell])

    assert (done.exit_code, done.stderr) == (0, "")
    assert f"_LORATOOLS_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    script = CliRunner().invoke(verbs, ["completion", "bash"]).stdout
    program = tmp_path / "loratools"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
    program.chmod(0o755)
    lines = [
        script,
        "COMP_WORDS=(loratools combine --method peft-); COMP_CWORD=3",
        "_loratools_completion loratools",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=True
    )

    assert sorted(done.stdout.split()) == [name for name in registry.names("methods") if name.startswith("peft-")]
