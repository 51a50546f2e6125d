"""Partition a lowered module: which calls go to an accelerator, found by TVM's patterns as it partitions for others.

Each call of a kernel of `KERNELS` becomes a call of a function with the attribute ``Codegen`` = `CODEGEN`, and all else
stays with the host: norms, attention, routers, embeddings, layers on float weights and on blocks with scales of their
own (Q4_0, Q8_0), whose sums are no plain integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import dpl

CODEGEN = "engram_npu"


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A kernel of the family ``portable`` that is a product of integers and scales after it.

    Attributes:
        weights: as `engram_runtime.npu.device.Product` calls them.
        parts: how many of its arguments are the weight: those before the last one, which is the scales.
        routed: whether it is a linear layer of chosen experts.
    """

    weights: str
    parts: int
    routed: bool

    @property
    def arguments(self) -> int:
        """Three of the quantised rows, four of the segments of experts, the weight, its scales."""
        return 3 + 4 * self.routed + self.parts + 1


KERNELS = {  # by what the kernels' names begin with
    "linear_int8_": Offloaded("int8", parts=1, routed=False),
    "linear_int4_": Offloaded("int4", parts=2, routed=False),
    "expert_linear_int8_": Offloaded("int8", parts=1, routed=True),
    "expert_linear_int4_": Offloaded("int4", parts=2, routed=True),
}


def partition(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with every call of an offloaded kernel in a function of its own."""
    patterns = []
    for variable, function in module.functions.items():
        offloaded = offloaded_kernel(variable.name_hint) if isinstance(function, tirx.PrimFunc) else None
        if offloaded is not None:
            arguments = [dpl.wildcard() for _ in range(offloaded.arguments)]
            patterns.append((f"{CODEGEN}.{variable.name_hint}", dpl.is_call_tir(variable.name_hint, arguments)))
    fuse = relax.transform.FuseOpsByPattern(patterns, bind_constants=False, annotate_codegen=True)
    partitioned: tvm.IRModule = fuse(module)
    return partitioned


def offloaded_kernel(name: str) -> Offloaded | None:
    """Return what is offloaded of a kernel of this name."""
    return next((kernel for prefix, kernel in KERNELS.items() if name.startswith(prefix)), None)


@dataclass(frozen=True, slots=True)
class Partition:
    """What one of the functions that `partition` made does.

    Attributes:
        kernel: name of the kernel it calls.
        places: for each argument of the kernel, which of the function's it is.
    """

    kernel: str
    places: tuple[int, ...]

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """Return the kernel's arguments in a call of the function with ``given`` ones."""
        return [given[place] for place in self.places]


def partitions(module: tvm.IRModule) -> dict[str, Partition]:
    """Return the functions that `partition` made, by name."""
    return {
        variable.name_hint: _partition_of(function)
        for variable, function in module.functions.items()
        if isinstance(function, relax.Function) and function.attrs.get("Codegen") == CODEGEN
    }


def _partition_of(function: relax.Function) -> Partition:
    """Look into a partition: it hands its parameters, in their order, to a function within, which calls the kernel."""
    within = function.body.blocks[0].bindings[0].value
    (call,) = (binding.value for block in within.body.blocks for binding in block.bindings)
    kernel, arguments = call.args
    places = {parameter: place for place, parameter in enumerate(within.params)}
    return Partition(kernel.name_hint, tuple(places[argument] for argument in arguments))
