"""``engram completion``: what a shell needs to complete the project's commands."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
PROGRAMS = ("engram", "engram-export")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script by which SHELL completes engram and engram-export.

    \b
    bash, zsh: eval "$(engram completion bash)" in ~/.bashrc, or zsh in ~/.zshrc
    fish:      engram completion fish > ~/.config/fish/conf.d/engram.fish
    """
    for program in PROGRAMS:
        click.echo(script(shell, program))


def script(shell: str, program: str) -> str:
    """Return the script that makes a shell ask a program of click's for completions."""
    kind = get_completion_class(shell)
    assert kind is not None
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()  # the one that click looks at
    return kind(click.Command(program), {}, program, variable).source()
