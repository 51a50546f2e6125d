"""The outline of a checkpoint: what its export would write and need."""

from collections.abc import Sequence
from pathlib import Path

from engram_export.checkpoint import Checkpoint, open_listed
from engram_export.engram_source import engram_sources
from engram_export.export_memory import ExportSizes, calibration_memory, peak_memory
from engram_export.families import FAMILIES, TABLE_FAMILIES
from engram_export.families.reading import count, text_part
from engram_export.listed_tensors import ListedTensors
from engram_export.outlines.decoders import take_inventory
from engram_export.outlines.foreign import foreign_bytes, site_inventory
from engram_export.outlines.headers import largest_file, source_bytes, weights_are_bfloat16
from engram_export.outlines.inventory import Inventory
from engram_export.outlines.layers import engram_site
from engram_export.outlines.tables import tables_of
from engram_runtime.errors import CheckpointError, RequestError
from engram_runtime.planning.outline import ROTATIONS, ExportNeeds, Outline, Table

CALIBRATED = ("llama", "qwen3")  # families all of whose layers are attention and SwiGLU
DEFAULT_QUANT = "int8"


def outline_checkpoint(path: Path, *, quant: str | None, table_dtype: str | None, context: int | None) -> Outline:
    """Return the outline of a checkpoint; only headers are read, or where shards are missing the config and index.

    Args:
        quant: weight format of the export, int8 by default.
        table_dtype: what table rows are repacked as, or None to take them as they are.
        context: tokens a sequence may have, or None for what the model was trained for.

    Raises:
        CheckpointError: a family that isn't known, or sizes that can't be.
        RequestError: a context the model can't have.
    """
    checkpoint = open_listed(path)
    family = checkpoint.require("model_type", str)
    if family in TABLE_FAMILIES:
        return _of_tables(checkpoint, quant or DEFAULT_QUANT, table_dtype)
    if family not in FAMILIES:
        raise CheckpointError(f"architecture {family!r} is not supported; supported are {sorted(FAMILIES)}")
    return _of_decoder(checkpoint, quant or DEFAULT_QUANT, table_dtype, context)


def _of_decoder(checkpoint: Checkpoint, quant: str, table_dtype: str | None, context: int | None) -> Outline:
    part = text_part(checkpoint)
    longest = count(part, "max_position_embeddings")
    if context is not None and not 1 <= context <= longest:
        raise RequestError(f"context is {context}, this model takes 1 to {longest} tokens")
    made = take_inventory(checkpoint, quant, context or longest, bfloat16=weights_are_bfloat16(checkpoint))
    if "engram" in checkpoint.config:
        for source in engram_sources(checkpoint, None):
            engram_site(made, source.config, count(part, "hidden_size"))
    tables = tables_of(checkpoint, table_dtype)
    sizes = ExportSizes(
        shapes=list(made.shapes.values()),
        states=made.states,
        vocab_size=count(part, "vocab_size"),
        hidden_size=count(part, "hidden_size"),
        num_layers=count(part, "num_hidden_layers"),
        context_length=context or longest,
        tokenizer_bytes=len(checkpoint.tokenizer_json or b""),
    )
    export = ExportNeeds(
        peak_bytes=_peak_bytes(checkpoint, made, sizes),
        disk_bytes=_disk_bytes(made, tables),
        quant=quant,
        context=context,
        table_dtype=table_dtype,
        tables_only=False,
    )
    return _outline(checkpoint, made, tables, export, {}, context or longest)


def _of_tables(checkpoint: Checkpoint, quant: str, table_dtype: str | None) -> Outline:
    if quant == "int4":
        raise RequestError("--quant int4 is for layers of a decoder, sites have none below int8; use int8 or none")
    tables, made = tables_of(checkpoint, table_dtype), site_inventory(checkpoint, quant)
    export = ExportNeeds(
        peak_bytes=None,
        disk_bytes=sum(part.stored_bytes for part in made.parts) + sum(table.num_bytes for table in tables),
        quant=quant,
        context=None,
        table_dtype=table_dtype,
        tables_only=True,
    )
    longest = count(text_part(checkpoint), "max_position_embeddings")
    return _outline(checkpoint, made, tables, export, foreign_bytes(checkpoint, tables_of(checkpoint, None)), longest)


def _outline(
    checkpoint: Checkpoint,
    made: Inventory,
    tables: Sequence[Table],
    export: ExportNeeds,
    foreign: dict[str, int],
    context_length: int,
) -> Outline:
    part, listed = text_part(checkpoint), isinstance(checkpoint.tensors, ListedTensors)
    return Outline(
        path=checkpoint.path,
        model=checkpoint.source,
        family=checkpoint.require("model_type", str),
        quantisation=made.quant,
        parameters=sum(each.values for each in made.parts if each.role != ROTATIONS),
        source_bytes=source_bytes(checkpoint),
        read_from="its config and index, as shards are not here" if listed else "its config and headers",
        vocab_size=count(part, "vocab_size"),
        num_layers=count(part, "num_hidden_layers"),
        context_length=context_length,
        parts=made.parts,
        states=made.states,
        tables=tables,
        foreign=foreign,
        export=export,
        weights_file=largest_file(checkpoint),
    )


def _peak_bytes(checkpoint: Checkpoint, made: Inventory, sizes: ExportSizes) -> int:
    if made.quant != "int4" or checkpoint.require("model_type", str) not in CALIBRATED:
        return peak_memory(sizes)
    layer = [shape for name, shape in made.shapes.items() if name.startswith("layers.0.")]
    return max(peak_memory(sizes), calibration_memory(sizes, layer))


def _disk_bytes(made: Inventory, tables: Sequence[Table]) -> int:
    weights = sum(part.stored_bytes + part.packed_bytes for part in made.parts)
    return weights + sum(table.num_bytes for table in tables)
