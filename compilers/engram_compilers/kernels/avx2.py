"""Linear layers for x86 with AVX2 and no dot product of bytes."""

from functools import partial

from engram_compilers.kernels import avx2_int4, tiled, tiled_block
from engram_compilers.kernels.intrinsics import dot4_avx2
from engram_compilers.kernels.isa import DotIsa
from engram_compilers.kernels.tiled import embed_int8
from engram_compilers.kernels.tiled_packing import pack_block, pack_int4, pack_int8

__all__ = ["ISA", "embed_int8", "linear_block", "linear_int4", "linear_int8", "pack_block", "pack_int4", "pack_int8"]

ISA = DotIsa(dot4=dot4_avx2, weight_bias=128, sums=4)

linear_int8 = partial(tiled.linear_int8, ISA)
linear_int4 = partial(avx2_int4.linear_int4, ISA)
linear_block = partial(tiled_block.linear_block, ISA)
