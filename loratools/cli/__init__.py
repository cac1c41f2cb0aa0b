"""The command line: one file is one verb, each a few lines around one function of `ops/`.

A verb is `loratools/cli/<verb>.py` with a click command named `command`. It is imported only when it is called, or
when the help lists it; what it computes with is imported inside the command.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from loratools._version import __version__
from loratools.cli.common.errors import Ended, NoVerb, run, signals_end, signals_raise

# As people meet them; a verb that is not listed here comes after these.
_ORDER = (
    "inspect",
    "list",
    "merge",
    "extract",
    "combine",
    "resize",
    "convert",
    "spectrum",
    "compare",
    "verify",
    "check",
    "clean",
    "formats",
    "methods",
    "explain",
    "help",
    "completion",
)


class Verbs(click.Group):
    """Finds verbs as files, and runs them inside the error boundary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from loratools import registry

        present = registry.names("cli")
        return [v for v in _ORDER if v in present] + [v for v in present if v not in _ORDER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if not _is_verb(cmd_name):
            return None
        command: click.Command = import_module(f"loratools.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs with their first sentences in full, where click would cut them off."""
        rows = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Verbs"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in rows if command])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise NoVerb(ctx.get_help())
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from difflib import get_close_matches

            from loratools.errors import UsageError

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            raise UsageError(
                f"no verb named '{args[0]}'; there are: {', '.join(self.list_commands(ctx))}",
                hint=f"did you mean '{near[0]}'?" if near else None,
            )
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        if "_LORATOOLS_COMPLETE" in os.environ:
            super().main(args, prog_name or "loratools", complete_var, True, **extra)
        # Not list(...): of this package, that name is the verb once it is imported.
        arguments = [*(sys.argv[1:] if args is None else args)]

        def body() -> None:
            # `make_context` takes what it parses out of the list it is given.
            with self.make_context(prog_name or "loratools", [*arguments], obj=tuple(arguments)) as context:
                self.invoke(context)

        verb = arguments[0] if arguments and _is_verb(arguments[0]) else None
        sys.exit(run(body, arguments, verb))


def _is_verb(name: str) -> bool:
    # One look at one file; the registry would read the folder.
    return name[:1].isalpha() and name.isidentifier() and Path(__file__).with_name(f"{name}.py").is_file()


@click.group(
    "loratools",
    cls=Verbs,
    subcommand_metavar="VERB [ARGUMENTS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'loratools help VERB' explains a verb, with examples.",
)
@click.version_option(__version__, "-V", "--version", prog_name="loratools")
def verbs() -> None:
    """Look into LoRA adapters, put them into models and take them out again, from file to file."""


def _keep_survivors(phase: str, info: dict[str, int]) -> None:
    """Take what a full collection has left out of all later ones."""
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


def main() -> NoReturn:
    """Run the command line with the arguments of this process, and end the process."""
    # What starting up allocates is kept to the end: looking through it for garbage, again and again and once more at
    # the exit, is a fifth of the time of a short verb. Cycles made later are still found, in larger batches.
    gc.set_threshold(50_000)
    # Of a model with 100,000 tensors as much is kept; every look would go through all of it again.
    gc.callbacks.append(_keep_survivors)
    if sys.argv[1:2] == ["inspect"] and "--values" not in sys.argv:
        # What is read of headers has no cycles, and is kept to the end.
        gc.disable()
    # A stream that the caller has closed is None here; what would go there goes nowhere.
    sys.stdout = sys.stdout if sys.stdout is not None else open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr if sys.stderr is not None else open(os.devnull, "w")  # noqa: PTH123, SIM115
    # Our workers keep the cores busy; numpy's own threads would only get in their way. Read when numpy is imported.
    for library in ("OPENBLAS", "MKL", "VECLIB"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    if hasattr(sys.stdout, "reconfigure"):
        # A name that the terminal's encoding lacks is shown as an escape; the default would end in a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        signals_raise()
        verbs.main(prog_name="loratools")
    except KeyboardInterrupt:
        # Before the error boundary of the verb, or after it.
        sys.exit(130)
    except Ended as end:
        sys.exit(end.exit_code)
    finally:
        signals_end()
        gc.freeze()
