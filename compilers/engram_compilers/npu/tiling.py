"""Choose how a product goes through a systolic array: how many rows at a time, and how many tiles of sums.

Rows are cut into blocks; a block's weight tiles are each loaded once. The outputs are cut into spans of tiles whose
sums are held together; within a span the inputs are the outer loop, so a strip of inputs (a block's rows of one input
tile) serves the whole span. Where all strips of a block fit, they are loaded once; else once for every span.
"""

from dataclasses import dataclass

from engram_runtime.npu.device import Product
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import slots
from engram_runtime.npu.tiles import Tiles

DOUBLE_BUFFER = 2  # slots in which one is filled while the other is read


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        tiles: the product's, of the array.
        row_block: rows held at a time.
        span: output tiles whose sums are held at a time.
        inputs_once: whether a block's inputs are loaded once, not once for every span.
    """

    tiles: Tiles
    row_block: int
    span: int
    inputs_once: bool

    @property
    def blocks(self) -> int:
        return -(-self.tiles.product.rows // self.row_block)

    @property
    def spans(self) -> int:
        return -(-self.tiles.output_tiles // self.span)

    @property
    def dma_bytes(self) -> int:
        """Bytes of weights, inputs and sums that are moved, commands left out."""
        product = self.tiles.product
        moved = product.compulsory_bytes(product.rows) + (self.blocks - 1) * product.weight_bytes
        return moved if self.inputs_once else moved + (self.spans - 1) * product.rows * product.inputs


def choose_tiling(geometry: SystolicArray, product: Product) -> Tiling:
    """Return the tiling that moves the fewest bytes, of equal ones that with the largest blocks of rows."""
    tiles = Tiles(geometry, product)
    row_blocks = sorted({-(-product.rows // blocks) for blocks in range(1, product.rows + 1)}, reverse=True)
    fitting = [row_block for row_block in row_blocks if min(slots(geometry, row_block).values()) >= DOUBLE_BUFFER]
    return min((_tiling(geometry, tiles, row_block) for row_block in fitting), key=lambda tiling: tiling.dma_bytes)


def _tiling(geometry: SystolicArray, tiles: Tiles, row_block: int) -> Tiling:
    """Return the best tiling of a size of blocks.

    Spans that read the inputs again are as wide as can be: their sums leave one slot, in which the next span begins
    while they are stored.
    """
    held = slots(geometry, row_block)
    if tiles.input_tiles <= held["input"]:
        return Tiling(tiles, row_block, span=1, inputs_once=True)
    fits_whole = tiles.output_tiles <= held["sums"]
    span = tiles.output_tiles if fits_whole else held["sums"] - 1
    return Tiling(tiles, row_block, span=span, inputs_once=fits_whole)
