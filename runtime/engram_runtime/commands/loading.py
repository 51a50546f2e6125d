"""How commands that generate load a bundle: the options for it, and what they come to."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.options import (
    draft_options,
    executor_option,
    overlay_option,
    read_options,
    table_options,
    target_option,
    threads_option,
    trust_options,
)
from engram_runtime.drafting.options import DraftOptions
from engram_runtime.llm import LLM
from engram_runtime.new_file import check_place, new_file
from engram_runtime.tables.options import TableOptions
from engram_runtime.tracing.recorder import Recorder
from engram_runtime.trust.levels import Trust

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What the user said of it."""

    executor: str
    threads: int | None
    target: str | None
    tables_on: bool
    tables: TableOptions
    drafts: DraftOptions
    trust: Trust

    @contextlib.contextmanager
    def load(self, bundle: Path, trace: Path | None = None) -> Iterator[LLM]:
        """Yield a loaded bundle, its tables announced; a trace is written once it is done with, be it by an error.

        Args:
            trace: where the times of what is generated go, None where they aren't taken.

        Raises:
            EngramError: as `LLM` and `engram_runtime.new_file.new_file`.
        """
        if trace is not None:
            check_place(trace, replace=True)
        with LLM(
            bundle,
            self.executor,
            threads=self.threads,
            target=self.target,
            tables_on=self.tables_on,
            tables=self.tables,
            drafts=self.drafts,
            announce=announce_table,
            trust=self.trust,
        ) as llm:
            if trace is None:
                yield llm
                return
            llm.record(recorder := Recorder())
            try:
                yield llm
            finally:
                with new_file(trace, replace=True) as file:
                    file.write(recorder.timeline.to_json())

    def figures(self, llm: LLM) -> dict[str, Any]:
        """Return what ran, as JSON values."""
        return {"executor": self.executor, "threads": llm.executor.threads, "tables_on": self.tables_on}


def loading_options(command: Command) -> Command:
    """Add the options of `Loading`, which the command gets as ``loading``."""

    @functools.wraps(command)
    def with_loading(
        *,
        tables: str,
        table_io: str,
        table_ram: int | None,
        overlays: tuple[Path, ...],
        executor: str,
        threads: int | None,
        target: str | None,
        drafts: DraftOptions,
        trust: Trust,
        **others: Any,
    ) -> Any:
        loading = Loading(
            executor=executor,
            threads=threads,
            target=target,
            tables_on=tables == "on",
            tables=read_options(tables, table_io, table_ram, overlays),
            drafts=drafts,
            trust=trust,
        )
        return command(loading=loading, **others)

    added: Any = with_loading
    for option in (
        trust_options,
        overlay_option,
        table_options,
        threads_option,
        target_option,
        executor_option,
        draft_options,
    ):
        added = option(added)
    return cast(Command, added)


trace_option = click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write a timeline of look-ups, forward passes and drafts to this file, for ui.perfetto.dev; one that "
    "exists is replaced.",
)
