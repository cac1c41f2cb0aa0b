"""check: what is wrong with adapters and models."""

from __future__ import annotations

from typing import Any

import click

from loratools.cli.common import options
from loratools.cli.common.grouped_help import INPUT, OUTPUT, PRINTING, SELECTION, option, verb
from loratools.cli.common.output import Output
from loratools.errors import UsageError


def _names(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


@verb("check", short_help="Find what is wrong with adapters and models.")
@click.argument("sources", type=options.SOURCE, nargs=-1, required=True, metavar="SOURCE...")
@option(
    SELECTION,
    "--select",
    type=options.CHECK_RULE,
    multiple=True,
    callback=_names,
    metavar="IDS",
    help="Apply only these rules: ids or families, separated by commas; repeatable.",
)
@option(
    SELECTION,
    "--ignore",
    type=options.CHECK_RULE,
    multiple=True,
    callback=_names,
    metavar="IDS",
    help="Do not apply these rules: ids or families, separated by commas; repeatable.",
)
@options.base
@option(
    INPUT,
    "--for",
    "program",
    type=options.PROGRAM,
    metavar="PROGRAM",
    help="The program that is to load the adapters: vllm, sglang, tgi, lorax, tensorrt-llm, comfyui, diffusers, "
    "llama.cpp, mlx or peft.",
)
@option(
    INPUT,
    "--baseline",
    type=options.PATH,
    metavar="FILE",
    help="A file of known findings, which are not counted again.",
)
@option(
    INPUT,
    "--values/--no-values",
    default=True,
    help="Read the values too, for the rules that look at them. This is the default; --no-values reads headers only.",
)
@options.from_format
@option(OUTPUT, "--write-baseline", type=options.PATH, metavar="FILE", help="Write all findings to a baseline file.")
@options.threads
@option(
    PRINTING,
    "--format",
    "printed",
    type=click.Choice(["text", "json", "sarif", "junit"]),
    help="How findings are printed: text where it is not given, json as --json does, SARIF 2.1.0 or JUnit XML.",
)
@options.common
@options.sources
@options.html_alone
def command(sources: tuple[str, ...], *, printed: str | None, output: Output, **settings: Any) -> None:
    """Find what is wrong with adapters and models, by rules with stable ids.

    Folders are searched with all their subfolders. A file that cannot be read is a finding. The exit code is 1 if there
    is an error or a warning, and 0 if there are only notes or nothing. --base also checks whether the adapters fit the
    model and how much of them rounding loses; --for checks what a program does not load. 'loratools explain ID'
    explains a rule.

    \b
    Examples:
      loratools check my-lora
      loratools check loras --ignore paths,config-alpha-assumed
      loratools check my-lora --base llama-3-8b --for vllm
      loratools check loras --write-baseline known.json
      loratools check loras --baseline known.json --format sarif > check.sarif
    """
    from loratools.ops.check.verb import check

    if output.json and printed not in (None, "json"):
        raise UsageError(f"--json and --format {printed} exclude each other", hint="give one of them")
    output = output._replace(json=output.json or printed == "json")
    with output.progress(None, "checking", files=True) as progress:
        report = check(*sources, execution="forked", progress=progress, **settings)
    output.html(report)
    if output.json:
        output.document(report.to_dict())
    elif printed == "sarif":
        from loratools.report.sarif import sarif

        output.text(sarif(report))
    elif printed == "junit":
        from loratools.report.junit import junit

        output.text(junit(report))
    else:
        from loratools.report.check import check_summary, check_tables

        output.table(*check_tables(report, every=output.verbose))
        output.summary(check_summary(report))
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)
