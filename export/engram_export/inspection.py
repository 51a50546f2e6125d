"""What a checkpoint holds, from its headers alone."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from engram_export.checkpoint import Checkpoint, TensorSource, open_checkpoint
from engram_export.families import FAMILIES, TABLE_FAMILIES, TABLE_TENSORS
from engram_export.families.reading import text_part
from engram_export.gguf_file import GgufTensors
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards

SIZES = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's facts as JSON values; raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    types = Counter(_tensor_type(tensors, name) for name in tensors.names())
    model_type = checkpoint.require("model_type", str)
    sizes = text_part(checkpoint).config
    return {
        "kind": "checkpoint",
        "model": checkpoint.source,
        "family": model_type,
        "supported": _support(model_type),
        "parameters": sum(prod(tensors.shape(name)) for name in tensors.names()),
        **{label: sizes[key] for label, key in SIZES.items() if key in sizes},
        "tokenizer": "yes" if checkpoint.tokenizer_json is not None else "no",
        "engram": "yes" if _has_tables(checkpoint, model_type) else "no",
        "tensors": [{"type": name, "count": count} for name, count in types.most_common()],
    }


def _has_tables(checkpoint: Checkpoint, model_type: str) -> bool:
    if "engram" in checkpoint.config or model_type in TABLE_FAMILIES:
        return True
    return any(table in name for name in checkpoint.tensors.names() for table in TABLE_TENSORS)


def _support(model_type: str) -> str:
    if model_type in TABLE_FAMILIES:
        return "tables and sites, with --tables-only"
    return "yes" if model_type in FAMILIES else f"no, only {', '.join(FAMILIES)}"


def _tensor_type(tensors: TensorSource, name: str) -> str:
    if isinstance(tensors, GgufTensors):
        return tensors.tensor_type(name)
    if isinstance(tensors, SafetensorsFile | SafetensorsShards):
        return tensors.dtype(name)
    raise AssertionError(f"no types for {type(tensors).__name__}")
