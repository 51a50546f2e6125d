"""Model families by the checkpoint's ``model_type``."""

from collections.abc import Callable, Sequence
from typing import Protocol

from engram_export.checkpoint import Checkpoint
from engram_export.decoder import Decoder
from engram_export.engram_site import EngramSite
from engram_export.families import deepseek_v41, gemma, gemma3n, gemma4, llama, mixture, qwen4_exp, qwen4_memory
from engram_export.formats import WeightFormat
from engram_export.host_table import TableSource
from engram_export.site_source import TablesSource
from engram_export.text_decoder import TextConfig
from engram_export.weight_map import NameMap
from engram_runtime.errors import CheckpointError


class Architecture(Protocol):
    """What a family knows of one checkpoint.

    Attributes:
        ignored: regular expressions of tensors that may stay unused.
    """

    @property
    def text(self) -> TextConfig: ...
    @property
    def ignored(self) -> Sequence[str]: ...

    def name_map(self) -> NameMap:
        """Return what every weight of the module is made of."""
        ...

    def tables(self, checkpoint: Checkpoint) -> Sequence[TableSource]:
        """Describe the family's own host tables."""
        ...

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> Decoder:
        """Make the module with uninitialised parameters; ``sites`` are those of the paper's Engram memory."""
        ...


FAMILIES: dict[str, Callable[[Checkpoint], Architecture]] = {
    "llama": llama.read,
    "qwen3": llama.read,
    "mixtral": mixture.read_mixtral,
    "qwen3_moe": mixture.read_qwen3_moe,
    "qwen3_5_moe": mixture.read_qwen3_5_moe,
    "qwen3_5_moe_text": mixture.read_qwen3_5_moe,
    "qwen4_exp": qwen4_exp.read,
    "qwen4_exp_text": qwen4_exp.read,
    "gemma3n": gemma3n.read,
    "gemma3n_text": gemma3n.read,
    "gemma4": gemma4.read,
    "gemma4_text": gemma4.read,
}
# Families of which only tables and sites can be exported.
TABLE_FAMILIES: dict[str, Callable[[Checkpoint], TablesSource]] = {"deepseek_v41": deepseek_v41.read}
# What the names of families' own tables contain, in checkpoints that export with their decoder.
TABLE_TENSORS = (gemma.TABLE, qwen4_memory.TABLE)


def read_tables_source(checkpoint: Checkpoint) -> TablesSource:
    """Read the tables and sites of a checkpoint; raises CheckpointError where its family has none by themselves."""
    model_type = checkpoint.require("model_type", str)
    if model_type not in TABLE_FAMILIES:
        raise CheckpointError(
            f"--tables-only takes checkpoints of {sorted(TABLE_FAMILIES)}, this is {model_type!r}; its tables are "
            f"exported with its decoder, without that option"
        )
    return TABLE_FAMILIES[model_type](checkpoint)


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
    return FAMILIES[model_type](checkpoint)
