"""Where a checkpoint's Engram sites come from: its own config and tensors, or a folder added at export."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint
from engram_export.engram_config import EngramConfig
from engram_export.host_table import RawTensors, TableSource, table_source
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.source_files import parse_json_object, read_small_file
from engram_export.token_compression import compress_vocabulary
from engram_export.weight_map import ReadRows
from engram_runtime.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "engram.safetensors"
MAX_CONFIG_BYTES = 4 << 20
DERIVE_FROM_TOKENIZER = "tokenizer"


# Weight of the site's module -> tensor of the checkpoint, after its prefix.
SITE_WEIGHTS: Mapping[str, str] = {
    "key_proj.weight": "key_proj.weight",
    "value_proj.weight": "value_proj.weight",
    "query_norm.weight": "query_norm.weight",
    "key_norm.weight": "key_norm.weight",
    "gate_bias": "gate_bias",
    "conv.norm.weight": "conv_norm.weight",
    "conv.weight": "conv.weight",
}
GAINS = ("query_norm.weight", "key_norm.weight", "conv.norm.weight")  # one where the checkpoint has none


@dataclass(frozen=True, slots=True, eq=False)
class EngramSource:
    """One site: its config and the tensors under its prefix."""

    config: EngramConfig
    tensors: RawTensors
    prefix: str

    def tensor(self, name: str) -> str:
        """Return the checkpoint's name of a site tensor."""
        return f"{self.prefix}.{name}"

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this site tensor."""
        return self.tensor(name) in self.tensors.names()

    def table(self) -> TableSource:
        """Describe the site's rows, without a token map; only headers are read.

        Raises:
            CheckpointError: tensors that are not what the config says.
        """
        config = self.config
        if config.num_rows != config.keyer.min_rows:
            raise CheckpointError(
                f"the engram block has {config.num_rows} rows, its primes sum to {config.keyer.min_rows}"
            )
        return table_source(
            site=config.site,
            keyer=config.keyer,
            token_map=None,
            columns=config.row_dim,
            tensors=self.tensors,
            payload=[self.tensor("table.rows")],
            packed=config.row_payload is not None,
            scales=[self.tensor("table.scales")] if self.has("table.scales") else [],
        )

    def table_with_map(self, vocab_size: int, tokenizer_json: bytes | None) -> TableSource:
        """Describe the site's rows and the ids that lead to them; raises CheckpointError."""
        return dataclasses.replace(self.table(), token_map=self.token_map(vocab_size, tokenizer_json))

    def token_map(self, vocab_size: int, tokenizer_json: bytes | None) -> NDArray[np.int32] | None:
        """Return ``[V]`` raw id -> compressed id, or None where raw ids are hashed."""
        if self.config.token_map is None:
            return None
        if self.config.token_map == DERIVE_FROM_TOKENIZER:
            if tokenizer_json is None:
                raise CheckpointError("the engram token map is to be derived, but the checkpoint has no tokenizer")
            problem = "the engram token map can't be derived, the tokenizer can't be used"
            values = compress_vocabulary(tokenizer_json, problem)
        else:
            values = self.tensors.read_raw(self.config.token_map).astype(np.int32)
        self._check_token_map(values, vocab_size)
        return values

    def _check_token_map(self, values: NDArray[np.int32], vocab_size: int) -> None:
        if values.shape != (vocab_size,):
            raise CheckpointError(f"the engram token map has {values.size} entries, the vocabulary {vocab_size}")
        expected = self.config.compressed_vocab_size
        if (found := int(values.max()) + 1) != expected or values.min() < 0:
            raise CheckpointError(
                f"the engram token map leads to {found} ids, the config says {expected}; this is another tokenizer"
            )


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the config of a folder that adds to a checkpoint; raises CheckpointError where it adds nothing."""
    path = folder / CONFIG_FILE
    config = parse_json_object(read_small_file(path, MAX_CONFIG_BYTES), str(path))
    if not {"engram", "mtp"} & config.keys():
        raise CheckpointError(f"{path} has neither an 'engram' nor an 'mtp' block")
    return config


def engram_sources(checkpoint: Checkpoint, folder: Path | None) -> list[EngramSource]:
    """Find the sites of a checkpoint, those of ``folder`` if one is given that has some.

    Raises:
        CheckpointError: an engram block that is malformed, or tensors that can't be read in place.
    """
    if folder is not None and "engram" in (config := read_folder_config(folder)):
        return _from_blocks(config["engram"], SafetensorsFile(folder / WEIGHTS_FILE))
    if "engram" not in checkpoint.config:
        return []
    if not isinstance(checkpoint.tensors, SafetensorsFile | SafetensorsShards):
        raise CheckpointError(f"{checkpoint.source} has an engram block, but its tensors are not safetensors")
    return _from_blocks(checkpoint.config["engram"], checkpoint.tensors)


def _from_blocks(blocks: object, tensors: RawTensors) -> list[EngramSource]:
    if isinstance(blocks, dict):
        return [EngramSource(EngramConfig.from_dict(blocks), tensors, "engram")]
    if not isinstance(blocks, list):
        raise CheckpointError(f"the engram block is a {type(blocks).__name__}, expected an object or a list of them")
    configs = sorted((EngramConfig.from_dict(block) for block in blocks), key=lambda config: config.layer_id)
    return [EngramSource(config, tensors, f"engram.{config.layer_id}") for config in configs]


def site_name_map(sources: Sequence[EngramSource]) -> dict[str, tuple[str, ...]]:
    """Return the name map of the sites' modules."""
    return {
        f"sites.{source.config.layer_id}.{weight}": (source.tensor(tensor),)
        for source in sources
        for weight, tensor in SITE_WEIGHTS.items()
    }


def unit_gains(sources: Sequence[EngramSource]) -> dict[str, ReadRows]:
    """Return ones for the norm gains that the checkpoint leaves out, by module weight."""
    return {
        f"sites.{source.config.layer_id}.{weight}": lambda start, stop: np.ones(stop - start, dtype=np.float32)
        for source in sources
        for weight in GAINS
        if not source.has(SITE_WEIGHTS[weight]) and (source.config.conv or not weight.startswith("conv"))
    }
