"""Linear layers for Arm with products of 2 by 8 matrices of bytes, unsigned weights by signed activations."""

from functools import partial

from engram_compilers.kernels import tiled, tiled_block, tiled_packing
from engram_compilers.kernels.intrinsics import multiply_usmmla
from engram_compilers.kernels.isa import MatrixIsa
from engram_compilers.kernels.matrix_layout import MATRICES

__all__ = ["ISA", "embed_int8", "linear_block", "linear_int4", "linear_int8", "pack_block", "pack_int4", "pack_int8"]

ISA = MatrixIsa(multiply=multiply_usmmla, weight_bias=128, sums=6)

linear_int8 = partial(tiled.linear_int8, ISA)
linear_int4 = partial(tiled.linear_int4, ISA)
linear_block = partial(tiled_block.linear_block, ISA)
embed_int8 = partial(tiled.embed_int8, layout=MATRICES)
pack_int8 = partial(tiled_packing.pack_int8, layout=MATRICES)
pack_int4 = partial(tiled_packing.pack_int4, layout=MATRICES)
pack_block = partial(tiled_packing.pack_block, layout=MATRICES)
