"""Passes over one token of each of several sequences: layers with states run once for each, all others once for all."""

from collections.abc import Mapping, Sequence

from tvm import relax

from engram_compilers.forward_pass import POSITION, Converter, ForwardPass
from engram_compilers.onnx_model import Node
from engram_compilers.values import Activation, Apart, Batched, Value
from engram_runtime.errors import CompileError

TOKEN_INPUTS: Mapping[str, Sequence[int]] = {
    "com.microsoft.CausalConvWithState": (0,),
    "com.microsoft.GroupQueryAttention": (0,),
    "com.microsoft.LinearAttention": (0, 1, 2, 4, 5),
    "engram.IndexedAttention": (0, 1),
    "engram.SharedAttention": (0,),
}
"""Places of the inputs with a row per token of the operators that read states; so has their first output."""


def takes_apart(forward: ForwardPass, node: Node) -> bool:
    """Return whether a node takes what each sequence has of its own."""
    return any(isinstance(forward.get(name), Apart) for name in node.inputs)


def convert_apart(convert: Converter, forward: ForwardPass, node: Node) -> Sequence[Value]:
    """Lower a node once for each sequence, by the kernels of a pass of one token, so to the bits of that pass."""
    rows = {node.inputs[place]: _split(forward, node, place) for place in TOKEN_INPUTS.get(node.operator, ())}
    taken = {name: forward.get(name) for name in (*node.inputs, POSITION)} | rows
    apart = {name: value.of for name, value in taken.items() if isinstance(value, Apart)}
    count = len(apart[POSITION])
    passes = (forward.of_sequence({name: of[index] for name, of in apart.items()}) for index in range(count))
    outputs = zip(*(convert(one, node) for one in passes), strict=True)
    first, *others = (Apart(values) for values in outputs)
    return [_joined(forward, first) if rows else first, *others]


def split_rows(forward: ForwardPass, whole: Activation) -> list[Activation]:
    """Return each row of ``whole [B, ...]`` as ``[1, ...]``."""
    count, *others = whole.shape
    if count == 1:
        return [whole]
    parts = forward.kernels.builder.emit(relax.op.split(whole.expr, count, axis=0))
    return [forward.emit(parts[index], (1, *others), whole.dtype) for index in range(count)]


def _split(forward: ForwardPass, node: Node, place: int) -> Apart:
    value = forward.get(node.inputs[place])
    if isinstance(value, Batched):
        return Apart(tuple(Batched(row) for row in split_rows(forward, value.inner)))
    return Apart(tuple(split_rows(forward, forward.activation(node, place))))


def _joined(forward: ForwardPass, rows: Apart) -> Value:
    """Return the rows of all sequences as one value again."""
    inner = [row.inner if isinstance(row, Batched) else row for row in rows.of]
    parts = [row for row in inner if isinstance(row, Activation)]
    if len(parts) != len(rows.of):
        raise CompileError(f"a layer makes {rows.of[0]!r} of a token, which can't be joined to those of others")
    shape = (len(parts), *parts[0].shape[1:])
    whole = forward.emit(relax.op.concat([part.expr for part in parts], 0), shape)
    return Batched(whole) if isinstance(rows.of[0], Batched) else whole
