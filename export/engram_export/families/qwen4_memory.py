"""The n-gram tables of Qwen4-Exp: hash constants, shards and sites by layer.

Reference: transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextNGramEmbedding``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint
from engram_export.families.reading import count, entries
from engram_export.host_table import RawTensors, TableSource, numbered_tensors, table_source
from engram_export.ngram_config import NgramSiteConfig
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.weight_map import Joined, Recipe, one_plus
from engram_runtime.errors import CheckpointError
from engram_runtime.hashing import column_offsets, derive_primes, derive_splitmix_multipliers
from engram_runtime.keyer_spec import NgramKeyerSpec

DEFAULT_SEED = 1234
MAX_ORDER = 16
MAX_PRIMES = 1 << 16  # of all memories together; each has to be searched for
# Constants some checkpoints carry, checked against the config; other tensors of a memory are weights.
TABLE = "ngram_embedding.shard_"
CONSTANTS = ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
FACTOR = "ngram_embedding.weight_scale"  # of all rows of an FP8 table


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramMemory:
    """One table and the site that reads it.

    Attributes:
        shards: tensors the table is spread over.
        row_multiple: what the number of rows is rounded up to.
    """

    site: NgramSiteConfig
    keyer: NgramKeyerSpec
    prefix: str
    shards: int
    row_multiple: int

    def table(self, checkpoint: Checkpoint) -> TableSource:
        """Describe the table; raises CheckpointError where tensors and config don't belong together."""
        tensors = checkpoint.tensors
        if not isinstance(tensors, SafetensorsFile | SafetensorsShards):
            raise CheckpointError(f"{checkpoint.source} has an n-gram table, but its tensors are not safetensors")
        self._check_constants(tensors)
        shard = f"{self.prefix}{TABLE}{{}}.weight"
        payload = numbered_tensors(tensors.names(), shard, self.shards)
        return table_source(
            site=self.site.site,
            keyer=self.keyer,
            token_map=None,
            columns=self.site.row_dim,
            tensors=tensors,
            payload=payload,
            factor=self._factor(tensors, payload[0]),
            row_multiple=self.row_multiple,
        )

    def _factor(self, tensors: RawTensors, shard: str) -> str | None:
        """Name the factor of all rows; those of other dtypes than FP8 may go without."""
        factor = f"{self.prefix}{FACTOR}"
        if factor in tensors.names():
            return factor
        if tensors.dtype(shard) == "F8_E4M3":
            raise CheckpointError(f"the checkpoint lacks {factor}, the factor of FP8 rows; it is incomplete")
        return None

    def _check_constants(self, tensors: RawTensors) -> None:
        """Hold the constants the checkpoint ships against those its config leads to."""
        derived = (self.keyer.multipliers, self.keyer.offsets, self.keyer.primes)
        for name, expected in zip(CONSTANTS, derived, strict=True):
            tensor = f"{self.prefix}{name}"
            if tensor in tensors.names() and (found := tensors.read_raw(tensor).tolist()) != list(expected):
                raise CheckpointError(
                    f"{tensor} is {found}, the config gives {list(expected)}; config and checkpoint don't belong "
                    f"together"
                )


def read_memories(checkpoint: Checkpoint, prefix: str, layer_types: tuple[str, ...]) -> dict[int, NgramMemory]:
    """Read the n-gram memories of a checkpoint by the layer they stand before."""
    layer_ids = entries(checkpoint, "ple_layer_ids")
    for layer_id in layer_ids:  # 1-based
        if type(layer_id) is not int or not 1 <= layer_id <= len(layer_types):
            raise CheckpointError(
                f"'ple_layer_ids' in {checkpoint.config_name} has {layer_id!r}, wanted 1 to {len(layer_types)}"
            )
    layers = [layer_id - 1 for layer_id in sorted(set(layer_ids))]
    if not layers:
        return {}
    primes = _primes(checkpoint, len(layers))
    return {layer: _memory(checkpoint, prefix, layer, index, primes[index]) for index, layer in enumerate(layers)}


def memory_names(prefix: str, layer: int) -> dict[str, Recipe]:
    """Return the weights of a layer's site."""
    source, target = f"{prefix}layers.{layer}.ple.", f"layers.{layer}.site."
    return {
        f"{target}key.weight": Joined(f"{source}key_proj.weight"),
        f"{target}value.weight": Joined(f"{source}value_proj.weight"),
        f"{target}key_gain": one_plus(f"{source}norm_key.weight"),
        f"{target}query_gain": one_plus(f"{source}norm_query.weight"),
        f"{target}conv_gain": one_plus(f"{source}norm_conv.weight"),
        f"{target}conv": Joined(f"{source}conv1d.weight"),
    }


def _primes(checkpoint: Checkpoint, memories: int) -> list[NDArray[np.int64]]:
    """Return the moduli of each memory, which go on from one to the next."""
    order, heads = _order_and_heads(checkpoint)
    if (columns := (order - 1) * heads) * memories > MAX_PRIMES:
        raise CheckpointError(
            f"{checkpoint.config_name} has {memories} n-gram memories of {columns} hash heads, wanted at most "
            f"{MAX_PRIMES} heads in all; correct the config"
        )
    base = count(checkpoint, "ngram_vocab_size_base", least=2)
    return derive_primes(layers=memories, rows_per_head=[base] * (order - 1), num_heads=heads)


def _order_and_heads(checkpoint: Checkpoint) -> tuple[int, int]:
    order, heads = count(checkpoint, "ngram_size", least=2), count(checkpoint, "heads_per_ngram")
    if order > MAX_ORDER:
        raise CheckpointError(f"'ngram_size' in {checkpoint.config_name} is {order}, wanted 2 to {MAX_ORDER}")
    return order, heads


def _memory(checkpoint: Checkpoint, prefix: str, layer: int, index: int, primes: NDArray[np.int64]) -> NgramMemory:
    order, heads = _order_and_heads(checkpoint)
    columns = (order - 1) * heads
    width = count(checkpoint, "ple_embed_dim", default=count(checkpoint, "hidden_size"))
    if width % columns:
        raise CheckpointError(
            f"'ple_embed_dim' in {checkpoint.config_name} is {width}, wanted a multiple of its {columns} hash heads"
        )
    return NgramMemory(
        site=NgramSiteConfig(
            layer=layer,
            columns=columns,
            row_dim=width // columns,
            conv_kernel=count(checkpoint, "ple_conv_kernel_size", least=2),
            conv_dilation=order,
        ),
        keyer=_keyer(checkpoint, order, heads, index, primes),
        prefix=f"{prefix}layers.{layer}.ple.ple_embedding.",
        shards=count(checkpoint, "split_ngram_parts"),
        row_multiple=count(checkpoint, "make_ngram_vocab_size_divisible_by"),
    )


def _keyer(checkpoint: Checkpoint, order: int, heads: int, index: int, primes: NDArray[np.int64]) -> NgramKeyerSpec:
    vocab_size = count(checkpoint, "vocab_size")
    eos = _end_of_text(checkpoint, vocab_size)
    multipliers = derive_splitmix_multipliers(
        vocab_size=vocab_size,
        max_order=order,
        layer_index=index,
        seed=count(checkpoint, "seed", default=DEFAULT_SEED, least=0),
    )
    return NgramKeyerSpec(
        orders=tuple(range(2, order + 1)),
        num_heads=heads,
        multipliers=tuple(multipliers.tolist()),
        primes=tuple(primes.tolist()),
        offsets=tuple(column_offsets(primes).tolist()),
        pad_id=eos,
        barrier_ids=(eos,),
    )


def _end_of_text(checkpoint: Checkpoint, vocab_size: int) -> int:
    """Return the token at which n-grams start anew; the first where a config has several."""
    value = checkpoint.config.get("eos_token_id")
    eos = value[0] if isinstance(value, list) and value else value
    if type(eos) is not int or not 0 <= eos < vocab_size:
        raise CheckpointError(
            f"'eos_token_id' in {checkpoint.config_name} is {value!r}, the n-gram memory needs a token id below "
            f"{vocab_size}"
        )
    return eos
