"""combine: make one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools import registry
from loratools.cli.common import options
from loratools.cli.common.output import Output
from loratools.cli.common.replaced import replaced_rows, with_replaced

if TYPE_CHECKING:
    from loratools.ops.combine.recipe import Calibration, HeadsRule
    from loratools.ops.common.arguments import RankFrom


@click.command("combine")
@click.argument("adapters", nargs=-1, type=options.WEIGHTED, metavar="ADAPTER[=W]...")
@options.out
@click.option(
    "--method",
    metavar="NAME",
    help=f"How, if not linear: {', '.join(registry.names('methods'))}. 'loratools methods' explains.",
)
@click.option(
    "--set", "settings", multiple=True, type=options.SETTING, metavar="OPTION=VALUE", help="An option of the method."
)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Truncate each module to this rank.")
@click.option("--energy", type=options.SHARE, metavar="F", help="Truncate, keeping this share of each module's energy.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="With --energy: no rank above this.")
@click.option(
    "--module-weight",
    "module_weights",
    multiple=True,
    type=options.MODULE_WEIGHT,
    metavar="GLOB=W[,W...]",
    help="A further factor for modules that match, for all adapters or one for each; the last match counts.",
)
@click.option(
    "--block-weights",
    multiple=True,
    type=options.NUMBERS,
    metavar="W,W,...",
    help="Block weights as kohya's scripts take them: 12, 17, 20 or 26 numbers, for all adapters or for each.",
)
@click.option(
    "--heads",
    type=click.Choice(["refuse", "first", "average"]),
    help="What to do where adapters replace a weight with different values, if not refuse.",
)
@click.option("--calibrate", type=click.Choice(["svc"]), help="Afterwards, bring back what several adapters repeat.")
@click.option("--norm-match", is_flag=True, help="Then scale each module to the weighted norms of its adapters.")
@click.option("--residual", type=options.PATH, metavar="PATH", help="Also write what was lost, as an adapter.")
@click.option("--recipe", type=options.PATH, metavar="FILE", help="A YAML file that says all this.")
@click.option("--seed", type=int, metavar="N", help="Seed of what is random, if not 0.")
@options.dtype
@options.include
@options.exclude
@options.from_format
@options.output_format
@options.base
@options.rank_from
@options.threads
@options.plan
@options.overwrite
@options.common
def command(
    adapters: tuple[options.Weighted, ...],
    *,
    out: Path,
    method: str | None,
    settings: tuple[tuple[str, str], ...],
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    module_weights: tuple[tuple[str, tuple[float, ...]], ...],
    block_weights: tuple[tuple[float, ...], ...],
    heads: HeadsRule | None,
    calibrate: Calibration | None,
    norm_match: bool,
    residual: Path | None,
    recipe: Path | None,
    seed: int | None,
    dtype: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    from_format: str | None,
    format: str | None,
    base: str | None,
    rank_from: RankFrom,
    threads: int | None,
    plan: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Write one adapter that does what the ADAPTERs do together, each times its weight W.

    The linear method without --rank or --energy loses nothing: ranks add up. With one of them, each module becomes the
    nearest of that size. For each adapter, the summary tells its gain (how much of it is in the result: its weight,
    where nothing overlaps), its interference (how differently the result answers to the inputs that it reacts to), and
    how much of its row space it shares with the others, beside what subspaces of that size share at random. --plan
    computes all of that and writes nothing; -v tells it by module.

    \b
    Examples:
      loratools combine style=0.7 facts=0.3 -o both
      loratools combine style facts -o both --rank 16
      loratools combine instruct chat=-0.5 -o less-chatty
      loratools combine a b c -o all --method ties --set density=0.3 --rank 16
      loratools combine --recipe blend.yaml -o blend
    """
    from loratools.ops.combine.verb import combine

    with output.progress(None, "combining") as progress:
        report = combine(
            [(a.source, a.weight) for a in adapters],
            out,
            recipe=recipe,
            method=method,
            options=dict(settings),
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            module_weights=dict(module_weights),
            block_weights=block_weights,
            heads=heads,
            calibrate=calibrate,
            norm_match=norm_match,
            residual=residual,
            seed=seed,
            dtype=dtype,
            include=include,
            exclude=exclude,
            from_format=from_format,
            format=format,
            base=base,
            rank_from=rank_from,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
            plan=plan,
        )
    for warning in report.warnings:
        output.warn(warning)
    if output.json:
        document = report.as_json()
        output.document(with_replaced(document, out, overwrite=overwrite) if plan else document)
        return
    from loratools.report.combination import combine_plan, combine_summary

    if plan:
        output.table(*combine_plan(report, out, every=output.verbose), *replaced_rows(out, overwrite=overwrite))
    else:
        output.summary(*combine_summary(report, every=output.verbose))
