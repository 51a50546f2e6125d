"""Batches of sequences of any size on functions compiled for a few."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import BatchInputs, PendingRows
from engram_runtime.manifest import EMBEDDINGS

if TYPE_CHECKING:
    from engram_runtime.executors.tvm_library import TvmStep


def batch_sizes(count: int, most: int) -> Sequence[int]:
    """Split ``count`` sequences into as few batches of up to ``most`` as hold them."""
    full, rest = divmod(count, most)
    return [most] * full + [rest] * (rest > 0)


class TvmBatchStep:
    """A function of ``size`` sequences that serves the first ``count``.

    The others take token 0 at position 0 of states that nobody reads: what of those goes by position begins anew at
    every pass, windows and recurrent states go on from what the last pass left. The experts they are routed to are
    read, and count in `Executor.expert_bytes_read`.
    """

    def __init__(self, step: "TvmStep", count: int, size: int) -> None:
        self._step = step
        self._count = count
        self._size = size

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `BatchStep.told`."""
        return {name: values[: self._count] for name, values in self._step.told.items()}

    def __call__(self, inputs: BatchInputs) -> NDArray[np.float32]:
        """See `BatchStep` and `TvmStep.run`."""
        others = (0, self._size - self._count)
        before = {
            "token_ids": np.pad(inputs.token_ids, others),
            "position": np.pad(inputs.positions, others),
            "logit_rows": np.arange(self._size, dtype=np.int64),
        }
        rows = {site: self._padded(pending) for site, pending in inputs.rows.items()}
        after = {} if inputs.embeddings is None else {EMBEDDINGS: np.pad(inputs.embeddings, (others, (0, 0)))}
        return self._step.run(before, rows, after)[: self._count]

    def _padded(self, rows: PendingRows) -> PendingRows:
        return PendingRows((self._size, *rows.shape[1:]), partial(self._fill, rows))

    def _fill(self, rows: PendingRows, out: NDArray[np.float32]) -> None:
        rows.fill(out[: self._count])
        out[self._count :] = 0
