"""The functions of a library that decode the records of a bundle's tables."""

from collections.abc import Sequence

import tvm

from engram_compilers.kernels.table_rows import decode_rows
from engram_runtime.library import row_function
from engram_runtime.table_spec import TableSpec


def table_functions(tables: Sequence[TableSpec]) -> tvm.IRModule:
    """Return a `row_function` for each kind of record; none for records cut elsewhere than before their scales."""
    functions = {}
    for table in tables:
        parts = [part.row_bytes for part in table.parts]
        if len(parts) == 1 or parts == [table.record.payload_bytes, table.record.record_bytes - parts[0]]:
            name = row_function(table)
            functions[name] = decode_rows(table.record, parts).with_attr("global_symbol", name)
    return tvm.IRModule(functions)
