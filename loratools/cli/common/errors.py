"""The one error boundary: what was raised becomes a message, a hint and an exit code. Commands catch nothing.

The order of the cases matters: MachineError is an OSError, BrokenPipeError is one too and no failure of ours.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import click

from loratools.cli.common.output import error_json, print_document, print_error, print_line
from loratools.errors import LoraToolsError, MachineError, UsageError
from loratools.report.text import safe


class Ended(BaseException):
    """A signal, as an exception, so that what is under way is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class NoVerb(Exception):  # noqa: N818 - a way out, as SystemExit
    """There are no arguments at all: the help is printed on stderr, and the exit code is 2 with every click."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.help = text


_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


def signals_raise() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the stack, once. What the parent ignores (nohup) stays ignored."""
    for name in _ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # `timeout` sends the same signal twice, to the process and to its group, and a service manager sends SIGTERM where
    # somebody has pressed Ctrl-C already: a second one must not stop the cleaning up.
    for name in _ENDING:
        if (ending := getattr(signal, name, None)) is not None:
            signal.signal(ending, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Ended(number)


def signals_end() -> None:
    """Let Ctrl-C end the process as the system does: the work is done, and the interpreter is about to end."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(body: Callable[[], object], args: Sequence[str], verb: str | None) -> int:
    """Call `body`; print what it raises, as `args` ask for it, and return the exit code."""
    flags = [a for a in args if a != "--"] if "--" not in args else list(args[: list(args).index("--")])
    try:
        body()
        # Here, so that a closed pipe is met inside the boundary and not while the interpreter shuts down.
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        _forget_stdout()
        return 128 + 13
    except (KeyboardInterrupt, click.Abort) as stop:
        print_line(sys.stderr, "interrupted")
        _print_notes(stop)
        return 130
    except Ended as end:
        _print_notes(end)
        return end.exit_code
    except NoVerb as asked:
        print_line(sys.stderr, asked.help)
        return 2
    except Exception as raised:
        if "--debug" in flags:
            import traceback

            traceback.print_exception(raised)
        error = explained(raised)
        if "-v" in flags or "--verbose" in flags:
            print_error(error, details=len(error.details))
        else:
            print_error(error)
        try:
            if "--json" in flags:
                print_document(verb, {"error": error_json(error)})
            sys.stdout.flush()
        except OSError:  # told on stderr already; a second failure at exit would change the exit code
            _forget_stdout()
        return error.exit_code


def _print_notes(stop: BaseException) -> None:
    """Print what was noted on the way out: what is kept, and how to go on."""
    for note in getattr(stop, "__notes__", ()):
        print_line(sys.stderr, safe(note), label="hint", colour="cyan")


def explained(raised: Exception) -> LoraToolsError:
    """What was raised, as an error that says what is wrong and what to do."""
    match raised:
        case LoraToolsError():
            return raised
        case click.UsageError():
            return _usage(raised)
        case click.ClickException():
            return UsageError(raised.format_message())
        case ModuleNotFoundError() if raised.name in ("jinja2", "numpy", "torch"):
            return MachineError(f"{raised.name} is not installed", hint=f"pip install {raised.name}")
        case MemoryError():
            return MachineError("out of memory", hint="fewer --threads need less; so does closing other programs")
        case RuntimeError() if "allocate memory" in str(raised) or "out of memory" in str(raised):
            # torch has no exception class of its own for a failed allocation in main memory.
            return MachineError("out of memory", details=[str(raised).partition("\n")[0]])
        case OSError() if raised.errno is not None:
            return _machine(raised)
        case _:
            return LoraToolsError(
                f"this is a bug in loratools: {type(raised).__name__}: {str(raised).partition(chr(10))[0]}",
                hint="run again with --debug and report what it prints",
            )


def _usage(raised: click.UsageError) -> UsageError:
    context = raised.ctx
    hint = f"'{context.command_path if context is not None else 'loratools'} --help' lists what there is"
    message = raised.format_message().rstrip(".")
    match raised:
        case click.NoSuchOption():
            message = f"no option named '{raised.option_name}'"
            if os.path.lexists(raised.option_name):
                hint = f"for what is called so, write ./{raised.option_name}"
            elif raised.possibilities:
                hint = f"did you mean {' or '.join(sorted(raised.possibilities))}?"
        case click.MissingParameter() if raised.param is not None and context is not None:
            param = raised.param
            name = " / ".join(param.opts) if isinstance(param, click.Option) else param.human_readable_name
            message = f"{name} is missing"
            hint = context.get_usage().replace("Usage:", "usage:", 1)
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    return UsageError(message, hint=hint)


def _machine(raised: OSError) -> LoraToolsError:
    if raised.errno == errno.ENAMETOOLONG:
        from pathlib import Path

        from loratools.storage.files import machine_error

        return machine_error(raised, "open", Path(os.fsdecode(raised.filename)) if raised.filename else None)
    hints = {
        errno.ENOSPC: "free some space, or write elsewhere with -o",
        errno.EDQUOT: "the quota is used up; write elsewhere with -o",
        errno.EROFS: "write elsewhere with -o",
        errno.EACCES: "the permissions of the file or of its folder do not allow this",
        errno.EPERM: "the permissions of the file or of its folder do not allow this",
        errno.EMFILE: "raise the limit on open files: ulimit -n",
    }
    reason = (raised.strerror or str(raised)).lower()
    file_part = f": '{os.fsdecode(raised.filename)}'" if isinstance(raised.filename, (str, bytes)) else ""
    return MachineError(reason + file_part, hint=hints.get(raised.errno or 0))


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere: the interpreter would complain about the closed pipe at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
