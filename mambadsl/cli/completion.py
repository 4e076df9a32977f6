"""`mambadsl completion`: the script that teaches a shell the commands and options."""

from __future__ import annotations

import click

from mambadsl.cli import output
from mambadsl.cli.command import command


@command(
    "completion",
    examples=(
        "mambadsl completion bash",
        "mambadsl completion zsh",
        "mambadsl completion fish",
    ),
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def run(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell.

    bash: add `eval "$(mambadsl completion bash)"` to ~/.bashrc; zsh: the same in ~/.zshrc; fish: write it to
    ~/.config/fish/completions/mambadsl.fish.
    """
    from click.shell_completion import get_completion_class

    from mambadsl.cli.commands import cli

    script = get_completion_class(shell)(cli, {}, "mambadsl", "_MAMBADSL_COMPLETE").source()
    if as_json:
        output.json(shell=shell, text=script)
    else:
        output.text(script)
