"""The sink: what goes where, and what it looks like without colours, without a terminal, in ASCII."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.table import Table

from loratools.cli.common.output import Output, ascii_only, console, print_rich


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal_as_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called in the test itself: pytest sets stderr anew after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_document_spells_what_is_not_finite_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    Output("inspect").document({"norms": [1.0, float("nan"), float("inf")], "name": "\x1b\u202e"})

    told = capsys.readouterr().out
    assert json.loads(told) == {
        "loratools": "0.1.0",
        "schema_version": 1,
        "verb": "inspect",
        "norms": [1.0, None, None],
        "name": "\x1b\u202e",
    }
    assert told.isascii()
    assert told.endswith("}\n")
    assert "\x1b" not in told


def test_data_goes_to_stdout_and_what_is_for_people_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("merge", verbose=True)

    output.table("table")
    output.summary("summary")
    output.explain("explained")
    output.warn("be warned")

    told = capsys.readouterr()
    assert told.out == "table\n"
    assert told.err == "summary\nexplained\nwarning: be warned\n"


def test_quiet_leaves_only_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("merge", quiet=True, verbose=True)

    output.table("table")
    output.summary("summary")
    output.explain("explained")
    output.warn("be warned")

    told = capsys.readouterr()
    assert (told.out, told.err) == ("table\n", "")


def test_explanations_are_told_with_v_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Output("merge").explain("explained")

    assert capsys.readouterr().err == ""


def test_what_is_said_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Output("merge").warn("'\x1b[31m[red]x[/red]'")

    assert capsys.readouterr().err == "warning: '\\x1b[31m[red]x[/red]'\n"


def test_markup_in_a_name_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    Output("inspect").table("[bold]name[/bold] :smile: 12 'x'")

    assert capsys.readouterr().out == "[bold]name[/bold] :smile: 12 'x'\n"


def test_label_is_coloured_on_a_terminal_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    Output("merge").warn("careful")
    monkeypatch.setenv("NO_COLOR", "1")
    Output("merge").warn("careful")

    assert terminal.getvalue() == "\x1b[33m\x1b[1mwarning:\x1b[0m careful\nwarning: careful\n"


def test_no_color_takes_the_colours_out_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    table = Table("name", header_style="red")
    table.add_row("x", style="green")

    print_rich(terminal, table)

    assert "\x1b[3" not in terminal.getvalue()


def test_table_in_ascii_has_the_same_width() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    table = Table("shape")
    table.add_row("4096×11008 · 0.1–0.2 …")

    print_rich(stream, table)
    stream.flush()

    lines = stream.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert "4096x11008 . 0.1-0.2 ~" in lines[3]
    assert len({len(line) for line in lines if line}) == 1


def test_our_characters_keep_their_width_in_ascii() -> None:
    assert ascii_only("4096×11008 · 0.1–0.2 → … ≈ — │─╭╮╰╯") == "4096x11008 . 0.1-0.2 > ~ ~ - |-++++"


def test_pipe_has_no_width_and_a_terminal_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    assert console(terminal).width == 80
    monkeypatch.delenv("COLUMNS")
    assert console(io.StringIO()).width == 1000


def test_progress_is_none_where_nobody_looks() -> None:
    with Output("merge").progress(100, "merging") as advance:
        assert advance is None


@pytest.mark.parametrize(("quiet", "term"), [(True, "xterm"), (False, "dumb")])
def test_progress_is_none_when_quiet_or_on_a_dumb_terminal(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, term: str
) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    monkeypatch.setenv("TERM", term)

    with Output("merge", quiet=quiet).progress(100, "merging") as advance:
        assert advance is None
    assert terminal.getvalue() == ""


def test_progress_on_a_terminal_shows_bytes_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stderr(monkeypatch)
    with Output("merge").progress(2_000_000, "merging [x]") as advance:
        assert advance is not None
        advance(500_000)
        advance(1_500_000)

    assert "merging [x]" in terminal.getvalue()
    assert "2.0/2.0 MB" in terminal.getvalue()
