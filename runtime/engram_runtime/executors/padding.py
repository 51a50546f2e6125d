"""Passes that aren't full: tokens after those that are meant, of which nothing is read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows, StepInputs

LARGEST = 8  # passes of so many tokens take little longer than smaller ones; of 16, 8 and 2 take less than a padded one


def chunk_sizes(sizes: Sequence[int], count: int, spare: int) -> Sequence[int]:
    """Return the passes that ``count`` tokens take: the largest first, and the next larger one for a small rest.

    Args:
        sizes: those that were compiled.
        spare: see `engram_runtime.executor.Executor.chunks`.
    """
    chunks: list[int] = []
    while count > 0:
        padded = [size for size in sizes if count <= size <= min(count + spare, LARGEST)]
        chunks.append(min(padded) if padded else max(size for size in sizes if size <= count))
        count -= chunks[-1]
    return chunks


def padded_inputs(inputs: StepInputs, size: int) -> StepInputs:
    """Return the inputs of a pass over ``size`` tokens, the first T of which are those given.

    The others repeat the last token, which needs the least of experts that would not be read anyway, and their rows are
    zeros. Logits are asked for of all of them where they are of all T.
    """
    every = len(inputs.logit_rows) > 1
    return replace(
        inputs,
        token_ids=_padded(inputs.token_ids, size),
        logit_rows=np.arange(size, dtype=np.int64) if every else inputs.logit_rows,
        rows={site: padded_rows(rows, size) for site, rows in inputs.rows.items()},
        hidden=None if inputs.hidden is None else _padded(inputs.hidden, size),
        embeddings=None if inputs.embeddings is None else _padded(inputs.embeddings, size),
    )


def padded_rows(rows: PendingRows, size: int) -> PendingRows:
    """Return ``[size, C, d]`` rows: those given, then zeros."""
    return PendingRows((size, *rows.shape[1:]), partial(_fill, rows))


def _fill(rows: PendingRows, out: NDArray[np.float32]) -> None:
    count = rows.shape[0]
    rows.fill(out[:count])
    out[count:] = 0


def _padded(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Repeat the last of ``values [T, ..]``."""
    return np.concatenate([values, *[values[-1:]] * (size - len(values))])
