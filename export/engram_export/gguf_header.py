"""The header of a GGUF file, checked in full against the file's size before a tensor is read by it.

The package's own GGUFReader is not used: it trusts every count and offset of the file, and spends seconds and a
numpy array on each vocabulary entry. The tests hold this parser against it.
"""

import math
import struct
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engram_export.source_files import file_size
from engram_runtime.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20  # 260 000 tokens with scores, types and merges take 20 MB
MAX_ARRAY_VALUES = 1 << 22  # in all arrays together: 260 000 tokens with scores, types and merges are 1.4 million
MAX_TENSORS = 100_000
MAX_RANK = 4  # ggml's own limit
MAX_ELEMENTS = 1 << 48
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20

BOOL, STRING, ARRAY = 7, 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

Scalar: TypeAlias = str | int | float | bool
T = TypeVar("T", str, int, float, bool)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies: ``num_bytes`` from ``offset``, counted from the file's first byte."""

    name: str
    shape: tuple[int, ...]  # slowest axis first, as in numpy
    type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    path: Path
    metadata: dict[str, Scalar | list[Scalar]]
    tensors: dict[str, GgufTensor]

    def require(self, key: str, kind: type[T]) -> T:
        """Return a value the model cannot do without."""
        if key not in self.metadata:
            raise CheckpointError(
                f"the metadata of {self.path} has no {key!r}; the file is incomplete, convert it again"
            )
        value = self.metadata[key]
        if type(value) is not kind:
            raise self._wrong_kind(key, value, kind.__name__)
        return value

    def positive(self, key: str, kind: type[Number]) -> Number:
        """Return a number the model cannot do without, which must be finite and above zero."""
        value = self.require(key, kind)
        if not 0 < value < math.inf:
            raise self._wrong_kind(key, value, "a finite number above 0")
        return value

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a value that may be missing, but not be of another type."""
        return self.require(key, kind) if key in self.metadata else None

    def get_list(self, key: str, kind: type[T]) -> list[T] | None:
        """Return an array that may be missing, but not hold another type."""
        if key not in self.metadata:
            return None
        values = self.metadata[key]
        found = [value for value in values if type(value) is kind] if isinstance(values, list) else []
        if not isinstance(values, list) or len(found) < len(values):
            raise self._wrong_kind(key, values, f"an array of {kind.__name__}")
        return found

    def _wrong_kind(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{key!r} in the metadata of {self.path} is {value!r:.80}, wanted {wanted}; convert it again"
        )


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor places.

    Raises:
        CheckpointError: the header is malformed, too long, or points outside the file.
    """
    size = file_size(path)
    try:
        with path.open("rb") as stream:
            return _Parser(path, stream, size).header()
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}; check the disk and the permissions") from err


def shortest_float(value: float) -> float:
    """Return the shortest decimal of a float32, such as 1e-05 for a stored 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Parser:
    """A cursor over the header that never steps past the file's end or ``MAX_HEADER_BYTES``."""

    def __init__(self, path: Path, stream: BufferedReader, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._left = min(size, MAX_HEADER_BYTES)
        self._array_values_left = MAX_ARRAY_VALUES

    def header(self) -> GgufHeader:
        self._check_magic()
        num_tensors, num_entries = self._unpack("QQ")
        metadata: dict[str, Scalar | list[Scalar]] = {}
        for _ in range(num_entries):
            key = self._string()
            if key in metadata:
                raise self._broken(f"metadata key {key!r} appears twice")
            metadata[key] = self._value()
        if num_tensors > MAX_TENSORS:
            raise self._broken(f"it lists {num_tensors} tensors, at most {MAX_TENSORS} are read")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        return GgufHeader(self._path, metadata, self._place(infos, self._alignment(metadata)))

    def _check_magic(self) -> None:
        if (magic := self._take(4)) != MAGIC:
            raise CheckpointError(f"{self._path} starts with {magic!r}, wanted {MAGIC!r}; give a .gguf file")
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path} has gguf version {version}, wanted 2 or 3 in little-endian order; convert it again"
            )

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._left:
            raise self._too_short(num_bytes)
        self._left -= num_bytes
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            raise self._too_short(num_bytes)
        return data

    def _too_short(self, num_bytes: int) -> CheckpointError:
        limit = min(self._size, MAX_HEADER_BYTES)
        position = limit - self._left
        if limit == MAX_HEADER_BYTES:
            return self._broken(
                f"it wants {num_bytes} bytes at byte {position}, the longest header read is {limit} bytes"
            )
        return CheckpointError(
            f"{self._path} holds {self._size} bytes, its header wants {num_bytes} more at byte {position}; "
            f"copy or download the file again"
        )

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as err:
            raise self._broken(f"a string is not utf-8: {err.object[:40]!r}") from err

    def _value(self) -> Scalar | list[Scalar]:
        (kind,) = self._unpack("I")
        if kind != ARRAY:
            return self._values(kind, 1)[0]
        kind, count = self._unpack("IQ")
        self._array_values_left -= count
        if self._array_values_left < 0:
            raise self._broken(f"its arrays hold more than {MAX_ARRAY_VALUES} values")
        return self._values(kind, count)

    def _values(self, kind: int, count: int) -> list[Scalar]:
        if kind == STRING:
            return [self._string() for _ in range(count)]
        if kind not in SCALAR_FORMATS:
            raise self._broken(f"a metadata value has type {kind}, known are 0 to 12 without nested arrays")
        layout = "<" + SCALAR_FORMATS[kind]
        data = self._take(count * struct.calcsize(layout))
        values = [value for (value,) in struct.iter_unpack(layout, data)]
        return [bool(value) for value in values] if kind == BOOL else values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (rank,) = self._unpack("I")
        if not 1 <= rank <= MAX_RANK:
            raise self._broken(f"tensor {name!r} has {rank} axes, wanted 1 to {MAX_RANK}")
        dims = self._unpack(f"{rank}Q")
        kind, offset = self._unpack("IQ")
        return name, dims[::-1], kind, offset

    def _alignment(self, metadata: dict[str, Scalar | list[Scalar]]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment!r:.80}, wanted a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        data_start = -(-self._stream.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._broken(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise self._broken(f"tensor {name!r} starts at offset {offset}, wanted a multiple of {alignment}")
            tensors[name] = self._tensor(name, shape, kind, data_start + offset)
        self._check_overlaps(tensors)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
            raise self._broken(f"tensor {name!r} has an unusable shape {list(shape)}")
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as err:
            raise self._broken(f"tensor {name!r} has the unknown type {kind}") from err
        block_length, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape[-1] % block_length:
            raise self._broken(f"rows of tensor {name!r} have {shape[-1]} values, wanted a multiple of {block_length}")
        num_bytes = math.prod(shape) // block_length * block_bytes
        if start + num_bytes > self._size:
            raise CheckpointError(
                f"{self._path} holds {self._size} bytes, tensor {name!r} wants bytes up to {start + num_bytes}; "
                f"copy or download the file again"
            )
        return GgufTensor(name, shape, quantization, start, num_bytes)

    def _check_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.num_bytes > after.offset:
                raise self._broken(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.offset}")

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"the header of {self._path} is damaged: {what}; download or convert the file again")
