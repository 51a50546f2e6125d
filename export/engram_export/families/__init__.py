"""Model families by the checkpoint's ``model_type``."""

from collections.abc import Mapping
from typing import Protocol

from engram_export.checkpoint import Checkpoint
from engram_export.families import llama
from engram_runtime.errors import CheckpointError


class Family(Protocol):
    """What a family's module says of its checkpoints."""

    NAME_MAP: Mapping[str, tuple[str, ...]]
    IGNORED: tuple[str, ...]

    def read_config(self, checkpoint: Checkpoint) -> llama.LlamaConfig:
        """Read the architecture from a checkpoint's config."""
        ...


FAMILIES: dict[str, Family] = {"llama": llama, "qwen3": llama}


def read_family_config(checkpoint: Checkpoint) -> llama.LlamaConfig:
    """Read the architecture of a checkpoint; raises CheckpointError where no family knows it."""
    model_type = checkpoint.require("model_type", str)
    if model_type not in FAMILIES:
        raise CheckpointError(f"architecture {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return FAMILIES[model_type].read_config(checkpoint)
