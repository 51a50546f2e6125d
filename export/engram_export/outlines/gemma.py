"""Gemma 3n and Gemma 4, as `engram_export.families` builds them."""

import dataclasses
from collections.abc import Sequence

from engram_export.checkpoint import Checkpoint
from engram_export.families.gemma_layers import (
    FULL,
    caches_of,
    gemma3n_inner_sizes,
    gemma4_inner_sizes,
    layer_kinds,
    layer_sizes,
    with_last_full,
)
from engram_export.families.reading import count, flag
from engram_export.outlines.inventory import Inventory
from engram_export.outlines.layers import Heads, attention, feed_forward, heads, norms

LAYER_NORMS = ("mixer_norm", "mixer_out_norm", "feed_forward_norm", "feed_forward_out_norm")


def gemma3n(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a Gemma 3n."""
    hidden_size, streams = count(checkpoint, "hidden_size"), count(checkpoint, "altup_num_inputs", least=2)
    layers, rank = count(checkpoint, "num_hidden_layers"), count(checkpoint, "laurel_rank")
    _decoder(made, checkpoint, [heads(checkpoint)] * layers, gemma3n_inner_sizes(checkpoint))
    for layer in range(layers):
        name = f"layers.{layer}"
        made.plain(f"{name}.altup.router_norm", hidden_size)
        made.float_linear(f"{name}.altup.router", hidden_size, streams)
        made.float_linear(f"{name}.altup.prediction", streams, streams * streams)
        made.float_linear(f"{name}.altup.correction", streams, streams)
        made.linear(f"{name}.laurel.left", hidden_size, rank)
        made.linear(f"{name}.laurel.right", rank, hidden_size)
        made.plain(f"{name}.laurel.norm", hidden_size)
        if flag(checkpoint, "altup_correct_scale", default=False):
            made.plain(f"{name}.correction_scale", hidden_size)
    made.linear("streams.spread", hidden_size, (streams - 1) * hidden_size)
    for other in range(streams - 1):
        made.linear(f"streams.merge.{other}", hidden_size, hidden_size)


def gemma4(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a Gemma 4."""
    checkpoint = with_last_full(checkpoint)
    sizes = [_heads_of(checkpoint, layer, kind) for layer, kind in enumerate(layer_kinds(checkpoint))]
    _decoder(made, checkpoint, sizes, gemma4_inner_sizes(checkpoint))
    for layer in range(len(sizes)):
        made.plain(f"layers.{layer}.scale", 1)


def _heads_of(checkpoint: Checkpoint, layer: int, kind: str) -> Heads:
    own = layer_sizes(checkpoint, layer, kind)
    return heads(dataclasses.replace(checkpoint, config={**checkpoint.config, **own}))


def _decoder(made: Inventory, checkpoint: Checkpoint, sizes: Sequence[Heads], inner_sizes: Sequence[int]) -> None:
    """Add what both have."""
    hidden_size, kinds, sources = count(checkpoint, "hidden_size"), layer_kinds(checkpoint), caches_of(checkpoint)
    tied = flag(checkpoint, "tie_word_embeddings", default=True)
    made.embedding(count(checkpoint, "vocab_size"), hidden_size, tied=tied)
    width = count(checkpoint, "hidden_size_per_layer_input", default=0, least=0)
    if width:
        made.linear("per_layer.projection", hidden_size, len(kinds) * width)
        made.plain("per_layer.norm", width)
    one_projection = flag(checkpoint, "attention_k_eq_v", default=False)
    for layer, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
        norms(made, layer, hidden_size, *LAYER_NORMS)
        if layer == source:
            keys_are_values = one_projection and kind == FULL
            attention(made, layer, sizes[layer], normed=True, keys_are_values=keys_are_values)
        else:
            _shared_attention(made, layer, sizes[layer])
        feed_forward(made, f"layers.{layer}.feed_forward", hidden_size, inner_sizes[layer])
        if width:
            _per_layer_gate(made, layer, hidden_size, width)
    made.plain("norm", hidden_size)
    for kind in sorted(set(kinds)):
        made.rotation(kind, next(own.head_dim for own, each in zip(sizes, kinds, strict=True) if each == kind))


def _shared_attention(made: Inventory, layer: int, sizes: Heads) -> None:
    name = f"layers.{layer}.mixer"
    made.linear(f"{name}.query", sizes.hidden_size, sizes.width)
    made.plain(f"{name}.query_norm", sizes.head_dim)
    made.linear(f"{name}.output", sizes.width, sizes.hidden_size)


def _per_layer_gate(made: Inventory, layer: int, hidden_size: int, width: int) -> None:
    name = f"layers.{layer}.per_layer"
    made.linear(f"{name}.gate", hidden_size, width)
    made.linear(f"{name}.projection", width, hidden_size)
    made.plain(f"{name}.norm", hidden_size)
