"""Where a draft head comes from: the ``mtp`` block and ``mtp.safetensors`` of a folder added at export.

The block says what the head computes, see `engram_export.draft_head`; other heads are refused. Tensors are named as in
Qwen's checkpoints, ``mtp.*``, or in DeepSeek's, ``model.layers.N.eh_proj`` and so on with N the number of layers of the
model; linear layers may be int8 with a scale of each row, ``X.weight_scale``. The ids that the head tells apart are
``mtp.draft_vocab``.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import TensorSource
from engram_export.engram_source import read_folder_config
from engram_export.families.llama import attention_names, mlp_names, norm_names
from engram_export.row_scaled_tensors import RowScaledTensors
from engram_export.safetensors_file import SafetensorsFile
from engram_export.weight_map import Joined, NameMap, ReadRows
from engram_runtime.errors import BundleError, CheckpointError
from engram_runtime.strict_json import Fields

WEIGHTS_FILE = "mtp.safetensors"
PREFIX = "mtp."
VOCABULARY = f"{PREFIX}draft_vocab"
# What is computed, in the words of the block: there is no other choice yet.
WORDS = {
    "hidden": "after the final norm",
    "lm_head": "tied, restricted to mtp.draft_vocab",
    "rope_positions": "position of the hidden state (t), then t+1 for the chained step",
}
QWEN = {
    "embedding_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "fc": "fc",
    "norm": "norm",
}
DEEPSEEK = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "fc": "eh_proj", "norm": "shared_head.norm"}
DEEPSEEK_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.eh_proj\.weight")
FC_INPUT = ("norm(embedding of token t+1)", "norm(hidden t)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """What a head is made of beside the model's own sizes."""

    norm_eps: float
    vocabulary_size: int

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Parse the block; raises CheckpointError naming the key."""
        try:
            return cls._from_fields(Fields(raw, "the mtp block"))
        except BundleError as error:
            raise CheckpointError(f"{error}; correct the folder's config") from error

    @classmethod
    def _from_fields(cls, fields: Fields) -> Self:
        if (layers := fields.count("num_layers")) != 1:
            raise CheckpointError(f"the mtp block has num_layers {layers}, supported is 1")
        if (found := fields.texts("fc_input")) != FC_INPUT:
            raise CheckpointError(f"the mtp block has fc_input {list(found)}, supported is {list(FC_INPUT)}")
        for name, words in WORDS.items():
            if (said := fields.take(name, str)) != words:
                raise CheckpointError(f"the mtp block has {name} {said!r}, supported is {words!r}")
        config = cls(norm_eps=fields.number("rms_norm_eps"), vocabulary_size=fields.count("draft_vocab_size", least=1))
        fields.finish()
        return config


@dataclass(frozen=True, slots=True, eq=False)
class DraftSource:
    """A head: its config, its tensors and the ids ``[n]`` it tells apart."""

    config: DraftConfig
    tensors: TensorSource
    vocabulary: NDArray[np.int64]

    def computed(self) -> dict[str, ReadRows]:
        """Return the parameters that are no weights, as `engram_export.decoder.Decoder.computed` does."""
        return {f"{PREFIX}vocabulary": lambda start, stop: self.vocabulary[start:stop]}

    def name_map(self) -> NameMap:
        """Return what every weight of the head's own is made of."""
        found = next(filter(None, map(DEEPSEEK_LAYER.fullmatch, self.tensors.names())), None)
        number = 0 if found is None else int(found[1])
        root, own, names = (PREFIX, PREFIX, QWEN) if found is None else ("model.", f"model.layers.{number}.", DEEPSEEK)
        layer = norm_names(root, number) | attention_names(root, number) | mlp_names(root, number)
        target, first = f"layers.{number}.", f"{PREFIX}layers.0."
        return {
            **{f"{PREFIX}{ours}.weight": Joined(f"{own}{theirs}.weight") for ours, theirs in names.items()},
            **{name.replace(target, first, 1): recipe for name, recipe in layer.items()},
        }


def draft_source(folder: Path, vocab_size: int) -> DraftSource | None:
    """Return the head that a folder adds to a model of so many tokens, or None where it adds none.

    Raises:
        CheckpointError: a block that is malformed or of another kind of head, or ids that aren't the model's.
    """
    if "mtp" not in (config := read_folder_config(folder)):
        return None
    draft = DraftConfig.from_dict(config["mtp"])
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    ids = file.read_raw(VOCABULARY).astype(np.int64)
    if ids.shape != (draft.vocabulary_size,):
        raise CheckpointError(f"{VOCABULARY} has shape {list(ids.shape)}, the config says [{draft.vocabulary_size}]")
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < len(ids):
        raise CheckpointError(
            f"{VOCABULARY} has ids {ids.min()} to {ids.max()}, expected distinct ones within [0, {vocab_size})"
        )
    return DraftSource(draft, RowScaledTensors(file), ids)
