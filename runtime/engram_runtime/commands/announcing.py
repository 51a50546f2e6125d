"""What commands say of tables as they are opened."""

import sys
import time
from collections.abc import Callable

import click

from engram_runtime.tables.policy import TableChoice

QUIET_S = 1.0  # of loading without a progress bar


def announce_table(choice: TableChoice) -> Callable[[int], None]:
    """Say on stderr how a table is read; its loading gets a progress bar once it takes a while."""
    click.echo(str(choice), err=True)
    started = time.perf_counter()
    bar = click.progressbar(length=choice.table_bytes, label=f"loading {choice.site}", file=sys.stderr)
    loaded = 0

    def finish() -> None:
        if 0 < bar.pos < choice.table_bytes:  # an unfinished bar leaves the terminal without a cursor
            bar.render_finish()

    def progress(num_bytes: int) -> None:
        nonlocal loaded
        loaded += num_bytes
        if time.perf_counter() - started > QUIET_S:
            bar.update(loaded - bar.pos)
            if bar.finished:
                bar.render_finish()

    click.get_current_context().call_on_close(finish)
    return progress
