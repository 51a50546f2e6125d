"""Weights and command streams of the systolic array."""

import numpy as np

from engram_compilers.kernels.packing import INT8_BIAS, Bytes, int4_header, require_groups
from engram_compilers.npu.schedule import schedule
from engram_compilers.npu.tiling import choose_tiling
from engram_runtime.npu.device import GROUP, Product
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import encode
from engram_runtime.npu.tiles import HALF


class SystolicCompiler:
    """Packs weights and writes command streams for an array of one geometry."""

    def __init__(self, geometry: SystolicArray) -> None:
        self._geometry = geometry

    def pack_int8(self, weight: Bytes) -> Bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`; the layout is `engram_runtime.npu.tiles`'."""
        values = weight ^ np.uint8(INT8_BIAS)  # value + 128 with the top bit turned is value, as two's complement
        return np.concatenate([values[outputs].T.reshape(-1) for outputs in self._blocks(len(weight))])

    def pack_int4(self, codes: Bytes, multiplier: Bytes, zero: Bytes) -> Bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`; the layout is `engram_runtime.npu.tiles`'."""
        require_groups(codes.shape[1])
        groups = codes.reshape(len(codes), -1, GROUP)
        halves = groups[:, :, :HALF] | groups[:, :, HALF:] << np.uint8(4)
        packed = np.concatenate([halves, int4_header(multiplier, zero)[:, :, None]], axis=2)  # [N, K/32, 17]
        return np.concatenate([packed[outputs].transpose(1, 2, 0).reshape(-1) for outputs in self._blocks(len(codes))])

    def commands(self, product: Product) -> bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`."""
        return encode(self._geometry, schedule(choose_tiling(self._geometry, product)))

    def _blocks(self, outputs: int) -> list[slice]:
        """Return the outputs of each column of tiles."""
        return [slice(start, start + self._geometry.columns) for start in range(0, outputs, self._geometry.columns)]
