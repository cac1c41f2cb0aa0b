"""Every verb that writes, as a job that is killed: at a chosen call to the system, or after a chosen time.

`python tests/reliability/kill_jobs.py` kills each of them at every call and 200 times at random, and prints what came
of it; the tests do the same with fewer.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # as pytest does for tests
    sys.path.insert(0, str(Path(__file__).parents[1]))

import factories
import torch
from reliability.killing import AtOnce, content, killed_at

import loratools
from loratools.ops.common import resumable_work
from loratools.ops.merge import writing
from loratools.storage import files, safetensors_reader


@dataclass(frozen=True)
class KillJob:
    """A verb with its arguments.

    Attributes:
        run: Runs it: the folder of the inputs, the output, whether to replace, whether to resume.
        suffix: What the name of its output ends with.
        resumes: Whether it takes `resume`.
    """

    run: Callable[[Path, Path, bool, bool], object]
    suffix: str = ""
    resumes: bool = True


JOBS: dict[str, KillJob] = {
    "merge": KillJob(
        lambda at, out, overwrite, resume: loratools.merge(
            at / "base", at / "one", out, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "merge with workers": KillJob(
        lambda at, out, overwrite, resume: loratools.merge(
            at / "base", at / "one", out, threads=2, execution="forked", overwrite=overwrite, resume=resume
        )
    ),
    "merge one file": KillJob(
        lambda at, out, overwrite, resume: loratools.merge(
            at / "single" / "model.safetensors", at / "one", out, threads=1, overwrite=overwrite, resume=resume
        ),
        ".safetensors",
    ),
    "merge GGUF": KillJob(
        lambda at, out, overwrite, resume: loratools.merge(
            at / "base.gguf", at / "one", out, threads=1, overwrite=overwrite, resume=resume
        ),
        ".gguf",
    ),
    "extract": KillJob(
        lambda at, out, overwrite, resume: loratools.extract(
            at / "base", at / "tuned", out, rank=2, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "extract within a size": KillJob(
        lambda at, out, overwrite, resume: loratools.extract(
            at / "base", at / "tuned", out, rank=2, max_params=9000, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "combine": KillJob(
        lambda at, out, overwrite, resume: loratools.combine(
            [at / "one", at / "two"], out, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "resize": KillJob(
        lambda at, out, overwrite, resume: loratools.resize(
            at / "one", out, rank=1, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "resize within a size": KillJob(
        lambda at, out, overwrite, resume: loratools.resize(
            at / "one", out, max_params=7000, threads=1, overwrite=overwrite, resume=resume
        )
    ),
    "convert": KillJob(
        lambda at, out, overwrite, resume: loratools.convert(
            at / "one", out, format="mlx", base=at / "base", overwrite=overwrite, resume=resume
        )
    ),
    "convert one file": KillJob(
        lambda at, out, overwrite, resume: loratools.convert(
            at / "one", out, format="gguf", base=at / "base", dtype="float16", overwrite=overwrite, resume=resume
        ),
        ".gguf",
    ),
    "save": KillJob(
        lambda at, out, overwrite, resume: loratools.save(at / "one", out, overwrite=overwrite), resumes=False
    ),
    "save one file": KillJob(
        lambda at, out, overwrite, resume: loratools.save(
            at / "one", out, format="gguf", base=at / "base", overwrite=overwrite
        ),
        ".gguf",
        resumes=False,
    ),
}

# What its workers ask of the system is counted by each of them.
BY_TIME_ALONE = {"merge with workers"}


def keep_all_work() -> None:
    """Keep finished work also of adapters that are so small that it is not worth it."""
    resumable_work.WORTH_KEEPING_BYTES = 0


def write_inputs(at: Path, *, layers: int = 2, shape: tuple[int, int] = (10, 6)) -> None:
    """Write what the jobs read: models and adapters of so many layers with one weight each."""
    modules = factories.layered(layers, {"mlp.up_proj": shape})
    weights = factories.base_weights(modules)
    factories.checkpoint_folder(at / "base", weights=weights, shards=2)
    factories.checkpoint_folder(at / "single", weights=weights)
    factories.gguf_model(at / "base.gguf", layers=layers, shape=shape)
    for seed, name in enumerate(("one", "two")):
        factories.adapter_folder(at / name, modules=modules, rank=2, seed=seed)
    loratools.merge(at / "base", at / "one", at / "tuned")


@dataclass
class Outcomes:
    """What came of killing a job again and again.

    Attributes:
        runs: How many runs were begun that were to be killed.
        killed: How many of them were, before they had come to their end.
        resumed: After how many of these a run went on with work that was done.
        placed: After how many the output had its place already.
        seconds: How long all took.
    """

    runs: int = 0
    killed: int = 0
    resumed: int = 0
    placed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def forget() -> None:
    """Nothing is known from an earlier run."""
    files.close_inputs()
    safetensors_reader._last = None


def killed_at_calls(job: KillJob, inputs: Path, place: Path, calls: Iterable[int], *, old: Path | None) -> Outcomes:
    """Kill the job at each of these calls, from a fresh start each time, and go on; until a run comes to its end.

    Args:
        job: The job.
        inputs: Its inputs.
        place: A folder that is made and removed again.
        calls: Numbers of calls to the system, upwards from 1.
        old: An output that is to be replaced.
    """
    outcomes = Outcomes()
    began = time.perf_counter()
    before = content(old) if old is not None else None
    after = _undisturbed(job, inputs, place, old)
    for n in calls:
        out = _fresh_place(place, job, old)
        forget()
        killed = killed_at(n, lambda out=out: job.run(inputs, out, old is not None, False), after=n % 2 == 1)  # type: ignore[misc]
        outcomes.runs += 1
        outcomes.killed += killed
        _check_and_finish(job, inputs, out, before, after, f"call {n}", outcomes)
        shutil.rmtree(place)
        if not killed:
            break
    outcomes.seconds = time.perf_counter() - began
    return outcomes


def killed_at_times(
    job: KillJob, inputs: Path, place: Path, kills: int, times: random.Random, *, old: Path | None
) -> Outcomes:
    """Kill the job so many times, each time at random between its beginning and its end.

    A run that goes on with a killed one is killed as well, one time out of two.
    """
    outcomes = Outcomes()
    before = content(old) if old is not None else None
    after = _undisturbed(job, inputs, place, old)
    out = _fresh_place(place, job, old)
    length = _seconds_of(lambda: job.run(inputs, out, old is not None, False))
    shutil.rmtree(place)
    began = time.perf_counter()
    while outcomes.runs < kills:
        out = _fresh_place(place, job, old)
        resume = False
        while outcomes.runs < kills:
            outcomes.runs += 1
            seconds = times.uniform(0, 1.1) * length
            killed = _killed_after(seconds, lambda out=out, r=resume: job.run(inputs, out, old is not None, r))  # type: ignore[misc]
            outcomes.killed += killed
            resume = job.resumes and content(out) == before
            if not resume or times.random() < 0.5:
                break
        _check_and_finish(job, inputs, out, before, after, f"run {outcomes.runs}", outcomes)
        shutil.rmtree(place)
    outcomes.seconds = time.perf_counter() - began
    return outcomes


def _check_and_finish(
    job: KillJob, inputs: Path, out: Path, before: object, after: object, where: str, outcomes: Outcomes
) -> None:
    """The output is the old or the new one; the next run makes it the new one; nothing stays beside it."""
    now = content(out)
    if now not in (before, after):
        outcomes.failures.append(f"{where}: neither the old output nor the new one")
    if now == after:
        outcomes.placed += 1
    else:
        forget()
        try:
            report = job.run(inputs, out, before is not None, job.resumes)
        except loratools.LoraToolsError as error:
            outcomes.failures.append(f"{where}: {error}")
            return
        warnings: tuple[str, ...] = getattr(report, "warnings", ())
        outcomes.resumed += any("was resumed" in warning for warning in warnings)
        if content(out) != after:
            outcomes.failures.append(f"{where}: not the bytes of an undisturbed run")
    # What was killed before its folder had a name that tells whose it is may be there: it is empty.
    loratools.clean(out.parent)
    if beside := [path.name for path in out.parent.iterdir() if path != out]:
        outcomes.failures.append(f"{where}: {beside} stayed")


def _undisturbed(job: KillJob, inputs: Path, place: Path, old: Path | None) -> object:
    out = _fresh_place(place, job, old)
    forget()
    job.run(inputs, out, old is not None, False)
    result = content(out)
    shutil.rmtree(place)
    return result


def _fresh_place(place: Path, job: KillJob, old: Path | None) -> Path:
    place.mkdir()
    out = place / f"out{job.suffix}"
    if old is not None and old.is_dir():
        shutil.copytree(old, out)
    elif old is not None:
        shutil.copyfile(old, out)
    return out


def _killed_after(seconds: float, run: Callable[[], object]) -> bool:
    """Do it in a copy of this process that is killed after a time, with its workers; whether that came before its
    end."""
    forget()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            run()
            status = 0
        finally:
            os._exit(status)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, how = os.waitpid(process, 0)
    killed = os.waitstatus_to_exitcode(how) == -signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(how) == 0
    # Its workers see that it is gone, and go; the lock goes with the last of them.
    for _ in range(200):
        try:
            os.killpg(process, 0)
        except (ProcessLookupError, PermissionError):
            break
        time.sleep(0.01)
    return killed


def _seconds_of(run: Callable[[], object]) -> float:
    forget()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help="the jobs; all where none is named")
    parser.add_argument("--kills", type=int, default=200, help="kills at random times of each job")
    parser.add_argument("--seed", type=int, default=None, help="of the times; random where it is not given")
    parser.add_argument("--stride", type=int, default=1, help="kill at every so many calls; 0: at none")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    keep_all_work()
    torch.set_num_threads(1)  # a copy of this process has no threads of torch's pool to wait for
    failed = 0
    for name in arguments.jobs or JOBS:
        job = JOBS[name]
        with tempfile.TemporaryDirectory() as folder:
            small, large, place = Path(folder, "small"), Path(folder, "large"), Path(folder, "place")
            write_inputs(small)
            write_inputs(large, layers=12, shape=(300, 200))
            lines = []
            for old in (None, Path(folder, f"old{job.suffix}")):
                if arguments.stride and name not in BY_TIME_ALONE:
                    if old is not None:
                        job.run(large, old, False, False)
                    workers = writing.ThreadPoolExecutor
                    writing.ThreadPoolExecutor = AtOnce  # type: ignore[misc, assignment]
                    calls = range(1, 5000, arguments.stride)
                    lines.append(("calls", killed_at_calls(job, small, place, calls, old=old)))
                    writing.ThreadPoolExecutor = workers  # type: ignore[misc]
                if arguments.kills:
                    if old is not None:
                        job.run(small, old, old.exists(), False)
                    times = random.Random(f"{seed} {name} {old is None}")
                    lines.append(("times", killed_at_times(job, large, place, arguments.kills // 2, times, old=old)))
            for what, outcomes in lines:
                print(
                    f"{name:24} at {what}: {outcomes.runs:4} runs, {outcomes.killed:4} killed, "
                    f"{outcomes.resumed:4} resumed, {outcomes.placed:3} had their place, "
                    f"{len(outcomes.failures)} wrong, {outcomes.seconds:.0f} s",
                    *outcomes.failures[:5],
                    sep="\n  ",
                    flush=True,
                )
                failed += len(outcomes.failures)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(_main())
