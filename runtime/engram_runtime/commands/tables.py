"""``engram tables``: look into a bundle's host tables."""

import click

from engram_runtime.lazy_group import LazyGroup

# name -> module:attribute
COMMANDS: dict[str, str] = {
    "stat": "engram_runtime.commands.tables_stat:stat",
    "trace": "engram_runtime.commands.tables_trace:trace",
    "mrc": "engram_runtime.commands.tables_mrc:mrc",
    "heat": "engram_runtime.commands.tables_heat:heat",
    "warm": "engram_runtime.commands.tables_warm:warm",
    "diff": "engram_runtime.commands.tables_diff:diff",
    "why": "engram_runtime.commands.tables_why:why",
}


@click.command(cls=LazyGroup, modules=COMMANDS)
def tables() -> None:
    """Look into host tables: what is read, what it costs, what it says."""
