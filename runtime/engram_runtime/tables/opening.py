"""How a bundle's tables are opened."""

from engram_runtime.bundle import Bundle
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.memory import InMemoryTable
from engram_runtime.tables.store import TableStore

RESIDENT_LIMIT_BYTES = 256 << 20  # a table below this is read into memory; larger ones are read row by row


def open_table(bundle: Bundle, spec: TableSpec) -> TableStore:
    """Open a bundle's table: resident below `RESIDENT_LIMIT_BYTES`, read from its files above."""
    table = FileTable(spec, bundle.table_path)
    if spec.num_rows * spec.record.record_bytes > RESIDENT_LIMIT_BYTES:
        return table
    with table:
        return InMemoryTable(table.read_all(), spec.record)
