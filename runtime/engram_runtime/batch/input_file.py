"""The requests of a batch, of which a file may hold any number."""

from pathlib import Path

import numpy as np

from engram_runtime.batch.lines import LineIndex, index_lines, read_lines
from engram_runtime.batch.request import MAX_LINE_BYTES, parse_request, request_key
from engram_runtime.errors import RequestError


def read_input(path: Path) -> LineIndex:
    """Return the index of a file of requests.

    Raises:
        RequestError: it can't be read, holds none, or two of one ``custom_id``.
    """
    try:
        with path.open("rb") as file:
            index = index_lines(path, read_lines(file, MAX_LINE_BYTES), request_key)
    except OSError as error:
        raise RequestError(f"input {path} can't be read: {error.strerror}") from error
    if not len(index):
        raise RequestError(f"input {path} holds no requests; it takes one JSON object a line")
    _refuse_duplicates(index)
    return index


def _refuse_duplicates(index: LineIndex) -> None:
    order = np.argsort(index.keys, kind="stable")
    same = index.keys[order[1:]] == index.keys[order[:-1]]
    if not (count := np.count_nonzero(same)):
        return
    second = order[1:][same].min()
    first = np.flatnonzero(index.keys == index.keys[second])[0]
    (line,) = index.at([second]).lines(MAX_LINE_BYTES)
    custom_id = parse_request(line).custom_id
    more = f", and {count - 1} more lines have one that stands before them" if count > 1 else ""
    raise RequestError(
        f"lines {index.numbers[first]} and {line.number} of {index.path} have the same custom_id {custom_id!r}{more}; "
        "answers are told apart by it, so give each line its own"
    )
