"""Every verb that writes, with each of its calls to the system failing once: old or new, nothing in between.

Every call fails once. The numbers of errors take turns over the calls of a verb, beginning with another one for each
verb and for a new and a replaced output.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import factories
import pytest
from reliability.faulty import FaultyOs, ShortOs
from reliability.killing import AtOnce, content

import loratools
from loratools import registry
from loratools.cli import verbs
from loratools.errors import LoraToolsError
from loratools.ops.merge import writing
from loratools.storage import files, safetensors_reader, system

CODES = [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT, errno.ESTALE]

# The name of a folder that is hidden from people.
HIDDEN = re.compile(r"\.loratools-\d")
# Verb, or verb and what it writes -> the call, to an output that may be there.
JOBS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda at, out: loratools.merge(at / "base", at / "one", out, overwrite=True, threads=1),
    "merge one file": lambda at, out: loratools.merge(
        at / "base" / "model.safetensors", at / "one", out.with_suffix(".safetensors"), overwrite=True, threads=1
    ),
    "merge GGUF": lambda at, out: loratools.merge(
        at / "base.gguf", at / "one", out.with_suffix(".gguf"), overwrite=True, threads=1
    ),
    "extract": lambda at, out: loratools.extract(at / "base", at / "tuned", out, rank=1, overwrite=True, threads=1),
    "combine": lambda at, out: loratools.combine([at / "one", at / "two"], out, overwrite=True, threads=1),
    "resize": lambda at, out: loratools.resize(at / "one", out, rank=1, overwrite=True, threads=1),
    "convert": lambda at, out: loratools.convert(at / "one", out, format="mlx", base=at / "base", overwrite=True),
    "convert one file": lambda at, out: loratools.convert(
        at / "one", out.with_suffix(".gguf"), format="gguf", base=at / "base", overwrite=True
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("inputs")
    module = {"model.layers.0.mlp.up_proj": (10, 6)}
    factories.checkpoint_folder(at / "base", weights=factories.base_weights(module))
    factories.gguf_model(at / "base.gguf")
    for seed, name in enumerate(("one", "two")):
        factories.adapter_folder(at / name, modules=module, rank=2, seed=seed)
    loratools.merge(at / "base", at / "one", at / "tuned")
    return at


@pytest.fixture(autouse=True)
def one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that the n-th call of each run is the same one."""
    monkeypatch.setattr(writing, "ThreadPoolExecutor", AtOnce)
    yield
    files.close_inputs()


def fresh() -> None:
    """Nothing is known from an earlier run."""
    files.close_inputs()
    safetensors_reader._last = None


def test_every_verb_with_an_output_is_swept() -> None:
    context = click.Context(verbs)
    commands = {name: verbs.get_command(context, name) for name in registry.names("cli")}
    writing_verbs = {
        name
        for name, command in commands.items()
        if command is not None and any(parameter.name == "out" for parameter in command.params)
    }
    assert writing_verbs == {name.partition(" ")[0] for name in JOBS}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
def test_failure_of_any_call_leaves_old_or_new(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, old: bool
) -> None:
    before_inputs = content(inputs)
    (tmp_path / "whole").mkdir()
    fresh()
    JOBS[job](inputs, tmp_path / "whole" / "out")
    new = content(tmp_path / "whole")
    failures = 0
    place = tmp_path / "place"
    for n in range(1, 2000):
        if old:
            shutil.copytree(tmp_path / "whole", place)
        else:
            place.mkdir()
        before = content(place)
        fresh()
        faulty = FaultyOs(n, CODES[(n + list(JOBS).index(job) + old) % len(CODES)])
        raised: LoraToolsError | None = None
        monkeypatch.setattr(system, "os", faulty)
        try:
            JOBS[job](inputs, place / "out")
        except LoraToolsError as error:
            raised = error
        except OSError as error:
            pytest.fail(f"{n}: {faulty.failed}: {error!r} is no error of ours")
        finally:
            monkeypatch.setattr(system, "os", os)
        where = (n, faulty.failed, raised)
        kept = [path.name for path in place.iterdir() if path.name.startswith(".")]
        if kept:  # finished work that the error speaks of
            assert raised is not None, where
            assert "--resume" in (raised.hint or ""), where
            loratools.clean(place)
        after = content(place)
        assert after in (before, new), where
        assert raised is not None or after == new, where
        assert raised is None or (raised.exit_code == 5 and not HIDDEN.search(raised.message)), where
        failures += raised is not None
        shutil.rmtree(place)
        if not faulty.failed:
            break
    else:
        pytest.fail("no clean run was reached")
    assert failures > 40
    assert content(inputs) == before_inputs


@pytest.mark.parametrize("job", JOBS)
def test_short_reads_and_writes_change_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    for name in ("whole", "short"):
        (tmp_path / name).mkdir()
    fresh()
    JOBS[job](inputs, tmp_path / "whole" / "out")
    fresh()
    monkeypatch.setattr(system, "os", ShortOs(7))

    JOBS[job](inputs, tmp_path / "short" / "out")

    monkeypatch.setattr(system, "os", os)
    assert content(tmp_path / "short") == content(tmp_path / "whole")


def test_a_baseline_is_replaced_in_one_step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what `check` reads a failure is a finding; of what it writes it is an error, and the old baseline stays."""
    baseline = tmp_path / "known.json"
    loratools.check(inputs / "one", write_baseline=baseline, threads=1)
    old = baseline.read_bytes()
    writing_calls = frozenset({"open", "pwrite", "fsync", "rename", "replace", "link", "mkdir", "close"})
    stayed = 0
    for n in range(1, 500):
        fresh()
        faulty = FaultyOs(n, CODES[n % len(CODES)], writing_calls)
        monkeypatch.setattr(system, "os", faulty)
        with suppress(LoraToolsError):
            loratools.check(inputs / "one", inputs / "two", write_baseline=baseline, threads=1)
        monkeypatch.setattr(system, "os", os)
        assert json.loads(baseline.read_bytes())["findings"] is not None, (n, faulty.failed)
        assert [path.name for path in tmp_path.iterdir()] == ["known.json"], (n, faulty.failed)
        stayed += baseline.read_bytes() == old
        if not faulty.failed:
            break
        baseline.write_bytes(old)
    else:
        pytest.fail("no clean run was reached")
    assert stayed > 5
