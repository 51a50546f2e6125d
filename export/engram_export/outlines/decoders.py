"""Decoders by family, as `engram_export.families` builds them."""

from collections.abc import Callable

from engram_export.checkpoint import Checkpoint
from engram_export.families.qwen4_memory import read_memories
from engram_export.families.reading import count, entries, flag, names, rotary_dim, text_part, text_prefix
from engram_export.outlines import gemma
from engram_export.outlines.inventory import Inventory
from engram_export.outlines.layers import (
    Heads,
    attention,
    delta_net,
    feed_forward,
    heads,
    hyper_connection,
    index,
    mixture,
    ngram_site,
    norms,
    stream_mixer,
)

FULL, LINEAR, INDEXED = "full_attention", "linear_attention", "indexed_attention"
LAYER_NORMS = ("mixer_norm", "feed_forward_norm")


def llama(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a llama."""
    _on_one_stream(made, checkpoint, lambda layer: _dense_layer(made, layer, checkpoint, normed=False))


def qwen3(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a qwen3."""
    _on_one_stream(made, checkpoint, lambda layer: _dense_layer(made, layer, checkpoint, normed=True))


def _dense_layer(made: Inventory, layer: int, checkpoint: Checkpoint, *, normed: bool) -> None:
    attention(made, layer, heads(checkpoint), normed=normed)
    inner = count(checkpoint, "intermediate_size")
    feed_forward(made, f"layers.{layer}.feed_forward", count(checkpoint, "hidden_size"), inner)


def mixtral(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a mixtral."""

    def add(layer: int) -> None:
        attention(made, layer, heads(checkpoint), normed=False)
        mixture(made, layer, checkpoint, experts="num_local_experts", inner="intermediate_size", shared=False)

    _on_one_stream(made, checkpoint, add)


def qwen3_moe(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add a qwen3_moe, some of whose layers may be dense."""
    key = "num_experts" if "num_experts" in checkpoint.config else "num_local_experts"
    step, listed = count(checkpoint, "decoder_sparse_step", default=1), entries(checkpoint, "mlp_only_layers")

    def add(layer: int) -> None:
        if layer in listed or (layer + 1) % step:
            _dense_layer(made, layer, checkpoint, normed=True)
            return
        attention(made, layer, heads(checkpoint), normed=True)
        mixture(made, layer, checkpoint, experts=key, inner="moe_intermediate_size", shared=False)

    _on_one_stream(made, checkpoint, add)


def qwen3_5_moe(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add the text model of a qwen3_5_moe."""
    kinds = names(checkpoint, "layer_types", length=count(checkpoint, "num_hidden_layers"), known=(FULL, LINEAR))

    def add(layer: int) -> None:
        if kinds[layer] == LINEAR:
            delta_net(made, layer, checkpoint)
        else:
            attention(made, layer, heads(checkpoint), normed=True, gated=True)
        mixture(made, layer, checkpoint, experts="num_experts", inner="moe_intermediate_size", shared=True)

    rotated = rotary_dim(checkpoint, heads(checkpoint).head_dim, default=0.25)
    _on_one_stream(made, checkpoint, add, rotated=rotated)


def _on_one_stream(
    made: Inventory, checkpoint: Checkpoint, add: Callable[[int], None], rotated: int | None = None
) -> None:
    hidden_size = _embedding(made, checkpoint)
    for layer in range(count(checkpoint, "num_hidden_layers")):
        norms(made, layer, hidden_size, *LAYER_NORMS)
        add(layer)
    made.plain("norm", hidden_size)
    made.rotation("full", heads(checkpoint).head_dim if rotated is None else rotated)


def qwen4_exp(made: Inventory, checkpoint: Checkpoint) -> None:
    """Add the text model of a qwen4_exp."""
    layers = count(checkpoint, "num_hidden_layers")
    kinds = names(checkpoint, "layer_types", length=layers, known=(LINEAR, INDEXED, FULL))
    hidden_size, sizes = _embedding(made, checkpoint), heads(checkpoint)
    streams, rank = count(checkpoint, "hc_count", least=2), count(checkpoint, "hc_lowrank")
    memories = read_memories(checkpoint, text_prefix(checkpoint), kinds)
    for layer, kind in enumerate(kinds):
        if layer in memories:
            ngram_site(made, memories[layer].site, streams, hidden_size)
        _mixer(made, layer, kind, checkpoint, sizes)
        mixture(made, layer, checkpoint, experts="num_experts", inner="moe_intermediate_size", shared=True)
        for connection in ("mixer_connection", "feed_forward_connection"):
            hyper_connection(made, f"layers.{layer}.{connection}", streams * hidden_size, streams, rank)
    stream_mixer(made, "mixer", streams * hidden_size, rank)
    made.rotation("full", rotary_dim(checkpoint, sizes.head_dim, default=1.0))


def _mixer(made: Inventory, layer: int, kind: str, checkpoint: Checkpoint, sizes: Heads) -> None:
    if kind == LINEAR:
        delta_net(made, layer, checkpoint)
        return
    attention(made, layer, sizes, normed=True, gated=True)
    number, dim = count(checkpoint, "indexer_n_heads"), count(checkpoint, "indexer_head_dim")
    index(made, layer, sizes.hidden_size, number, dim)


def _embedding(made: Inventory, checkpoint: Checkpoint) -> int:
    """Add the embedding and return the hidden size."""
    hidden_size = count(checkpoint, "hidden_size")
    tied = flag(checkpoint, "tie_word_embeddings", default=False)
    made.embedding(count(checkpoint, "vocab_size"), hidden_size, tied=tied)
    return hidden_size


DECODERS: dict[str, Callable[[Inventory, Checkpoint], None]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen4_exp": qwen4_exp,
    "qwen4_exp_text": qwen4_exp,
    "gemma3n": gemma.gemma3n,
    "gemma3n_text": gemma.gemma3n,
    "gemma4": gemma.gemma4,
    "gemma4_text": gemma.gemma4,
}


def take_inventory(checkpoint: Checkpoint, quant: str, context_length: int, *, bfloat16: bool) -> Inventory:
    """Return what an export of a decoder writes.

    Args:
        bfloat16: whether the checkpoint's weights are.

    Raises:
        CheckpointError: sizes that are missing or can't be.
    """
    made = Inventory(quant, context_length, bfloat16=bfloat16)
    DECODERS[checkpoint.require("model_type", str)](made, text_part(checkpoint))
    return made
