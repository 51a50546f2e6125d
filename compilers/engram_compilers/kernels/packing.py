"""What the packers of every kernel family share: checks, padding and the int4 header."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_compilers.kernels.loops import round_up
from engram_runtime.errors import CompileError

GROUP = 32  # inputs that share a multiplier, a zero or a block scale
INT8_BIAS = 128  # int8 weights are stored as value + 128
BLOCK_BIAS = {4: 8, 8: 128}  # what Q4_0 and Q8_0 codes are above their value

_MOST_ELEMENTS = 2**31 - 1

Bytes = NDArray[np.uint8]
Arrays = dict[str, NDArray[Any]]  # in the order of the kernel's arguments
Scalar = TypeVar("Scalar", bound=np.generic)


def require_indexable(what: str, *shape: int) -> None:
    """Refuse a buffer whose elements 32-bit index arithmetic cannot count."""
    elements = int(np.prod(shape, dtype=np.int64))
    if elements > _MOST_ELEMENTS:
        raise CompileError(f"{what} has {elements} elements, kernels index at most {_MOST_ELEMENTS}; split it")


def require_groups(in_features: int) -> None:
    """Refuse a width that is not made of whole groups."""
    if in_features % GROUP:
        raise CompileError(f"in_features is {in_features}, grouped weights need a multiple of {GROUP}")


def require_bits(bits: int) -> None:
    """Refuse a block format other than Q4_0 and Q8_0."""
    if bits not in BLOCK_BIAS:
        raise CompileError(f"block weights have 4 or 8 bits, not {bits}")


def int4_header(multiplier: Bytes, zero: Bytes) -> Bytes:
    """Return the header byte of each group, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: a group's weights (code - zero) * multiplier do not fit int8.
    """
    wide_multiplier, wide_zero = multiplier.astype(np.int32), zero.astype(np.int32)
    legal = (wide_multiplier >= 1) & (wide_multiplier <= 16) & (wide_zero <= 15)
    legal &= ((15 - wide_zero) * wide_multiplier <= 127) & (wide_zero * wide_multiplier <= 128)
    if not legal.all():
        row, group = np.argwhere(~legal)[0]
        raise CompileError(
            f"group {group} of output {row} has multiplier {multiplier[row, group]} and zero {zero[row, group]}, "
            "wanted 1..16 and 0..15 with (15 - zero) * multiplier <= 127 and zero * multiplier <= 128"
        )
    return ((multiplier - 1) | (zero << np.uint8(4))).astype(np.uint8)


def pad(values: NDArray[Scalar], row_multiple: int, column_multiple: int, fill: int = 0) -> NDArray[Scalar]:
    """Return a copy with rows and columns rounded up to a multiple, filled with ``fill``."""
    rows, columns = values.shape
    shape = (round_up(rows, row_multiple), round_up(columns, column_multiple))
    padded = np.full(shape, fill, values.dtype)
    padded[:rows, :columns] = values
    return padded
