"""Whole-number attributes of an ONNX file's nodes, read off its bytes: a box that runs bundles has no onnx package.

The wire format is protobuf's: a key, field number times 8 plus kind, then a varint or a length and as many bytes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from engram_runtime.errors import BundleError

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields
GRAPH, NODE = 7, 1  # fields of a model and of a graph
OPERATOR, ATTRIBUTE = 4, 5  # of a node
NAME, NUMBER = 1, 3  # of an attribute

Value = int | memoryview


def node_numbers(path: Path, operators: Sequence[str], attribute: str) -> list[int]:
    """Return an attribute of all nodes of these operators, in their order.

    Raises:
        BundleError: this is no ONNX file.
    """
    try:
        return list(_numbers(memoryview(path.read_bytes()), operators, attribute.encode()))
    except (IndexError, KeyError) as error:
        raise BundleError(f"{path} is not an ONNX file; export the bundle again") from error


def _numbers(model: memoryview, operators: Sequence[str], attribute: bytes) -> Iterator[int]:
    for graph in _messages(model, GRAPH):
        for node in _messages(graph, NODE):
            if any(bytes(name).decode() in operators for name in _messages(node, OPERATOR)):
                yield from (_number(each) for each in _messages(node, ATTRIBUTE) if _name(each) == attribute)


def _name(attribute: memoryview) -> bytes:
    return b"".join(_messages(attribute, NAME))


def _number(attribute: memoryview) -> int:
    return next(value for number, value in _fields(attribute) if number == NUMBER and isinstance(value, int))


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(message) if number == wanted and isinstance(value, memoryview))


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield numbers and values of a message's fields; of those of fixed size, which nothing here wants, none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif kind == BYTES:
            size, at = _varint(message, at)
            yield number, message[at : at + size]
            at += size
        else:
            at += {EIGHT_BYTES: 8, FOUR_BYTES: 4}[kind]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number and where what follows it begins."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
