"""How weights lie in memory for GPUs: 32 outputs side by side, 16 bytes of each in turn.

Threads with neighbouring outputs then read neighbouring 16 bytes at once.
"""

import numpy as np
from numpy.typing import NDArray

from engram_compilers.kernels.loops import round_up
from engram_compilers.kernels.packing import (
    BLOCK_BIAS,
    GROUP,
    INT8_BIAS,
    Arrays,
    Bytes,
    int4_header,
    pad,
    require_bits,
    require_groups,
)
from engram_compilers.kernels.quantise import PLANE_MULTIPLE

TILE = 32  # outputs side by side: the threads of a warp, or of half a wavefront
CHUNK = 16  # bytes a thread loads of its output in turn


def tiled(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, B] -> [Np/32, B/16, 32, 16], N rounded up to 32 with zeros; B is a multiple of 16."""
    padded = pad(values, TILE, CHUNK)
    outputs, width = padded.shape
    return padded.reshape(outputs // TILE, TILE, width // CHUNK, CHUNK).transpose(0, 2, 1, 3).copy()


def tiled_groups(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """[N, G] -> [Np/32, G, 32], N rounded up to 32 with zeros."""
    padded = pad(values, TILE, 1)
    outputs, groups = padded.shape
    return padded.reshape(outputs // TILE, TILE, groups).transpose(0, 2, 1).copy()


def pack_int8(weight: Bytes) -> Arrays:
    """Pack weights stored as value + 128, ``[N, K]``, for `linear_int8` and `embed_int8`.

    Returns:
        weight: int8 ``[Np/32, Kp/16, 32, 16]``, the values themselves; K is rounded up to 64.
    """
    unbiased = (pad(weight, 1, PLANE_MULTIPLE, INT8_BIAS) ^ np.uint8(INT8_BIAS)).astype(np.uint8)
    return {"weight": tiled(unbiased).view(np.int8)}


def pack_int4(codes: Bytes, multiplier: Bytes, zero: Bytes) -> Arrays:
    """Pack ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]`` for `linear_int4`.

    Returns:
        codes: ``[Np/32, Kp/32, 32, 16]``; byte i of a group's 16 holds inputs i (low nibble) and 16 + i (high nibble).
        header: ``[Np/32, Kp/32, 32]``, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
    """
    require_groups(codes.shape[1])
    header = pad(int4_header(multiplier, zero), 1, PLANE_MULTIPLE // GROUP)
    return {"codes": tiled(_nibbles(pad(codes, 1, PLANE_MULTIPLE))), "header": tiled_groups(header)}


def pack_block(codes: Bytes, block_scale: NDArray[np.float32], bits: int) -> Arrays:
    """Pack Q4_0 or Q8_0 ``codes [N, K]`` (value + 8 or 128) with ``block_scale [N, K/32]`` for `linear_block`.

    Returns:
        codes: as `pack_int4` (4 bits) or `pack_int8` (8 bits) lay them out, values + 8 or + 128.
        block_scale: float32 ``[Np/32, Kp/32, 32]``.
    """
    require_bits(bits)
    require_groups(codes.shape[1])
    padded = pad(codes, 1, PLANE_MULTIPLE, BLOCK_BIAS[bits])
    scale = pad(block_scale, 1, PLANE_MULTIPLE // GROUP)
    return {"codes": tiled(_nibbles(padded) if bits == 4 else padded), "block_scale": tiled_groups(scale)}


def _nibbles(codes: Bytes) -> Bytes:
    """[N, K] -> [N, K/2]: the two halves of a group of 32 in the low and high nibbles."""
    outputs, inputs = codes.shape
    grouped = codes.reshape(outputs, inputs // GROUP, 2, GROUP // 2)
    return (grouped[:, :, 0] | (grouped[:, :, 1] << np.uint8(4))).reshape(outputs, inputs // 2)


def tiles_of(out_features: int) -> int:
    """Return the tiles of 32 outputs."""
    return round_up(out_features, TILE) // TILE
