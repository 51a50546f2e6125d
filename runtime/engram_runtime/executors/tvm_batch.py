"""Batches of any number of rows on functions compiled for a few."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import BatchInputs
from engram_runtime.executors.padding import padded_rows
from engram_runtime.manifest import EMBEDDINGS

if TYPE_CHECKING:
    from engram_runtime.executors.tvm_library import TvmStep


def batch_sizes(count: int, most: int) -> Sequence[int]:
    """Split ``count`` rows into as few batches of up to ``most`` as hold them."""
    full, rest = divmod(count, most)
    return [most] * full + [rest] * (rest > 0)


class TvmBatchStep:
    """Functions of a few numbers of rows that serve any number up to the largest of them.

    Rows that are left take token 0 at position 0 of states that nobody reads: what of those goes by position begins
    anew at every pass, windows and recurrent states go on from what the last pass left. The experts they are routed to
    are read, and count in `Executor.expert_bytes_read`.
    """

    def __init__(
        self, step: "TvmStep", sizes: Sequence[int], states: Sequence[Sequence[Any]], unread: Sequence[Any]
    ) -> None:
        """Serve sequences with these states, in tensors as the functions take them.

        Args:
            sizes: ascending numbers of rows that ``step`` has a function for.
            unread: states of the rows that are left.
        """
        self._step = step
        self._sizes = sizes
        self._states = states
        self._unread = unread
        self._count = 0  # rows of the last pass

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `BatchStep.told`."""
        return {name: values[: self._count] for name, values in self._step.told.items()}

    def __call__(self, inputs: BatchInputs) -> NDArray[np.float32]:
        """See `BatchStep` and `TvmStep.run`."""
        self._count = count = len(inputs.token_ids)
        size = min(size for size in self._sizes if size >= count)
        others = (0, size - count)
        before = {
            "token_ids": np.pad(inputs.token_ids, others),
            "position": np.pad(inputs.positions, others),
            "logit_rows": np.arange(size, dtype=np.int64),
        }
        rows = {site: padded_rows(pending, size) for site, pending in inputs.rows.items()}
        after = {} if inputs.embeddings is None else {EMBEDDINGS: np.pad(inputs.embeddings, (others, (0, 0)))}
        states = [*(self._states[index] for index in inputs.sequences), *[self._unread] * (size - count)]
        return self._step.run(before, rows, after, list(itertools.chain.from_iterable(states)))[:count]
