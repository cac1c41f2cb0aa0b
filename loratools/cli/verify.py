"""verify: whether a merged model is its base plus its adapters, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import EXECUTION, INPUT, option, verb
from loratools.cli.common.output import Output
from loratools.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loratools.ops.verify.files import FilesReport
    from loratools.ops.verify.report import VerifyReport


@verb("verify")
@click.argument("merged", type=options.SOURCE)
@click.argument("adapters", nargs=-1, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@option(INPUT, "--base", type=options.SOURCE, metavar="BASE", help="The model that it was merged from.")
@option(
    INPUT,
    "--files",
    is_flag=True,
    help="Hold the files against the record of what was written, without BASE and ADAPTERs.",
)
@option(
    EXECUTION,
    "--sample",
    type=options.SHARE,
    metavar="F",
    help="Look at this share of the adapted weights only; the verdict is then at most undecided.",
)
@option(
    INPUT,
    "--trained-on",
    metavar="SCHEME",
    help="How training quantised the base, as for merge.  [default: what the record of MERGED says]",
)
@option(
    INPUT,
    "--moments",
    type=options.PATH,
    metavar="FILE",
    help="The second moments that a merge with --rounding calibrated read.",
)
@options.allow_partial
@options.include
@options.exclude
@options.from_format
@options.rank_from
@options.initial
@options.expert_packing
@options.expert_orientation
@options.threads
@options.common
@options.sources
@options.html_alone
def command(
    merged: str,
    adapters: tuple[options.Weighted, ...],
    *,
    base: str | None,
    files: bool,
    output: Output,
    **settings: Any,
) -> None:
    """Tell whether MERGED is BASE with the ADAPTERs added, each times its weight W, and nothing else.

    Weights that no adapter changes are compared byte by byte. For the others, the report says which known way of
    computing gives exactly their values, and so which program may have merged them; or what is wrong with them: not
    applied, scale ignored, transposed, another base, and so on. The exit code is 0 if everything is explained (same),
    1 if not (different), and 3 if it cannot be decided.

    With --files, MERGED is any folder that loratools has written, and its files are compared with their recorded
    hashes: bits that changed on the disk, copies that were cut off, files that are missing or were added.

    \b
    Examples:
      loratools verify merged --base llama-3-8b my-lora
      loratools verify merged --base llama-3-8b style=0.7 facts=0.3 --json
      loratools verify merged --files
    """
    if files:
        _verify_files(merged, adapters, base, output, settings)
        return
    if base is None or not adapters:
        absent = "--base" if base is None else "ADAPTER"
        raise UsageError(
            f"{absent} is missing",
            hint="give what it was merged from, --base BASE ADAPTER[=W]..., or --files to look at its files alone",
        )
    from loratools.ops.verify.verb import verify
    from loratools.report.verification import verification_tables

    with output.progress(None, "verifying") as progress:
        report = verify(merged, base, adapters, execution="forked", progress=progress, **settings)
    for warning in report.warnings:
        output.warn(warning)
    _print(report, partial(verification_tables, report, every=output.verbose), output)


def _verify_files(
    merged: str, adapters: tuple[options.Weighted, ...], base: str | None, output: Output, settings: Mapping[str, Any]
) -> None:
    """Do what --files asks for, which no other option but --threads has to do with."""
    given_options = [name for name, value in settings.items() if value and name != "threads"]
    if adapters or base is not None or given_options:
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in given_options)
        raise UsageError(
            f"--files looks at the files alone, and takes no {spelled or '--base and no ADAPTER'}",
            hint="run verify twice: once with --files, once with --base BASE ADAPTER[=W]...",
        )
    from loratools.ops.verify.files import verify_files
    from loratools.report.verification import file_tables

    with output.progress(None, "verifying") as progress:
        report = verify_files(merged, threads=settings["threads"], progress=progress)
    _print(report, partial(file_tables, report, every=output.verbose), output)


def _print(report: VerifyReport | FilesReport, tables: Callable[[], Iterable[RenderableType]], output: Output) -> None:
    """Print a verdict, and exit with its code."""
    output.html(report)
    if output.json:
        output.document(report.to_dict())
    else:
        output.table(*tables())
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)
