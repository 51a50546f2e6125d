"""Model families by the checkpoint's ``model_type``, imported when they are read: torch takes seconds."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from engram_export.checkpoint import Checkpoint
from engram_export.families.qwen4_memory import TABLE as NGRAM_TABLE
from engram_export.weight_map import NameMap
from engram_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from engram_export.decoder import Decoder
    from engram_export.engram_site import EngramSite
    from engram_export.formats import WeightFormat
    from engram_export.host_table import TableSource
    from engram_export.site_source import TablesSource
    from engram_export.text_decoder import TextConfig


class Architecture(Protocol):
    """What a family knows of one checkpoint.

    Attributes:
        ignored: regular expressions of tensors that may stay unused.
    """

    @property
    def text(self) -> "TextConfig": ...
    @property
    def ignored(self) -> Sequence[str]: ...

    def name_map(self) -> NameMap:
        """Return what every weight of the module is made of."""
        ...

    def tables(self, checkpoint: Checkpoint) -> "Sequence[TableSource]":
        """Describe the family's own host tables."""
        ...

    def build(self, context_length: int, weights: "WeightFormat", sites: "Sequence[EngramSite]") -> "Decoder":
        """Make the module with uninitialised parameters; ``sites`` are those of the paper's Engram memory."""
        ...


# model_type -> module:function that reads an `Architecture`
FAMILIES = {
    "llama": "engram_export.families.llama:read",
    "qwen3": "engram_export.families.llama:read",
    "mixtral": "engram_export.families.mixture:read_mixtral",
    "qwen3_moe": "engram_export.families.mixture:read_qwen3_moe",
    "qwen3_5_moe": "engram_export.families.mixture:read_qwen3_5_moe",
    "qwen3_5_moe_text": "engram_export.families.mixture:read_qwen3_5_moe",
    "qwen4_exp": "engram_export.families.qwen4_exp:read",
    "qwen4_exp_text": "engram_export.families.qwen4_exp:read",
    "gemma3n": "engram_export.families.gemma3n:read",
    "gemma3n_text": "engram_export.families.gemma3n:read",
    "gemma4": "engram_export.families.gemma4:read",
    "gemma4_text": "engram_export.families.gemma4:read",
}
# Families of which only tables and sites can be exported, and what reads their `TablesSource`.
TABLE_FAMILIES = {"deepseek_v41": "engram_export.families.deepseek_v41:read"}
PER_LAYER_TABLE = "embed_tokens_per_layer.weight"  # of Gemma
# What the names of families' own tables contain, in checkpoints that export with their decoder.
TABLE_TENSORS = (PER_LAYER_TABLE, NGRAM_TABLE)


def read_tables_source(checkpoint: Checkpoint) -> "TablesSource":
    """Read the tables and sites of a checkpoint; raises CheckpointError where its family has none by themselves."""
    model_type = checkpoint.require("model_type", str)
    if model_type not in TABLE_FAMILIES:
        raise CheckpointError(
            f"--tables-only takes checkpoints of {sorted(TABLE_FAMILIES)}, this is {model_type!r}; its tables are "
            f"exported with its decoder, without that option"
        )
    source: TablesSource = _reader(TABLE_FAMILIES, model_type)(checkpoint)
    return source


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Read the architecture of a checkpoint; raises CheckpointError where no family knows it."""
    model_type = checkpoint.require("model_type", str)
    if model_type in TABLE_FAMILIES:
        raise CheckpointError(
            f"of {model_type!r} the n-gram tables and the sites that read them are supported, attention, experts and "
            f"hyper-connections are not; add --tables-only to export what is"
        )
    if model_type not in FAMILIES:
        raise CheckpointError(f"architecture {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    architecture: Architecture = _reader(FAMILIES, model_type)(checkpoint)
    return architecture


def _reader(families: Mapping[str, str], model_type: str) -> Callable[[Checkpoint], Any]:
    module, _, function = families[model_type].partition(":")
    reader: Callable[[Checkpoint], Any] = getattr(importlib.import_module(module), function)
    return reader
