"""Check a command stream in its own order: no command would wait for ever, and all sums are what they should be.

Of every slot one engine fills it and one empties it, and filling and emptying alternate in the stream; so they
do in any order the engines can take, and a slot always holds what it held here. A stream that passes computes the
whole product: each sum is stored once, after all its inputs, in ascending order.
"""

from dataclasses import dataclass, field

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import AGAIN
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import (
    ACCUMULATE,
    FREE_INPUT,
    FREE_WEIGHT,
    LOAD_INPUT,
    LOAD_WEIGHT,
    MULTIPLY,
    Stream,
)
from engram_runtime.npu.tiles import Tiles


class _OutOfOrderError(Exception):
    """Why a command can't run where it stands."""


@dataclass(slots=True)
class _Slots:
    """What each slot holds; an empty one is absent.

    weights: (row block, input tile, output tile). inputs: (row block, input tile).
    sums: (row block, output tile, input tiles that are in them). stored: (row block, output tile).
    """

    input_tiles: int
    weights: dict[int, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sums: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    stored: set[tuple[int, int]] = field(default_factory=set)

    def multiply(self, flags: int, weight: int, inputs: int, sums: int, tile: tuple[int, int, int]) -> None:
        block, input_tile, output_tile = tile
        if self.weights.get(weight) != tile:
            raise _OutOfOrderError(f"multiplies weight slot {weight}, which doesn't hold its tile")
        if self.inputs.get(inputs) != (block, input_tile):
            raise _OutOfOrderError(f"multiplies input slot {inputs}, which doesn't hold its inputs")
        before = (block, output_tile, input_tile) if flags & ACCUMULATE else None
        if self.sums.get(sums) != before or (before is None) != (input_tile == 0):
            raise _OutOfOrderError(f"adds to sum slot {sums}, which doesn't hold the sums before it")
        self.sums[sums] = (block, output_tile, input_tile + 1)
        if flags & FREE_WEIGHT:
            del self.weights[weight]
        if flags & FREE_INPUT:
            del self.inputs[inputs]

    def store(self, sums: int, block: int, output_tile: int) -> None:
        if self.sums.get(sums) != (block, output_tile, self.input_tiles):
            raise _OutOfOrderError(f"stores sum slot {sums}, which doesn't hold whole sums")
        if (block, output_tile) in self.stored:
            raise _OutOfOrderError("stores sums that were stored before")
        del self.sums[sums]
        self.stored.add((block, output_tile))


def _load(held: dict[int, tuple[int, ...]], what: str, slot: int, tile: tuple[int, ...]) -> None:
    if slot in held:
        raise _OutOfOrderError(f"loads {what} slot {slot}, which is in use")
    held[slot] = tile


def check_order(geometry: SystolicArray, stream: Stream) -> None:
    """Check a decoded stream; raises TargetError naming the first command that can't run where it stands."""
    tiles = Tiles(geometry, stream.product)
    held = _Slots(tiles.input_tiles)
    index = 0
    try:
        for index, command in enumerate(stream.commands.tolist()):  # noqa: B007
            _step(held, *command)
    except _OutOfOrderError as error:
        raise TargetError(f"command {index} of a stream {error}; {AGAIN}") from None
    if held.weights or held.inputs or held.sums or len(held.stored) != stream.blocks * tiles.output_tiles:
        raise TargetError(
            f"a command stream stores {len(held.stored)} of {stream.blocks * tiles.output_tiles} tiles of sums and "
            f"leaves {len(held.weights) + len(held.inputs) + len(held.sums)} slots in use; {AGAIN}"
        )


def _step(
    held: _Slots,
    opcode: int,
    flags: int,
    weight: int,
    inputs: int,
    sums: int,
    block: int,
    input_tile: int,
    output_tile: int,
) -> None:
    if opcode == LOAD_WEIGHT:
        _load(held.weights, "weight", weight, (block, input_tile, output_tile))
    elif opcode == LOAD_INPUT:
        _load(held.inputs, "input", inputs, (block, input_tile))
    elif opcode == MULTIPLY:
        held.multiply(flags, weight, inputs, sums, (block, input_tile, output_tile))
    else:
        held.store(sums, block, output_tile)
