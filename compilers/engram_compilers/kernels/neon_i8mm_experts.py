"""Linear layers of routed experts for Arm with the dot product of unsigned and signed bytes."""

from functools import partial

from engram_compilers.kernels import tiled_experts
from engram_compilers.kernels.neon_i8mm import ISA
from engram_compilers.kernels.tiled_experts import pack_expert_int4, pack_expert_int8

__all__ = ["expert_linear_int4", "expert_linear_int8", "pack_expert_int4", "pack_expert_int8"]

expert_linear_int8 = partial(tiled_experts.expert_linear_int8, ISA)
expert_linear_int4 = partial(tiled_experts.expert_linear_int4, ISA)
