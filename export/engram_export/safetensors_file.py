"""Read safetensors files lazily, tensor by tensor; nothing stays open between reads."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_export.safetensors_header import NUMPY_DTYPES, TensorEntry, read_header
from engram_export.source_files import check_row_range, read_exactly
from engram_runtime.errors import CheckpointError


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bit patterns; exact, since bfloat16 is the upper half of float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


FLOAT32_CONVERSIONS: dict[str, Callable[[NDArray[Any]], NDArray[np.float32]]] = {
    "F32": lambda values: values,
    "F16": lambda values: values.astype(np.float32),
    "BF16": bfloat16_to_float32,
}


class SafetensorsFile:
    """The tensors of one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self.metadata = read_header(path)

    def names(self) -> list[str]:
        """List the tensors in the order of the header."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as the file spells it, such as ``BF16``."""
        return self._entry(name).dtype

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole F32, F16 or BF16 tensor as a fresh float32 array."""
        return self._to_float32(name)(self.read_raw(name))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis as fresh float32; only their bytes are read."""
        return self._to_float32(name)(self.read_raw_rows(name, start, stop))

    def read_raw(self, name: str) -> NDArray[Any]:
        """Read a whole tensor, fresh, in its own dtype; BF16 comes as uint16, float8 as uint8."""
        entry = self._entry(name)
        return self._read_range(entry, entry.start, entry.stop, entry.shape)

    def read_raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read ``[stop - start, ...]`` rows of the first axis, fresh, in the tensor's own dtype.

        Raises:
            IndexError: the rows are not within ``[0, shape[0]]``; nothing was read.
        """
        entry = self._entry(name)
        check_row_range(name, entry.shape, start, stop)
        row_bytes = prod(entry.shape[1:]) * NUMPY_DTYPES[entry.dtype].itemsize
        shape = (stop - start, *entry.shape[1:])
        return self._read_range(entry, entry.start + start * row_bytes, entry.start + stop * row_bytes, shape)

    def locate(self, name: str) -> tuple[Path, TensorEntry]:
        """Return the file that holds a tensor and where in it the data lies."""
        return self.path, self._entry(name)

    def check_readable(self, name: str) -> None:
        """Refuse a tensor that `read` can't convert; raises CheckpointError without reading it."""
        self._to_float32(name)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r}; the checkpoint lacks a weight the model needs"
            )
        return self._entries[name]

    def _read_range(self, entry: TensorEntry, start: int, stop: int, shape: tuple[int, ...]) -> NDArray[Any]:
        data = read_exactly(self.path, start, stop - start)
        return data.view(NUMPY_DTYPES[entry.dtype]).reshape(shape)

    def _to_float32(self, name: str) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        dtype = self.dtype(name)
        if dtype not in FLOAT32_CONVERSIONS:
            raise CheckpointError(
                f"tensor {name!r} of {self.path} has dtype {dtype}, wanted F32, F16 or BF16; convert the checkpoint"
            )
        return FLOAT32_CONVERSIONS[dtype]


class SafetensorsShards:
    """Several safetensors files read as one; ``files`` maps each tensor's name to the file that holds it."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        self._files = files

    def names(self) -> list[str]:
        """List the tensors in the order of the index."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as its file spells it."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole F32, F16 or BF16 tensor as a fresh float32 array."""
        return self._file(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis as fresh float32; only their bytes are read."""
        return self._file(name).read_rows(name, start, stop)

    def read_raw(self, name: str) -> NDArray[Any]:
        """Read a whole tensor, fresh, in its own dtype; BF16 comes as uint16, float8 as uint8."""
        return self._file(name).read_raw(name)

    def read_raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read ``[stop - start, ...]`` rows of the first axis, fresh, in the tensor's own dtype."""
        return self._file(name).read_raw_rows(name, start, stop)

    def locate(self, name: str) -> tuple[Path, TensorEntry]:
        """Return the file that holds a tensor and where in it the data lies."""
        return self._file(name).locate(name)

    def check_readable(self, name: str) -> None:
        """Refuse a tensor that `read` can't convert; raises CheckpointError without reading it."""
        self._file(name).check_readable(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise CheckpointError(f"the index lists no tensor {name!r}; the checkpoint lacks a weight the model needs")
        return self._files[name]
