"""What an accelerator is to the compiler: how its weights lie in memory, and command streams for products.

With `engram_runtime.npu.device` this is the whole interface of a device; docs/adding-a-device.md says how to add one.
"""

from collections.abc import Callable
from typing import Any, Protocol

from engram_compilers.kernels.packing import Bytes
from engram_compilers.npu.dot_engine import DotEngineCompiler
from engram_compilers.npu.systolic import SystolicCompiler
from engram_runtime.npu.device import Geometry, Product


class DeviceCompiler(Protocol):
    """Packs weights and writes command streams for a device of one geometry."""

    def pack_int8(self, weight: Bytes) -> Bytes:
        """Lay out a weight stored as value + 128, ``[N, K]``, as the device reads it: ``[B]``."""
        ...

    def pack_int4(self, codes: Bytes, multiplier: Bytes, zero: Bytes) -> Bytes:
        """Lay out ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]``: ``[B]``.

        Raises:
            CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
        """
        ...

    def commands(self, product: Product) -> bytes:
        """Write the command stream of a product.

        Raises:
            TargetError: the product does not fit the device.
        """
        ...


COMPILERS: dict[str, Callable[[Any], DeviceCompiler]] = {
    "systolic": SystolicCompiler,
    "dot-engine": DotEngineCompiler,
}


def compiler_for(geometry: Geometry) -> DeviceCompiler:
    """Return the compiler for an accelerator."""
    return COMPILERS[geometry.accelerator](geometry)
