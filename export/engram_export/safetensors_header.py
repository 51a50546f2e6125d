"""The header of a safetensors file, checked in full against the file's size before anything is read by it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engram_export.source_files import file_size, parse_json_object, read_exactly
from engram_runtime.errors import CheckpointError

LENGTH_BYTES = 8  # the header's own length comes first, as a little-endian uint64
MAX_HEADER_BYTES = 16 << 20  # 100 000 tensors with long names; the reference reader allows 100 MB
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 48  # keeps every product of dimensions far from int64, empty axes included
MAX_RANK = 32  # numpy 1.26 stops here

# bfloat16 and float8 have no numpy type: their bit patterns are read.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes ``start`` to ``stop``, counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensors' places and the free-text metadata.

    Raises:
        CheckpointError: the header is malformed or does not describe this file to the last byte.
    """
    size = file_size(path)
    data_start = _data_start(path, size)
    raw = parse_json_object(
        read_exactly(path, LENGTH_BYTES, data_start - LENGTH_BYTES).tobytes(), f"the header of {path}"
    )
    metadata = _metadata(path, raw.pop("__metadata__", {}))
    if len(raw) > MAX_TENSORS:
        raise CheckpointError(f"{path} lists {len(raw)} tensors, at most {MAX_TENSORS} are read; split the file")
    entries = {name: _entry(path, name, fields, data_start) for name, fields in raw.items()}
    _check_layout(path, entries, data_start, size)
    return entries, metadata


def _data_start(path: Path, size: int) -> int:
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{path} holds {size} bytes, too few for a safetensors file; download the file again")
    header_bytes = int.from_bytes(read_exactly(path, 0, LENGTH_BYTES).tobytes(), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} states a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read; "
            f"check that it is a safetensors file"
        )
    if LENGTH_BYTES + header_bytes > size:
        raise _truncated(path, size, LENGTH_BYTES + header_bytes)
    return LENGTH_BYTES + header_bytes


def _metadata(path: Path, raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"__metadata__ in the header of {path} is not a map of strings; write the file again")
    return raw


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    where = f"tensor {name!r} in the header of {path}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets; write the file again")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r}, known are {', '.join(NUMPY_DTYPES)}; convert the file")
    if not _are_counts(shape) or len(shape) > MAX_RANK or prod(max(dim, 1) for dim in shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{where} has an unusable shape {_clip(shape)}; write the file again")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has unusable data_offsets {_clip(offsets)}; write the file again")
    wanted = prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        found = offsets[1] - offsets[0]
        raise CheckpointError(f"{where} spans {found} bytes, its shape and dtype want {wanted}; write the file again")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: object) -> bool:
    # type() and not isinstance(): json's true and false are ints to python
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    ends = [("the header", data_start), *((f"tensor {name!r}", entry.stop) for name, entry in ordered)]
    for (before, stop), (name, entry) in zip(ends, ordered, strict=False):
        if entry.start != stop:
            raise CheckpointError(
                f"tensor {name!r} in {path} starts at byte {entry.start}, wanted {stop} where {before} ends; "
                f"write the file again"
            )
    if ends[-1][1] != size:
        raise _truncated(path, size, ends[-1][1])


def _truncated(path: Path, found: int, wanted: int) -> CheckpointError:
    return CheckpointError(f"{path} holds {found} bytes, its header says {wanted}; copy or download the file again")


def _clip(value: object) -> str:
    return repr(value)[:80]
