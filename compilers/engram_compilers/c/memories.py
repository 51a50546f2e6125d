"""Where a kernel's buffers are: parameters, arrays on the stack, vectors a compiler can keep in registers."""

from dataclasses import dataclass

from tvm import ir, tirx

from engram_compilers.c.c_types import CType
from engram_compilers.c.tir_nodes import Node, is_call, whole_vector, within


@dataclass(frozen=True, slots=True)
class Memory:
    """A buffer.

    Attributes:
        name: of a pointer or an array in C.
        cut: neighbouring elements that make up a vector, of which the array is one in C; 1 for an array of elements.
    """

    name: str
    element: CType
    cut: int = 1


class Buffers:
    """The buffers a kernel allocates, and which names stand for the same one."""

    def __init__(self, body: Node) -> None:
        self._views: dict[tirx.Var, tirx.Var] = {}
        self._accesses: dict[tirx.Var, list[Node]] = {}
        self._read: set[tirx.Var] = set()
        for node in within(body):
            if isinstance(node, tirx.DeclBuffer):
                self._views[node.buffer] = _viewed(node)
            elif isinstance(node, ir.TensorLoad):
                self._read.add(self.origin(node.source))
                self._accesses.setdefault(self.origin(node.source), []).append(node.indices[0])
            elif isinstance(node, tirx.BufferStore):
                self._accesses.setdefault(self.origin(node.buffer), []).append(node.indices[0])

    def origin(self, buffer: tirx.Var) -> tirx.Var:
        """Return the parameter or allocated buffer that ``buffer`` is, or is a view of."""
        while buffer in self._views:
            buffer = self._views[buffer]
        return buffer

    def is_read(self, buffer: tirx.Var) -> bool:
        """Return whether anything reads what is stored in a buffer."""
        return self.origin(buffer) in self._read

    def lanes_of(self, buffer: tirx.Var, elements: int) -> int:
        """Return into which vectors an allocated buffer can be cut, or 1: those every access reads whole or in part."""
        indices = self._accesses.get(buffer, [])
        lanes = max((whole_vector(index) for index in indices), default=0)
        if lanes > 1 and elements % lanes == 0 and all(_fits(index, lanes, elements) for index in indices):
            return lanes
        return 1


def _viewed(node: tirx.DeclBuffer) -> tirx.Var:
    assert is_call(node.data, "tirx.buffer_data")
    return node.data.args[0]


def _fits(index: Node, lanes: int, elements: int) -> bool:
    """Return whether an index is of one vector: all of it, or an element of one that is known."""
    if whole := whole_vector(index):
        base = index.base
        return whole == lanes and isinstance(base, tirx.IntImm) and base.value % lanes == 0
    return elements == lanes or isinstance(index, tirx.IntImm)
