"""The kernels that all families of processors have in common, and what a GPU has in their place."""

from dataclasses import dataclass
from types import ModuleType

from engram_compilers.kernels import (
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
from engram_compilers.kernels import gpu as on_gpu

GPU = "gpu"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SharedKernels:
    """Modules that make kernels; those of a set have the functions of the same set for processors.

    Attributes:
        lacking: operators that none of them has kernels for.
    """

    activation: ModuleType
    attention: ModuleType
    batched_matmul: ModuleType
    experts: ModuleType
    float_linear: ModuleType
    normalise: ModuleType
    quantise: ModuleType
    recurrent: ModuleType
    rotary: ModuleType
    streams: ModuleType
    lacking: frozenset[str] = frozenset()


ON_CPU = SharedKernels(
    activation=activation,
    attention=attention,
    batched_matmul=batched_matmul,
    experts=experts,
    float_linear=float_linear,
    normalise=normalise,
    quantise=quantise,
    recurrent=recurrent,
    rotary=rotary,
    streams=streams,
)

ON_GPU = SharedKernels(
    activation=on_gpu.activation,
    attention=on_gpu.attention,
    batched_matmul=on_gpu.batched_matmul,
    experts=on_gpu.experts,
    float_linear=on_gpu.float_linear,
    normalise=on_gpu.normalise,
    quantise=on_gpu.quantise,
    recurrent=on_gpu.recurrent,
    rotary=on_gpu.rotary,
    streams=on_gpu.streams,
    lacking=frozenset({"engram.IndexedAttention"}),
)


def shared_kernels(family: str) -> SharedKernels:
    """Return the kernels beside the linear layers of a family."""
    return ON_GPU if family == GPU else ON_CPU
