"""Answers on their way to their files, and what they come to."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_runtime.batch.input_file import read_input
from engram_runtime.batch.lines import LineIndex
from engram_runtime.batch.output_file import OutputFile
from engram_runtime.batch.result import Result
from engram_runtime.errors import RequestError

Put = Callable[[Result], None]


@dataclass(slots=True)
class Tally:
    """What was answered so far, lines of the input without blank ones.

    Attributes:
        lines: in all.
        before: answered by runs before this one.
        answered: by this run, ``failed`` of them with an error.
    """

    lines: int
    before: int
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, result: Result) -> None:
        """Count an answer."""
        self.answered += 1
        self.failed += result.failed
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens


@contextlib.contextmanager
def open_batch(source: Path, output: Path, errors: Path | None) -> Iterator[tuple[LineIndex, Tally, Put]]:
    """Yield the lines that have no answer yet, the count of all, and what takes an answer.

    Args:
        errors: where answers that tell of an error go; None for ``output``.

    Raises:
        RequestError: as `read_input` and `OutputFile`, or the output is of another input.
    """
    if errors is not None and errors.absolute() == output.absolute():
        raise RequestError(f"{errors} is the output itself; leave out --errors or choose another file")
    index = read_input(source)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(OutputFile(path)) for path in (output, errors) if path is not None]
        for file in files:
            file.check_belongs(index)
        pending = index.without(np.concatenate([file.index.keys for file in files]))
        tally = Tally(len(index), len(index) - len(pending))

        def put(result: Result) -> None:
            files[-1 if result.failed else 0].append(result.text)
            tally.add(result)

        yield pending, tally, put
