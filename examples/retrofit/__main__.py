"""``python -m examples.retrofit``: each step of adding a memory and a draft head to a model, as a command."""

import click

from engram_runtime.command_line import run_command
from engram_runtime.lazy_group import LazyGroup

# name -> module:attribute, in the order they are run
COMMANDS = {
    "words": "examples.retrofit.words_command:words",
    "generate": "examples.retrofit.mtp_commands:generate",
    "site": "examples.retrofit.site_command:site",
    "cartridge": "examples.retrofit.cartridge:cartridge",
    "train-head": "examples.retrofit.mtp_commands:train_head",
    "acceptance": "examples.retrofit.mtp_commands:acceptance",
    "bundle": "examples.retrofit.bundle_command:bundle",
    "evaluate": "examples.retrofit.evaluation:evaluate",
    "card": "examples.retrofit.report:card",
    "compare": "examples.retrofit.report:compare",
}


@click.command(cls=LazyGroup, modules=COMMANDS)
def retrofit() -> None:
    """Add Engram memory and a draft head to a language model that is already trained."""


if __name__ == "__main__":
    run_command(retrofit, "retrofit")
