"""completion: let a shell complete verbs, options and names."""

from __future__ import annotations

import click

from loratools.cli.common.grouped_help import verb
from loratools.cli.common.options import common
from loratools.cli.common.output import Output
from loratools.errors import UsageError

SHELLS = ("bash", "zsh", "fish", "powershell")


@verb("completion", short_help="Print the script that lets a shell complete commands.")
@click.argument("shell", type=click.Choice(SHELLS))
@common
def command(shell: str, *, output: Output) -> None:
    """Print the script that lets a shell complete verbs, options, choices, methods, formats and file names.

    The script asks loratools itself, so that it stays right when loratools is upgraded.

    \b
    Examples:
      loratools completion bash > ~/.local/share/bash-completion/completions/loratools
      source <(loratools completion zsh)
      loratools completion fish > ~/.config/fish/completions/loratools.fish
      loratools completion powershell | Out-String | Invoke-Expression
    """
    from click.shell_completion import ShellComplete, get_completion_class

    parent = click.get_current_context().parent
    assert parent is not None
    complete = get_completion_class(shell)
    if complete is None:
        raise UsageError(
            f"the installed click has no completion for {shell}", hint="a newer click has: pip install -U click"
        )
    # The method of the base class: bash's own starts a bash to look at its version.
    script = ShellComplete.source(complete(parent.command, {}, "loratools", "_LORATOOLS_COMPLETE"))
    if output.json:
        output.document({"shell": shell, "script": script})
    else:
        output.text(script)
