"""Whole-number attributes of an ONNX file's nodes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from engram_runtime.errors import BundleError
from engram_runtime.protobuf import fields, messages

GRAPH, NODE = 7, 1  # fields of a model and of a graph
OPERATOR, ATTRIBUTE = 4, 5  # of a node
NAME, NUMBER = 1, 3  # of an attribute


def node_numbers(path: Path, operators: Sequence[str], attribute: str) -> list[int]:
    """Return an attribute of all nodes of these operators, in their order.

    Raises:
        BundleError: this is no ONNX file.
    """
    try:
        return list(_numbers(memoryview(path.read_bytes()), operators, attribute.encode()))
    except ValueError as error:
        raise BundleError(f"{path} is not an ONNX file: {error}; export the bundle again") from error


def _numbers(model: memoryview, operators: Sequence[str], attribute: bytes) -> Iterator[int]:
    wanted = [name.encode() for name in operators]
    for graph in messages(model, GRAPH):
        for node in messages(graph, NODE):
            if any(bytes(name) in wanted for name in messages(node, OPERATOR)):
                yield from (_number(each) for each in messages(node, ATTRIBUTE) if _name(each) == attribute)


def _name(attribute: memoryview) -> bytes:
    return b"".join(messages(attribute, NAME))


def _number(attribute: memoryview) -> int:
    for number, value in fields(attribute):
        if number == NUMBER and isinstance(value, int):
            return value
    raise ValueError("an attribute that is a number has none")
