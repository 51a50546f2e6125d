"""The ``engram`` command: each subcommand lives in the package it needs, imported when it is called."""

import click

from engram_runtime.command_line import run_command
from engram_runtime.lazy_group import LazyGroup

# name -> module:attribute
COMMANDS = {
    "run": "engram_runtime.commands.run:run",
    "chat": "engram_runtime.commands.chat:chat",
    "serve": "engram_runtime.commands.serve:serve",
    "plan": "engram_runtime.commands.plan:plan",
    "inspect": "engram_runtime.commands.inspect:inspect",
    "verify": "engram_runtime.commands.verify:verify",
    "bench": "engram_runtime.commands.bench:bench",
    "simulate": "engram_runtime.commands.simulate:simulate",
    "tables": "engram_runtime.commands.tables:tables",
    "eval": "engram_runtime.commands.evaluate:evaluate",
    "batch": "engram_runtime.commands.batch:batch",
    "completion": "engram_runtime.commands.completion:completion",
    "doctor": "engram_runtime.commands.doctor:doctor",
    "compile": "engram_compilers.cli:compile_command",
    "trust": "engram_runtime.commands.trust:trust",
    "sign": "engram_runtime.commands.sign:sign_command",
    "keys": "engram_runtime.commands.keys:keys",
    "targets": "engram_targets.cli:targets",
    "pack": "engram_compilers.pack.cli:pack_command",
    "tune": "engram_compilers.tuning.cli:tune",
}


@click.command(cls=LazyGroup, modules=COMMANDS)
@click.version_option(package_name="engram-edge")
def cli() -> None:
    """Run language models with Engram memory."""


def main() -> None:
    """Run the command."""
    run_command(cli, "engram")
