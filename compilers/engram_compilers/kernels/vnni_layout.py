"""How the tiled families lay weights out in memory: the packers' side in numpy and the kernels' side in vectors.

A *tile* is 16 outputs, a *step* 4 inputs: one vector of 64 bytes holds a step of a tile, byte 4i + b being output
i of the tile, input b of the step. Nibbles hold two neighbouring steps in one vector, the first in the low ones.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lanes, splat
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import GROUP, INT8_BIAS, Bytes, Scalar

VECTOR_BYTES = 64
STEP = 4
GROUP_STEPS = GROUP // STEP

UseStep = Callable[[Expr, Expr], None]  # (step, its vector of weights) -> statements


def tile_bytes(values: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/4, 64]."""
    outputs, inputs = values.shape
    tiled = values.reshape(outputs // LANES, LANES, inputs // STEP, STEP).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(outputs // LANES, inputs // STEP, VECTOR_BYTES)


def tile_nibbles(codes: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/8, 64]."""
    vectors = tile_bytes(codes)
    return vectors[:, ::2] | (vectors[:, 1::2] << np.uint8(4))


def tile_groups(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[N, G] -> [N/16, G, 16]."""
    outputs, groups = values.shape
    return np.ascontiguousarray(values.reshape(outputs // LANES, LANES, groups).transpose(0, 2, 1))


def code_vectors(group: Expr, bits: int) -> list[Expr]:
    """Return the indices of the vectors that hold a group's codes."""
    count = GROUP_STEPS * bits // 8
    return [group * count + i for i in range(count)]


def each_byte_step(codes: Expr, tile: Expr, group: Expr, use: UseStep) -> None:
    """Emit use(step, codes) for every step of a group of bytes."""
    for s in range(GROUP_STEPS):
        step = group * GROUP_STEPS + s
        use(step, codes[tile, step, lanes(0, VECTOR_BYTES)])


def each_nibble_step(codes: Expr, tile: Expr, group: Expr, use: UseStep) -> None:
    """Emit use(step, codes) for every step of a group of nibbles."""
    for s in range(GROUP_STEPS // 2):
        vector = T.Bind(codes[tile, group * (GROUP_STEPS // 2) + s, lanes(0, VECTOR_BYTES)])
        step = group * GROUP_STEPS + 2 * s
        use(step, T.bitwise_and(vector, T.broadcast(T.uint8(15), VECTOR_BYTES)))
        use(step + 1, T.shift_right(vector, T.broadcast(T.uint8(4), VECTOR_BYTES)))


def each_int4_step(
    codes: Expr, header: Expr, tile: Expr, group: Expr, use: UseStep, *, bias: int = INT8_BIAS
) -> None:
    """Emit use(step, weights) for every step of a group: (code - zero) * multiplier + bias (mod 256) as uint8x64.

    ``bias`` is 128 or 0.
    """
    multiplier = T.Bind(_multiplier(header[tile, group, lanes(0)]))
    zero_bytes = T.Bind(rebiased(_zero_bytes(header[tile, group, lanes(0)]), INT8_BIAS - bias))

    def scale(step: Expr, nibbles: Expr) -> None:
        # A 16-bit lane scales its two codes at once: 15 * 16 fits a byte, so nothing carries over.
        scaled = T.reinterpret("uint16x32", nibbles) * multiplier
        use(step, T.reinterpret("uint8x64", scaled) - zero_bytes)

    each_nibble_step(codes, tile, group, scale)


def rebiased(weights: Expr, bias: int) -> Expr:
    """Return uint8x64 with a bias of 128 taken off (mod 256) if ``bias`` is 0, as it is if that is 128."""
    return weights if bias == INT8_BIAS else T.bitwise_xor(weights, T.broadcast(T.uint8(INT8_BIAS), VECTOR_BYTES))


def _pairs(header: Expr) -> Expr:
    """Repeat each of 16 header bytes in both 16-bit halves of its lane, as uint16x32."""
    wide = T.cast(header, "int32x16")
    return T.reinterpret("uint16x32", T.bitwise_or(wide, T.shift_left(wide, splat(16))))


def _multiplier(header: Expr) -> Expr:
    """Return each output's multiplier twice, as uint16x32."""
    return T.bitwise_and(_pairs(header), T.broadcast(T.uint16(15), 32)) + T.broadcast(T.uint16(1), 32)


def _zero_bytes(header: Expr) -> Expr:
    """Return zero * multiplier in the four bytes of each output, as uint8x64."""
    scaled = T.shift_right(_pairs(header), T.broadcast(T.uint16(4), 32)) * _multiplier(header)  # at most 128
    both = T.bitwise_or(scaled, T.shift_left(scaled, T.broadcast(T.uint16(8), 32)))
    return T.reinterpret("uint8x64", both)
