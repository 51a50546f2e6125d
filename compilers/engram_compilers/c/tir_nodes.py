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


def alike(a: Node, b: Node, names: dict[tirx.Var, tirx.Var] | None = None) -> bool:
    """Return whether two statements or expressions do the same, but for threads that share a loop.

    Args:
        names: variables of ``b`` by those of ``a`` that they stand for; those defined on the way are added.
    """
    names = {} if names is None else names
    if isinstance(a, tirx.Var) and isinstance(b, tirx.Var):
        counterpart: Node = names.get(a, a)
        return bool(counterpart.same_as(b))
    if type(a) is not type(b) or _facts(a) != _facts(b):
        return False
    for name in ("var", "loop_var"):
        if hasattr(a, name):
            names[getattr(a, name)] = getattr(b, name)
    if isinstance(a, tirx.AllocBuffer | tirx.DeclBuffer):
        names[a.buffer] = b.buffer
    return len(_parts(a)) == len(_parts(b)) and all(
        alike(x, y, names) for x, y in zip(_parts(a), _parts(b), strict=True)
    )


def _facts(node: Node) -> list[str]:
    """Return what tells a node from others of its class, besides what it is made of."""
    facts = [str(getattr(node, name)) for name in ("op", "ty") if hasattr(node, name)]
    if isinstance(node, tirx.IntImm | tirx.FloatImm):
        facts.append(str(node.value))
    if isinstance(node, tirx.Shuffle):
        facts.append(str(node.indices))
    if isinstance(node, tirx.AllocBuffer):
        facts += [str(node.buffer.dtype), str(node.buffer.shape)]
    return facts


def _parts(node: Node) -> list[Node]:
    names = [*_PARTS.get(type(node).__name__, ("a", "b")), "source"]
    if isinstance(node, tirx.BufferStore):
        names.append("buffer")
    found = []
    for name in names:
        part = getattr(node, name, None)
        found += list(part) if isinstance(part, ir.Array | tuple | list) else [part]
    return [part for part in found if part is not None]


def is_call(node: Node, *names: str) -> bool:
    """Return whether a node is a call of one of TIR's own operators."""
    return isinstance(node, ir.Call) and isinstance(node.op, ir.Op) and node.op.name in names


def whole_vector(index: Node) -> int:
    """Return the lanes of an index of neighbouring elements; 0 of another one."""
    if isinstance(index, tirx.Ramp) and isinstance(index.stride, tirx.IntImm) and index.stride.value == 1:
        return int(index.ty.dtype.lanes)
    return 0
