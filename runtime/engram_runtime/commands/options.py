"""Options that several commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from engram_runtime.drafting.mask import DEFAULT_CONFIDENCE
from engram_runtime.drafting.options import DRAFTERS, NO_DRAFTS, DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.executor import EXECUTORS, MOST_THREADS
from engram_runtime.sampling import SamplingOptions
from engram_runtime.sizes import parse_size
from engram_runtime.tables.opening import AUTO_OPTIONS
from engram_runtime.tables.options import TABLE_IO, TableOptions
from engram_runtime.trust.levels import LEVELS, LOCAL, parse_trust

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
target_option = click.option(
    "--target", metavar="NAME", help="Run the library compiled for this target.  [default: this machine's]"
)
overlay_option = click.option(
    "--overlay",
    "overlays",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Rows to use in place of a table's, from engram tables diff, or a cartridge in place of all of them; "
    "of several the last one comes first.",
)
on_or_off_option = click.option(
    "--tables", type=click.Choice(["on", "off"]), default="on", show_default=True, help="Read them, or not."
)
force_option = click.option("--force", is_flag=True, help="Replace a file that exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def table_options(command: Command) -> Command:
    """Add ``--tables`` and `reading_options`; `read_options` makes `TableOptions` of them."""
    return on_or_off_option(reading_options(command))


def reading_options(command: Command) -> Command:
    """Add ``--table-io`` and ``--table-ram``."""
    for option in reversed(
        [
            click.option(
                "--table-io",
                type=click.Choice(TABLE_IO),
                default=AUTO_OPTIONS.io,
                show_default=True,
                help="Hold tables in memory, map them or read their rows; auto measures what is best.",
            ),
            click.option(
                "--table-ram",
                type=parse_size,
                metavar="SIZE",
                help="Most memory for resident tables, such as 512MiB.  [default: half of what is free]",
            ),
        ]
    ):
        command = option(command)
    return command


def read_options(tables: str, table_io: str, table_ram: int | None, overlays: tuple[Path, ...] = ()) -> TableOptions:
    """Return how tables are to be read.

    Raises:
        RequestError: the options contradict one another.
    """
    options = TableOptions(io=table_io, ram_bytes=table_ram, overlays=overlays)
    if tables == "off" and options != AUTO_OPTIONS:
        raise RequestError(
            "--table-io, --table-ram and --overlay say how tables are read, with --tables off none is; "
            "leave out one or the other"
        )
    return options


AUTO = "auto"


def draft_options(command: Command) -> Command:
    """Add ``--draft``, ``--draft-k`` and those of masks, which the command gets as ``drafts``, `DraftOptions`."""

    @functools.wraps(command)
    def with_drafts(
        *, draft: str, draft_k: int | None, mask_id: int | None, mask_confidence: float | None, **others: Any
    ) -> Any:
        drafts = DraftOptions(drafter=draft, drafts=draft_k, mask_id=mask_id, confidence=mask_confidence)
        return command(drafts=drafts, **others)

    added: Any = with_drafts
    for option in reversed(
        [
            click.option(
                "--draft",
                type=click.Choice(DRAFTERS),
                default=NO_DRAFTS.drafter,
                show_default=True,
                help="Draft tokens that the model verifies several at once: by text before, the bundle's draft head or "
                "masks the model was trained on. What is said stays the same, bit for bit with tvm, but for "
                "mask-approximate; onnxruntime rounds passes of several tokens in another way.",
            ),
            click.option(
                "--draft-k",
                type=_number_or_auto,
                metavar="N|auto",
                default=AUTO,
                show_default=True,
                help="Drafts a forward pass; auto measures what pays, 0 included (with masks it is 3).",
            ),
            click.option("--mask-id", type=int, help="Token of a mask.  [default: that of published models]"),
            click.option(
                "--mask-confidence",
                type=float,
                help=f"Least probability of a guess at a mask that is taken.  [default: {DEFAULT_CONFIDENCE}]",
            ),
        ]
    ):
        added = option(added)
    return cast(Command, added)


def _number_or_auto(text: str) -> int | None:
    if text == AUTO:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is neither a number nor {AUTO}") from error


def trust_options(command: Command) -> Command:
    """Add ``--trust`` and ``--sha256``, which the command gets as ``trust``, `Trust`."""

    @functools.wraps(command)
    def with_trust(*, trust: str, digests: tuple[str, ...], **others: Any) -> Any:
        return command(trust=parse_trust(trust, digests), **others)

    added: Any = with_trust
    for option in reversed(
        [
            click.option(
                "--trust",
                type=click.Choice(LEVELS),
                default=LOCAL,
                show_default=True,
                help="local runs machine code that this user compiled here or trusts, see engram trust; signed asks "
                "for signatures of bundle and code by a trusted key.",
            ),
            click.option(
                "--sha256",
                "digests",
                multiple=True,
                metavar="DIGEST",
                help="Run this manifest alone, and machine code of this digest whoever made it; engram inspect shows "
                "both, each is given by an option of its own.",
            ),
        ]
    ):
        added = option(added)
    return cast(Command, added)


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
