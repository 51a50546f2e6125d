"""Write the commands of a tiling, loads as early in the stream as a slot is free.

The loads before the first MULTIPLY fill the scratchpads. Of a product whose weight's place is known beforehand the
weights come first: they need no planes, so the device loads them while the product before ends and the host works. Of
a routed one the inputs come first.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engram_compilers.npu.tiling import Tiling
from engram_runtime.npu.isa import (
    ACCUMULATE,
    COMMAND,
    FREE_INPUT,
    FREE_WEIGHT,
    LOAD_INPUT,
    LOAD_WEIGHT,
    MULTIPLY,
    STORE,
    Stream,
    slots,
)

Command = tuple[int, int, int, int, int, int, int, int]  # the fields of COMMAND


class _Multiply(NamedTuple):
    """A multiplication in its order.

    Attributes:
        block, input_tile, output_tile: what is multiplied.
        strip: which load of inputs, counted over the stream, it reads. ``frees``: whether it is the last to do so.
        sums: which tile of sums, counted over the stream, it adds to.
    """

    block: int
    input_tile: int
    output_tile: int
    strip: int
    frees: bool
    sums: int


def schedule(tiling: Tiling) -> Stream:
    """Return the command stream of a tiling."""
    multiplies = list(_multiplies(tiling))
    writer = _Writer(tiling, multiplies)
    for place, multiply in enumerate(multiplies):
        writer.load()
        writer.multiply(place, multiply)
    return Stream(tiling.tiles.product, tiling.row_block, np.array(writer.commands, COMMAND))


def _multiplies(tiling: Tiling) -> Iterator[_Multiply]:
    """Yield block after block, span after span, input tile after input tile, output tile after output tile."""
    input_tiles, output_tiles = tiling.tiles.input_tiles, tiling.tiles.output_tiles
    spans = range(0, output_tiles, tiling.span)
    for block in range(tiling.blocks):
        for number, first in enumerate(spans):
            outputs = range(first, min(first + tiling.span, output_tiles))
            load = block if tiling.inputs_once else block * len(spans) + number
            last_read = not tiling.inputs_once or number == len(spans) - 1
            for input_tile in range(input_tiles):
                for output_tile in outputs:
                    frees = last_read and output_tile == outputs[-1]
                    strip, sums = load * input_tiles + input_tile, block * output_tiles + output_tile
                    yield _Multiply(block, input_tile, output_tile, strip, frees, sums)


class _Writer:
    """The commands so far, the loads to come, and how many slots are free. Slots are used in turn."""

    def __init__(self, tiling: Tiling, multiplies: list[_Multiply]) -> None:
        self.commands: list[Command] = []
        self.tiling = tiling
        self.slots = slots(tiling.tiles.geometry, tiling.row_block)
        self.free = dict(self.slots)
        self.weights = deque(enumerate(multiplies))
        self.strips = deque(dict.fromkeys((each.strip, each.block, each.input_tile) for each in multiplies))

    def load(self) -> None:
        """Write every load that a slot is free for."""
        if self.tiling.tiles.product.routed:
            self.load_strips()
            self.load_weights()
        else:
            self.load_weights()
            self.load_strips()

    def load_weights(self) -> None:
        while self.weights and self.free["weight"]:
            place, tile = self.weights.popleft()
            self.free["weight"] -= 1
            slot = place % self.slots["weight"]
            self.commands.append((LOAD_WEIGHT, 0, slot, 0, 0, tile.block, tile.input_tile, tile.output_tile))

    def load_strips(self) -> None:
        while self.strips and self.free["input"]:
            strip, block, input_tile = self.strips.popleft()
            self.free["input"] -= 1
            self.commands.append((LOAD_INPUT, 0, 0, strip % self.slots["input"], 0, block, input_tile, 0))

    def multiply(self, place: int, tile: _Multiply) -> None:
        """Write the multiplication at a place in the order, and the store of sums it completes."""
        sums = tile.sums % self.slots["sums"]
        flags = FREE_WEIGHT | (FREE_INPUT if tile.frees else 0) | (ACCUMULATE if tile.input_tile else 0)
        held = (place % self.slots["weight"], tile.strip % self.slots["input"], sums)
        self.commands.append((MULTIPLY, flags, *held, tile.block, tile.input_tile, tile.output_tile))
        self.free["weight"] += 1
        self.free["input"] += tile.frees
        if tile.input_tile == self.tiling.tiles.input_tiles - 1:
            self.commands.append((STORE, 0, 0, 0, sums, tile.block, 0, tile.output_tile))
