"""Reports as HTML: complete, self-contained, escaped, and written by the rules of every output."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import peers
import pytest
from cli_runner import CliRunner
from page_samples import BASE, DIALOGUE, FIXTURES, HOSTILE, REPORTS, SCIENCE, SHAKESPEARE, hostile_list

import loratools
from loratools.cli import verbs
from loratools.errors import OutputExistsError, UsageError
from loratools.ops.listing.rows import ListedAdapter, ListReport
from loratools.pages.parts.dispatch import PAGES

TINY = FIXTURES / "bert-tiny"
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", str(SCIENCE)],
    "list": ["list", str(FIXTURES / "llama-tiny-science"), "--no-cache"],
    "spectrum": ["spectrum", str(SCIENCE)],
    "compare": ["compare", str(SCIENCE), str(DIALOGUE)],
    "compare of three": ["compare", str(SCIENCE), str(DIALOGUE), str(SHAKESPEARE)],
    "combine": ["combine", str(SCIENCE), str(DIALOGUE), "-o", "{out}"],
    "combine --plan": ["combine", str(SCIENCE), str(DIALOGUE), "-o", "{out}", "--plan"],
    "combine of methods": ["combine", str(SCIENCE), str(DIALOGUE), "-o", "{out}", "--plan", "--method", "linear,slerp"],
    "extract": ["extract", str(TINY), f"{TINY}-tuned", "-o", "{out}", "--rank", "4"],
    "merge": ["merge", str(BASE), str(SCIENCE), "-o", "{out}"],
    "merge --plan": ["merge", str(BASE), str(SCIENCE), "-o", "{out}", "--plan"],
    "verify --files": ["verify", "{merged}", "--files"],
    "verify": ["verify", "{merged}", "--base", str(BASE), str(SCIENCE)],
    "check": ["check", str(FIXTURES / "bert-tiny-sentiment")],
}
# Verbs that compute with torch.
COMPUTING = {"spectrum", "compare", "combine", "extract", "check"}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def page_of(report: object, folder: Path) -> str:
    loratools.write_page(report, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    loratools.merge(BASE, [SCIENCE], out)
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_verb_writes_a_page_with_its_command_and_versions(command: str, tmp_path: Path, merged: Path) -> None:
    arguments = [part.format(out=tmp_path / "out", merged=merged) for part in COMMANDS[command]]
    if arguments[0] in COMPUTING:
        import torch  # noqa: F401

    done = CliRunner().invoke(verbs, [*arguments, "--html", str(tmp_path / "page.html")])

    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<pre><code>loratools {arguments[0]} " in text
    assert f"by loratools {loratools.__version__}, Python {sys.version.split()[0]}" in text
    assert not Elements(text).open
    assert "<tbody>" in text


@pytest.mark.parametrize("kind", REPORTS)
def test_page_is_whole_and_names_nothing_outside_of_itself(kind: str, tmp_path: Path) -> None:
    report = REPORTS[kind](tmp_path)
    assert type(report).__name__ == kind

    elements = Elements(page_of(report, tmp_path))

    assert not elements.open
    addresses = [
        value
        for _, attributes in elements.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "style")
    ]
    assert addresses == ["data:,"]


@pytest.mark.parametrize("kind", REPORTS)
def test_rows_of_every_report_are_in_its_page(kind: str, tmp_path: Path) -> None:
    report = REPORTS[kind](tmp_path)
    rows = getattr(report, "rows", list)()

    cells = set(Elements(page_of(report, tmp_path)).cells)

    names = {str(row.get("name", row.get("method", row.get("path", row.get("first"))))) for row in rows}
    assert {name for name in names if not any(name.endswith(cell) for cell in cells if cell)} == set()


def test_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else(tmp_path: Path) -> None:
    text = page_of(REPORTS["AdapterEntry"](tmp_path), tmp_path)

    def hash_of(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = dict(Elements(text).tags[3][1])["content"]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hash_of('script')}'; style-src 'sha256-{hash_of('style')}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_is_text_in_page_and_fragment(name: str, tmp_path: Path) -> None:
    report = ListReport(adapters=(ListedAdapter(path=name, title=name, base_model=name, error=name),))

    for text in (page_of(report, tmp_path), report._repr_html_()):
        assert text is not None
        elements = Elements(text)
        assert not elements.open
        assert {tag for tag, _ in elements.tags} <= {
            *("html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h3", "bdi", "main", "dl"),
            *("div", "dt", "dd", "ul", "li", "strong", "table", "caption", "span", "thead", "tr", "th", "tbody", "td"),
            *("footer", "p", "time", "script"),
        }
        assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)


def test_hostile_command_is_text_and_has_no_password(tmp_path: Path) -> None:
    from loratools.pages.parts.about import about
    from loratools.pages.parts.contents import Contents
    from loratools.pages.parts.rendering import page

    text = page(Contents("title"), about(["inspect", "<script>1</script>", "https://me:secret@host/x"]))

    assert "<script>1" not in text
    assert "secret" not in text
    assert "https://…@host/x" in text


def test_date_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "951782400")  # 29 February 2000, midnight UTC
    report = REPORTS["AdapterEntry"](tmp_path)

    loratools.write_page(report, tmp_path / "first.html")
    loratools.write_page(report, tmp_path / "second.html")

    assert 'Made on <time datetime="2000-02-29">' in (tmp_path / "first.html").read_text(encoding="utf-8")
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_page_replaces_a_page_with_overwrite_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    loratools.write_page(loratools.inspect(SCIENCE), page)

    with pytest.raises(OutputExistsError, match=r"'.*page.html' exists"):
        loratools.write_page(loratools.inspect(DIALOGUE), page)
    assert "llama-tiny-science" in page.read_text(encoding="utf-8")

    loratools.write_page(loratools.inspect(DIALOGUE), page, overwrite=True)
    assert "llama-tiny-dialogue" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("content", ["", "<!doctype html><title>mine</title>", "loratools.version"])
def test_page_of_somebody_else_is_never_replaced(content: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(content, encoding="utf-8")

    with pytest.raises(OutputExistsError, match="was not written by loratools"):
        loratools.write_page(loratools.inspect(SCIENCE), page, overwrite=True)
    assert page.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("name", ["page", "page.txt", "page.safetensors"])
def test_page_with_another_name_is_refused_with_the_right_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the name of a page") as refused:
        loratools.write_page(loratools.inspect(SCIENCE), tmp_path / name)

    assert refused.value.hint == f"write {name}.html"


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a dict has no page"):
        loratools.write_page({"a": 1}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_page_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine", encoding="utf-8")
    command = ["merge", str(BASE), str(SCIENCE), "-o", str(tmp_path / "out")]

    done = CliRunner().invoke(verbs, [*command, "--html", str(tmp_path / "page.html")])

    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_page_inside_of_the_output_is_refused(tmp_path: Path) -> None:
    command = ["merge", str(BASE), str(SCIENCE), "-o", str(tmp_path / "out")]

    done = CliRunner().invoke(verbs, [*command, "--html", str(tmp_path / "out" / "page.html")])

    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "lies in the output" in done.stderr
    assert "hint: write the page beside it" in done.stderr


def test_page_of_findings_is_written_before_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")

    done = CliRunner().invoke(verbs, ["check", str(tmp_path), "--html", str(tmp_path / "page.html")])

    assert done.exit_code == 1
    assert "broken.safetensors" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_document_stays_alone_on_stdout_beside_a_page(tmp_path: Path) -> None:
    plain = CliRunner().invoke(verbs, ["inspect", str(SCIENCE), "--json"])
    beside = CliRunner().invoke(verbs, ["inspect", str(SCIENCE), "--json", "--html", str(tmp_path / "page.html")])

    assert (beside.exit_code, beside.stdout, beside.stderr) == (0, plain.stdout, "")


def test_missing_jinja2_is_named_before_the_work(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from loratools.cli import verbs\n"
        f"verbs.main(['inspect', {str(SCIENCE)!r}, '--html', {str(tmp_path / 'page.html')!r}])\n"
    )

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "error: jinja2 is not installed\nhint: pip install jinja2\n"
    without = "import sys; sys.modules['jinja2'] = None\nimport loratools\n"
    without += f"print(loratools.load({str(SCIENCE)!r})._repr_html_())"
    printed = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, timeout=60).stdout
    assert printed == "None\n"


def test_jinja2_is_imported_for_a_page_alone() -> None:
    probe = (
        "import sys\nfrom loratools.cli import verbs\n"
        f"try: verbs.main(['inspect', {str(SCIENCE)!r}, '--json'])\n"
        "except SystemExit: pass\n"
        "print('jinja2' in sys.modules, 'loratools.pages' in sys.modules, file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)

    assert done.stderr == "False False\n"


def test_long_table_is_cut_with_a_count_in_a_notebook() -> None:
    html = hostile_list(1_000)._repr_html_()

    assert html is not None
    assert html.count("<tr>") == 1 + 200
    assert f"… and {len(HOSTILE) + 1_000 - 200:,} rows more, which <code>rows()</code> has." in html


def test_every_report_and_the_adapter_have_a_fragment(tmp_path: Path) -> None:
    for kind, make in REPORTS.items():
        (tmp_path / kind).mkdir()
        html = make(tmp_path / kind)._repr_html_()  # type: ignore[attr-defined]

        assert html.startswith('<div class="loratools">'), kind
        assert "<script" not in html
        assert not Elements(html).open


def test_every_public_report_has_a_page() -> None:
    reports = {name for name in loratools.__all__ if name.endswith("Report")} - {"CleanReport"}

    assert reports <= set(PAGES)
    assert set(PAGES) <= {*loratools.__all__}
    assert set(REPORTS) - {"Adapter"} == set(PAGES) - {"FailedEntry"}


@peers.needs("pandas", "polars")
@pytest.mark.parametrize("kind", [kind for kind in REPORTS if kind not in ("Adapter", "MergePlan")])
def test_rows_make_a_data_frame(kind: str, tmp_path: Path) -> None:
    import pandas
    import polars

    rows: list[dict[str, object]] = REPORTS[kind](tmp_path).rows()  # type: ignore[attr-defined]

    frame = pandas.DataFrame(rows)
    assert polars.DataFrame(rows).shape == frame.shape

    assert len(frame) == len(rows) > 0
    assert list(frame.columns) == list(dict.fromkeys(key for row in rows for key in row))
