"""int8 weights ``X`` and a scale of each of their rows, ``X_scale``, read as one float32 tensor."""

import numpy as np
from numpy.typing import NDArray

from engram_export.scaled_tensors import StoredTensors
from engram_runtime.errors import CheckpointError

INT8, SCALE = "I8", "_scale"


class RowScaledTensors:
    """A tensor source whose int8 weights ``[N, K]`` are read as float32 and whose scales ``[N]`` are hidden."""

    def __init__(self, tensors: StoredTensors) -> None:
        """Find the scales by their names; raises CheckpointError where one is missing or doesn't fit."""
        self._tensors = tensors
        known = frozenset(tensors.names())
        self._scales = {name: f"{name}{SCALE}" for name in known if tensors.dtype(name) == INT8}
        for name, scales in self._scales.items():
            if scales not in known:
                raise CheckpointError(f"{name} is {INT8} without scales, expected {scales}")
            if tensors.shape(scales) != tensors.shape(name)[:1]:
                raise CheckpointError(
                    f"{scales} has shape {list(tensors.shape(scales))}, {name} {list(tensors.shape(name))} wants one "
                    f"scale for each row"
                )

    def names(self) -> list[str]:
        """List the tensors without the scales."""
        hidden = frozenset(self._scales.values())
        return [name for name in self._tensors.names() if name not in hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensors.shape(name)

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole tensor as fresh float32."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis as fresh float32.

        Raises:
            CheckpointError: a scale that is not finite, by name and row.
        """
        if name not in self._scales:
            return self._tensors.read_rows(name, start, stop)
        scales = self._tensors.read_rows(self._scales[name], start, stop)
        if (bad := np.flatnonzero(~np.isfinite(scales))).size:
            raise CheckpointError(
                f"{self._scales[name]} has scale {scales[bad[0]]} in row {start + bad[0]}, expected finite scales"
            )
        values: NDArray[np.float32] = self._tensors.read_raw_rows(name, start, stop).astype(np.float32)
        values *= scales[:, None]
        return values
