"""The sizes of DeepSeek-V4.1's Engram memory, as its config says them."""

from collections.abc import Mapping
from dataclasses import dataclass

from engram_export.checkpoint import Checkpoint
from engram_export.families.reading import count
from engram_runtime.errors import CheckpointError

# Tokens that stand for parts of images; they read no rows, and no token looks back beyond them.
DEAD_KEYS = ("image_token_id", "image_token_index", "video_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngramSizes:
    """What the config says of the memory; ``layers`` holds each layer's id and rows, ``pad_id`` is a raw id."""

    layers: Mapping[int, int]
    max_order: int
    rows_per_head: int
    num_heads: int
    row_dim: int
    pad_id: int
    compressed_vocab_size: int
    num_streams: int
    dead_ids: tuple[int, ...]


def engram_sizes(checkpoint: Checkpoint, part: Checkpoint) -> EngramSizes:
    """Read and bound the sizes; ``part`` is the checkpoint with its text model's config."""
    pad = "engram_pad_token_id" if "engram_pad_token_id" in part.config else "engram_pad_id"
    vocab_size = count(part, "vocab_size")
    named = [(source, key) for source in (checkpoint, part) for key in DEAD_KEYS if source.config.get(key) is not None]
    dead = [count(source, key, least=0) for source, key in named]
    sizes = EngramSizes(
        layers=_layers(part),
        max_order=count(part, "engram_max_ngram_size", least=2),
        rows_per_head=count(part, "engram_vocab_size"),
        num_heads=count(part, "engram_n_heads"),
        row_dim=count(part, "engram_head_dim"),
        pad_id=count(part, pad, least=0),
        compressed_vocab_size=count(part, "engram_compressed_vocab_size"),
        num_streams=count(part, "hc_mult"),
        dead_ids=tuple(sorted(set(dead))),
    )
    for token_id in (sizes.pad_id, *sizes.dead_ids):
        if token_id >= vocab_size:
            raise CheckpointError(f"{part.config_name} names token id {token_id}, the vocabulary has {vocab_size}")
    return sizes


def _layers(part: Checkpoint) -> dict[int, int]:
    """Return the rows of each layer with a site."""
    layer_ids, num_rows = part.require("engram_layer_ids", list), part.require("engram_num_embeddings", list)
    num_layers = count(part, "num_hidden_layers")
    if len(layer_ids) != len(num_rows) or not layer_ids:
        raise CheckpointError(
            f"{part.config_name} has {len(layer_ids)} 'engram_layer_ids' and {len(num_rows)} 'engram_num_embeddings', "
            f"wanted as many of both"
        )
    known = [layer for layer in range(num_layers) if layer in layer_ids]
    if any(type(number) is not int for number in (*layer_ids, *num_rows)) or sorted(layer_ids) != known:
        raise CheckpointError(
            f"'engram_layer_ids' in {part.config_name} are {layer_ids!r:.80}, wanted distinct layers of 0 to "
            f"{num_layers - 1}"
        )
    return dict(zip(layer_ids, num_rows, strict=True))
