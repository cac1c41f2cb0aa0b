# ruff: noqa: PT012 (what happens inside an interrupted block is the subject)
"""An output appears complete or not at all, and nothing that is not ours is ever removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loratools.errors import MachineError, OutputExistsError, UsageError
from loratools.storage import system
from loratools.storage.commit import Replacement, check_output, staged_file, staged_folder
from loratools.storage.ownership import MARK, RECORD, owned_files, write_record
from loratools.storage.safetensors_writer import write_safetensors
from loratools.storage.staging_names import process_space


@pytest.fixture(params=["exchange", "rename aside"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "rename aside":
        monkeypatch.setattr(system, "exchange", lambda *_: False)
    return str(request.param)


def written(folder: Path, text: str) -> None:
    """A folder as loratools leaves it."""
    folder.mkdir(exist_ok=True)
    fill(folder, text)
    write_record(folder)


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "model.safetensors").write_text(text)


def content(path: Path) -> object:
    if path.is_dir():
        return {child.name: content(child) for child in path.iterdir() if child.name != RECORD}
    return path.read_text() if path.exists() else None


def complete(text: str) -> dict:
    return {"config.json": text, "sub": {"model.safetensors": text}}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_folder_appears_complete_with_its_parents(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / "deep" / "out", overwrite=False, inputs=()) as staging:
        fill(staging, "new")
        assert not (tmp_path / "new" / "deep" / "out").exists()

    assert content(tmp_path) == {"new": {"deep": {"out": complete("new")}}}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    for staged in (staged_folder, staged_file):
        with pytest.raises(error), staged(tmp_path / "new" / "out", overwrite=False, inputs=()) as staging:
            (staging / "x" if staged is staged_folder else staging).write_text("half")
            raise error
        assert content(tmp_path) == {}


def test_failed_block_leaves_the_old_output(tmp_path: Path) -> None:
    written(tmp_path / "out", "old")

    with (
        pytest.raises(ZeroDivisionError),
        staged_folder(tmp_path / "out", overwrite=True, inputs=()) as staging,
    ):
        fill(staging, "new")
        raise ZeroDivisionError

    assert content(tmp_path) == {"out": complete("old")}


@pytest.mark.usefixtures("swap")
def test_overwrite_replaces_all_that_loratools_wrote(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    (tmp_path / "out" / "stale.safetensors").touch()
    written(tmp_path / "out", "old")

    with staged_folder(tmp_path / "out", overwrite=True, inputs=()) as staging:
        fill(staging, "new")
        assert (tmp_path / "out" / "stale.safetensors").exists()

    assert content(tmp_path) == {"out": complete("new")}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.usefixtures("swap")
def test_overwrite_keeps_what_others_wrote_and_the_very_same_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out, "old")
    (out / "notes.txt").write_text("mine")
    (out / "sub" / "mine.txt").write_text("mine too")
    (out / "checkpoint-500" / "deep").mkdir(parents=True)
    (out / "checkpoint-500" / "adapter_model.safetensors").write_text("precious")
    (out / "checkpoint-500" / "deep" / "link").symlink_to("nowhere")
    (out / "empty").mkdir(mode=0o710)
    inode = (out / "notes.txt").stat().st_ino

    assert check_output(out, overwrite=True, inputs=()) == Replacement(
        ("config.json", RECORD, "sub/model.safetensors"),
        ("checkpoint-500/", "empty/", "notes.txt", "sub/mine.txt"),
    )
    with staged_folder(out, overwrite=True, inputs=()) as staging:
        fill(staging, "new")
        (out / "at-the-last-moment.txt").write_text("mine as well")

    assert content(out / "sub") == {"model.safetensors": "new", "mine.txt": "mine too"}
    assert (out / "config.json").read_text() == "new"
    assert (out / "notes.txt").stat().st_ino == inode
    assert (out / "at-the-last-moment.txt").read_text() == "mine as well"
    assert (out / "checkpoint-500" / "adapter_model.safetensors").read_text() == "precious"
    assert (out / "checkpoint-500" / "deep" / "link").readlink() == Path("nowhere")
    assert (out / "empty").stat().st_mode & 0o777 == 0o710
    assert hidden(tmp_path) == []


def test_what_others_wrote_is_never_removed_though_it_came_after_the_last_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written(out, "old")
    exchange = system.exchange

    def late(first: Path, second: Path) -> bool:
        (second / "sub" / "late.txt").write_text("mine")
        return exchange(first, second)

    monkeypatch.setattr(system, "exchange", late)
    with staged_folder(out, overwrite=True, inputs=()) as staging:
        fill(staging, "new")

    assert content(out / "sub") == {"model.safetensors": "new", "late.txt": "mine"}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["config.json", "sub"])
def test_new_file_under_the_name_of_a_foreign_one_is_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    written(out, "old")
    if name == "config.json":
        (out / name).write_text("edited by a person")
    else:
        for path in (out / "sub" / "model.safetensors", out / "sub"):
            path.unlink() if path.is_file() else path.rmdir()
        (out / "sub").write_text("a file where a folder must be")
    before = content(out)

    with pytest.raises(OutputExistsError) as early:
        check_output(out, overwrite=True, inputs=(), names=["config.json", "sub/model.safetensors"])
    assert early.value.details == (name,)
    with pytest.raises(OutputExistsError) as caught, staged_folder(out, overwrite=True, inputs=()) as staging:
        fill(staging, "new")

    assert caught.value.exit_code == 2
    assert caught.value.details == (name,)
    assert content(out) == before
    assert hidden(tmp_path) == []


def test_foreign_files_that_cannot_be_kept_refuse_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    written(tmp_path / "out", "old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr(system, "hard_link_unfollowed", refuse)
    with (
        pytest.raises(OutputExistsError, match="cannot keep") as caught,
        staged_folder(tmp_path / "out", overwrite=True, inputs=()) as staging,
    ):
        fill(staging, "new")

    assert caught.value.details == ("notes.txt",)
    assert content(tmp_path) == {"out": {**complete("old"), "notes.txt": "mine"}}


def test_removed_staging_folder_is_the_error(tmp_path: Path) -> None:
    for error in (None, FileNotFoundError("gone"), RuntimeError("a consequence")):
        with (
            pytest.raises(MachineError, match="removed meanwhile"),
            staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging,
        ):
            shutil.rmtree(staging)
            staging.mkdir()
            fill(staging, "half")
            if error is not None:
                raise error
    with (
        pytest.raises(MachineError, match="removed meanwhile"),
        staged_file(tmp_path / "out", overwrite=False, inputs=()) as staged,
    ):
        staged.write_text("x")
        staged.unlink()

    assert not (tmp_path / "out").exists()


def test_empty_folder_that_cannot_be_renamed_is_filled_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.setattr(system, "is_mount_point", lambda path: path == out)
    renamed: list[str] = []
    rename = system.rename
    monkeypatch.setattr(system, "rename", lambda a, b: (renamed.append(b.name), rename(a, b)))

    with pytest.raises(ZeroDivisionError), staged_folder(out, overwrite=False, inputs=()) as staging:
        fill(staging, "half")
        raise ZeroDivisionError
    assert list(out.iterdir()) == []
    with staged_folder(out, overwrite=False, inputs=()) as staging:
        fill(staging, "new")
        (staging / "model.safetensors.index.json").write_text("{}")

    assert {**complete("new"), "model.safetensors.index.json": "{}"} == content(out)
    assert renamed == ["config.json", "sub", "model.safetensors.index.json", RECORD]
    assert out.stat().st_ino == inode
    assert hidden(tmp_path) == []
    with pytest.raises(UsageError, match="mount point"):
        check_output(out, overwrite=True, inputs=())


def test_single_file_is_replaced_only_where_it_says_that_loratools_wrote_it(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write_safetensors(out, {"x": torch.ones(3)}, {"format": "pt"})
    with pytest.raises(OutputExistsError, match="not written by loratools"):
        check_output(out, overwrite=True, inputs=())
    write_safetensors(out, {"x": torch.ones(3)}, {MARK: "0.1"})

    assert check_output(out, overwrite=True, inputs=()) == Replacement(("out.safetensors",))
    with staged_file(out, overwrite=True, inputs=()) as staged:
        staged.write_text("new")
    assert out.read_text() == "new"


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "out", "old")
    monkeypatch.setattr(system, "exchange", lambda *_: False)
    real, calls = system.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(system, "rename", second_fails)
    with pytest.raises(MachineError), staged_folder(tmp_path / "out", overwrite=True, inputs=()) as staging:
        fill(staging, "new")

    assert content(tmp_path) == {"out": complete("old")}


def test_run_killed_between_two_renames_is_repaired_by_the_next(tmp_path: Path) -> None:
    aside = tmp_path / f".out.loratools-old-{dead_process()}-{process_space()}00000000"
    aside.mkdir()
    fill(aside, "old")

    with pytest.raises(OutputExistsError), staged_folder(tmp_path / "out", overwrite=False, inputs=()):
        pass

    assert content(tmp_path) == {"out": complete("old")}


def test_file_output_appears_complete_and_keeps_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_safetensors(tmp_path / "elsewhere" / "target", {}, {MARK: "0.1"})
    (tmp_path / "elsewhere" / "target").chmod(0o640)
    (tmp_path / "link").symlink_to("elsewhere/target")

    with staged_file(tmp_path / "link", overwrite=True, inputs=()) as staged:
        staged.write_text("new")
    with staged_file(tmp_path / "fresh", overwrite=False, inputs=()) as staged:
        staged.write_text("fresh")

    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path) == {"elsewhere": {"target": "new"}, "link": "new", "fresh": "fresh"}
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o640


def test_existing_outputs_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {}, {MARK: "0.1"})
    written(tmp_path / "folder", "old")
    (tmp_path / "empty").mkdir()

    for name in ("file", "folder"):
        with pytest.raises(OutputExistsError) as caught:
            check_output(tmp_path / name, overwrite=False, inputs=())
        assert caught.value.exit_code == 2
        assert caught.value.hint is not None
        assert "--overwrite" in caught.value.hint
        check_output(tmp_path / name, overwrite=True, inputs=())
    check_output(tmp_path / "empty", overwrite=False, inputs=())
    check_output(tmp_path / "missing" / "deep", overwrite=False, inputs=())
    with staged_folder(tmp_path / "empty", overwrite=False, inputs=()) as staging:
        fill(staging, "new")
    assert content(tmp_path / "empty") == complete("new")


def test_file_in_the_way_of_a_folder_is_refused_and_vice_versa(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {}, {MARK: "0.1"})
    (tmp_path / "folder").mkdir()

    with pytest.raises(UsageError, match="is a file"), staged_folder(tmp_path / "file", overwrite=True, inputs=()):
        pass
    with pytest.raises(UsageError, match="is a folder"), staged_file(tmp_path / "folder", overwrite=True, inputs=()):
        pass
    with pytest.raises(UsageError, match="no folder"):
        check_output(tmp_path / "file" / "deeper" / "out", overwrite=False, inputs=())


@pytest.mark.parametrize("names", [["notes.txt", "photos"], ["config.json", "src"], ["model.safetensors", ".git"]])
@pytest.mark.parametrize("record", [None, "not JSON", '{"loratools": "0.1"}', '{"files": {"config.json": {}}}'])
def test_folder_without_our_record_is_never_replaced(tmp_path: Path, names: list[str], record: str | None) -> None:
    for name in names:
        (tmp_path / "home" / name).mkdir(parents=True)
    if record is not None:
        (tmp_path / "home" / RECORD).write_text(record)

    with pytest.raises(OutputExistsError, match="no record"):
        check_output(tmp_path / "home", overwrite=True, inputs=())


def test_output_that_is_holds_or_lies_in_an_input_is_always_refused(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "model.safetensors").touch()
    (tmp_path / "models" / "config.json").touch()
    os.link(base / "model.safetensors", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(base)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "models" / "base" / "model.safetensors")
    file = base / "model.safetensors"

    for out, given in [
        (base, base),
        (file, file),
        (tmp_path / "hard", file),
        (tmp_path / "soft", base),
        (base, tmp_path / "soft"),
        (base / "merged", base),
        (tmp_path / "soft" / "deep" / "merged", base),
        (tmp_path / "models", base),
        (tmp_path / "models", file),
        (base / ".." / "base", base),
        (tmp_path / "snapshot", tmp_path / "snapshot" / "model.safetensors"),
    ]:
        with pytest.raises(OutputExistsError, match="input"):
            check_output(out, overwrite=True, inputs=[tmp_path / "other", given])
    check_output(base / "next-to-it.safetensors", overwrite=False, inputs=[file])
    check_output(tmp_path / "merged", overwrite=False, inputs=[base, file, tmp_path / "soft"])


def test_devices_and_fifos_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null"), Path("/")):
        with pytest.raises(UsageError):
            check_output(path, overwrite=True, inputs=())
    for staged in (staged_file, staged_folder):
        with pytest.raises(UsageError), staged(tmp_path / "fifo", overwrite=True, inputs=()):
            pass
    assert (tmp_path / "fifo").is_fifo()


def test_output_written_by_another_run_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputExistsError, match="another run"),
        staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging,
    ):
        fill(staging, "second")
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "first")
    with (
        pytest.raises(OutputExistsError, match="another run"),
        staged_file(tmp_path / "file", overwrite=False, inputs=()) as staged,
    ):
        staged.write_text("second")
        (tmp_path / "file").write_text("first")

    assert content(tmp_path) == {"out": complete("first"), "file": "first"}


def test_file_output_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(system, "hard_link", refuse)
    with staged_file(tmp_path / "x", overwrite=False, inputs=()) as staged:
        staged.write_text("new")
    with pytest.raises(OutputExistsError), staged_file(tmp_path / "y", overwrite=False, inputs=()) as staged:
        staged.write_text("second")
        (tmp_path / "y").write_text("first")

    assert content(tmp_path) == {"x": "new", "y": "first"}


def test_only_orphans_of_dead_owners_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, dead = process_space(), dead_process()
    orphan = tmp_path / f".out.loratools-{dead}-{space}00000000"
    kept = [
        tmp_path / f".out.loratools-{os.getppid()}-{space}00000000",  # its owner lives
        tmp_path / f".out.loratools-{dead}-0000000000000000",  # of another machine or container
        tmp_path / f".other.loratools-{dead}-{space}00000000",  # of another output
        tmp_path / ".out.loratools-backup",  # a person's
        tmp_path / f".out.loratools-{dead}-{space}11111111",  # locked, whatever its process id says
    ]
    for path in (orphan, *kept):
        path.mkdir()
        (path / "half").touch()
    lock = system.lock_folder(kept[-1])

    with staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging:
        assert not orphan.exists()
        fill(staging, "new")

    assert all(path.exists() for path in kept)
    assert lock is not None
    os.close(lock)


def test_long_names_leave_room_for_the_staging_folder(tmp_path: Path) -> None:
    name = "ä" * 120 + ".safetensors"
    with staged_file(tmp_path / name, overwrite=False, inputs=()) as staged:
        staged.write_text("new")

    assert content(tmp_path) == {name: "new"}
    with pytest.raises(UsageError), staged_file(tmp_path / ("x" * 300), overwrite=False, inputs=()) as staged:
        staged.write_text("new")
    assert content(tmp_path) == {name: "new"}


def test_parallel_runs_to_one_output_have_one_winner(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    results: list[str] = []

    def run(text: str) -> None:
        try:
            with staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging:
                fill(staging, text)
                barrier.wait()
            results.append(text)
        except OutputExistsError:
            results.append("beaten")

    threads = [threading.Thread(target=run, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    winners = [text for text in results if text != "beaten"]
    assert len(results) == 6
    assert len(winners) == 1
    assert content(tmp_path) == {"out": complete(winners[0])}


def test_everything_is_flushed_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)
            if name not in ("fsync", "rename"):
                return real

            def record(*args: object) -> object:
                what = str(Path(f"/proc/self/fd/{args[0]}").readlink()) if name == "fsync" else str(args[1])
                events.append(f"{name} {Path(what).name if '.loratools' not in Path(what).name else 'staging'}")
                return real(*args)

            return record

    with staged_folder(tmp_path / "out", overwrite=False, inputs=()) as staging:
        fill(staging, "new")
        monkeypatch.setattr(system, "os", Recorder())

    assert [event for event in events if event != f"fsync {RECORD}"] == [
        "fsync config.json", "fsync model.safetensors", "fsync sub", "fsync staging", "rename out",
        f"fsync {tmp_path.name}",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_hidden_is_left(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "orphans" not in request.node.name:
        assert hidden(tmp_path) == []


def test_file_that_was_changed_to_the_same_size_is_no_longer_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"ours")
    (tmp_path / "README.md").write_bytes(b"ours too")
    write_record(tmp_path)

    (tmp_path / "config.json").write_bytes(b"mine")

    assert owned_files(tmp_path) == {"README.md", RECORD}
