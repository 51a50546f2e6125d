"""How a product is cut into tiles of a systolic array, and where a packed weight's tiles lie in memory.

Tiles of one block of outputs follow one another by their inputs, blocks of outputs follow one another. A tile at the
end of the inputs or outputs is as small as what is left: no padding is moved. Within a tile:

int8: ``[k, n]`` int8, a row of the array after the other.
int4: ``[k/32, 17, n]``: of a group of 32 inputs, byte row i of 16 holds inputs i (low nibble) and 16 + i (high), the
    last row holds headers, (multiplier - 1) | zero << 4.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.npu.device import GROUP, Product
from engram_runtime.npu.geometry import SystolicArray

HALF = GROUP // 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """A product's weight tiles: ``input_tiles`` by ``output_tiles`` of them."""

    geometry: SystolicArray
    product: Product

    @property
    def input_tiles(self) -> int:
        return -(-self.product.inputs // self.geometry.rows)

    @property
    def output_tiles(self) -> int:
        return -(-self.product.outputs // self.geometry.columns)

    def inputs_of(self, tile: int) -> int:
        """Return how many inputs a tile has."""
        return min(self.geometry.rows, self.product.inputs - tile * self.geometry.rows)

    def outputs_of(self, tile: int) -> int:
        """Return how many outputs a tile has."""
        return min(self.geometry.columns, self.product.outputs - tile * self.geometry.columns)


def unpacked_tile(packed: NDArray[np.uint8], inputs: int, outputs: int, weights: str) -> NDArray[np.float32]:
    """Return a packed tile's weights ``[k, n]``; they are integers, which float32 holds exactly."""
    if weights == "int8":
        return packed.view(np.int8).reshape(inputs, outputs).astype(np.float32)
    groups = inputs // GROUP
    packed = packed.reshape(groups, HALF + 1, outputs)
    codes, header = packed[:, :HALF], packed[:, HALF:]
    values = np.empty((groups, GROUP, outputs), np.float32)
    values[:, :HALF], values[:, HALF:] = codes & np.uint8(15), codes >> np.uint8(4)
    values -= header >> np.uint8(4)
    values *= (header & np.uint8(15)) + np.uint8(1)
    return values.reshape(inputs, outputs)
