"""Options that several verbs share, each defined once, and the types of their values.

A verb's decorators, in order: `@verb("resize")`, `@click.argument("adapter", type=SOURCE)`, the shared options
(`@out`, `@dtype`, ...), and last, nearest the function, `@common`, which gives it `output: Output`. The function names
the options that it uses itself; all others reach the verb's Python function as `**settings`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from loratools import registry
from loratools.arguments import parse_size
from loratools.cli.common.grouped_help import EXECUTION, INPUT, OUTPUT, PRINTING, RANK, SELECTION, option
from loratools.cli.common.hub_progress import sources as sources
from loratools.cli.common.output import Output
from loratools.cli.common.page_file import PageFile
from loratools.cli.common.plot_file import PlotFile
from loratools.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    # Generic since click 8.2 or so, and only for type checkers: 8.1 cannot subscript it.
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

_Command = TypeVar("_Command", bound=Callable[..., Any])

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
# `style=0,7` and `style:0.7`: what stands where a weight would, as other programs and languages spell it.
_MISSPELT_WEIGHT = re.compile(r"(.+)(?:=(?=[^=]*,)|:)([+-]?\d*[.,]?\d+)", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf(inity)?)", re.IGNORECASE)


class Weighted(NamedTuple):
    """An adapter argument: where it is, and what its delta is multiplied with."""

    source: str
    weight: float = 1.0


def parse_weighted(text: str) -> Weighted:
    """Split an adapter argument into the source and its weight.

    `style=0.7` -> ("style", 0.7). An argument that is the name of something that exists has no weight in it.
    """
    source, equals, number = text.rpartition("=")
    if os.path.lexists(text):
        return Weighted(text)
    misspelt = _MISSPELT_WEIGHT.fullmatch(text)
    if misspelt is not None:
        adapter, weight_text = misspelt[1], misspelt[2].replace(",", ".")
        adapter_exists = os.path.lexists(adapter)
        # `host:8080` is no weight; a fraction, and a comma behind `=`, can be nothing else.
        if adapter_exists or "." in weight_text:
            exists = f", and '{adapter}' does" if adapter_exists else ""
            raise UsageError(f"'{text}' does not exist{exists}", hint=f"a weight is written {adapter}={weight_text}")
    if not equals:
        return Weighted(text)
    is_number = _NUMBER.fullmatch(number) or _NOT_FINITE.fullmatch(number)
    if not is_number or source.endswith("="):
        _refuse_misspelt(text)
    if not is_number:
        return Weighted(text)
    if not source:
        raise UsageError(f"'{text}' has a weight and no adapter", hint="write ADAPTER=0.7")
    weight = float(number)
    if not math.isfinite(weight):
        raise UsageError(f"the weight of '{source}' is {number}, which is not finite", hint=f"write {source}=0.7")
    return Weighted(source, weight)


def _refuse_misspelt(text: str) -> None:
    """Raise UsageError where something exists whose name is followed by an equals sign and no number."""
    for adapter in (text[:at] for at, character in enumerate(text) if character == "="):
        if os.path.lexists(adapter):
            raise UsageError(
                f"'{text}' does not exist, and '{adapter}' does", hint=f"a weight is written {adapter}=0.7"
            )


def parse_share(text: str) -> float:
    """A number in (0, 1]."""
    if not _NUMBER.fullmatch(text.strip()):
        percent = text.strip().removesuffix("%")
        hint = f"did you mean {_as_share(float(percent))}?" if _NUMBER.fullmatch(percent) else None
        raise UsageError(f"'{text}' is no share, a number above 0 and at most 1", hint=hint)
    share = float(text)
    if not 0 < share <= 1:
        hint = f"did you mean {_as_share(share)}?" if 1 < share <= 100 else None
        raise UsageError(f"{text.strip()} is no share, a number above 0 and at most 1", hint=hint)
    return share


def _as_share(percent: float) -> str:
    return f"{percent / 100:.6g}"


class _Parsed(_ParamType):
    """A value that one function reads; its refusal is printed with the name of the option.

    choices: what a shell offers to complete; None for file names.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], choices: Callable[[], Iterable[str]] | None = tuple):
        self.name = name
        self.parse = parse
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except UsageError as error:
            if param is None or not isinstance(param, click.Option):
                raise
            raise UsageError(f"{param.opts[-1]}: {error.message}", hint=error.hint) from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        if self.choices is None:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(choice) for choice in self.choices() if choice.startswith(incomplete)]


def _parse_dtype(text: str) -> str:
    from loratools.storage.casting import stored_dtype

    return stored_dtype(text)


def _parse_source(text: str) -> str:
    if not text:
        raise UsageError("an empty argument names no source")
    return text


def _parse_path(text: str) -> Path:
    if not text:
        # As a path, the empty string is the working folder.
        raise UsageError("an empty string names no file or folder")
    return Path(text)


def _parse_device(text: str) -> str:
    from loratools.ops.common.device import ensure_device

    ensure_device(text)
    return text


def parse_setting(text: str) -> tuple[str, str]:
    """Split a setting into its name and its value.

    `density=0.3` -> ("density", "0.3").
    """
    name, equals, value = text.partition("=")
    if not (name.strip() and equals and value.strip()):
        raise UsageError(f"'{text}' is no setting of an option", hint="write option=value, as in density=0.3")
    return name.strip(), value.strip()


def parse_text(text: str) -> tuple[str, str]:
    """Split a text for the header of a file into its key and its value, which may be empty.

    `modelspec.title=Ink` -> ("modelspec.title", "Ink").
    """
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise UsageError(f"'{text}' is no key with its text", hint="write KEY=TEXT, as in modelspec.title=Ink")
    return key.strip(), value


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas.

    `1,0.5,0` -> (1.0, 0.5, 0.0).
    """
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not _NUMBER.fullmatch(word)]:
        raise UsageError(f"'{bad[0]}' is no number", hint="write numbers with commas between them: 1,0.5,0")
    return tuple(map(float, words))


def parse_module_weight(text: str) -> tuple[str, tuple[float, ...]]:
    """Split a weight of modules into the glob and its numbers.

    `*.q_proj=0.5` -> ("*.q_proj", (0.5,)).
    """
    glob, equals, numbers = text.rpartition("=")
    if not glob or not equals:
        raise UsageError(f"'{text}' is no weight of modules", hint="write GLOB=W, as in '*.q_proj=0.5'")
    return glob, parse_numbers(numbers)


def parse_rule(text: str) -> tuple[str, float]:
    """Split a rule for ranks into its name and its number.

    `sv_fro=0.9` -> ("sv_fro", 0.9).
    """
    name, equals, number = text.partition("=")
    if not equals or not _NUMBER.fullmatch(number.strip()):
        raise UsageError(f"'{text}' is no rule with its number", hint="write NAME=F, as in sv_fro=0.9")
    return name.strip(), float(number)


def _unchanged(text: str) -> str:
    return text


def _split(text: str) -> tuple[str, ...]:
    """The names of a list with commas; one empty name of an empty text."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) or ("",)


def _verbs() -> tuple[str, ...]:
    return registry.names("cli")


def _methods() -> tuple[str, ...]:
    return registry.names("methods")


def _rules() -> tuple[str, ...]:
    return registry.names("checks")


def _programs() -> Iterable[str]:
    from loratools.checks.common.programs import PROGRAMS

    return PROGRAMS


def _formats_that(ability: str) -> list[str]:
    return [name for name in registry.names("formats") if hasattr(registry.load("formats", name), ability)]


def _devices() -> tuple[str, ...]:
    return ("auto", "cpu", "cuda", "mps")


def _dtypes() -> tuple[str, ...]:
    return ("float32", "bfloat16", "float16", "float64")


SIZE = _Parsed("size", parse_size)
SETTING = _Parsed("setting", parse_setting)
TEXT = _Parsed("text", parse_text)
NUMBERS = _Parsed("numbers", parse_numbers)
MODULE_WEIGHT = _Parsed("weight", parse_module_weight)
RULE = _Parsed("rule", parse_rule)
SHARE = _Parsed("share", parse_share)
WEIGHTED = _Parsed("adapter", parse_weighted, None)
DTYPE = _Parsed("dtype", _parse_dtype, _dtypes)
SOURCE = _Parsed("source", _parse_source, None)
BASE = _Parsed("base", _parse_source, None)
PATH = _Parsed("path", _parse_path, None)
DEVICE = _Parsed("device", _parse_device, _devices)
# The functions of the verbs refuse a name that does not exist, with what there is.
METHOD = _Parsed("method", _unchanged, _methods)
METHODS = _Parsed("methods", _split, lambda: ("all", *_methods()))
PROGRAM = _Parsed("program", _unchanged, _programs)
CHECK_RULE = _Parsed("rule", _unchanged, _rules)
READ_FORMAT = _Parsed("format", _unchanged, lambda: _formats_that("read"))
WRITTEN_FORMAT = _Parsed("format", _unchanged, lambda: _formats_that("write"))
VERB = _Parsed("verb", _unchanged, _verbs)


def as_mapping(ctx: click.Context, param: click.Parameter, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a repeatable option as a mapping; the last of the same name counts."""
    return dict(pairs)


out = option(OUTPUT, "-o", "--out", required=True, type=PATH, metavar="PATH", help="Where to write the result.")
overwrite = option(OUTPUT, "--overwrite", is_flag=True, help="Replace the files that loratools wrote.")
resume = option(EXECUTION, "--resume", is_flag=True, help="Go on with a killed run of the same inputs and options.")
set_metadata = option(
    OUTPUT,
    "--set-metadata",
    multiple=True,
    type=TEXT,
    callback=as_mapping,
    metavar="KEY=TEXT",
    help="Write this text into the header of the file, such as modelspec.title=Ink; an empty text removes the key.",
)
strip_metadata = option(
    OUTPUT,
    "--strip-metadata",
    is_flag=True,
    help="Leave out the texts of the source's header: title, prompts, settings of the training.",
)
card = option(
    OUTPUT,
    "--card/--no-card",
    default=True,
    help="Write a model card (README.md) into an output folder. The default.",
)
plan = option(EXECUTION, "--plan", is_flag=True, help="Print what would be done, and stop.")
dtype = option(
    OUTPUT,
    "--dtype",
    type=DTYPE,
    metavar="DTYPE",
    help="Dtype of the stored weights: float32, bfloat16, float16, float64.",
)
float32_dtype = option(
    OUTPUT,
    "--dtype",
    type=DTYPE,
    default="F32",
    metavar="DTYPE",
    help="Dtype of the stored weights: float32, bfloat16, float16, float64.  [default: float32]",
)
threads = option(EXECUTION, "--threads", type=click.IntRange(min=1), metavar="N", help="Number of workers.")
device = option(
    EXECUTION,
    "--device",
    type=DEVICE,
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="Compute on: cpu, cuda, cuda:N, mps, or auto.",
)
seed = option(EXECUTION, "--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed.")
include = option(
    SELECTION, "--include", multiple=True, metavar="GLOB", help="Take only the modules whose names match; repeatable."
)
exclude = option(
    SELECTION, "--exclude", multiple=True, metavar="GLOB", help="Leave out the modules whose names match; repeatable."
)
to_format = option(
    OUTPUT,
    "--format",
    type=WRITTEN_FORMAT,
    default="peft",
    show_default=True,
    metavar="FORMAT",
    help="Format to write; see 'loratools formats'.",
)
output_format = option(
    OUTPUT,
    "--format",
    type=WRITTEN_FORMAT,
    metavar="FORMAT",
    help="Format to write. Where it is not given: the format of the adapters, or peft.",
)
base = option(
    INPUT,
    "--base",
    type=BASE,
    metavar="BASE",
    help=(
        "The model that the adapter is for, where its names need one: a checkpoint, its config.json, or the "
        "family of an image model."
    ),
)
from_format = option(
    INPUT,
    "--from",
    "from_format",
    type=READ_FORMAT,
    metavar="FORMAT",
    help="The format to read the adapters as, where detection is wrong.",
)
rank_from = option(
    INPUT,
    "--rank-from",
    type=click.Choice(["tensors", "config"]),
    help="Which rank the scale is computed with, where tensors and config disagree.",
)
initial = option(
    INPUT,
    "--initial",
    type=PATH,
    multiple=True,
    help="The adapter as it was before training, which is subtracted (PiSSA, OLoRA, CorDA, LoRA-GA); repeatable.",
)
allow_partial = option(
    SELECTION, "--allow-partial", is_flag=True, help="Leave out what does not fit the base, and list it."
)
expert_packing = option(
    INPUT,
    "--expert-packing",
    type=click.Choice(["peft", "expert-major"]),
    help="How fused experts share the columns of B, where the files do not say it.",
)
expert_orientation = option(
    INPUT,
    "--expert-orientation",
    type=click.Choice(["out-in", "in-out"]),
    help="How square fused experts are stored, where the files do not say it.",
)
rank = option(RANK, "--rank", type=click.IntRange(min=1), metavar="N", help="Largest rank of each module.")
energy = option(
    RANK,
    "--energy",
    type=SHARE,
    metavar="F",
    help="Smallest rank that keeps this share of the energy (squared norm) of each module.",
)
error = option(
    RANK, "--error", type=SHARE, metavar="F", help="Smallest rank with at most this relative error in each module."
)
max_rank = option(
    RANK, "--max-rank", type=click.IntRange(min=1), metavar="N", help="No module gets a higher rank, whatever the rule."
)
max_size = option(
    RANK,
    "--max-size",
    type=SIZE,
    metavar="SIZE",
    help="Choose the ranks of all modules so that the file has at most this size.",
)
max_params = option(
    RANK,
    "--max-params",
    type=click.IntRange(min=1),
    metavar="N",
    help="Choose the ranks of all modules so that they have at most N parameters.",
)

_JSON = option(PRINTING, "--json", is_flag=True, help="Print one JSON document on stdout.")
_QUIET = option(PRINTING, "-q", "--quiet", is_flag=True, help="Print only errors and what was asked for.")
_VERBOSE = option(
    PRINTING, "-v", "--verbose", is_flag=True, help="Print more: what was matched, and every detail of an error."
)
_DEBUG = option(PRINTING, "--debug", is_flag=True, help="Show the traceback of an error.")

_HTML = option(
    PRINTING, "--html", type=PATH, metavar="FILE", help="Also write the report as one self-contained HTML page."
)
_OVERWRITE_PAGE = option(PRINTING, "--overwrite", is_flag=True, help="Replace a page or picture that loratools wrote.")
_PLOT = option(
    PRINTING,
    "--plot",
    type=PATH,
    metavar="FILE",
    help="Also draw the numbers: .png, .svg or .pdf. Needs the extra 'plot'.",
)


def html(command: _Command) -> Callable[..., Any]:
    """--html, of a verb that has --overwrite: its command calls `output.html(report)` once. Stands below `common`."""

    @wraps(command)
    def run(*args: Any, html: Path | None, output: Output, **options: Any) -> Any:
        if html is not None:
            page = PageFile(html, options["overwrite"], click.get_current_context().obj or ())
            page.check(options.get("out"))
            output = output._replace(page=page)
        return command(*args, output=output, **options)

    return _HTML(run)


def html_alone(command: _Command) -> Callable[..., Any]:
    """Options `--html` and `--overwrite` of a verb that writes nothing else."""

    @html
    @wraps(command)
    def run(*args: Any, overwrite: bool, **options: Any) -> Any:
        return command(*args, **options)

    return _OVERWRITE_PAGE(run)


def plot(command: _Command) -> Callable[..., Any]:
    """--plot, of a verb that has --overwrite: its command calls `output.plot(report)` once.

    Stands below `common`, and above what takes --overwrite away.
    """

    @wraps(command)
    def run(*args: Any, plot: Path | None, output: Output, **options: Any) -> Any:
        if plot is not None:
            plot_file = PlotFile.of(plot, options)
            plot_file.check()
            output = output._replace(plot_file=plot_file)
        return command(*args, output=output, **options)

    return _PLOT(run)


def common(command: _Command) -> Callable[..., Any]:
    """What every verb takes: --json, -q, -v, --debug. The command gets them as `output`."""

    @wraps(command)
    def run(*args: Any, json: bool, quiet: bool, verbose: bool, debug: bool, **options: Any) -> Any:
        # `debug` is for the error boundary, which reads the arguments itself: it also meets errors of parsing them.
        verb = click.get_current_context().info_name or ""
        return command(*args, output=Output(verb, json=json, quiet=quiet, verbose=verbose), **options)

    return _JSON(_QUIET(_VERBOSE(_DEBUG(run))))
