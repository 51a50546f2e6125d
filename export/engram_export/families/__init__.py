"""Model families by the checkpoint's ``model_type``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engram_export.checkpoint import Checkpoint
from engram_export.families import llama
from engram_runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """What a family's module says of its checkpoints.

    Attributes:
        name_map: module weight -> tensors of the checkpoint. ``ignored``: tensors that may stay unused.
    """

    read_config: Callable[[Checkpoint], llama.LlamaConfig]
    name_map: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]


LLAMA = Family(llama.read_config, llama.NAME_MAP, llama.IGNORED)
FAMILIES = {"llama": LLAMA, "qwen3": LLAMA}


def read_family_config(checkpoint: Checkpoint) -> llama.LlamaConfig:
    """Read the architecture of a checkpoint; raises CheckpointError where no family knows it."""
    model_type = checkpoint.require("model_type", str)
    if model_type not in FAMILIES:
        raise CheckpointError(f"architecture {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return FAMILIES[model_type].read_config(checkpoint)
