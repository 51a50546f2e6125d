"""``engram tables``: look into a bundle's host tables."""

import click

from engram_runtime.lazy_group import LazyGroup

# name -> module:attribute
COMMANDS: dict[str, str] = {
    "why": "engram_runtime.commands.tables_why:why",
}


@click.command(cls=LazyGroup, modules=COMMANDS)
def tables() -> None:
    """Look into host tables: what is read, what it costs, what it says."""
