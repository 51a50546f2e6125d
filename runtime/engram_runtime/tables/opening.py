"""How a bundle's tables are opened."""

from engram_runtime.bundle import Bundle
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.decoding import NumpyRowDecoder
from engram_runtime.tables.memory import ResidentTable
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.store import TableStore

RESIDENT_LIMIT_BYTES = 256 << 20  # a table below this is read into memory; larger ones are read row by row


def open_table(bundle: Bundle, spec: TableSpec) -> TableStore:
    """Open a bundle's table: resident below `RESIDENT_LIMIT_BYTES`, read from its files above."""
    decoder = NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts])
    if spec.num_rows * spec.record.record_bytes > RESIDENT_LIMIT_BYTES:
        return PreadTable(spec, bundle.table_path, decoder)
    return ResidentTable.load(spec, bundle.table_path, decoder)
