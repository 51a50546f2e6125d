"""The ``engram`` command: each subcommand lives in the package it needs, imported when it is called."""

import importlib

import click

from engram_runtime.command_line import run_command
from engram_runtime.errors import TargetError

# name -> module:attribute
COMMANDS = {
    "run": "engram_runtime.commands.run:run",
    "chat": "engram_runtime.commands.chat:chat",
    "inspect": "engram_runtime.commands.inspect:inspect",
    "verify": "engram_runtime.commands.verify:verify",
    "bench": "engram_runtime.commands.bench:bench",
    "eval": "engram_runtime.commands.evaluate:evaluate",
    "compile": "engram_compilers.cli:compile_command",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; raises TargetError where its package is not installed."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise TargetError(
                f"engram {cmd_name} needs {error.name}: pip install 'engram-edge[export,compile,ort]'"
            ) from error
        return command


@click.command(cls=LazyGroup)
@click.version_option(package_name="engram-edge")
def cli() -> None:
    """Run language models with Engram memory."""


def main() -> None:
    """Run the command."""
    run_command(cli, "engram")
