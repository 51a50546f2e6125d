"""How weights lie in memory for instructions that multiply matrices of 2 by 8 bytes, such as USMMLA.

As in `vnni_layout`, a tile is 16 outputs and an octet 8 inputs, but the two vectors of a tile's octet are 8 outputs
each: byte 8i + b of part p is output 8p + i, input b. Nibbles hold the two parts of an octet.
"""

from collections.abc import Sequence

import numpy as np
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import LANES
from engram_compilers.kernels.packing import Bytes
from engram_compilers.kernels.vnni_layout import OCTET, VECTOR_BYTES, Layout

_OUTPUTS = LANES // 2  # of a vector


def _tile(values: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/4, 64]."""
    outputs, inputs = values.shape
    tiled = values.reshape(outputs // LANES, LANES, inputs // OCTET, OCTET).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(outputs // LANES, inputs * LANES // VECTOR_BYTES, VECTOR_BYTES)


def _place(output: Expr, column: Expr) -> tuple[Expr, Expr]:
    return column // OCTET * 2 + output // _OUTPUTS, output % _OUTPUTS * OCTET + column % OCTET


def _words(numbers: Expr) -> Sequence[Expr]:
    wide = T.Bind(T.cast(numbers, "uint16x16"))
    outputs = [[part * _OUTPUTS + word * 2 // OCTET for word in range(VECTOR_BYTES // 2)] for part in range(2)]
    return [T.Shuffle([wide, wide], of_words) for of_words in outputs]  # twice: as many lanes as it returns


MATRICES = Layout(tile=_tile, place=_place, words=_words)
