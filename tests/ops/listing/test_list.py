"""list: every adapter below a folder is a row, everything else is counted with the reason why not."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click.testing
import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import formats
from loratools.cli import verbs
from loratools.errors import UsageError
from loratools.formats.common.source import open_source
from loratools.ops.listing import catalogue, verb
from loratools.ops.listing.alike import _OF_FORMATS, KnownRows, outline_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalogue of each test is a file of its own, and never that of the person who runs the tests."""
    path = tmp_path / "cache" / "adapters.sqlite"
    monkeypatch.setattr(catalogue, "default_path", lambda: path)
    monkeypatch.setattr("loratools.ops.listing.verb.default_path", lambda: path)
    return path


def kohya_file(path: Path, *, rank: int = 3, scale: float = 1.0, metadata: dict[str, str] | None = None) -> Path:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, 768, generator=generator),
        f"{name}.lora_up.weight": torch.randn(640, rank, generator=generator) * scale,
        f"{name}.alpha": torch.tensor(float(rank)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata or {})
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    factories.adapter_folder(folder / "chat", rank=4, alpha=8)
    kohya_file(
        folder / "image" / "ink.safetensors",
        metadata={
            "modelspec.title": "Ink wash",
            "modelspec.trigger_phrase": "inkw, wash",
            "modelspec.date": "2024-08-02",
        },
    )
    kohya_file(folder / "image" / "bold.safetensors", rank=5)
    factories.checkpoint_folder(folder / "model")
    (folder / "image" / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 half")
    (folder / "image" / "readme.txt").write_text("nothing to list")
    return folder


def names(report: loratools.ListReport) -> list[str]:
    return [adapter.name for adapter in report.adapters]


def invoke(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(verbs, ["list", *map(str, arguments)], env={"COLUMNS": "160"})


def test_every_adapter_is_a_row_and_a_broken_file_is_one_with_its_error(library: Path) -> None:
    report = loratools.list_adapters(library)

    assert sorted(names(report)) == ["bold.safetensors", "broken.safetensors", "chat", "ink.safetensors"]
    rows = {adapter.name: adapter for adapter in report.adapters}
    chat = rows["chat"]
    assert (chat.format, chat.kind, chat.modules, chat.rank, chat.alpha, chat.scale) == ("peft", "lora", 4, 4, 8.0, 2.0)
    assert chat.parameters == sum(4 * (out + into) for out, into in factories.MODULES.values())
    ink = rows["ink.safetensors"]
    assert (ink.title, ink.trigger_words, ink.date, ink.rank) == ("Ink wash", ("inkw", "wash"), "2024-08-02", 3)
    assert ink.bytes == (library / "image" / "ink.safetensors").stat().st_size
    broken = rows["broken.safetensors"].error
    assert broken is not None
    assert rows["broken.safetensors"].rank is None
    assert [(Path(other.path).name, other.what) for other in report.others] == [("model", "huggingface checkpoint")]


def test_conditions_and_order(library: Path) -> None:
    report = loratools.list_adapters(library, where="rank >= 4", sort="-rank")
    assert names(report) == ["bold.safetensors", "chat"]
    assert report.hidden == 2
    assert names(loratools.list_adapters(library, where="title", sort="title")) == ["ink.safetensors"]
    # What has no rank comes last, whichever way it is sorted.
    assert names(loratools.list_adapters(library, sort="rank"))[-1] == "broken.safetensors"
    assert names(loratools.list_adapters(library, sort="-rank"))[-1] == "broken.safetensors"


def test_what_did_not_change_is_not_read_again(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loratools.list_adapters(library)

    def refuse(*arguments: object, **options: object) -> Any:
        raise AssertionError("a file was read that has not changed")

    with monkeypatch.context() as patched:
        patched.setattr("loratools.formats.load", refuse)
        assert loratools.list_adapters(library).to_dict() == first.to_dict()
        with pytest.raises(AssertionError):
            loratools.list_adapters(library, cache=False)


def test_what_changed_is_read_again(library: Path) -> None:
    loratools.list_adapters(library)
    kohya_file(library / "image" / "bold.safetensors", rank=7)
    rows = {adapter.name: adapter.rank for adapter in loratools.list_adapters(library).adapters}
    assert rows["bold.safetensors"] == 7


def test_a_changed_config_of_a_folder_is_seen(library: Path) -> None:
    loratools.list_adapters(library)
    path = library / "chat" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 40}))
    rows = {adapter.name: adapter.scale for adapter in loratools.list_adapters(library).adapters}
    assert rows["chat"] == 10.0


@pytest.mark.parametrize("damage", ["garbage", "other table", "folder", "wrong rows"])
def test_a_damaged_catalogue_is_no_hindrance(library: Path, own_cache: Path, damage: str) -> None:
    expected = loratools.list_adapters(library, cache=False).to_dict()
    loratools.list_adapters(library)
    if damage == "wrong rows":
        with sqlite3.connect(own_cache) as connection:
            connection.execute("UPDATE adapters SET body = '[1]'")
    else:
        own_cache.unlink()
        if damage == "garbage":
            own_cache.write_bytes(b"no database" * 100)
        elif damage == "folder":
            own_cache.mkdir()
        else:
            with sqlite3.connect(own_cache) as connection:
                connection.execute("CREATE TABLE adapters (other INTEGER)")
    assert loratools.list_adapters(library).to_dict() == expected


def test_a_row_is_found_by_where_the_file_is_and_shown_as_it_was_given(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratools.list_adapters(library)
    monkeypatch.chdir(library)
    assert {a.path for a in loratools.list_adapters("image", where="not error").adapters} == {
        str(Path("image") / "ink.safetensors"),
        str(Path("image") / "bold.safetensors"),
    }


def test_a_file_that_is_linked_to_is_one_row(library: Path) -> None:
    other = library / "copies"
    other.mkdir()
    try:
        (other / "linked.safetensors").symlink_to(library / "image" / "ink.safetensors")
    except OSError:
        pytest.skip("this system makes no links for this person")
    report = loratools.list_adapters(library, where="not error")
    assert len(report.adapters) == 3
    assert any(other.what.startswith("the same file as") for other in report.others)


def test_duplicates_are_found_by_bytes_and_on_request_by_values(library: Path) -> None:
    image = library / "image"
    (image / "copy.safetensors").write_bytes((image / "bold.safetensors").read_bytes())
    # The same update: names of another format, alpha baked into B, half precision.
    stored = load_file(image / "ink.safetensors")
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    spelled = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = stored[f"{name}.lora_down.weight"], stored[f"{name}.lora_up.weight"]
    save_file(
        {f"{spelled}.lora_A.weight": (2 * down).half(), f"{spelled}.lora_B.weight": (up / 2).half()},
        image / "renamed.safetensors",
    )
    # Another update of nearly the same size.
    save_file(
        {f"{spelled}.lora_A.weight": down.roll(1, dims=1).clone(), f"{spelled}.lora_B.weight": up.clone()},
        image / "other.safetensors",
    )

    by_file = loratools.list_adapters(library, duplicates=True).duplicates
    by_values = loratools.list_adapters(library, duplicates=True, values=True).duplicates

    found = {(group.how, tuple(Path(path).name for path in group.paths)) for group in by_values}
    assert [(g.how, [Path(p).name for p in g.paths]) for g in by_file] == [
        ("file", ["bold.safetensors", "copy.safetensors"])
    ]
    assert found == {
        ("file", ("bold.safetensors", "copy.safetensors")),
        ("values", ("ink.safetensors", "renamed.safetensors")),
    }


def test_adapters_whose_values_tell_nothing_are_named(library: Path) -> None:
    name = "base_model.model.{}.lora_magnitude_vector"
    magnitudes = {name.format(module): torch.ones(rows) for module, (rows, _) in factories.MODULES.items()}
    factories.adapter_folder(library / "dora", extra=magnitudes, config={"use_dora": True})

    report = loratools.list_adapters(library, duplicates=True, values=True)

    assert report.not_compared == (str(library / "dora"),)
    assert loratools.list_adapters(library, duplicates=True).not_compared == ()
    shown = invoke(library, "--duplicates", "--values", "-v")
    assert "1 adapter not compared by values: updates that depend on a base" in shown.stderr
    assert str(library / "dora") in shown.stderr


def hub_repository(cache: Path, name: str, revisions: list[str]) -> Path:
    """A repository with an adapter in the hub's cache, whose revisions have the same files."""
    repository = cache / f"models--{name.replace('/', '--')}"
    source = factories.adapter_folder(cache / "made", rank=4)
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(source.iterdir()):
        blob = repository / "blobs" / f"{len(file.name):064x}"
        file.rename(blob)
        for revision in revisions:
            link = repository / "snapshots" / revision / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:
                pytest.skip("this system makes no links for this person")
    source.rmdir()
    return repository


def test_the_cache_of_the_hub_is_listed_by_repository_and_revision_and_each_blob_once(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    hub_repository(cache, "ink/wash", ["a" * 40])
    repository = hub_repository(cache, "owner/chat-lora", ["0f3a9" + "b" * 35, "1c2d3" + "b" * 35])

    report = loratools.list_adapters(cache)

    rows = {(adapter.name, adapter.revision) for adapter in report.adapters}
    assert rows == {("ink/wash", "a" * 40), ("owner/chat-lora", "0f3a9" + "b" * 35)}
    second = str(repository / "snapshots" / ("1c2d3" + "b" * 35))
    assert [other.path for other in report.others] == [second]
    assert report.others[0].what.startswith("the same file as")
    shown = invoke(cache, "--columns", "name,revision").stdout
    assert [line.split() for line in shown.splitlines()[2:]] == [
        ["ink/wash", "aaaaaaaa"],
        ["owner/chat-lora", "0f3a9bbb"],
    ]
    assert {row["revision"] for row in json.loads(invoke(cache, "--json").stdout)["adapters"]} == {r for _, r in rows}


def test_an_adapter_that_names_no_base_is_said_to_be_shaped_like_published_models(tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.self_attn.k_proj": (512, 2048) for i in range(16)}
    factories.adapter_folder(tmp_path / "unnamed", modules=modules, config={"base_model_name_or_path": "/data/model"})
    factories.adapter_folder(tmp_path / "named", modules=modules, config={"base_model_name_or_path": "someone/model"})

    families = {adapter.name: adapter.family for adapter in loratools.list_adapters(tmp_path).adapters}

    assert families == {"unnamed": "Llama-3.2-1B-shaped", "named": None}
    assert names(loratools.list_adapters(tmp_path, where="family ~ 'llama-3.2-1b*'")) == ["unnamed"]


def test_files_of_one_trainer_have_the_rows_that_each_has_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are taken over from files with the same tensors: what differs from file to file must be each one's own."""
    said = [
        {},
        {"modelspec.title": "Ink wash", "modelspec.trigger_phrase": "inkw", "ss_steps": "1200"},
        {"modelspec.title": "Bold", "ss_base_model_version": "sd_v1"},
        {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.date": "2024-08-02"},
        {"modelspec.title": "Häufig \U0001f58c", "software": "of its own"},
    ]
    files = [kohya_file(tmp_path / f"{i}.safetensors", metadata=metadata) for i, metadata in enumerate(said)]
    # The same tensors with another alpha, and with another number that is not finite.
    for name, alpha in (("other-alpha", 1.5), ("no-alpha", 0.0), ("infinite", float("inf"))):
        tensors = load_file(files[0])
        tensors = {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    alone = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        monkeypatch.setattr(verb, "_known_rows", KnownRows())
        (alone[path.name],) = loratools.list_adapters(path, cache=False).adapters

    for _ in range(2):  # the second time every row is known
        report = loratools.list_adapters(tmp_path, cache=False, threads=1)
        assert {adapter.name: adapter for adapter in report.adapters} == alone
    assert alone["other-alpha.safetensors"].alpha == 1.5
    assert alone["infinite.safetensors"].error is not None
    assert [alone[f"{i}.safetensors"].title for i in range(5)] == [None, "Ink wash", "Bold", None, "Häufig \U0001f58c"]


def test_formats_read_no_metadata_that_tells_rows_apart_unseen(tmp_path: Path) -> None:
    """What a format reads of a header must be in what files are compared by, or it is what people are told alone."""
    path = kohya_file(
        tmp_path / "a.safetensors",
        metadata={"ss_base_model_version": "sd_v1", "ss_tag_frequency": "{}", "modelspec.title": "a", "other": "b"},
    )
    read: set[str] = set()

    class Recorded(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    source = open_source(path)
    source = dataclasses.replace(source, metadata=Recorded(source.metadata))
    formats.load_source(source)

    outline = outline_of(path)
    assert outline is not None
    compared = {key for key, _ in outline.key[2]}
    assert "ss_base_model_version" in read
    assert {key for key in read if key in source.metadata} <= compared
    assert {key for key in read if key.startswith(("ss_", "sshs_", "modelspec."))} <= _OF_FORMATS


def test_two_lists_at_once_fill_one_catalogue(library: Path, own_cache: Path) -> None:
    expected = loratools.list_adapters(library, cache=False).to_dict()
    with ThreadPoolExecutor(4) as threads:
        reports = list(threads.map(lambda _: loratools.list_adapters(library).to_dict(), range(8)))

    assert all(report == expected for report in reports)
    with sqlite3.connect(own_cache) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        paths = {path for (path,) in connection.execute("SELECT path FROM adapters")}
    assert {Path(path).name for path in paths} == {"chat", "ink.safetensors", "bold.safetensors", "model"}


def test_without_a_catalogue_nothing_is_written(library: Path, own_cache: Path) -> None:
    loratools.list_adapters(library, cache=False)
    assert invoke(library, "--no-cache").exit_code == 0
    assert not own_cache.parent.exists()


def test_processes_and_threads_give_the_same(library: Path) -> None:
    one = loratools.list_adapters(library, cache=False, threads=1).to_dict()
    assert loratools.list_adapters(library, cache=False, threads=3, execution="forked").to_dict() == one
    assert loratools.list_adapters(library, cache=False, threads=3).to_dict() == one


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((), {}, "no folder"),
        (("nowhere",), {}, "does not exist"),
        (("fixtures",), {"sort": "size"}, "no column 'size'"),
        (("fixtures",), {"values": True}, "duplicates"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loratools.list_adapters(*arguments, **options)


def test_the_command_prints_a_table_and_counts_the_rest(library: Path) -> None:
    shown = invoke(library)
    assert shown.exit_code == 0, shown.stderr
    assert "Ink wash" in shown.stdout
    assert "inkw, wash" in shown.stdout
    assert "cannot be read" in shown.stdout
    assert "broken.safetensors" in shown.stderr
    assert "huggingface checkpoint (1)" in shown.stderr
    assert str(library / "model") not in shown.stderr
    assert str(library / "model") in invoke(library, "-v").stderr


def test_json_has_the_fields_of_the_contract(library: Path) -> None:
    body = json.loads(invoke(library, "--json").stdout)
    assert body["verb"] == "list"
    wanted = {
        "path", "format", "kind", "family", "base_model", "modules", "rank", "alpha", "scale", "dtype", "parameters",
        "bytes", "title", "trigger_words", "modified", "warnings", "error",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in body["adapters"])
    assert [set(other) for other in body["others"]] == [{"path", "what"}]


def test_csv_can_be_read_back(library: Path) -> None:
    shown = invoke(library, "--csv", "--where", "title")
    (row,) = csv.DictReader(io.StringIO(shown.stdout))
    assert (row["title"], row["trigger_words"], row["rank"]) == ("Ink wash", "inkw; wash", "3")


def test_columns_are_chosen_and_named_wrongly_with_a_hint(library: Path) -> None:
    shown = invoke(library, "--columns", "name,rank", "--sort", "rank", "--where", "rank")
    assert [line.split() for line in shown.stdout.splitlines()[2:]] == [
        ["ink.safetensors", "3"], ["chat", "4"], ["bold.safetensors", "5"],
    ]  # fmt: skip
    wrong = invoke(library, "--columns", "name,size")
    assert wrong.exit_code == 2
    assert "no column 'size'" in wrong.stderr


def test_names_of_strangers_are_escaped(tmp_path: Path) -> None:
    kohya_file(tmp_path / "a.safetensors", metadata={"modelspec.title": "\x1b[31mred"})
    kohya_file(tmp_path / "b.safetensors", metadata={"modelspec.title": "[bold]"})
    shown = invoke(tmp_path)
    assert "\x1b[31m" not in shown.stdout
    assert "[bold]" in shown.stdout


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_a_row_with_the_reason(library: Path) -> None:
    path = library / "image" / "bold.safetensors"
    path.chmod(0)
    rows = {adapter.name: adapter.error for adapter in loratools.list_adapters(library).adapters}
    assert rows["bold.safetensors"]
