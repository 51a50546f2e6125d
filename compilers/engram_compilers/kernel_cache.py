"""The kernels of a library, by name."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tvm import relax, tirx

from engram_compilers.kernel_sets import ON_CPU, SharedKernels

MakeKernel = Callable[[], tirx.PrimFunc]


class KernelCache:
    """The kernels of a library, each generated once for its name."""

    def __init__(
        self,
        builder: relax.BlockBuilder,
        family: ModuleType,
        expert_family: ModuleType,
        shared: SharedKernels = ON_CPU,
    ) -> None:
        self.builder = builder
        self.family = family  # engram_compilers.kernels.<family>
        self.expert_family = expert_family  # engram_compilers.kernels.<family>_experts
        self.shared = shared
        self._known: dict[str, Any] = {}

    def get(self, name: str, make: MakeKernel) -> Any:
        """Return the global variable of a kernel, generating it the first time."""
        if name not in self._known:
            self._known[name] = self.builder.add_func(make(), name)
        return self._known[name]
