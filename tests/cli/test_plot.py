"""`--plot`: the picture of a report as a file, by the rules of every output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peers
import pytest

pytest.importorskip("torch", reason="the reports are computed with it")

import factories
from cli_runner import CliRunner

import loratools
from loratools.cli import verbs

COMMANDS = {
    "inspect": ["inspect", "a", "--values"],
    "spectrum": ["spectrum", "a"],
    "compare": ["compare", "a", "b"],
    "compare-three": ["compare", "a", "b", "c"],
    "combine": ["combine", "a", "b", "-o", "out", "--plan", "--rank", "2"],
    "methods": ["combine", "a", "b", "--plan", "--rank", "2", "--method", "linear,ties"],
}
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 3), ("b", 4), ("c", 5)):
        factories.adapter_folder(tmp_path / name, seed=seed)
    return tmp_path


@peers.needs("matplotlib")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("suffix", MAGIC)
def test_picture_is_written_and_named_and_the_rest_is_printed_as_without_it(
    adapters: Path, command: list[str], suffix: str
) -> None:
    alone = CliRunner().invoke(verbs, command)
    with_picture = CliRunner().invoke(verbs, [*command, "--plot", f"p{suffix}"])

    assert with_picture.exit_code == 0, with_picture.stderr
    assert (adapters / f"p{suffix}").read_bytes().startswith(MAGIC[suffix])
    assert f"picture  p{suffix}" in with_picture.stderr
    if "--method" not in command:  # whose table has times
        assert with_picture.stdout == alone.stdout


@peers.needs("matplotlib")
def test_nothing_is_said_of_the_picture_where_silence_is_asked_for(adapters: Path) -> None:
    done = CliRunner().invoke(verbs, ["spectrum", "a", "--plot", "p.svg", "--json", "-q"])

    assert json.loads(done.stdout)["verb"] == "spectrum"
    assert done.stderr == ""
    assert (adapters / "p.svg").exists()


@peers.needs("matplotlib")
@pytest.mark.parametrize("suffix", MAGIC)
def test_overwrite_replaces_pictures_of_loratools_and_no_others(adapters: Path, suffix: str) -> None:
    picture = adapters / f"p{suffix}"
    command = ["spectrum", "a", "--plot", picture.name]
    CliRunner().invoke(verbs, command)
    first = picture.read_bytes()

    again = CliRunner().invoke(verbs, command)
    replaced = CliRunner().invoke(verbs, ["spectrum", "b", "--plot", picture.name, "--overwrite"])
    second = picture.read_bytes()
    picture.write_bytes(MAGIC[suffix] + b" of somebody else")
    foreign = CliRunner().invoke(verbs, [*command, "--overwrite"])

    assert (again.exit_code, replaced.exit_code, foreign.exit_code) == (2, 0, 2)
    assert "--overwrite" in again.stderr
    assert second != first
    assert "was not written by loratools" in foreign.stderr
    assert picture.read_bytes() == MAGIC[suffix] + b" of somebody else"


@peers.needs("matplotlib")
def test_a_picture_in_an_adapter_and_one_of_an_unknown_kind_are_refused_before_any_work(adapters: Path) -> None:
    inside = CliRunner().invoke(verbs, ["spectrum", "a", "--plot", "a/p.svg"])
    kind = CliRunner().invoke(verbs, ["spectrum", "a", "--plot", "p.jpg"])

    assert (inside.exit_code, kind.exit_code) == (2, 2)
    assert "lies in the input" in inside.stderr
    assert ".png, .svg, .pdf" in kind.stderr
    assert sorted(path.name for path in adapters.iterdir()) == ["a", "b", "c"]


def test_without_matplotlib_the_error_names_what_to_install(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    done = CliRunner().invoke(verbs, ["spectrum", "a", "--plot", "p.svg"])

    assert done.exit_code == 4
    assert "hint: pip install 'loratools[plot]'" in done.stderr
    assert not (adapters / "p.svg").exists()
    with pytest.raises(loratools.UnsupportedError, match="matplotlib"):
        loratools.spectrum("a").plot()


@peers.needs("matplotlib")
def test_inspect_without_values_has_nothing_to_draw(adapters: Path) -> None:
    done = CliRunner().invoke(verbs, ["inspect", "a", "--plot", "p.svg"])

    assert done.exit_code == 2
    assert "hint: add --values" in done.stderr


@peers.needs("matplotlib")
def test_a_source_without_numbers_by_module_is_bad_input_and_nothing_is_written(adapters: Path) -> None:
    factories.checkpoint_folder(adapters / "base")

    done = CliRunner().invoke(verbs, ["inspect", "base", "--values", "--plot", "p.svg"])

    assert done.exit_code == 4
    assert "nothing to draw" in done.stderr
    assert not (adapters / "p.svg").exists()


@peers.needs("matplotlib")
def test_plot_of_a_report_is_a_figure_with_a_panel_for_each_chart(adapters: Path) -> None:
    from matplotlib.figure import Figure

    reports = (
        loratools.inspect("a", values=True),
        loratools.inspect("a", values=True).sources[0],
        loratools.spectrum("a"),
        loratools.compare("a", "b"),
        loratools.compare("a", "b", "c"),
        loratools.combine(["a", "b"], "out", rank=2, plan=True),
    )

    for report in reports:
        drawn = report.plot()  # type: ignore[union-attr]
        assert isinstance(drawn, Figure)
        titles = {axes.get_title(loc="left").replace("\n", " ") for axes in drawn.axes}
        assert {chart.title for chart in report.charts()} <= titles  # type: ignore[union-attr]
