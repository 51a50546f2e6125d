"""Kernels for GPUs: blocks of threads, in the TIR that TVM prints as CUDA C++, OpenCL C and Metal alike.

The package is a family of kernels as its siblings are, and its modules stand in for those that processors share.
"""

from engram_compilers.kernels.gpu import (
    activation,
    attention,
    batched_matmul,
    experts,
    float_linear,
    normalise,
    quantise,
    recurrent,
    rotary,
    streams,
)
from engram_compilers.kernels.gpu.block_linear import linear_block
from engram_compilers.kernels.gpu.linear import embed_int8, linear_int4, linear_int8
from engram_compilers.kernels.gpu.packing import pack_block, pack_int4, pack_int8

__all__ = [
    "activation",
    "attention",
    "batched_matmul",
    "embed_int8",
    "experts",
    "float_linear",
    "linear_block",
    "linear_int4",
    "linear_int8",
    "normalise",
    "pack_block",
    "pack_int4",
    "pack_int8",
    "quantise",
    "recurrent",
    "rotary",
    "streams",
]
