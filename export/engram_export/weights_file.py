"""Write a safetensors file whose tensors arrive one at a time, in any order."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import CheckpointError
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan

WEIGHTS_ALIGNMENT = 64
TABLE_ALIGNMENT = 64 << 10  # covers pages of 4, 16 and 64 KiB


def check_finite(name: str, first_row: int, values: NDArray[Any]) -> None:
    """Refuse values that are not finite numbers, whose first axis begins at a row of a tensor; integers are.

    Raises:
        CheckpointError: naming the tensor and the place of the first one.
    """
    if values.dtype.kind in "iub":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float32)  # finite wherever all are, unless it overflows; it takes no memory
    if np.isfinite(total):
        return
    sound = np.isfinite(values)
    if not sound.all():
        row, *place = np.argwhere(~np.atleast_1d(sound))[0].tolist()
        found = np.atleast_1d(values)[row, *place]
        raise CheckpointError(
            f"{name} is {found} at {[first_row + row, *place]}, expected finite numbers; download the checkpoint again"
        )


class SafetensorsWriter:
    """A file laid out in advance; every planned tensor must be written before it closes."""

    def __init__(self, path: Path, plans: Sequence[TensorPlan], *, alignment: int = WEIGHTS_ALIGNMENT) -> None:
        """Write the header, padded so that the data starts at a multiple of ``alignment``."""
        self._missing = {plan.name: plan for plan in plans}
        layout = SafetensorsLayout.of(plans, alignment=alignment)
        self.offsets = layout.offsets
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.write_at(0, np.frombuffer(layout.header, dtype=np.uint8))
        os.ftruncate(self._file, len(layout.header) + sum(plan.bytes for plan in plans))

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write a planned tensor; its shape and dtype must be the planned ones.

        Raises:
            CheckpointError: a value is not finite.
        """
        check_finite(name, 0, values)
        plan = self._missing.pop(name)
        if values.shape != plan.shape or values.dtype != np.dtype(plan.dtype):
            raise ValueError(f"{name} is {values.dtype} {values.shape}, planned was {plan.dtype} {plan.shape}")
        self.write_at(self.offsets[name], values)

    def write_rows(self, name: str, start: int, values: NDArray[Any]) -> None:
        """Write rows of a planned tensor from row ``start`` on; the last rows complete it.

        Raises:
            CheckpointError: a value is not finite.
        """
        check_finite(name, start, values)
        plan = self._missing[name]
        row_bytes = plan.bytes // plan.shape[0]
        self.write_at(self.offsets[name] + start * row_bytes, values)
        if start + len(values) == plan.shape[0]:
            del self._missing[name]

    def write_at(self, offset: int, values: NDArray[Any]) -> None:
        """Write raw bytes at an offset of the file."""
        view = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        if kind is None and self._missing:
            raise ValueError(f"planned but never written: {sorted(self._missing)}")
