"""What each layer of Gemma 3n and Gemma 4 is, as their configs say it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engram_export.checkpoint import Checkpoint
from engram_export.families.reading import count, flag, names, objects
from engram_runtime.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"
GLOBAL_HEAD_DIM = 512  # of Gemma 4's full attention, where the config says nothing


def layer_kinds(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return each layer's kind of attention."""
    layers = count(checkpoint, "num_hidden_layers")
    return names(checkpoint, "layer_types", length=layers, known=(SLIDING, FULL))


def caches_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the layer whose caches each layer reads.

    The last ``num_kv_shared_layers`` read those of the last layer of their kind before them.
    """
    kinds = layer_kinds(checkpoint)
    first_shared = len(kinds) - count(checkpoint, "num_kv_shared_layers", default=0, least=0)
    own = {kind: layer for layer, kind in enumerate(kinds[: max(first_shared, 0)])}
    if missing := sorted(set(kinds) - own.keys()):
        raise CheckpointError(
            f"'num_kv_shared_layers' in {checkpoint.config_name} leaves no layer with {missing[0]} of its own; "
            f"correct the config"
        )
    return tuple(layer if layer < first_shared else own[kind] for layer, kind in enumerate(kinds))


def with_last_full(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with full attention in its last layer, which transformers' config forces."""
    kinds = [*layer_kinds(checkpoint)[:-1], FULL]
    return dataclasses.replace(checkpoint, config={**checkpoint.config, "layer_types": kinds})


def layer_sizes(checkpoint: Checkpoint, layer: int, kind: str) -> Mapping[str, Any]:
    """Return what the config says of the heads of one of Gemma 4's layers."""
    config = checkpoint.config
    if config.get("per_layer_config") is not None:  # how transformers saves what published configs say in two keys
        return objects(checkpoint, "per_layer_config").get(str(layer), {})
    if kind == SLIDING:
        return {}
    head_dim = {"head_dim": config.get("global_head_dim", GLOBAL_HEAD_DIM)}
    kv_heads = config.get("num_global_key_value_heads") if flag(checkpoint, "attention_k_eq_v", default=False) else None
    return head_dim if kv_heads is None else {**head_dim, "num_key_value_heads": kv_heads}


def gemma3n_inner_sizes(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the inner size of each layer's feed-forward."""
    layers, sizes = count(checkpoint, "num_hidden_layers"), checkpoint.config.get("intermediate_size")
    if not isinstance(sizes, list):
        return (count(checkpoint, "intermediate_size"),) * layers
    if len(sizes) != layers or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(
            f"'intermediate_size' in {checkpoint.config_name} is {sizes!r:.80}, wanted {layers} positive whole numbers"
        )
    return tuple(sizes)


def gemma4_inner_sizes(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the inner size of each layer's feed-forward."""
    size = count(checkpoint, "intermediate_size")
    wide = 2 * size if flag(checkpoint, "use_double_wide_mlp", default=False) else size
    return tuple(size if layer == source else wide for layer, source in enumerate(caches_of(checkpoint)))
