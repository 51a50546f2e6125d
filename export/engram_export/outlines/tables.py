"""The host tables that an export of a checkpoint would write."""

from pathlib import Path

from engram_export.checkpoint import Checkpoint
from engram_export.engram_source import engram_sources
from engram_export.families import PER_LAYER_TABLE
from engram_export.families.deepseek_sizes import engram_sizes
from engram_export.families.qwen4_memory import FACTOR, TABLE, NgramMemory, read_memories
from engram_export.families.reading import count, entries, text_part, text_prefix
from engram_export.host_table import PAYLOADS
from engram_export.listed_tensors import ListedTensors
from engram_export.outlines.headers import dtype_of, stated_dtype
from engram_export.table_writer import written_format
from engram_runtime.errors import CheckpointError
from engram_runtime.planning.outline import Table, layers_before
from engram_runtime.records import RecordFormat
from engram_runtime.tables.place import place_of
from engram_runtime.tables.policy import TableFacts

FP8_COLUMNS = 32  # that share a scale in DeepSeek-V4.1's tables


def tables_of(checkpoint: Checkpoint, table_dtype: str | None) -> list[Table]:
    """Return a checkpoint's tables, their records repacked if a dtype is given.

    Raises:
        CheckpointError: sizes that can't be, or tables whose shards are needed and aren't there.
    """
    part = text_part(checkpoint)
    return [_table(part, table_dtype, *found) for found in (*_own(checkpoint, part), *_of_sites(checkpoint))]


Found = tuple[str, int, int, RecordFormat, Path | None]  # site, rows, rows a token, record, a file with some of them


def _own(checkpoint: Checkpoint, part: Checkpoint) -> list[Found]:
    """Return the tables of the checkpoint's family."""
    if entries(part, "ple_layer_ids"):
        kinds = tuple(part.require("layer_types", list))
        prefix = text_prefix(part)
        return [_ngram_table(part, memory) for memory in read_memories(part, prefix, kinds).values()]
    if "engram_layer_ids" in part.config:
        return _deepseek_tables(checkpoint, part)
    width = count(part, "hidden_size_per_layer_input", default=0, least=0)
    return [_per_layer_table(part, width)] if width else []


def _ngram_table(part: Checkpoint, memory: NgramMemory) -> Found:
    rows = -(-memory.keyer.min_rows // memory.row_multiple) * memory.row_multiple
    first = f"{memory.prefix}{TABLE}0.weight"
    scaled = "F8_E4M3" if f"{memory.prefix}{FACTOR}" in part.tensors.names() else stated_dtype(part)
    dtype, path = dtype_of(part.tensors, first, scaled)
    site = memory.site
    return site.site, rows, site.columns, _plain(dtype, site.row_dim), path


def _per_layer_table(part: Checkpoint, width: int) -> Found:
    name = f"{text_prefix(part)}{PER_LAYER_TABLE}"
    dtype, path = dtype_of(part.tensors, name, stated_dtype(part))
    record = _plain(dtype, count(part, "num_hidden_layers") * width)
    return "per_layer", count(part, "vocab_size_per_layer_input"), 1, record, path


def _deepseek_tables(checkpoint: Checkpoint, part: Checkpoint) -> list[Found]:
    sizes = engram_sizes(checkpoint, part)
    record = RecordFormat(payload="float8_e4m3", columns=sizes.row_dim, scale="e8m0", scale_columns=FP8_COLUMNS)
    columns = (sizes.max_order - 1) * sizes.num_heads
    found = []
    for layer, rows in sizes.layers.items():
        (name,) = [name for name in part.tensors.names() if name.endswith(f"layers.{layer}.engram.embed.weight")] or [
            ""
        ]
        _, path = dtype_of(part.tensors, name, "F8_E4M3")
        found.append((f"layer_{layer}", rows, columns, record, path))
    return found


def _of_sites(checkpoint: Checkpoint) -> list[Found]:
    """Return the tables of the paper's Engram sites."""
    if "engram" not in checkpoint.config:
        return []
    if isinstance(checkpoint.tensors, ListedTensors):
        raise CheckpointError(
            f"{checkpoint.source} has an engram block, the formats of its rows stand in shards that are not here; "
            f"download them"
        )
    tables = [source.table() for source in engram_sources(checkpoint, None)]
    return [(table.site, table.num_rows, table.keyer.columns, table.record, table.parts[0][0].path) for table in tables]


def _plain(dtype: str, columns: int) -> RecordFormat:
    if dtype not in PAYLOADS:
        raise CheckpointError(f"table rows are {dtype}, expected one of {sorted(PAYLOADS)}")
    return RecordFormat(payload=PAYLOADS[dtype], columns=columns, scale="none", scale_columns=columns)


def _table(
    part: Checkpoint,
    table_dtype: str | None,
    site: str,
    num_rows: int,
    rows: int,
    record: RecordFormat,
    path: Path | None,
) -> Table:
    record_bytes = written_format(record, table_dtype).record_bytes
    file = path or part.path
    return Table(
        num_rows=num_rows,
        record_bytes=record_bytes,
        rows=rows,
        parts=1,
        layers_before=layers_before(site, count(part, "num_hidden_layers")),
        facts=TableFacts(
            site=site,
            num_bytes=num_rows * record_bytes,
            reads=rows,
            external=False,
            leased=True,
            path=file,
            place=place_of(Path.cwd()),
        ),
    )
