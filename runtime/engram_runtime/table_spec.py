"""How a manifest describes host tables: what a record is, where its parts lie, and how histories become row ids."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Self

from engram_runtime.errors import BundleError
from engram_runtime.keyer_spec import KeyerSpec, parse_keyer
from engram_runtime.records import RecordFormat
from engram_runtime.strict_json import Fields

CHECKSUM_BLOCK_BYTES = 4096  # of a file for each checksum; benchmarks/block_checksums.py says why
CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """Consecutive rows in one file: row i of the part lies at ``offset + (i - first_row) * row_bytes``.

    ``file`` is a path inside the bundle, or an absolute path where ``external`` (tables read in place); ``identity``
    then tells whether it is still the same file, see `engram_runtime.bundle.file_identity`. ``checksums`` is the
    file of its checksums, see `engram_runtime.tables.checksums`; external files and those of version 2 have none.
    """

    first_row: int
    num_rows: int
    file: str
    external: bool
    offset: int
    identity: str | None = None
    checksums: str | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse and check what can be checked by itself."""
        rows = cls(
            first_row=fields.count("first_row"),
            num_rows=fields.count("num_rows", least=1),
            file=fields.take("file", str),
            external=fields.take("external", bool),
            offset=fields.count("offset"),
            identity=fields.optional_text("identity"),
            checksums=fields.take("checksums", str) if fields.given("checksums") else None,
        )
        fields.finish()
        if rows.external != PurePosixPath(rows.file).is_absolute():
            raise BundleError(f"table file {rows.file} must be absolute if external and relative if not")
        if rows.external != (rows.identity is not None):
            raise BundleError(f"table file {rows.file} must have an identity if external and none if not")
        if rows.external and rows.checksums is not None:
            raise BundleError(f"table file {rows.file} is external and must have no checksums")
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePart:
    """A part of every record, such as the payload or the scales: ``row_bytes`` a row, over one or more files."""

    row_bytes: int
    ranges: tuple[RowRange, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse; whether the rows are complete is checked by the table."""
        part = cls(
            row_bytes=fields.count("row_bytes", least=1),
            ranges=tuple(RowRange.from_fields(item) for item in fields.objects("ranges")),
        )
        fields.finish()
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """A host table: a record is its parts one after another; T tokens get ``[T, keyer.columns, record.columns]``."""

    site: str
    num_rows: int
    record: RecordFormat
    parts: tuple[TablePart, ...]
    keyer: KeyerSpec

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse and check."""
        table = cls(
            site=fields.take("site", str),
            num_rows=fields.count("num_rows", least=1),
            record=RecordFormat.from_fields(fields.fields("record")),
            parts=tuple(TablePart.from_fields(item) for item in fields.objects("parts")),
            keyer=parse_keyer(fields.fields("keyer")),
        )
        fields.finish()
        table.check()
        return table

    @property
    def ranges(self) -> tuple[RowRange, ...]:
        """The row ranges of all parts."""
        return tuple(rows for part in self.parts for rows in part.ranges)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the bundle that the table needs."""
        own = [rows for rows in self.ranges if not rows.external]
        checksums = [rows.checksums for rows in own if rows.checksums is not None]
        return (*self.keyer.files, *(rows.file for rows in own), *checksums)

    def check(self) -> None:
        """Refuse a table whose rows, records and keyer disagree."""
        if self.num_rows < (least := self.keyer.min_rows):
            raise BundleError(f"table {self.site} has {self.num_rows} rows, its keyer needs {least}")
        if (total := sum(part.row_bytes for part in self.parts)) != self.record.record_bytes:
            raise BundleError(
                f"table {self.site} has {total} bytes a row in its parts, its record {self.record.record_bytes}"
            )
        for index, part in enumerate(self.parts):
            self._check_rows(index, part)
        self._check_checksums()

    def _check_checksums(self) -> None:
        """Refuse a file that has its checksums in two places."""
        found: dict[str, str | None] = {}
        for rows in self.ranges:
            if found.setdefault(rows.file, rows.checksums) != rows.checksums:
                raise BundleError(f"table file {rows.file} has checksums {rows.checksums} and {found[rows.file]}")

    def _check_rows(self, index: int, part: TablePart) -> None:
        """Refuse row ranges with gaps, overlaps or missing rows: the reader finds rows by bisection."""
        reached = 0
        for rows in part.ranges:
            if rows.first_row != reached:
                raise BundleError(
                    f"part {index} of table {self.site} goes on with row {rows.first_row}, expected row {reached}"
                )
            reached += rows.num_rows
        if reached != self.num_rows:
            raise BundleError(f"part {index} of table {self.site} has {reached} rows, expected {self.num_rows}")


def checksums_bytes(num_bytes: int) -> int:
    """Return the size of the checksums of a file of so many bytes."""
    return -(-num_bytes // CHECKSUM_BLOCK_BYTES) * CHECKSUM_BYTES
