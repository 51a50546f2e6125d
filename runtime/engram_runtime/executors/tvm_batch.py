"""Batches of sequences of any size on functions compiled for a few."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows, Step, StepInputs


def batch_sizes(count: int, most: int) -> Sequence[int]:
    """Split ``count`` sequences into as few batches of up to ``most`` as hold them."""
    full, rest = divmod(count, most)
    return [most] * full + [rest] * (rest > 0)


class PaddedStep:
    """A step of ``size`` sequences that serves the first ``count`` of them; the others begin anew at every pass."""

    def __init__(self, step: Step, count: int, size: int) -> None:
        self._step = step
        self._count = count
        self._size = size

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `Step.told`."""
        return {name: values[: self._count] for name, values in self._step.told.items()}

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step`."""
        unread = self._size - self._count
        padded = replace(
            inputs,
            token_ids=np.pad(inputs.token_ids, (0, unread)),
            position=np.pad(np.asarray(inputs.position), (0, unread)),
            logit_rows=np.arange(self._size, dtype=np.int64),
            rows={site: self._padded(rows) for site, rows in inputs.rows.items()},
        )
        return self._step(padded)[: self._count]

    def _padded(self, rows: PendingRows) -> PendingRows:
        return PendingRows((self._size, *rows.shape[1:]), partial(self._fill, rows))

    def _fill(self, rows: PendingRows, out: NDArray[np.float32]) -> None:
        rows.fill(out[: self._count])
        out[self._count :] = 0
