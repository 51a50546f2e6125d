"""Linear layers of routed experts for Arm with products of 2 by 8 matrices of bytes."""

from functools import partial

from engram_compilers.kernels import tiled_experts
from engram_compilers.kernels.matrix_layout import MATRICES
from engram_compilers.kernels.neon_i8mm import ISA

__all__ = ["expert_linear_int4", "expert_linear_int8", "pack_expert_int4", "pack_expert_int8"]

expert_linear_int8 = partial(tiled_experts.expert_linear_int8, ISA)
expert_linear_int4 = partial(tiled_experts.expert_linear_int4, ISA)
pack_expert_int8 = partial(tiled_experts.pack_expert_int8, layout=MATRICES)
pack_expert_int4 = partial(tiled_experts.pack_expert_int4, layout=MATRICES)
