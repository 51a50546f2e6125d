"""How the tiled families lay weights out in memory: the packers' side in numpy and the kernels' side in vectors.

A *tile* is 16 outputs, an *octet* 8 inputs: the weights of both are two vectors of 64 bytes, *parts* 0 and 1. Here
each part is a *step* of 4 inputs, byte 4i + b being output i of the tile, input b of the step; `matrix_layout` is
another way. Nibbles hold an octet in one vector, part 0 in the low ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, lanes, splat
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import GROUP, INT8_BIAS, Bytes, Scalar

VECTOR_BYTES = 64
STEP = 4
OCTET = 8
GROUP_OCTETS = GROUP // OCTET

UsePart = Callable[[Expr, int, Expr], None]  # (octet, part, its vector of weights) -> statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the weights of a tile lie in its vectors.

    Attributes:
        tile: ``[N, K]`` -> ``[N/16, K/4, 64]``, vector 2o + p being part p of octet o.
        place: (output of a tile, input) -> (vector of the tile, byte of the vector).
        words: numbers of a tile's outputs, uint8x16 -> for each 16-bit word of a vector that of its output, uint16x32:
            one that serves both parts, or one for each.
    """

    tile: Callable[[Bytes], Bytes]
    place: Callable[[Expr, Expr], tuple[Expr, Expr]]
    words: Callable[[Expr], Sequence[Expr]]


def tile_bytes(values: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/4, 64]."""
    outputs, inputs = values.shape
    tiled = values.reshape(outputs // LANES, LANES, inputs // STEP, STEP).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(outputs // LANES, inputs // STEP, VECTOR_BYTES)


def tile_nibbles(codes: Bytes, layout: Layout) -> Bytes:
    """[N, K] -> [N/16, K/8, 64]."""
    vectors = layout.tile(codes)
    return vectors[:, ::2] | (vectors[:, 1::2] << np.uint8(4))


def tile_groups(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[N, G] -> [N/16, G, 16]."""
    outputs, groups = values.shape
    return np.ascontiguousarray(values.reshape(outputs // LANES, LANES, groups).transpose(0, 2, 1))


def code_vectors(group: Expr, bits: int) -> list[Expr]:
    """Return the indices of the vectors that hold a group's codes."""
    count = 2 * GROUP_OCTETS * bits // 8
    return [group * count + i for i in range(count)]


def each_byte_part(codes: Expr, tile: Expr, group: Expr, use: UsePart) -> None:
    """Emit use(octet, part, codes) for every part of a group of bytes."""
    for o, part in product(range(GROUP_OCTETS), range(2)):
        octet = group * GROUP_OCTETS + o
        use(octet, part, codes[tile, octet * 2 + part, lanes(0, VECTOR_BYTES)])


def each_nibble_part(codes: Expr, tile: Expr, group: Expr, use: UsePart) -> None:
    """Emit use(octet, part, codes) for every part of a group of nibbles."""
    for o in range(GROUP_OCTETS):
        octet = group * GROUP_OCTETS + o
        vector = T.Bind(codes[tile, octet, lanes(0, VECTOR_BYTES)])
        use(octet, 0, T.bitwise_and(vector, T.broadcast(T.uint8(15), VECTOR_BYTES)))
        use(octet, 1, T.shift_right(vector, T.broadcast(T.uint8(4), VECTOR_BYTES)))


def each_int4_part(
    codes: Expr, header: Expr, tile: Expr, group: Expr, use: UsePart, *, layout: Layout, bias: int
) -> None:
    """Emit use(octet, part, weights) for every part of a group: (code - zero) * multiplier + bias (mod 256).

    Weights are uint8x64, ``bias`` is 128 or 0.
    """
    words = [T.Bind(word) for word in layout.words(header[tile, group, lanes(0)])]
    multiplier = [T.Bind(multipliers(word)) for word in words]
    zero_bytes = [T.Bind(rebiased(_zero_bytes(word), INT8_BIAS - bias)) for word in words]

    def scale(octet: Expr, part: int, nibbles: Expr) -> None:
        # A 16-bit lane scales its two codes at once: 15 * 16 fits a byte, so nothing carries over.
        scaled = T.reinterpret("uint16x32", nibbles) * multiplier[part % len(words)]
        use(octet, part, T.reinterpret("uint8x64", scaled) - zero_bytes[part % len(words)])

    each_nibble_part(codes, tile, group, scale)


def rebiased(weights: Expr, bias: int) -> Expr:
    """Return uint8x64 with a bias of 128 taken off (mod 256) if ``bias`` is 0, as it is if that is 128."""
    return weights if bias == INT8_BIAS else T.bitwise_xor(weights, T.broadcast(T.uint8(INT8_BIAS), VECTOR_BYTES))


def _place(output: Expr, column: Expr) -> tuple[Expr, Expr]:
    return column // STEP, output * STEP + column % STEP


def _words(numbers: Expr) -> Sequence[Expr]:
    wide = T.cast(numbers, "int32x16")
    return [T.reinterpret("uint16x32", T.bitwise_or(wide, T.shift_left(wide, splat(16))))]


DOTS = Layout(tile=tile_bytes, place=_place, words=_words)


def multipliers(words: Expr) -> Expr:
    """Return the multipliers of header bytes, all uint16x32."""
    return T.bitwise_and(words, T.broadcast(T.uint16(15), 32)) + T.broadcast(T.uint16(1), 32)


def zeros(words: Expr) -> Expr:
    """Return zero * multiplier of header bytes, at most 128, all uint16x32."""
    return T.shift_right(words, T.broadcast(T.uint16(4), 32)) * multipliers(words)


def _zero_bytes(words: Expr) -> Expr:
    """Return zero * multiplier in both bytes of each word, as uint8x64."""
    scaled = zeros(words)
    both = T.bitwise_or(scaled, T.shift_left(scaled, T.broadcast(T.uint16(8), 32)))
    return T.reinterpret("uint8x64", both)
