"""Records traces: a text is tokenised and hashed, no graph is run and no row is read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.lens.chunks import chunks
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.lens.trace_file import check_size
from engram_runtime.table_spec import TableSpec
from engram_runtime.tokenizer import TextTokenizer

PIECE_CHARS = 1 << 18  # of text tokenised at a time
CHUNK_TOKENS = 8192  # hashed at a time


def text_token_ids(
    tokenizer: TextTokenizer, path: Path, most: int, progress: Callable[[int], None] = lambda count: None
) -> NDArray[np.int64]:
    """Return the first ``most`` token ids of a UTF-8 text, tokenised in pieces that end where a line does.

    Args:
        progress: told the bytes of each piece.

    Raises:
        RequestError: a text that can't be read, is not UTF-8 or has no tokens.
    """
    pieces: list[NDArray[np.int64]] = []
    count = 0
    for piece in _pieces(path):
        ids = tokenizer.encode(piece, add_special_tokens=not pieces)
        pieces.append(np.array(ids, dtype=np.int64))
        count += len(ids)
        progress(len(piece.encode()))
        if count >= most:
            break
    if not count:
        raise RequestError(f"text {path} has no tokens; give one that has some")
    return np.concatenate(pieces)[:most]


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE_CHARS):
                yield piece + file.readline(PIECE_CHARS)
    except OSError as error:
        raise RequestError(f"text {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"text {path} is not UTF-8; convert it") from error


def record_trace(
    bundle: Bundle,
    token_ids: NDArray[np.int64],
    *,
    text: str,
    command: str,
    progress: Callable[[int], None] = lambda count: None,
) -> Trace:
    """Return the rows that ``[T]`` token ids read, as one sequence, from every table of a bundle.

    Args:
        progress: told the row ids of each chunk.
    """
    specs = bundle.manifest.tables
    check_size(len(token_ids), sum(spec.keyer.columns for spec in specs))
    sites = [TraceSite.of(bundle, spec) for spec in specs]
    row_ids = {
        site.site: _row_ids(bundle, spec, token_ids, site.dtype, progress)
        for site, spec in zip(sites, specs, strict=True)
    }
    return Trace(model=bundle.manifest.model.name, text=text, command=command, sites=tuple(sites), row_ids=row_ids)


def _row_ids(
    bundle: Bundle,
    spec: TableSpec,
    token_ids: NDArray[np.int64],
    dtype: np.dtype[Any],
    progress: Callable[[int], None],
) -> NDArray[np.signedinteger[Any]]:
    keyer = bundle.keyer(spec.keyer)
    row_ids = np.empty((len(token_ids), keyer.columns), dtype=dtype)
    done = 0
    for history, chunk in chunks(token_ids, CHUNK_TOKENS, keyer.context):
        row_ids[done : done + len(chunk)] = keyer.row_ids(history, chunk)
        done += len(chunk)
        progress(len(chunk) * keyer.columns)
    return row_ids
