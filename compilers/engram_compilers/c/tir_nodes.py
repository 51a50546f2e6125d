"""What TIR's nodes are made of."""

from collections.abc import Iterator
from typing import Any

from tvm import ir, tirx

Node = Any  # a statement or an expression

_PARTS: dict[str, tuple[str, ...]] = {
    "AttrStmt": ("value", "body"),
    "Bind": ("value",),
    "Broadcast": ("value",),
    "BufferStore": ("value", "indices"),
    "Call": ("args",),
    "Cast": ("value",),
    "DeclBuffer": ("data",),
    "Evaluate": ("value",),
    "For": ("min", "extent", "body"),
    "IfThenElse": ("condition", "then_case", "else_case"),
    "Let": ("value", "body"),
    "Ramp": ("base", "stride"),
    "Select": ("condition", "true_value", "false_value"),
    "SeqStmt": ("seq",),
    "Shuffle": ("vectors",),
    "TensorLoad": ("indices",),
    "While": ("condition", "body"),
}


def within(node: Node) -> Iterator[Node]:
    """Yield a node and all it is made of."""
    yield node
    for name in _PARTS.get(type(node).__name__, ("a", "b")):
        part = getattr(node, name, None)
        for child in part if isinstance(part, ir.Array | tuple | list) else [part]:
            if child is not None:
                yield from within(child)


def is_call(node: Node, *names: str) -> bool:
    """Return whether a node is a call of one of TIR's own operators."""
    return isinstance(node, ir.Call) and isinstance(node.op, ir.Op) and node.op.name in names


def whole_vector(index: Node) -> int:
    """Return the lanes of an index of neighbouring elements; 0 of another one."""
    if isinstance(index, tirx.Ramp) and isinstance(index.stride, tirx.IntImm) and index.stride.value == 1:
        return int(index.ty.dtype.lanes)
    return 0
