"""Linear layers of routed experts for GPUs."""

from engram_compilers.kernels.gpu.experts import (
    expert_linear_int4,
    expert_linear_int8,
    pack_expert_int4,
    pack_expert_int8,
)

__all__ = ["expert_linear_int4", "expert_linear_int8", "pack_expert_int4", "pack_expert_int8"]
