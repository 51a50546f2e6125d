"""Code for accelerators: weights as they read them and command streams."""

from engram_compilers.npu.device import DeviceCompiler, compiler_for

__all__ = ["DeviceCompiler", "compiler_for"]
