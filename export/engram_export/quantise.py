"""Weight formats by rounding: int8 per output channel, and int4 in two levels.

int8:  w[n, k] = (code - 128) * scale[n]
int4:  w[n, k] = (code - zero[n, g]) * multiplier[n, g] * scale[n],  g = k // 32,
       where (code - zero) * multiplier fits int8, so integer kernels sum it exactly over all of K.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import CheckpointError

BLOCK = 32  # weights that share a multiplier and a zero, and ONNX MatMulNBits' block
INT8_ZERO = 128
MAX_CODE = 15
MAX_MULTIPLIER = 16
# Parts of names of layers that are few bytes and the most sensitive: never below int8.
ALWAYS_INT8 = frozenset({"lm_head", "mtp", "sites", "site", "index", "mixer_connection", "feed_forward_connection"})
SEARCH_ROWS = 256  # rows searched at once: bounds the memory of the int4 search

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


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


def num_blocks(name: str, in_features: int) -> int:
    """Return the blocks of a row of weight ``name``; raises CheckpointError if they aren't whole."""
    if in_features % BLOCK:
        raise CheckpointError(
            f"{name} has {in_features} inputs, quantised weights need a multiple of {BLOCK}; export with --quant none"
        )
    return in_features // BLOCK


def quantise_int8(weight: NDArray[np.float32]) -> Int8Weight:
    """Round ``[N, K]`` to int8 with one scale per row, the largest magnitude at 127."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / nonzero(scale)) + INT8_ZERO
    return Int8Weight(codes.astype(np.uint8), scale)


def quantise_int4(weight: NDArray[np.float32]) -> Int4Weight:
    """Round ``[N, K]`` to two-level int4, K a multiple of 32.

    The scale of a row puts the widest group's step at `MAX_MULTIPLIER`; every group then takes the
    (multiplier, zero) with the least squared error.
    """
    parts = [_round_rows(weight[start : start + SEARCH_ROWS]) for start in range(0, len(weight), SEARCH_ROWS)]
    codes, multiplier, zero, scale = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Int4Weight(codes, multiplier, zero, scale)


def _round_rows(weight: Floats) -> tuple[Codes, Codes, Codes, Floats]:
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = row_scale(blocks)
    multiplier, zero = search_blocks(blocks, scale)
    steps = blocks / nonzero(scale)[:, :, None] / multiplier[:, :, None]
    codes = np.clip(np.rint(steps) + zero[:, :, None], 0, MAX_CODE)
    return codes.reshape(weight.shape).astype(np.uint8), multiplier, zero, scale


def zero_range(multiplier: int) -> tuple[int, int]:
    """Return the smallest and largest zero for which (code - zero) * multiplier stays in -128..127."""
    return max(0, MAX_CODE - 127 // multiplier), min(MAX_CODE, 128 // multiplier)


def row_scale(blocks: Floats) -> Floats:
    """Return ``[N, 1]`` for ``[N, G, 32]``: one step of the widest block is MAX_MULTIPLIER scales, as int8 can hold."""
    high = np.maximum(blocks.max(axis=2), 0)
    low = np.minimum(blocks.min(axis=2), 0)
    step = ((high - low) / MAX_CODE).max(axis=1, keepdims=True)
    # A block with all its values on one side reaches 15 steps, int8 only 128 / multiplier of them.
    reach = np.maximum(high, -low).max(axis=1, keepdims=True)
    scale: Floats = np.maximum(step / MAX_MULTIPLIER, reach / np.float32(127))
    return scale


def search_blocks(blocks: Floats, scale: Floats) -> tuple[Codes, Codes]:
    """Return the multipliers and zeros ``[N, G]`` with the least squared error for ``[N, G, 32]``."""
    scaled = blocks / nonzero(scale)[:, :, None]
    low = np.minimum(scaled.min(axis=2), 0)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    multiplier, zero = np.ones(low.shape, dtype=np.uint8), np.zeros(low.shape, dtype=np.uint8)
    error = np.empty_like(scaled)
    for candidate in range(1, MAX_MULTIPLIER + 1):
        rounded = np.rint(scaled / np.float32(candidate))
        for step in (-1, 0, 1):
            # A good zero puts the smallest value of the block at code 0, a step more, or a step less and clips it.
            offset = np.clip(np.floor(-low / candidate) + step, *zero_range(candidate))
            np.minimum(rounded, MAX_CODE - offset[:, :, None], out=error)
            np.maximum(error, -offset[:, :, None], out=error)
            np.subtract(np.multiply(error, np.float32(candidate), out=error), scaled, out=error)
            total = np.einsum("ngk,ngk->ng", error, error)
            better = total < best
            best[better] = total[better]
            multiplier[better], zero[better] = candidate, offset[better].astype(np.uint8)
    return multiplier, zero


def nonzero(scale: Floats) -> Floats:
    """Return a divisor: one where the scale is zero, and so are the values."""
    return np.where(scale == 0, np.float32(1), scale)
