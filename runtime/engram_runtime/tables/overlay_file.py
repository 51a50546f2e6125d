"""Overlay files: rows that take the place of some of a table's or of all, and what tells which table that is.

A safetensors file with ``row_ids [N]`` int64, strictly ascending, and ``records [N, record_bytes]`` uint8; its metadata
holds `OverlaySpec` as JSON. Overlays may come from anywhere, so everything in them is checked before it is used.
"""

import dataclasses
import json
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, TableError, TargetError
from engram_runtime.keyer_digest import keyer_digest
from engram_runtime.memory import free_memory
from engram_runtime.new_file import new_file
from engram_runtime.records import RecordFormat
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan
from engram_runtime.sizes import format_size
from engram_runtime.strict_json import Fields, parse_facts, version_error
from engram_runtime.table_spec import TableSpec

FORMAT_VERSION = 2  # version 1 is read as well: its overlays leave others to the table
FACTS = "engram_overlay"  # key of the metadata
ROW_IDS, RECORDS = "row_ids", "records"
TABLE, ZERO = "table", "zero"  # what the rows are that an overlay doesn't hold
BLOCK_BYTES = 8 << 20  # of float32 rows checked at a time
MEMORY_SHARE = 2  # an overlay may take one part in so many of the memory that is available

RowBlock = tuple[NDArray[np.int64], NDArray[np.uint8]]  # row ids [n] and their records [n, record_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlaySpec:
    """The table an overlay is for, and the format of the overlay's own records.

    Attributes:
        num_rows: of the table.
        record: need not be the table's, but for the number of columns.
        keyer_sha256: see `keyer_digest`.
        others: what rows are that it doesn't hold: ``table``, those of the table below, or ``zero``, so that nothing
            below is read. The latter is a cartridge, which stands for a whole table.
    """

    site: str
    num_rows: int
    record: RecordFormat
    keyer_sha256: str
    others: str = TABLE

    @classmethod
    def of(cls, bundle: Bundle, table: TableSpec, record: RecordFormat | None = None, *, others: str = TABLE) -> Self:
        """Describe an overlay for a bundle's table; ``record`` is the table's own unless given."""
        return cls(
            site=table.site,
            num_rows=table.num_rows,
            record=record or table.record,
            keyer_sha256=keyer_digest(bundle, table.keyer),
            others=others,
        )

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse and check."""
        version = fields.count("format_version")
        if not 1 <= version <= FORMAT_VERSION:
            raise version_error("it has format", version, FORMAT_VERSION, "make it again")
        spec = cls(
            site=fields.take("site", str),
            num_rows=fields.count("num_rows", least=1),
            record=RecordFormat.from_fields(fields.fields("record")),
            keyer_sha256=fields.take("keyer_sha256", str),
            others=fields.take("others", str) if version > 1 else TABLE,
        )
        fields.finish()
        if spec.others not in (TABLE, ZERO):
            raise BundleError(f"its other rows are {spec.others!r}, expected {TABLE!r} or {ZERO!r}; make it again")
        return spec

    def to_json(self) -> str:
        """Return what `from_fields` reads."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    def mismatch(self, other: Self) -> tuple[str, int | str, int | str] | None:
        """Return the first fact that must be the same and isn't, as its name, this value and the other's."""
        facts = (
            ("site", self.site, other.site),
            ("number of rows", self.num_rows, other.num_rows),
            ("number of columns", self.record.columns, other.record.columns),
            ("keyer digest", self.keyer_sha256, other.keyer_sha256),
        )
        return next((fact for fact in facts if fact[1] != fact[2]), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlay:
    """Rows of a table: ``row_ids [N]``, strictly ascending, and ``records [N, record_bytes]``."""

    spec: OverlaySpec
    row_ids: NDArray[np.int64]
    records: NDArray[np.uint8]


def read_overlay(path: Path) -> Overlay:
    """Read an overlay into memory.

    Raises:
        TableError: not an overlay, of another version, too large, or with rows that no table can have.
        TargetError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open  # most runs have no overlay
    except ModuleNotFoundError as error:  # as in a packed folder
        raise TargetError("overlays need safetensors: pip install safetensors") from error

    try:
        _check_file(path)
        with safe_open(path, framework="numpy") as file:
            return _read(file)
    except OSError as error:
        raise TableError(f"overlay {path} can't be read: {error.strerror}") from error
    except (SafetensorError, BundleError) as error:
        raise TableError(f"overlay {path} can't be used: {error}") from error


def write_overlay(
    path: Path, spec: OverlaySpec, row_ids: NDArray[np.int64], records: NDArray[np.uint8], *, replace: bool = False
) -> None:
    """Write an overlay of ``row_ids [N]``, strictly ascending, and ``records [N, record_bytes]``.

    Args:
        spec: best from `OverlaySpec.of`.
        replace: whether a file that is there already may be replaced.

    Raises:
        RequestError: there is a file already, or no folder for it.
        TableError: rows that no table can have: ids not ascending or outside it, values that aren't finite.
    """
    write_overlay_blocks(path, spec, [(row_ids, records)], replace=replace)


def write_overlay_blocks(path: Path, spec: OverlaySpec, blocks: Iterable[RowBlock], *, replace: bool = False) -> int:
    """Write an overlay of blocks in ascending order, never more than one in memory; returns how many rows it has.

    The file appears whole or not at all. Raises what `write_overlay` does.
    """
    with new_file(path, replace=replace) as file, tempfile.TemporaryFile(dir=path.parent) as records:
        row_ids = _spill(spec, blocks, records)
        file.write(_header(spec, len(row_ids)) + row_ids.astype("<i8").tobytes())
        records.seek(0)
        shutil.copyfileobj(records, file)
    return len(row_ids)


def _spill(spec: OverlaySpec, blocks: Iterable[RowBlock], file: IO[bytes]) -> NDArray[np.int64]:
    """Write records one after another and return all row ids: only then is it known where records begin."""
    row_ids = [np.empty(0, dtype=np.int64)]
    after = -1
    for ids, records in blocks:
        check_rows(spec, ids, records, after)
        file.write(records.tobytes())
        row_ids.append(ids)
        after = int(ids[-1]) if len(ids) else after
    return np.concatenate(row_ids)


def _header(spec: OverlaySpec, count: int) -> bytes:
    plans = [
        TensorPlan(ROW_IDS, "int64", (count,)),
        TensorPlan(RECORDS, "uint8", (count, spec.record.record_bytes)),
    ]
    return SafetensorsLayout.of(plans, metadata={FACTS: spec.to_json()}).header


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError("it is not a plain file")
    if status.st_size * MEMORY_SHARE > (available := free_memory().num_bytes):
        raise BundleError(
            f"it holds {format_size(status.st_size)}, at most half of the {format_size(available)} available is "
            f"allowed; export a bundle with these rows"
        )


def _read(file: Any) -> Overlay:
    spec = OverlaySpec.from_fields(parse_facts(file.metadata(), FACTS, "make one with engram tables diff"))
    if (names := sorted(file.keys())) != [RECORDS, ROW_IDS]:
        raise BundleError(f"it has tensors {names[:8]}, expected {[RECORDS, ROW_IDS]}")
    count = next(iter(file.get_slice(ROW_IDS).get_shape()), 0)
    _check_tensor(file, ROW_IDS, "I64", [count])
    _check_tensor(file, RECORDS, "U8", [count, spec.record.record_bytes])
    overlay = Overlay(spec=spec, row_ids=file.get_tensor(ROW_IDS), records=file.get_tensor(RECORDS))
    check_rows(spec, overlay.row_ids, overlay.records, -1)
    return overlay


def _check_tensor(file: Any, name: str, dtype: str, shape: list[int]) -> None:
    tensor = file.get_slice(name)
    found = tensor.get_dtype(), list(tensor.get_shape())
    if found != (dtype, shape):
        raise BundleError(f"its {name} are {found[0]} {found[1]}, expected {dtype} {shape}")


def check_rows(spec: OverlaySpec, row_ids: NDArray[np.int64], records: NDArray[np.uint8], after: int) -> None:
    """Refuse rows that no table can have.

    Args:
        row_ids: ``[n]``.
        records: ``[n, record_bytes]``.
        after: the row id before the first one, or -1.

    Raises:
        TableError: ids that aren't ascending or outside the table, or values that aren't finite.
    """
    expected = (len(row_ids), spec.record.record_bytes)
    if row_ids.dtype != np.int64 or records.dtype != np.uint8 or records.shape != expected:
        raise TableError(f"records are {records.dtype} {list(records.shape)}, expected uint8 {list(expected)}")
    before = np.concatenate([[after], row_ids[:-1]])[: len(row_ids)]
    if (wrong := np.flatnonzero(row_ids <= before)).size:
        place = wrong[0]
        raise TableError(f"row id {row_ids[place]} comes after {before[place]}, expected ascending ids from 0")
    if len(row_ids) and row_ids[-1] >= spec.num_rows:
        raise TableError(f"row id {row_ids[-1]} is outside [0, {spec.num_rows})")
    step = max(1, BLOCK_BYTES // (4 * spec.record.columns))
    for start in range(0, len(row_ids), step):
        _check_finite(spec.record, row_ids[start : start + step], records[start : start + step])


def _check_finite(record: RecordFormat, row_ids: NDArray[np.int64], records: NDArray[np.uint8]) -> None:
    finite = np.isfinite(record.decode(records)).all(axis=1)
    if not finite.all():
        raise TableError(f"row {row_ids[~finite][0]} has a value that is not finite; it would spoil all later tokens")
