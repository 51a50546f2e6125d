"""What the tiled kernels ask of an instruction set; all else about them is the same on every machine."""

from collections.abc import Callable
from dataclasses import dataclass

from engram_compilers.kernels.intrinsics import Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """An instruction set with a dot product of bytes.

    Attributes:
        dot4: (total int32x16, weights uint8x64, activations int8x64) -> total[i] + sum_b weights[4i+b] *
            activations[4i+b], exact. It takes the weights' bytes as its instruction does.
        weight_bias: what an int8 weight's byte is above its value: 128 where ``dot4`` takes unsigned bytes,
            0 where it takes signed ones.
        sums: sums of 16 lanes that fit the registers, beside weights and activations.
    """

    dot4: Callable[[Expr, Expr, Expr], Expr]
    weight_bias: int
    sums: int
