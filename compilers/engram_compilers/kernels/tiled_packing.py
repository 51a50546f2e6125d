"""Pack weights for the tiled families, which all read the same layout; it is described in `vnni_layout`."""

import numpy as np
from numpy.typing import NDArray

from engram_compilers.kernels.loops import LANES
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
from engram_compilers.kernels.vnni_layout import DOTS, Layout, tile_groups, tile_nibbles


def pack_int8(weight: Bytes, layout: Layout = DOTS) -> Arrays:
    """Pack weights stored as value + 128, ``[N, K]``, for `linear_int8` and `embed_int8`.

    Returns:
        weight: ``[Np/16, Kp/4, 64]``, N and K rounded up to 16 and 64; byte 4i + b of vector (t, s) is
            output 16t + i, input 4s + b, or where another layout puts them.
    """
    return {"weight": layout.tile(pad(weight, LANES, PLANE_MULTIPLE, INT8_BIAS))}


def pack_int4(codes: Bytes, multiplier: Bytes, zero: Bytes, layout: Layout = DOTS) -> Arrays:
    """Pack ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]`` for `linear_int4`.

    Returns:
        codes: ``[Np/16, Kp/8, 64]``; byte 4i + b of vector (t, s) is output 16t + i, inputs 8s + b (low nibble)
            and 8s + 4 + b (high nibble), or where another layout puts them.
        header: ``[Np/16, Kp/32, 16]``, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
    """
    require_groups(codes.shape[1])
    header = pad(int4_header(multiplier, zero), LANES, PLANE_MULTIPLE // GROUP)
    return {"codes": tile_nibbles(pad(codes, LANES, PLANE_MULTIPLE), layout), "header": tile_groups(header)}


def pack_block(codes: Bytes, block_scale: NDArray[np.float32], bits: int, layout: Layout = DOTS) -> Arrays:
    """Pack Q4_0 or Q8_0 ``codes [N, K]`` (value + 8 or 128) with ``block_scale [N, K/32]`` for `linear_block`.

    Returns:
        codes: as `pack_int4` (4 bits) or `pack_int8` (8 bits) lay them out.
        block_scale: float32 ``[Np/16, Kp/32, 16]``.

    Raises:
        CompileError: K is not a multiple of 32, or ``bits`` is neither 4 nor 8.
    """
    require_bits(bits)
    require_groups(codes.shape[1])
    padded = pad(codes, LANES, PLANE_MULTIPLE, BLOCK_BIAS[bits])
    scale = pad(block_scale, LANES, PLANE_MULTIPLE // GROUP)
    tiled = tile_nibbles(padded, layout) if bits == 4 else layout.tile(padded)
    return {"codes": tiled, "block_scale": tile_groups(scale)}
