"""DeepSeek-V4.1's Engram memory: its tables and sites; attention, experts and hyper-connections are not exported.

Reference: the equations of the published inference code. A checkpoint holds neither token map nor multipliers nor
primes: all of them are derived here and held against the sizes that the config states.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint, TensorSource
from engram_export.decoder import TableInput
from engram_export.families.deepseek_sizes import EngramSizes, engram_sizes
from engram_export.families.llama import text_config
from engram_export.families.reading import text_part
from engram_export.host_table import RawTensors, TableSource, table_source
from engram_export.multi_stream_site import MultiStreamConfig
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.scaled_tensors import ScaledTensors, weight_block
from engram_export.site_source import SiteSource, TablesSource
from engram_export.token_compression import compress_vocabulary
from engram_export.weight_map import Floats, Joined, WeightSource
from engram_runtime.errors import CheckpointError
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.keyer_spec import NgramKeyerSpec

PREFIXES = ("model.language_model.", "model.", "")
BLOCK = (32, 32)  # values of a weight that share a scale, where the config does not say


@dataclass(frozen=True, slots=True)
class Product:
    """Two tensors of one shape multiplied value by value."""

    first: str
    second: str

    def tensors(self, rows: int) -> list[str]:
        """See `engram_export.weight_map.Recipe`."""
        return [self.first, self.second]

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `engram_export.weight_map.Recipe`."""
        shape = source.shape(self.first)
        return shape if shape == source.shape(self.second) else None

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `engram_export.weight_map.Recipe`."""
        return source.read_rows(self.first, start, stop) * source.read_rows(self.second, start, stop)


def read(checkpoint: Checkpoint) -> TablesSource:
    """Read the tables and sites of a checkpoint; only headers and the tokenizer are read.

    Raises:
        CheckpointError: tensors that are missing, or sizes that tokenizer, config and tensors don't agree on.
    """
    tensors = checkpoint.tensors
    if not isinstance(tensors, SafetensorsFile | SafetensorsShards):
        raise CheckpointError(f"{checkpoint.source} is deepseek_v41 in another format; give its safetensors folder")
    part = text_part(checkpoint)
    text, sizes = text_config(part), engram_sizes(checkpoint, part)
    token_map = read_token_map(checkpoint, text.vocab_size, sizes.compressed_vocab_size)
    scaled = ScaledTensors(tensors, weight_block({**checkpoint.config, **part.config}, BLOCK))
    sites = []
    for layer, keyer in derive_keyers(sizes, token_map, part.config_name).items():
        prefix = _prefix(tensors, layer)
        config = MultiStreamConfig(
            table=TableInput(f"layer_{layer}", keyer.columns, sizes.row_dim),
            num_streams=sizes.num_streams,
            hidden_size=text.hidden_size,
            eps=text.rms_norm_eps,
        )
        table = _table(tensors, prefix, config.table, keyer, token_map)
        sites.append(SiteSource(table=table, config=config, weights=_weights(scaled, prefix, config)))
    return TablesSource(checkpoint=checkpoint, text=text, sites=tuple(sites))


def read_token_map(checkpoint: Checkpoint, vocab_size: int, compressed_vocab_size: int) -> NDArray[np.int32]:
    """Compress the tokenizer's vocabulary, ``[V]`` raw id -> compressed id.

    Raises:
        CheckpointError: no tokenizer, one that can't be read, or one with other numbers of ids: every row id would be
            another.
    """
    if checkpoint.tokenizer_json is None:
        raise CheckpointError(
            f"{checkpoint.source} has no tokenizer.json, which row ids are computed with; download it as well"
        )
    problem = f"the tokenizer of {checkpoint.source} can't be used"
    token_map = compress_vocabulary(checkpoint.tokenizer_json, problem)
    advice = "row ids would be wrong, give the model's own tokenizer.json"
    if len(token_map) != vocab_size:
        raise CheckpointError(f"the tokenizer has {len(token_map)} tokens, the config says {vocab_size}; {advice}")
    if (found := int(token_map.max()) + 1) != compressed_vocab_size:
        raise CheckpointError(
            f"the tokenizer's {vocab_size} tokens compress to {found} ids, 'engram_compressed_vocab_size' in "
            f"{checkpoint.config_name} is {compressed_vocab_size}; {advice}"
        )
    return token_map


def derive_keyers(sizes: EngramSizes, token_map: NDArray[np.int32], config_name: str) -> dict[int, NgramKeyerSpec]:
    """Return each layer's keyer: multipliers seeded by the layer's id, primes that go on from layer to layer.

    Raises:
        CheckpointError: a layer's primes don't sum to its rows.
    """
    orders = tuple(range(2, sizes.max_order + 1))
    primes = derive_primes(
        layers=len(sizes.layers), rows_per_head=[sizes.rows_per_head] * len(orders), num_heads=sizes.num_heads
    )
    keyers = {}
    for (layer, num_rows), moduli in zip(sizes.layers.items(), primes, strict=True):
        keyers[layer] = _keyer(sizes, orders, layer, moduli, int(token_map[sizes.pad_id]))
        if (total := keyers[layer].min_rows) != num_rows:
            raise CheckpointError(
                f"'engram_num_embeddings' in {config_name} is {num_rows} for layer {layer}, the primes of its hash "
                f"sum to {total}; correct the config"
            )
    return keyers


def _keyer(
    sizes: EngramSizes, orders: tuple[int, ...], layer: int, primes: NDArray[np.int64], pad_id: int
) -> NgramKeyerSpec:
    multipliers = derive_multipliers(vocab_size=sizes.compressed_vocab_size, max_order=sizes.max_order, layer_id=layer)
    return NgramKeyerSpec(
        orders=orders,
        num_heads=sizes.num_heads,
        multipliers=tuple(multipliers.tolist()),
        primes=tuple(primes.tolist()),
        offsets=tuple(column_offsets(primes).tolist()),
        pad_id=pad_id,
        barrier_ids=sizes.dead_ids,
        silent_ids=sizes.dead_ids,
    )


def _table(
    tensors: RawTensors, prefix: str, rows: TableInput, keyer: NgramKeyerSpec, token_map: NDArray[np.int32]
) -> TableSource:
    return table_source(
        site=rows.site,
        keyer=keyer,
        token_map=token_map,
        columns=rows.row_dim,
        tensors=tensors,
        payload=[f"{prefix}embed.weight"],
        scales=[f"{prefix}embed.scale"],
    )


def _weights(tensors: ScaledTensors, prefix: str, config: MultiStreamConfig) -> WeightSource:
    inputs, size = config.table.columns * config.table.row_dim, config.hidden_size
    return WeightSource(
        tensors,
        {"key_value.weight": ((config.num_streams + 1) * size, inputs), "gain": (config.num_streams, size)},
        {"key_value.weight": Joined(f"{prefix}wkv.weight"), "gain": Product(f"{prefix}q_weight", f"{prefix}k_weight")},
        ignored=(rf"(?!{re.escape(prefix)}).*",),
        ignored_names=(f"{prefix}embed.weight",),
    )


def _prefix(tensors: SafetensorsFile | SafetensorsShards, layer: int) -> str:
    """Return what the names of a site's tensors begin with, in whichever layout the checkpoint has."""
    known = frozenset(tensors.names())
    candidates = [f"{prefix}layers.{layer}.engram." for prefix in PREFIXES]
    return next((prefix for prefix in candidates if f"{prefix}embed.weight" in known), candidates[-1])
