"""Forward passes as straight-line programs: calls of kernels on tensors that have a place, without a virtual machine.

`engram_compilers.straight_line` makes them. All shapes are static, all tensors contiguous and aligned to 64 bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from tvm import tirx

from engram_runtime.library import ITEM_BYTES


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph, by its name in the manifest."""

    name: str


@dataclass(frozen=True, slots=True)
class State:
    """A state by its name in the manifest, of one of the sequences of a batch."""

    name: str
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the packed weights, by its place in `PackedWeights.tensors`."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """An array of `Programs.constants`."""

    index: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes from ``offset`` of the program's scratch memory."""

    offset: int


@dataclass(frozen=True, slots=True)
class Output:
    """Memory the caller has for an output of the program, by its index."""

    index: int


Place = Input | State | Weight | Constant | Scratch | Output


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array in its place; a place may hold several, one after the other or as views in other shapes."""

    dtype: str
    shape: tuple[int, ...]
    place: Place

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A kernel's run on ``arguments`` in the order of its parameters: what it reads, changes in place, then writes."""

    kernel: str
    arguments: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class AwaitRows:
    """The wait until the rows of a table, by its place in manifest order, are in their input."""

    site: int
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Program:
    """A forward pass of a fixed number of tokens.

    Attributes:
        calls: in the order they are to run.
        inputs: the graph's inputs, in manifest order.
        outputs: what the function of the library returns, see `engram_runtime.library.LibraryInfo`: windows and
            recurrent states at their `State` places, everything else at `Output` places.
        scratch_bytes: the memory of `Scratch` places.
    """

    name: str
    calls: tuple[KernelCall | AwaitRows, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    scratch_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Programs:
    """The programs of a bundle and what they share.

    Attributes:
        of: by function name.
        kernels: the functions programs call, by name, as TVM's pipeline for kernels takes them.
        constants: arrays, by the index of `Constant`.
    """

    of: Mapping[str, Program]
    kernels: Mapping[str, tirx.PrimFunc]
    constants: Sequence[NDArray[Any]]
