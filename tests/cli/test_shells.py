"""Completion in the shells themselves: bash, zsh and fish with what `loratools completion SHELL` prints.

Bash and zsh are asked on a terminal, as by a person who presses the tab key; fish has a command for it.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import CliRunner

from loratools import registry
from loratools.cli import verbs

# What a person has typed, and every word that the shell must offer for the last one.
CASES = {
    "verbs": ("loratools com", {"combine", "compare", "completion"}),
    "options": ("loratools merge --max-", {"--max-shard-size"}),
    "choices": ("loratools merge --rounding a", {"adapter"}),
    "methods": (
        "loratools combine --method peft-",
        {name for name in registry.names("methods") if name.startswith("peft-")},
    ),
    "formats": ("loratools convert --to m", {"mlx"}),
    "dtypes": ("loratools merge --dtype f", {"float16", "float32", "float64"}),
    "file names": ("loratools inspect my-ad", {"my-adapter.safetensors"}),
}
SECONDS = 60
# What a terminal is told besides text.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|[\x07\r]")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program `loratools` that is the one that is tested."""
    folder = tmp_path_factory.mktemp("bin")
    path = folder / "loratools"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
    path.chmod(0o755)
    return folder


@pytest.fixture
def environment(program: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "my-adapter.safetensors").write_bytes(b"")
    return {
        **os.environ,
        "PATH": f"{program}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "home"),
        "XDG_DATA_HOME": str(tmp_path / "home"),
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
    }


def script_of(shell: str, environment: dict[str, str]) -> Path:
    """The file with the script, in a folder of its own: its name must not be among what is offered."""
    folder = Path(environment["HOME"])
    folder.mkdir(exist_ok=True)
    path = folder / f"script.{shell}"
    path.write_text(CliRunner().invoke(verbs, ["completion", shell]).stdout)
    return path


def offered_by_bash(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    """What bash shows on a terminal after a press of the tab key."""
    settings = [
        *(
            f"bind 'set {setting}'"
            for setting in ("show-all-if-ambiguous on", "page-completions off", "bell-style none")
        ),
        "bind 'set completion-query-items 1000'",
        "bind 'set enable-bracketed-paste off'",
        f"source {script_of('bash', environment)}",
        "PS1='READY> '",
    ]
    start = Path(environment["HOME"]) / "bashrc"
    start.write_text("\n".join(settings) + "\n")
    return _shown(["bash", "--noprofile", "--rcfile", str(start), "-i"], line, folder, environment)


def offered_by_fish(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    command = f"source {script_of('fish', environment)}; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", command],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    # Behind a tab stands what a word means.
    return {row.partition("\t")[0] for row in done.stdout.splitlines()}


def offered_by_zsh(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    """What zsh shows on a terminal after a press of the tab key."""
    settings = [
        "autoload -Uz compinit",
        "compinit -u -D",
        f"source {script_of('zsh', environment)}",
        "LISTMAX=1000",
        "PROMPT='READY> '",
        "setopt auto_list no_list_ambiguous no_beep no_prompt_cr no_prompt_sp",
    ]
    (Path(environment["HOME"]) / ".zshrc").write_text("\n".join(settings) + "\n")
    return _shown(["zsh", "-i"], line, folder, {**environment, "ZDOTDIR": environment["HOME"]})


def _shown(command: list[str], line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    """The words on the terminal of a shell in which a person has typed the line and pressed the tab key."""
    import pty  # which Windows does not have

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, {**environment, "COLUMNS": "200"})
    try:
        _read_until(terminal, lambda text: "READY> " in text)
        os.write(terminal, f"{line}\t".encode())
        shown = _read_until(terminal, lambda text: all(word in text for word in _words_wanted(line)))
    finally:
        os.kill(process, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(process, 0)
    return set(_CONTROL.sub(" ", shown).split())


def _words_wanted(line: str) -> set[str]:
    return next(words for typed, words in CASES.values() if typed == line)


def _read_until(terminal: int, enough: Callable[[str], bool]) -> str:
    """What the terminal shows, until it is enough, or nothing more is to be expected."""
    shown = ""
    end = time.monotonic() + SECONDS
    while not enough(shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                shown += os.read(terminal, 4096).decode(errors="replace")
            except OSError:
                break
    return shown


SHELLS = {"bash": offered_by_bash, "zsh": offered_by_zsh, "fish": offered_by_fish}


@pytest.mark.skipif(os.name != "posix", reason="these shells are those of Unix")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_offers(shell: str, case: str, tmp_path: Path, environment: dict[str, str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    line, wanted = CASES[case]

    offered = SHELLS[shell](line, tmp_path, environment)

    assert wanted <= offered
    if shell == "fish":  # on a terminal there is more, such as what was typed
        assert {word for word in offered if word.startswith(line.rpartition(" ")[2])} == wanted
