"""Weights and command streams of the dot engine."""

import numpy as np

from engram_compilers.kernels.packing import GROUP, INT8_BIAS, Bytes, int4_header, pad, require_groups
from engram_runtime.npu.device import Product
from engram_runtime.npu.dot_engine import DotEngine, header, words


class DotEngineCompiler:
    """Packs weights and writes command streams for a dot engine of one geometry."""

    def __init__(self, geometry: DotEngine) -> None:
        self._geometry = geometry

    def pack_int8(self, weight: Bytes) -> Bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`; the layout is `engram_runtime.npu.dot_engine`'s."""
        lanes, width = self._geometry.lanes, self._geometry.width
        values = pad(weight ^ np.uint8(INT8_BIAS), lanes, width)  # two's complement: value + 128, its top bit turned
        tiles = values.reshape(len(values) // lanes, lanes, -1, width)
        return tiles.transpose(0, 2, 1, 3).reshape(-1)

    def pack_int4(self, codes: Bytes, multiplier: Bytes, zero: Bytes) -> Bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`: as int8, for nothing unpacks codes on their way."""
        require_groups(codes.shape[1])
        int4_header(multiplier, zero)  # refuses weights that do not fit int8
        values = codes.astype(np.int16) - np.repeat(zero, GROUP, axis=1)
        return self.pack_int8((values * np.repeat(multiplier, GROUP, axis=1) + INT8_BIAS).astype(np.uint8))

    def commands(self, product: Product) -> bytes:
        """See `engram_compilers.npu.device.DeviceCompiler`."""
        return header(self._geometry, product) + words(self._geometry, product).tobytes()
