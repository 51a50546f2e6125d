"""A host table as a checkpoint holds it: its keyer, its record format and where the rows lie, all checked."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_export.safetensors_header import TensorEntry
from engram_export.source_files import read_exactly
from engram_runtime.errors import CheckpointError
from engram_runtime.keyer_spec import KeyerSpec
from engram_runtime.records import NO_FACTOR, PAYLOAD_BITS, RecordFormat, scale_values

PAYLOADS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3", "I8": "int8"}
PACKED_PAYLOAD = "int4"  # two values a byte, which no dtype of safetensors says
# E8M0 scales stand in checkpoints under their own name and as plain bytes.
SCALES = {"F16": "float16", "F32": "float32", "F8_E8M0": "e8m0", "U8": "e8m0"}
SCAN_BYTES = 8 << 20  # scales checked at a time
Progress = Callable[[int], None]


class RawTensors(Protocol):
    """Tensors whose bytes can be found in their files."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> NDArray[np.float32]: ...
    def read_raw(self, name: str) -> NDArray[np.generic]: ...
    def locate(self, name: str) -> tuple[Path, TensorEntry]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTensor:
    """Consecutive rows of a table's part: row i is ``row_bytes`` bytes at ``offset + i * row_bytes`` of ``path``."""

    name: str
    path: Path
    offset: int
    num_rows: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableSource:
    """A table to be exported.

    Attributes:
        keyer: constants without the file of the token map.
        token_map: ``[V]`` raw id -> compressed id, or None where raw ids are hashed.
        parts: tensors that make up a record, payload first, then the scales where there are any; each in row order.
    """

    site: str
    keyer: KeyerSpec
    token_map: NDArray[np.int32] | None
    num_rows: int
    record: RecordFormat
    parts: tuple[tuple[RowTensor, ...], ...]

    @property
    def tensors(self) -> list[str]:
        """Names of all tensors that hold rows or scales."""
        return [tensor.name for part in self.parts for tensor in part]

    @property
    def scales_bytes(self) -> int:
        """Bytes that `check_scales` reads."""
        return self.num_rows * (self.record.record_bytes - self.record.payload_bytes)

    def check_scales(self, progress: Progress = lambda count: None) -> None:
        """Read every scale, a slice at a time; one that is not finite would spoil its rows.

        Raises:
            CheckpointError: naming the tensor and its row.
        """
        for tensor in (tensor for part in self.parts[1:] for tensor in part):
            step = max(1, SCAN_BYTES // tensor.row_bytes)
            for start in range(0, tensor.num_rows, step):
                count = min(step, tensor.num_rows - start)
                data = read_exactly(tensor.path, tensor.offset + start * tensor.row_bytes, count * tensor.row_bytes)
                scales = scale_values(data.reshape(count, tensor.row_bytes), self.record.scale)
                _check_finite(tensor.name, start, scales)
                progress(data.nbytes)


def table_source(
    *,
    site: str,
    keyer: KeyerSpec,
    token_map: NDArray[np.int32] | None,
    columns: int,
    tensors: RawTensors,
    payload: Sequence[str],
    scales: Sequence[str] = (),
    factor: str | None = None,
    row_multiple: int = 1,
    packed: bool = False,
) -> TableSource:
    """Describe a table from a checkpoint's tensors; only headers and the factor are read.

    Args:
        columns: width of a row.
        payload: tensors ``[rows, columns]`` in row order, all of one dtype and one number of rows but for a
            shorter last one, as ``torch.chunk`` makes them.
        scales: tensors ``[rows]`` or ``[rows, groups]`` in row order, likewise.
        factor: a tensor with one number for the whole table, or None.
        row_multiple: what the keyer's rows are rounded up to in this family.
        packed: the payload are bytes ``[rows, columns / 2]`` of two int4 values each, the low half first.

    Raises:
        CheckpointError: a dtype, width, number of rows or factor that can't be. Shards of equal size whose names were
            swapped can't be told from right ones.
    """
    num_rows = -(-keyer.min_rows // row_multiple) * row_multiple
    rows = _Stack.read(tensors, payload, {"U8": PACKED_PAYLOAD} if packed else PAYLOADS)
    width = columns * PAYLOAD_BITS[PACKED_PAYLOAD] // 8 if packed else columns
    if rows.width != (width,):
        raise CheckpointError(f"{payload[0]} has shape {list(rows.shape)}, expected [rows, {width}]")
    stacks = [rows, *([_Stack.read(tensors, scales, SCALES)] if scales else [])]
    for stack in stacks:
        if stack.num_rows != num_rows:
            raise CheckpointError(f"{stack.title} has {stack.num_rows} rows, the hash of table {site} wants {num_rows}")
    return TableSource(
        site=site,
        keyer=keyer,
        token_map=token_map,
        num_rows=num_rows,
        record=_record(rows.dtype, columns, stacks[1:], NO_FACTOR if factor is None else _read_factor(tensors, factor)),
        parts=tuple(stack.tensors for stack in stacks),
    )


def numbered_tensors(names: Iterable[str], pattern: str, count: int) -> list[str]:
    """Return tensors 0 to ``count - 1`` by number, so that 10 comes after 9.

    Args:
        pattern: their name with ``{}`` for the number.

    Raises:
        CheckpointError: a number is missing or beyond the last.
    """
    before, after = map(re.escape, pattern.split("{}"))
    form = re.compile(f"{before}(0|[1-9][0-9]{{0,17}}){after}")
    found = {int(match[1]) for name in names if (match := form.fullmatch(name))}
    if missing := sorted(set(range(count)) - found):
        raise CheckpointError(f"the checkpoint lacks {pattern.format(missing[0])}, one of {count}; it is incomplete")
    if len(found) > count:
        raise CheckpointError(f"the checkpoint has {pattern.format(max(found))}, its config says {count} of them")
    return [pattern.format(number) for number in range(count)]


@dataclass(frozen=True, slots=True)
class _Stack:
    """Tensors of one part of the records, one below the other; the last may have fewer rows than ``shape``."""

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[RowTensor, ...]

    @classmethod
    def read(cls, tensors: RawTensors, names: Sequence[str], dtypes: dict[str, str]) -> "_Stack":
        dtype, shape = tensors.dtype(names[0]), tensors.shape(names[0])
        if dtype not in dtypes or not 1 <= len(shape) <= 2 or 0 in shape:
            raise CheckpointError(
                f"{names[0]} is {dtype} {list(shape)}, expected rows in {' or '.join(sorted(dtypes))}"
            )
        for name in names[1:]:
            found = tensors.shape(name)
            alike = _may_be_last(found, shape) if name == names[-1] else found == shape
            if tensors.dtype(name) != dtype or not alike:
                raise CheckpointError(
                    f"{name} is {tensors.dtype(name)} {list(found)}, {names[0]} {dtype} {list(shape)}; shards must be "
                    f"equal, the last alone may have fewer rows"
                )
        return cls(dtypes[dtype], shape, tuple(_row_tensor(tensors, name) for name in names))

    @property
    def width(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def num_rows(self) -> int:
        return sum(tensor.num_rows for tensor in self.tensors)

    @property
    def title(self) -> str:
        first, *others = [tensor.name for tensor in self.tensors]
        return first if not others else f"{first} to {others[-1]}"


def _may_be_last(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape of the others, or some of their rows."""
    return len(found) == len(shape) and found[1:] == shape[1:] and 1 <= found[0] <= shape[0]


def _row_tensor(tensors: RawTensors, name: str) -> RowTensor:
    path, entry = tensors.locate(name)
    row_bytes = (entry.stop - entry.start) // entry.shape[0]
    return RowTensor(name=name, path=path.resolve(), offset=entry.start, num_rows=entry.shape[0], row_bytes=row_bytes)


def _record(payload: str, columns: int, scales: Sequence[_Stack], factor: str) -> RecordFormat:
    if not scales:
        return RecordFormat(payload=payload, columns=columns, scale="none", scale_columns=columns, factor=factor)
    (stack,) = scales
    groups = prod(stack.width)
    if columns % groups:
        raise CheckpointError(f"{stack.title} has {groups} scales a row, expected a divisor of {columns} columns")
    return RecordFormat(
        payload=payload, columns=columns, scale=stack.dtype, scale_columns=columns // groups, factor=factor
    )


def _read_factor(tensors: RawTensors, name: str) -> str:
    """Return a tensor's one number as `float.hex` spells it."""
    if prod(shape := tensors.shape(name)) != 1:
        raise CheckpointError(f"{name} has shape {list(shape)}, expected one number for the whole table")
    value = float(tensors.read(name).ravel()[0])
    if not (isfinite(value) and value > 0):
        raise CheckpointError(f"{name} is {value}, expected a positive finite factor; download the checkpoint again")
    return value.hex()


def _check_finite(name: str, first_row: int, scales: NDArray[np.float32]) -> None:
    bad = ~np.isfinite(scales)
    if bad.any():
        row, group = np.argwhere(bad)[0].tolist()
        raise CheckpointError(
            f"{name} has scale {scales[row, group]} in row {first_row + row}, expected finite scales; "
            f"download the checkpoint again"
        )
