"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from engram_runtime.executor import EXECUTORS, MOST_THREADS
from engram_runtime.sampling import SamplingOptions

Command = TypeVar("Command", bound=Callable[..., Any])

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
executor_option = click.option(
    "--executor", type=click.Choice(list(EXECUTORS)), default="tvm", show_default=True, help="What runs the graph."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1, max=MOST_THREADS),
    help="Worker threads.  [default: the profile's, else one per core]",
)
tables_option = click.option(
    "--tables", type=click.Choice(["on", "off"]), default="on", show_default=True, help="Read the tables, or not."
)
overlay_option = click.option(
    "--overlay",
    "overlays",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Rows to use in place of a table's, from engram tables diff; of several the last one comes first.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def sampling_options(command: Command) -> Command:
    """Add the options of `SamplingOptions`, their defaults read from there."""
    defaults = SamplingOptions()
    for option in reversed(
        [
            click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True),
            click.option("--temperature", type=float, default=defaults.temperature, show_default=True),
            click.option("--top-k", type=int, default=defaults.top_k, show_default=True, help="0 keeps all."),
            click.option("--top-p", type=float, default=defaults.top_p, show_default=True),
            click.option("--min-p", type=float, default=defaults.min_p, show_default=True),
            click.option("--repetition-penalty", type=float, default=defaults.repetition_penalty, show_default=True),
            click.option("--seed", type=int, help="Makes sampling repeatable."),
        ]
    ):
        command = option(command)
    return command
