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


def unpacked(packed: NDArray[np.uint8], tiles: Tiles) -> NDArray[np.int8]:
    """Return a packed weight as int8 ``[N * K]``, tile after tile as an int8 weight is packed."""
    product, columns = tiles.product, tiles.geometry.columns
    if product.weights == "int8":
        return packed[: product.weight_bytes].view(np.int8)
    whole = product.outputs // columns * columns
    split = whole * (product.weight_bytes // product.outputs)
    parts = [_from_codes(packed[:split], product.inputs, columns)]
    if whole < product.outputs:
        parts.append(_from_codes(packed[split : product.weight_bytes], product.inputs, product.outputs - whole))
    return np.concatenate(parts)


def _from_codes(packed: NDArray[np.uint8], inputs: int, outputs: int) -> NDArray[np.int8]:
    """Return the weights of blocks of ``outputs`` int4 outputs; bytes wrap to what int8 holds."""
    blocks = packed.reshape(-1, inputs // GROUP, HALF + 1, outputs)
    codes, header = blocks[:, :, :HALF], blocks[:, :, HALF:]
    values = np.empty((*blocks.shape[:2], GROUP, outputs), np.uint8)
    values[:, :, :HALF], values[:, :, HALF:] = codes & np.uint8(15), codes >> np.uint8(4)
    values -= header >> np.uint8(4)
    values *= (header & np.uint8(15)) + np.uint8(1)
    return values.reshape(-1).view(np.int8)
