"""Command streams of the systolic array: a header, then commands of 16 bytes, little-endian.

Three engines take the commands of a stream, each its own in order: one loads from memory (LOAD_WEIGHT, LOAD_INPUT),
the array multiplies (MULTIPLY), one stores to memory (STORE). The scratchpads are slots: of a weight tile
``rows * columns`` bytes, of inputs ``row_block * rows`` bytes, of sums ``row_block * columns * 4`` bytes, where
``row_block`` is how many rows of a product are held at a time, the header's.

A slot has a full bit, the only way engines wait for one another: a load waits for it to be empty and fills it, MULTIPLY
waits for its weight and inputs to be full and empties those its flags say, and STORE empties sums. Without ACCUMULATE a
MULTIPLY waits for its sums to be empty, and begins them. So a stream runs the same whatever the engines' speeds, if in
its own order no command would wait: `check_order` sees to that.

Addresses come from tile numbers (`engram_runtime.npu.tiles`) and three base registers: the weight's, the planes', the
sums'. A run has a fourth register, its number of rows: commands of a block past them are skipped, those of the block
they end in take the rows there are.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import TargetError
from engram_runtime.npu.device import AGAIN, SUM_BYTES, WEIGHT_BITS, Product
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.tiles import Tiles

MAGIC = b"ENGRAMSA"
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("array_rows", "<u2"),
        ("array_columns", "<u2"),
        ("geometry", "<u8"),
        ("rows", "<u4"),
        ("inputs", "<u4"),
        ("outputs", "<u4"),
        ("row_block", "<u4"),
        ("commands", "<u4"),
        ("weight_bits", "u1"),
        ("routed", "u1"),
        ("zero", "<u2"),
    ]
)
COMMAND = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("weight", "<u2"),
        ("input", "<u2"),
        ("sums", "<u2"),
        ("row_block", "<u2"),
        ("input_tile", "<u2"),
        ("output_tile", "<u4"),
    ]
)

LOAD_WEIGHT, LOAD_INPUT, MULTIPLY, STORE = 1, 2, 3, 4
ACCUMULATE, FREE_WEIGHT, FREE_INPUT = 1, 2, 4  # flags of MULTIPLY
USED = {  # fields that say something, by opcode; the others are zero
    LOAD_WEIGHT: ("weight", "row_block", "input_tile", "output_tile"),
    LOAD_INPUT: ("input", "row_block", "input_tile"),
    MULTIPLY: ("flags", "weight", "input", "sums", "row_block", "input_tile", "output_tile"),
    STORE: ("sums", "row_block", "output_tile"),
}
MOST_SLOTS = 2**16

Commands = NDArray[np.void]  # [C] of COMMAND


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A decoded command stream."""

    product: Product
    row_block: int
    commands: Commands

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.product.rows // self.row_block)


def slots(geometry: SystolicArray, row_block: int) -> dict[str, int]:
    """Return how many slots the scratchpads have that commands can name, by the commands' field."""
    held = {
        "weight": geometry.weight_bytes // (geometry.rows * geometry.columns),
        "input": geometry.input_bytes // (row_block * geometry.rows),
        "sums": geometry.accumulator_bytes // (row_block * geometry.columns * SUM_BYTES),
    }
    return {field: min(count, MOST_SLOTS) for field, count in held.items()}


def geometry_digest(geometry: SystolicArray) -> int:
    """Return 64 bits that tell arrays of other sizes from this one."""
    return int.from_bytes(sha256(repr(geometry).encode()).digest()[:8], "little")


def encode(geometry: SystolicArray, stream: Stream) -> bytes:
    """Return a stream's bytes."""
    product = stream.product
    header = np.array(
        (
            *(MAGIC, VERSION, geometry.rows, geometry.columns, geometry_digest(geometry)),
            *(product.rows, product.inputs, product.outputs, stream.row_block, len(stream.commands)),
            *(WEIGHT_BITS[product.weights], product.routed, 0),
        ),
        HEADER,
    )
    return header.tobytes() + stream.commands.tobytes()


def decode(geometry: SystolicArray, data: bytes) -> Stream:
    """Decode a stream, every field checked against the geometry and the product.

    Raises:
        TargetError: it is damaged or of another device or geometry.
    """
    header = _header(geometry, data)
    bits = {bits: name for name, bits in WEIGHT_BITS.items()}
    if header["weight_bits"] not in bits or header["routed"] > 1 or header["zero"]:
        raise TargetError(
            f"a command stream has weights of {header['weight_bits']} bits, routed {header['routed']} and a last field "
            f"{header['zero']}, wanted {sorted(bits)}, 0 or 1, and 0; {AGAIN}"
        )
    product = Product(
        rows=header["rows"],
        inputs=header["inputs"],
        outputs=header["outputs"],
        weights=bits[header["weight_bits"]],
        routed=bool(header["routed"]),
    )
    stream = Stream(product, header["row_block"], np.frombuffer(data, COMMAND, offset=HEADER.itemsize))
    _check_row_block(geometry, stream)
    _check_fields(geometry, stream)
    return stream


def _header(geometry: SystolicArray, data: bytes) -> dict[str, Any]:
    if len(data) < HEADER.itemsize or not data.startswith(MAGIC):
        raise TargetError(f"{len(data)} bytes are no command stream of a systolic array; {AGAIN}")
    values = np.frombuffer(data, HEADER, count=1)[0].item()
    header = dict(zip(HEADER.names or (), values, strict=True))
    if header["version"] != VERSION:
        raise TargetError(f"a command stream has version {header['version']}, this runtime reads {VERSION}; {AGAIN}")
    if header["geometry"] != geometry_digest(geometry):
        raise TargetError(
            f"a command stream is for a systolic array of {header['array_rows']} x {header['array_columns']} with its "
            f"own memories, this one is {geometry}; {AGAIN}"
        )
    expected = HEADER.itemsize + header["commands"] * COMMAND.itemsize
    if len(data) != expected:
        raise TargetError(f"a command stream has {len(data)} bytes, its header says {expected}; {AGAIN}")
    return header


def _check_row_block(geometry: SystolicArray, stream: Stream) -> None:
    most = stream.product.rows
    if not 1 <= stream.row_block <= most or min(slots(geometry, stream.row_block).values()) < 2:
        raise TargetError(
            f"a command stream holds {stream.row_block} rows at a time, wanted 1 to {most} and scratchpads of "
            f"two slots each; {AGAIN}"
        )


def _check_fields(geometry: SystolicArray, stream: Stream) -> None:
    commands, tiles = stream.commands, Tiles(geometry, stream.product)
    bounds = slots(geometry, stream.row_block) | {
        "flags": (ACCUMULATE | FREE_WEIGHT | FREE_INPUT) + 1,
        "row_block": stream.blocks,
        "input_tile": tiles.input_tiles,
        "output_tile": tiles.output_tiles,
    }
    _refuse(commands, "opcode", ~np.isin(commands["opcode"], list(USED)), f"wanted one of {list(USED)}")
    for field, bound in bounds.items():
        used = np.isin(commands["opcode"], [opcode for opcode, fields in USED.items() if field in fields])
        _refuse(commands, field, commands[field] >= np.where(used, bound, 1), f"wanted less than {bound}, or 0")


def _refuse(commands: Commands, field: str, wrong: NDArray[np.bool_], wanted: str) -> None:
    if wrong.any():
        index = int(wrong.argmax())
        raise TargetError(f"command {index} of a stream has {field} {commands[field][index]}, {wanted}; {AGAIN}")
