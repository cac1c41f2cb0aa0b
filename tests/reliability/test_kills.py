"""Killed at any call to the system, or at any time: an old output or a new one, and `--resume` ends it right."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import factories
import pytest
import torch
from reliability.kill_jobs import JOBS, killed_at_calls, killed_at_times, write_inputs
from reliability.killing import AtOnce, content, killed_at

import loratools
from loratools.ops.common import resumable_work
from loratools.ops.merge import writing
from loratools.storage import files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes and kills them")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("inputs")
    modules = factories.layered(2, {"self_attn.q_proj": (10, 6)})
    factories.checkpoint_folder(at / "base", weights=factories.base_weights(modules), shards=2)
    factories.adapter_folder(at / "style", modules=modules, rank=2)
    loratools.merge(at / "base", at / "style", at / "whole")
    files.close_inputs()
    return at


@pytest.fixture(autouse=True)
def one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the n-th call of each run is the same one; and work is kept of adapters that are as small as these."""
    monkeypatch.setattr(writing, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(resumable_work, "WORTH_KEEPING_BYTES", 0)


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
def test_a_merge_killed_at_any_call_is_resumed_to_the_same_bytes(inputs: Path, tmp_path: Path, old: bool) -> None:
    whole = content(inputs / "whole")
    loratools.merge(inputs / "base", [(inputs / "style", 0.5)], tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("a person's")
    before = content(tmp_path / "old") if old else None
    assert isinstance(whole, dict)
    after = {**whole, "notes.txt": b"a person's"} if old else whole
    place = tmp_path / "place"
    resumed = placed = 0
    # Every third call, before and after it in turns; of an output that is replaced every ninth.
    for n in range(1, 2000, 9 if old else 3):
        place.mkdir()
        if old:
            shutil.copytree(tmp_path / "old", place / "out")

        def job(resume: bool = False) -> loratools.MergeReport:
            return loratools.merge(
                inputs / "base", inputs / "style", place / "out", threads=1, overwrite=old, resume=resume
            )

        killed = killed_at(n, job, after=n % 2 == 1)
        now = content(place / "out")
        assert now in (before, after), n
        if now == before:
            report = job(resume=True)
            resumed += any("was resumed" in warning for warning in report.warnings)
        else:
            placed += killed
            loratools.clean(place)
        assert content(place / "out") == after, n
        # What was killed before its folder had a name that tells whose it is may be there: it is empty.
        loratools.clean(place)
        assert [path.name for path in place.iterdir()] == ["out"], n
        shutil.rmtree(place)
        files.close_inputs()
        if not killed:
            break
    else:
        pytest.fail("no run came to its end")
    assert resumed > 3
    assert placed > 0


def test_a_merge_killed_at_random_times_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """The command line with its workers, in processes of their own; again and again until it is done."""
    modules = factories.layered(12, {"mlp.up_proj": (900, 400)})
    factories.checkpoint_folder(
        tmp_path / "base", weights=factories.base_weights(modules, dtype=torch.bfloat16), shards=3
    )
    factories.adapter_folder(tmp_path / "style", modules=modules)
    command = [sys.executable, "-m", "loratools", "merge", "base", "style", "-q", "--threads", "2", "-o"]
    began = time.perf_counter()
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True)
    length = time.perf_counter() - began
    times = random.Random(5)

    for _ in range(4):
        process = subprocess.Popen([*command, "out", "--resume"], cwd=tmp_path, stderr=subprocess.PIPE)
        time.sleep(times.uniform(0.3, 1.05) * length)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.2)  # its workers see that it is gone
        assert content(tmp_path / "out") in (None, content(tmp_path / "whole"))
        if process.returncode == 0:
            shutil.rmtree(tmp_path / "out")
    if not (tmp_path / "out").exists():
        subprocess.run([*command, "out", "--resume"], cwd=tmp_path, check=True)

    assert content(tmp_path / "out") == content(tmp_path / "whole")
    loratools.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "style", "whole"]


@pytest.mark.parametrize(
    "name", ["merge one file", "merge GGUF", "extract", "combine", "resize", "convert", "convert one file"]
)
def test_a_run_that_is_killed_at_any_call_is_resumed_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    """From another call each time; `tests/reliability/kill_jobs.py`, run by hand, kills every verb at every call."""
    write_inputs(tmp_path)
    # A merge this small has nine calls in a row after its first finished unit: from any call on, one of them is met.
    stride, seed = 7, random.SystemRandom().randrange(1 << 32)
    first = random.Random(seed).randint(1, stride)

    outcomes = killed_at_calls(JOBS[name], tmp_path, tmp_path / "place", range(first, 5000, stride), old=None)

    assert outcomes.failures == [], seed
    assert outcomes.runs == outcomes.killed + 1, (seed, "no run came to its end")
    assert outcomes.resumed > 0, seed


@pytest.mark.parametrize("name", ["merge GGUF", "extract"])
def test_a_run_that_is_killed_at_any_time_is_resumed_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    write_inputs(tmp_path, layers=8, shape=(200, 100))
    seed = random.SystemRandom().randrange(1 << 32)

    outcomes = killed_at_times(JOBS[name], tmp_path, tmp_path / "place", 5, random.Random(seed), old=None)

    assert outcomes.failures == [], seed
    assert outcomes.killed > 0, seed
