"""What the commands that evaluate share: how they load a bundle, the text they score, and their JSON."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from engram_runtime.commands.evaluate import read_text
from engram_runtime.commands.loading import Loading
from engram_runtime.commands.options import (
    overlay_option,
    read_options,
    reading_options,
    target_option,
    threads_option,
    trust_options,
)
from engram_runtime.drafting.options import NO_DRAFTS
from engram_runtime.evaluation.texts import Windows
from engram_runtime.llm import LLM
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.trust.levels import Trust

Command = TypeVar("Command", bound=Callable[..., Any])

limit_option = click.option("--limit", type=click.IntRange(min=1), help="Ask the first ones only.  [default: all]")


def scoring_options(command: Command) -> Command:
    """Add how tables are read, threads and target, which the command gets as ``loading``; it drafts nothing.

    ``--executor`` and ``--tables`` are for those to add that have a choice there.
    """

    @functools.wraps(command)
    def with_loading(
        *,
        executor: str = "tvm",
        threads: int | None,
        target: str | None,
        table_io: str,
        table_ram: int | None,
        overlays: tuple[Path, ...],
        tables: str = "on",
        trust: Trust,
        **others: Any,
    ) -> Any:
        loading = Loading(
            executor=executor,
            threads=threads,
            target=target,
            tables_on=tables == "on",
            tables=read_options(tables, table_io, table_ram, overlays),
            drafts=NO_DRAFTS,
            trust=trust,
        )
        return command(loading=loading, **others)

    added: Any = with_loading
    for option in (trust_options, overlay_option, reading_options, threads_option, target_option):
        added = option(added)
    return cast(Command, added)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToScore:
    """A file, how many of its tokens are scored, and how many of them are a sequence of their own."""

    path: Path
    tokens: int
    window: int

    def windows(self, tokenizer: TextTokenizer, context_length: int) -> Windows:
        """Read and cut it; raises RequestError for a file that can't be read or has nothing to score."""
        window = min(self.window, context_length)
        return Windows.of(tokenizer, read_text(self.path), tokens=self.tokens, window=window)


def text_options(*, required: bool) -> Callable[[Command], Command]:
    """Add ``--text``, ``--tokens`` and ``--window``, which the command gets as ``text``, a `TextToScore` or None."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def with_text(*, text: Path | None, tokens: int, window: int, **others: Any) -> Any:
            chosen = None if text is None else TextToScore(path=text, tokens=tokens, window=window)
            return command(text=chosen, **others)

        added: Any = with_text
        for option in (
            click.option(
                "--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context."
            ),
            click.option(
                "--tokens", type=click.IntRange(min=2), default=2000, show_default=True, help="Tokens to score."
            ),
            click.option(
                "--text", required=required, type=click.Path(path_type=Path), help="UTF-8 text file to score."
            ),
        ):
            added = option(added)
        return cast(Command, added)

    return add


def to_json(figures: Mapping[str, Any]) -> str:
    """Return figures as a JSON object, each `engram_runtime.evaluation.intervals.Estimate` as an object of its own."""
    return json.dumps(figures, default=asdict)


def what_ran(loading: Loading, llm: LLM) -> dict[str, Any]:
    """Return how a bundle was run, as JSON values."""
    return {
        **loading.figures(llm),
        "tables": [choice.figures() for choice in llm.tables],
        "overlays": list(map(str, loading.tables.overlays)),
    }
