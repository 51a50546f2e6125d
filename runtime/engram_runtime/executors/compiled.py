"""Executor on a compiled library: which module runs it is said by the device it was compiled for."""

import importlib

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.executor import Executor
from engram_runtime.library import CPU, NPU, OPENCL, library_device

DEVICES = {
    CPU: "engram_runtime.executors.tvm_library",
    NPU: "engram_runtime.npu.executor",
    OPENCL: "engram_runtime.gpu.executor",
}


def load(bundle: Bundle, *, threads: int | None, target: str | None) -> Executor:
    """Load the library for ``target``, or the one for a CPU that fits this machine.

    Raises:
        BundleError: its description is damaged.
        TargetError: there is none, it doesn't fit, or it can't be loaded.
    """
    device = library_device(bundle, target)
    if device not in DEVICES:
        raise TargetError(
            f"library {target} is for device {device!r}, this runtime runs {sorted(DEVICES)}; compile for a target of "
            "those, which engram targets lists"
        )
    executor: Executor = importlib.import_module(DEVICES[device]).load(bundle, threads=threads, target=target)
    return executor
