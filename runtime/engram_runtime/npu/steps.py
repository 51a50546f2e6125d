"""A stream's commands with their sizes, for a run of a number of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram_runtime.npu.device import GROUP, SUM_BYTES
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.isa import COMMAND, HEADER, LOAD_INPUT, LOAD_WEIGHT, MULTIPLY, STORE, Stream

Numbers = NDArray[np.int64]  # [C], one a command


class Step(NamedTuple):
    """A command and its sizes.

    Attributes:
        opcode, flags, weight, input, sums: as in `engram_runtime.npu.isa`.
        rows, inputs, outputs: of the block and the tile. ``row``, ``column``, ``output``: the first of each.
        place: weights before the tile's in the weight's order.
        moved: bytes of the tile, the inputs or the sums.
        fetched: bytes of the commands since the load before, this one's included; of loads only.
    """

    opcode: int
    flags: int
    weight: int
    input: int
    sums: int
    rows: int
    inputs: int
    outputs: int
    row: int
    column: int
    output: int
    place: int
    moved: int
    fetched: int


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The commands of a stream that a run of some rows executes, ``[C]`` of each of a `Step`'s numbers."""

    columns: dict[str, Numbers]

    def __iter__(self) -> Iterator[Step]:
        return map(Step._make, zip(*(self.columns[name].tolist() for name in Step._fields), strict=True))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all commands."""
        multiplies = self.columns["opcode"] == MULTIPLY
        rows, inputs, outputs = (self.columns[name][multiplies] for name in ("rows", "inputs", "outputs"))
        return int((rows * inputs * outputs).sum())

    def sum_of(self, field: str, opcode: int) -> int:
        """Return the sum of a number over the commands of one opcode."""
        return int(self.columns[field][self.columns["opcode"] == opcode].sum())


def steps_of(geometry: SystolicArray, stream: Stream, rows: int) -> Steps:
    """Return the commands that a run of ``rows`` executes, and their sizes."""
    product, block = stream.product, stream.row_block
    active = stream.commands[stream.commands["row_block"].astype(np.int64) * block < rows]
    columns = {name: active[name].astype(np.int64) for name in COMMAND.names or ()}
    first = {
        "row": columns.pop("row_block") * block,
        "column": columns.pop("input_tile") * geometry.rows,
        "output": columns.pop("output_tile") * geometry.columns,
    }
    columns |= first | {
        "rows": np.minimum(block, rows - first["row"]),
        "inputs": np.minimum(geometry.rows, product.inputs - first["column"]),
        "outputs": np.minimum(geometry.columns, product.outputs - first["output"]),
    }
    columns["place"] = first["output"] * product.inputs + columns["outputs"] * first["column"]
    columns["moved"] = _moved(columns, product.weights)
    columns["fetched"] = _fetched(columns["opcode"])
    return Steps(columns)


def _packed(outputs: Numbers, inputs: Numbers, weights: str) -> Numbers:
    """Return the bytes of packed weights of so many outputs and inputs."""
    return outputs * inputs if weights == "int8" else outputs * (inputs // 2 + inputs // GROUP)


def _moved(columns: dict[str, Numbers], weights: str) -> Numbers:
    rows, inputs, outputs, opcode = (columns[name] for name in ("rows", "inputs", "outputs", "opcode"))
    moved = {
        LOAD_WEIGHT: _packed(outputs, inputs, weights),
        LOAD_INPUT: rows * inputs,
        MULTIPLY: np.zeros_like(rows),
        STORE: rows * outputs * SUM_BYTES,
    }
    return np.select([opcode == code for code in moved], list(moved.values()))


def _fetched(opcode: Numbers) -> Numbers:
    """Return for loads the bytes of the commands since the load before; the header comes with the first."""
    loads = np.flatnonzero(np.isin(opcode, (LOAD_WEIGHT, LOAD_INPUT)))
    fetched = np.zeros_like(opcode)
    fetched[loads] = np.diff(loads, prepend=-1) * COMMAND.itemsize
    fetched[loads[:1]] += HEADER.itemsize
    return fetched
