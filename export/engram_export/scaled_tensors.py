"""FP8 weights and their scales read as one float32 tensor: value = payload * scale of its tile.

Scales stand beside a weight ``X.weight`` as ``X.weight_scale_inv`` or ``X.weight_scale`` (fp8 checkpoints of Hugging
Face) or as ``X.scale`` (DeepSeek). All of them are multiplied, the inverse ones too: they are inverse to quantising.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint, TensorSource
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_runtime.errors import CheckpointError
from engram_runtime.records import E8M0_VALUES, FLOAT8_E4M3_VALUES

FLOAT8 = "F8_E4M3"
E8M0 = ("F8_E8M0", "U8")  # exponents stand in checkpoints under their own name and as plain bytes
WEIGHT = ".weight"
HUGGING_FACE_BLOCK = (128, 128)  # of fp8 checkpoints whose config does not say


class StoredTensors(TensorSource, Protocol):
    """Tensors that can also be read as they are stored."""

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it."""

    def read_raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read rows of the first axis in the tensor's own dtype, float8 as uint8."""

    def check_readable(self, name: str) -> None:
        """Refuse a tensor that `read` can't convert, without reading it."""


class ScaledTensors:
    """A tensor source whose FP8 weights are read as float32 and whose scales are hidden; the rest is as it was."""

    def __init__(self, tensors: StoredTensors, block: tuple[int, int]) -> None:
        """Find the scales by their names; ``block`` is the tile of the last two axes that shares a scale."""
        self._tensors, self._block = tensors, block
        known = frozenset(tensors.names())
        weights = [name for name in known if tensors.dtype(name) == FLOAT8]
        self._scales = {weight: next((name for name in _names(weight) if name in known), None) for weight in weights}
        self._hidden = frozenset(self._scales.values())
        self._checked: set[str] = set()

    def names(self) -> list[str]:
        """List the tensors without the scales."""
        return [name for name in self._tensors.names() if name not in self._hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            CheckpointError: a dtype that can't be read, or an FP8 weight without finite scales that fit.
        """
        shape = self._tensors.shape(name)
        if name in self._scales:
            scales, _ = self._tile(name, shape)
            self._check_scales(scales)
        else:
            self._tensors.check_readable(name)
        return shape

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole tensor as fresh float32; raises CheckpointError for a scale that is not finite."""
        if name not in self._scales:
            return self._tensors.read(name)
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis as fresh float32, and only the scales they need.

        Raises:
            CheckpointError: a scale that is not finite, by name and row.
        """
        if name not in self._scales:
            return self._tensors.read_rows(name, start, stop)
        payload = self._tensors.read_raw_rows(name, start, stop)
        values: NDArray[np.float32] = FLOAT8_E4M3_VALUES[payload]
        values *= self._scales_of(name, values.shape, start)
        return values

    def _scales_of(self, name: str, rows: Sequence[int], start: int) -> NDArray[np.float32]:
        """Return scales that fit values of shape ``rows``, which begin at row ``start`` of a weight."""
        scales, tile = self._tile(name, self._tensors.shape(name))
        if not tile:
            return _finite(scales, 0, self._tensors.read(scales))
        first, last = start // tile[0], -(-(start + rows[0]) // tile[0])
        values = _finite(scales, first, self._read_scales(scales, first, last))
        places = [np.arange(size) // length for size, length in zip(rows, tile, strict=True)]
        places[0] = np.arange(start, start + rows[0]) // tile[0] - first
        return values[np.ix_(*places)]

    def _tile(self, weight: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return a weight's scales and how many values of each axis share one, () where one number is all."""
        if (scales := self._scales[weight]) is None:
            raise CheckpointError(f"{weight} is {FLOAT8} without scales, expected {' or '.join(_names(weight))}")
        found = self._tensors.shape(scales)
        if len(found) < len(shape) and prod(found) == 1:
            return scales, ()
        tile = _tile(shape, found, self._block)
        if tile is None:
            raise CheckpointError(
                f"{scales} has shape {list(found)}, {weight} {list(shape)} wants one scale for each {list(self._block)}"
            )
        return scales, tile

    def _check_scales(self, name: str) -> None:
        """Read a weight's scales, which are few beside it, the first time its shape is asked for."""
        if name not in self._checked:
            shape = self._tensors.shape(name)
            _finite(name, 0, self._read_scales(name, 0, shape[0]) if shape else self._tensors.read(name))
            self._checked.add(name)

    def _read_scales(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if self._tensors.dtype(name) in E8M0:
            values: NDArray[np.float32] = E8M0_VALUES[self._tensors.read_raw_rows(name, start, stop)]
            return values
        return self._tensors.read_rows(name, start, stop)


def weight_block(config: Mapping[str, Any], default: tuple[int, int] = HUGGING_FACE_BLOCK) -> tuple[int, int]:
    """Return the tile that shares a scale, from a config's ``quantization_config``; raises CheckpointError."""
    quantisation = config.get("quantization_config") or {}
    if not isinstance(quantisation, Mapping):
        raise CheckpointError(f"'quantization_config' is {quantisation!r:.80}, wanted an object; correct the config")
    found = quantisation.get("weight_block_size") or default
    if not isinstance(found, Sequence) or len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
        raise CheckpointError(f"'weight_block_size' is {found!r}, wanted two sizes; correct the config")
    return found[0], found[1]


def scaled_tensors(checkpoint: Checkpoint) -> TensorSource:
    """Return a checkpoint's tensors, FP8 weights as float32; others than safetensors as they are."""
    tensors = checkpoint.tensors
    if not isinstance(tensors, SafetensorsFile | SafetensorsShards):
        return tensors
    return ScaledTensors(tensors, weight_block(checkpoint.config))


def _names(weight: str) -> list[str]:
    return [f"{weight}_scale_inv", f"{weight}_scale", f"{weight.removesuffix(WEIGHT)}.scale"]


def _tile(shape: Sequence[int], scales: Sequence[int], block: tuple[int, int]) -> tuple[int, ...] | None:
    """Return the tile that gives ``shape`` so many scales: of each axis a block, one value or all of it."""
    if not len(scales) == len(shape) >= len(block):
        return None
    tile = []
    for size, count, part in zip(shape, scales, [1] * (len(shape) - len(block)) + [*block], strict=True):
        fitting = [length for length in (part, 1, size) if -(-size // length) == count]
        if not fitting:
            return None
        tile.append(fitting[0])
    return tuple(tile)


def _finite(name: str, first: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        found = values[tuple(bad[0])]
        place = [int(bad[0][0]) + first, *bad[0][1:].tolist()] if values.ndim else []
        raise CheckpointError(f"{name} has scale {found} at {place}, expected finite scales; download it again")
    return values
