"""An exported ONNX graph as nodes and lazily read initialisers; its weights stay in their file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from engram_runtime.errors import BundleError, CompileError

MOST_AXES, MOST_VALUES = 8, 1 << 48  # of a tensor
MOST_DIGITS = 18
WEIGHT_KINDS = "biuf"  # of numpy's own dtypes: what a weights file holds
# Whatever onnx's helpers raise on a file that isn't what it says.
GRAPH_FAILURES = (AttributeError, LookupError, NotImplementedError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Weight:
    """An initialiser in the weights file, or some rows of one.

    Attributes:
        rows_of: for rows, the whole weight and the ids ``[n]`` of the rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    rows_of: "tuple[Weight, Weight] | None" = None

    def rows(self, ids: "Weight") -> "Weight":
        """Return the rows of these ids, to be read together when they are packed."""
        shape = (*ids.shape, *self.shape[1:])
        return Weight(f"{self.name}.rows.{ids.name}", self.dtype, shape, self.offset, rows_of=(self, ids))


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator; the domain is part of its name where it isn't ONNX's own."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def has(self, place: int) -> bool:
        """Return whether the input at a place is given; ONNX leaves one out by an empty name."""
        return place < len(self.inputs) and bool(self.inputs[place])


@dataclass(frozen=True, slots=True, eq=False)
class OnnxModel:
    """A decoder graph: nodes in order, small constants, and weights mapped from their file."""

    nodes: tuple[Node, ...]
    constants: dict[str, NDArray[Any]]
    weights: dict[str, Weight]
    data: NDArray[np.uint8]

    def read(self, weight: Weight) -> NDArray[Any]:
        """Return a weight as a view of the mapped file, rows of one as a fresh array."""
        if weight.rows_of is not None:
            return self._read_rows(*weight.rows_of)
        dtype = np.dtype(weight.dtype)
        size = int(np.prod(weight.shape, dtype=np.int64)) * dtype.itemsize
        return self.data[weight.offset : weight.offset + size].view(dtype).reshape(weight.shape)

    def _read_rows(self, whole: Weight, ids: Weight) -> NDArray[Any]:
        values, places = self.read(whole), self.read(ids)
        if places.size and not 0 <= places.min() <= places.max() < len(values):
            raise CompileError(
                f"rows {places.min()} to {places.max()} of weight {whole.name} are taken, it has {len(values)}; "
                f"export the bundle again"
            )
        chosen: NDArray[Any] = values[places]
        return chosen


def read_onnx_model(graph: Path, weights_file: Path) -> OnnxModel:
    """Read a graph whose external data all lies in ``weights_file``.

    Raises:
        BundleError: it is not an ONNX graph, or one of its constants isn't what it says.
        CompileError: a weight lies in another file or outside this one, or can't be read there.
    """
    model = load_onnx(graph)
    try:
        return _read(model, weights_file)
    except GRAPH_FAILURES as error:
        raise BundleError(f"{graph} is not an ONNX graph: {error}; export the bundle again") from error


def load_onnx(graph: Path) -> onnx.ModelProto:
    """Load a graph without its external weights; raises BundleError where a file is none."""
    try:
        return onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{graph} is not an ONNX graph: {error}; export the bundle again") from error


def _read(model: onnx.ModelProto, weights_file: Path) -> OnnxModel:
    data = np.memmap(weights_file, dtype=np.uint8, mode="r")
    constants: dict[str, NDArray[Any]] = {}
    weights: dict[str, Weight] = {}
    for tensor in model.graph.initializer:
        if tensor.name in constants or tensor.name in weights:
            raise ValueError(f"initialiser {tensor.name!r} stands twice")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            weights[tensor.name] = _weight(tensor, weights_file.name, len(data))
        else:
            constants[tensor.name] = onnx.numpy_helper.to_array(_checked(tensor))
    return OnnxModel(
        nodes=tuple(_node(node) for node in model.graph.node),
        constants=constants,
        weights=weights,
        data=data,
    )


def _weight(tensor: onnx.TensorProto, file_name: str, file_bytes: int) -> Weight:
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(_checked(tensor).data_type)
    if dtype.kind not in WEIGHT_KINDS:
        raise CompileError(f"weight {tensor.name} is of {dtype.name}, which isn't compiled; export the bundle again")
    size = math.prod(tensor.dims) * dtype.itemsize
    offset = place.get("offset", "")
    whole = offset.isascii() and offset.isdigit() and len(offset) <= MOST_DIGITS
    inside = whole and place.get("length") == str(size) and int(offset) + size <= file_bytes
    if place.get("location") != file_name or not inside:
        raise CompileError(
            f"weight {tensor.name} of {size} bytes is said to lie at {place}, outside {file_name} of {file_bytes} bytes"
        )
    return Weight(tensor.name, dtype.name, tuple(tensor.dims), int(offset))


def _checked(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a tensor whose dimensions numpy can take."""
    if len(tensor.dims) > MOST_AXES or min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > MOST_VALUES:
        raise ValueError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)[: MOST_AXES + 1]}")
    return tensor


def _node(node: onnx.NodeProto) -> Node:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    return Node(operator, tuple(node.input), tuple(node.output), attributes, metadata)
