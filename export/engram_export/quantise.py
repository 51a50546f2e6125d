"""Weight formats by rounding: int8 per output channel, and int4 in two levels.

int8:  w[n, k] = (code - 128) * scale[n]
int4:  w[n, k] = (code - zero[n, g]) * multiplier[n, g] * scale[n],  g = k // 32,
       where (code - zero) * multiplier fits int8, so integer kernels sum it exactly over all of K.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # weights that share a multiplier and a zero, and ONNX MatMulNBits' block
INT8_ZERO = 128
MAX_CODE = 15
MAX_MULTIPLIER = 16
SEARCH_ROWS = 256  # rows searched at once: bounds the memory of the int4 search


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """``codes [N, K]`` uint8 with zero point 128, ``scale [N, 1]`` float32."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]

    def dequantise(self) -> NDArray[np.float32]:
        """Return ``[N, K]``."""
        return (self.codes.astype(np.float32) - INT8_ZERO) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """``codes [N, K]`` 0..15, ``multiplier`` and ``zero`` ``[N, K / 32]`` uint8, ``scale [N, 1]`` float32."""

    codes: NDArray[np.uint8]
    multiplier: NDArray[np.uint8]
    zero: NDArray[np.uint8]
    scale: NDArray[np.float32]

    def dequantise(self) -> NDArray[np.float32]:
        """Return ``[N, K]``."""
        zero, multiplier = (np.repeat(part.astype(np.float32), BLOCK, axis=1) for part in (self.zero, self.multiplier))
        return (self.codes.astype(np.float32) - zero) * multiplier * self.scale


def quantise_int8(weight: NDArray[np.float32]) -> Int8Weight:
    """Round ``[N, K]`` to int8 with one scale per row, the largest magnitude at 127."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / _nonzero(scale)) + INT8_ZERO
    return Int8Weight(codes.astype(np.uint8), scale)


def quantise_int4(weight: NDArray[np.float32]) -> Int4Weight:
    """Round ``[N, K]`` to two-level int4, K a multiple of 32.

    The scale of a row puts the widest group's step at `MAX_MULTIPLIER`; every group then takes the
    (multiplier, zero) with the least squared error.
    """
    parts = [_search(weight[start : start + SEARCH_ROWS]) for start in range(0, len(weight), SEARCH_ROWS)]
    codes, multiplier, zero, scale = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Int4Weight(codes, multiplier, zero, scale)


def zero_range(multiplier: int) -> tuple[int, int]:
    """Return the smallest and largest zero for which (code - zero) * multiplier stays in -128..127."""
    return max(0, MAX_CODE - 127 // multiplier), min(MAX_CODE, 128 // multiplier)


def _search(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    groups = weight.reshape(len(weight), -1, BLOCK)  # [N, G, 32]
    scale = _row_scale(groups)  # [N, 1]
    scaled = groups / _nonzero(scale)[:, :, None]
    low = np.minimum(scaled.min(axis=2), 0)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    codes = np.zeros(groups.shape, dtype=np.uint8)
    multiplier = np.ones(low.shape, dtype=np.uint8)
    zero = np.zeros(low.shape, dtype=np.uint8)
    for candidate, step in product(range(1, MAX_MULTIPLIER + 1), (-1, 0, 1)):
        # A good zero puts the smallest value of the group at code 0, a step more, or a step less and clips it.
        offset = np.clip(np.floor(-low / candidate) + step, *zero_range(candidate))[:, :, None]
        trial = np.clip(np.rint(scaled / candidate) + offset, 0, MAX_CODE)
        error = np.square((trial - offset) * candidate - scaled).sum(axis=2)
        better = error < best
        best[better] = error[better]
        codes[better] = trial[better].astype(np.uint8)
        multiplier[better], zero[better] = candidate, offset[:, :, 0][better].astype(np.uint8)
    return codes.reshape(weight.shape), multiplier, zero, scale


def _row_scale(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``[N, 1]``: one step of the widest group is MAX_MULTIPLIER scales, within what int8 can hold."""
    high = np.maximum(groups.max(axis=2), 0)
    low = np.minimum(groups.min(axis=2), 0)
    step = ((high - low) / MAX_CODE).max(axis=1, keepdims=True)
    # A group with all its values on one side reaches 15 steps, int8 only 128 / multiplier of them.
    reach = np.maximum(high, -low).max(axis=1, keepdims=True)
    scale: NDArray[np.float32] = np.maximum(step / MAX_MULTIPLIER, reach / np.float32(127))
    return scale


def _nonzero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(scale == 0, np.float32(1), scale)
