"""What README.md and docs/ say is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from loratools import registry
from loratools.cli import verbs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(name: str) -> click.Command:
    found = verbs.get_command(click.Context(verbs), name)
    assert found is not None
    return found


def sessions() -> list[tuple[str, str]]:
    """Every command of the README's first session with the output that is shown below it."""
    first = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert first is not None
    return [
        (c.strip(), output.strip("\n")) for c, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", first[1], re.M)
    ]


def told(text: str) -> str:
    """Without what differs from run to run, and what a processor's rounding decides; no blanks at the ends of lines."""
    text = re.sub(r"in [\d.]+ s", "in N s", text)
    text = re.sub(r"(?<=^gain     ).*|(?<=^checked  ).*", lambda m: re.sub(r"[\d.]+", "N", m[0]), text, flags=re.M)
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


@pytest.mark.parametrize(("line", "shown"), sessions())
def test_the_session_at_the_top_of_the_readme_prints_what_it_shows(line: str, shown: str, tmp_path: Path) -> None:
    if not (ROOT / "fixtures" / "llama-tiny").exists():
        pytest.skip("the fixtures are not here")
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    words = line.split()
    assert words[0] == "loratools"

    # As in a pipe with no width given, and whatever the machine's language.
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LANG", "LC_ALL")} | {"PYTHONUTF8": "1"}

    run = subprocess.run(
        [sys.executable, "-m", "loratools", *words[1:]], cwd=tmp_path, capture_output=True, encoding="utf-8", env=env
    )

    assert told(run.stdout + run.stderr) == told(shown)


def commands_in(text: str) -> list[str]:
    """The arguments of every command, of sessions (`$ loratools ...`) and of tables and sentences."""
    commands = re.findall(r"^\$ loratools (.*)$", text, re.M) + re.findall(r"`loratools ([a-z]+ -?[^`\n]*)`", text)
    return list(dict.fromkeys(line.partition(" # ")[0].strip() for line in commands))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("page", "line"), [(page.name, line) for page in PAGES for line in commands_in(page.read_text(encoding="utf-8"))]
)
def test_every_command_on_a_page_uses_options_that_exist(page: str, line: str) -> None:
    words = line.split("|")[0].split()
    known = {option for p in command(words[0]).params for option in [*p.opts, *p.secondary_opts]}

    assert {w.partition("=")[0] for w in words if w.startswith("-")} <= known


@pytest.mark.parametrize("name", verbs.list_commands(click.Context(verbs)))
def test_every_verb_is_in_the_readme_and_has_help_with_an_example(name: str) -> None:
    assert re.search(rf"^### .*\b{name}\b", README, re.M)
    assert "Example" in (command(name).help or "")


@pytest.mark.parametrize("folder", ["formats", "methods", "checkpoints", "updates", "quantization"])
def test_every_entry_of_a_registry_has_a_summary(folder: str) -> None:
    for name in registry.names(folder):
        assert registry.summary(folder, name), name


def test_generated_parts_are_up_to_date() -> None:
    run = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)

    assert run.returncode == 0, run.stdout + run.stderr


def ours(text: str) -> list[str]:
    """Words of messages of loratools that have an entry in the page on troubleshooting."""
    section = text.partition("## Messages of loratools")[2]
    return [
        words for heading in re.findall(r"^### (.*)$", section, re.M) for words in re.findall(r"`([^`]+)`", heading)
    ]


def test_messages_that_are_explained_are_messages_of_loratools() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "loratools").rglob("*.py")))
    explained = ours((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))

    assert len(explained) > 3
    assert [words for words in explained if words not in source] == []
    assert "no message says this" not in source


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {name for block in re.findall(r"```{toctree}\n(.*?)```", contents, re.DOTALL) for name in block.split()}

    assert {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"} <= listed


def test_files_that_the_documents_name_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text))

    missing = [n for n in named if not any((ROOT / top / n).exists() for top in ("", "loratools", "loratools/formats"))]
    assert missing == []
