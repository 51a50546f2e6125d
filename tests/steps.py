"""Steps of executors that tests make up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import PendingRows, StepInputs


@dataclass(frozen=True, slots=True)
class FunctionStep:
    """A function as an executor's step."""

    run: Callable[[StepInputs], NDArray[np.float32]]
    told: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        return self.run(inputs)


def filled_rows(rows: PendingRows) -> NDArray[np.float32]:
    """Wait for rows and return them in a fresh array."""
    values = np.full(rows.shape, np.nan, dtype=np.float32)
    rows.fill(values)
    return values


def ready_rows(values: NDArray[np.float32]) -> PendingRows:
    """Return rows that needn't be waited for."""
    return PendingRows(values.shape, lambda out: np.copyto(out, values))
