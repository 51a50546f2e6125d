"""Where an ONNX file says its tensors lie, checked before a library that would go and read there gets the file.

ONNX lets a tensor name any file: that has let models read what they were not given, time and again (CVE-2022-25882,
CVE-2024-27318, CVE-2026-27489, CVE-2026-34446), and put addresses of memory for files (onnxruntime's PR 28709).
"""

from collections.abc import Iterator
from pathlib import Path

from engram_runtime.errors import BundleError
from engram_runtime.protobuf import messages

GRAPH, TRAINING, FUNCTION = 7, 20, 25  # fields of a model
NODE, INITIALIZER, SPARSE = 1, 5, 15  # of a graph
FUNCTION_NODE = 7
ATTRIBUTE = 5  # of a node
TENSORS, GRAPHS, SPARSE_TENSORS = (5, 10), (6, 11), (22, 23)  # of an attribute, one and several
EXTERNAL = 13  # of a tensor
KEY, VALUE = 1, 2
LOCATION, OFFSET, LENGTH, CHECKSUM = "location", "offset", "length", "checksum"
MOST_DIGITS = 18
MOST_DEPTH = 16  # of graphs within nodes


def check_places(graph: Path, weights: Path) -> None:
    """Refuse a graph with a tensor outside the file ``weights``, which lies beside it.

    Raises:
        BundleError: naming where the tensor is said to lie; or this is no ONNX file.
    """
    file_bytes = weights.stat().st_size
    try:
        for place in _places(memoryview(graph.read_bytes())):
            if not _is_inside(place, weights.name, file_bytes):
                raise BundleError(
                    f"{graph} has a tensor said to lie at {str(place)[:300]}, outside {weights.name} of {file_bytes} "
                    f"bytes; export the bundle again"
                )
    except ValueError as error:
        raise BundleError(f"{graph} is not an ONNX file: {error}; export the bundle again") from error


def _is_inside(place: dict[str, str], name: str, file_bytes: int) -> bool:
    offset, length = place.get(OFFSET, "0"), place.get(LENGTH, "")
    counts = all(text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS for text in (offset, length))
    known = place.keys() <= {LOCATION, OFFSET, LENGTH, CHECKSUM}
    return known and counts and place.get(LOCATION) == name and int(offset) + int(length) <= file_bytes


def _places(model: memoryview) -> Iterator[dict[str, str]]:
    """Yield what each tensor that lies elsewhere says of its place, wherever in the model it is."""
    for training in messages(model, TRAINING):
        for graph in messages(training, 1, 2):
            yield from _of_graph(graph, 0)
    for function in messages(model, FUNCTION):
        for node in messages(function, FUNCTION_NODE):
            yield from _of_node(node, 0)
    for graph in messages(model, GRAPH):
        yield from _of_graph(graph, 0)


def _of_graph(graph: memoryview, depth: int) -> Iterator[dict[str, str]]:
    if depth > MOST_DEPTH:
        raise ValueError(f"it has graphs within graphs, more than {MOST_DEPTH}")
    for tensor in messages(graph, INITIALIZER):
        yield from _of_tensor(tensor)
    for sparse in messages(graph, SPARSE):
        yield from _of_sparse(sparse)
    for node in messages(graph, NODE):
        yield from _of_node(node, depth)


def _of_node(node: memoryview, depth: int) -> Iterator[dict[str, str]]:
    for attribute in messages(node, ATTRIBUTE):
        for tensor in messages(attribute, *TENSORS):
            yield from _of_tensor(tensor)
        for sparse in messages(attribute, *SPARSE_TENSORS):
            yield from _of_sparse(sparse)
        for graph in messages(attribute, *GRAPHS):
            yield from _of_graph(graph, depth + 1)


def _of_sparse(sparse: memoryview) -> Iterator[dict[str, str]]:
    for tensor in messages(sparse, 1, 2):
        yield from _of_tensor(tensor)


def _of_tensor(tensor: memoryview) -> Iterator[dict[str, str]]:
    entries = [(_text(entry, KEY), _text(entry, VALUE)) for entry in messages(tensor, EXTERNAL)]
    if len(dict(entries)) < len(entries):
        raise ValueError("a tensor says twice where it lies")
    if entries:
        yield dict(entries)


def _text(entry: memoryview, number: int) -> str:
    texts = [bytes(text).decode() for text in messages(entry, number)]
    if len(texts) != 1:
        raise ValueError(f"an entry of a tensor's place has {len(texts)} texts where one is due")
    return texts[0]
