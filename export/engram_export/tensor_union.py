"""Several tensor sources read as one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import TensorSource
from engram_runtime.errors import CheckpointError


class TensorUnion:
    """The tensors of all ``sources``; the same source may stand twice, the same name in two of them may not."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._owner: dict[str, TensorSource] = {}
        for source in sources:
            for name in source.names():
                if self._owner.setdefault(name, source) is not source:
                    raise CheckpointError(f"tensor {name!r} stands both in the checkpoint and in the engram folder")

    def names(self) -> list[str]:
        """List all tensors."""
        return list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._owner[name].shape(name)

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole tensor as float32."""
        return self._owner[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis as float32."""
        return self._owner[name].read_rows(name, start, stop)
