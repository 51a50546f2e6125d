"""Read the values of a config that families share, bounded before anything is allocated for them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from engram_export.checkpoint import Checkpoint
from engram_export.rope import RotaryEmbedding, rotary_embedding
from engram_runtime.errors import CheckpointError

# Far above any published model: what a config may claim.
LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "engram_max_ngram_size": 16,
    "engram_n_heads": 1 << 8,
    "engram_head_dim": 1 << 16,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "heads_per_ngram": 1 << 8,
    "split_ngram_parts": 1 << 16,
    "ngram_vocab_size_base": 1 << 32,
    "altup_num_inputs": 64,
    "hc_count": 64,
}
OTHER_LIMIT = 1 << 24
ROTARY_MULTIPLE = 16  # of head sizes and rotated dimensions, in onnxruntime's attention


def count(checkpoint: Checkpoint, key: str, *, default: int | None = None, least: int = 1) -> int:
    """Return a whole number of the config; ``default`` stands for a key that is absent or null."""
    if default is not None and checkpoint.config.get(key) is None:
        return default
    value, limit = checkpoint.require(key, int), LIMITS.get(key, OTHER_LIMIT)
    if not least <= value <= limit:
        raise CheckpointError(
            f"{key!r} in {checkpoint.config_name} is {value}, wanted {least} to {limit}; correct the config"
        )
    return value


def names(checkpoint: Checkpoint, key: str, *, length: int, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return a list of the config with one of ``known`` for each layer."""
    values = checkpoint.require(key, list)
    if len(values) != length:
        raise CheckpointError(f"{key!r} in {checkpoint.config_name} has {len(values)} entries for {length} layers")
    for layer, value in enumerate(values):
        if value not in known:
            raise CheckpointError(
                f"{key!r} in {checkpoint.config_name} has {value!r} at layer {layer}, supported are {list(known)}"
            )
    return tuple(values)


def flag(checkpoint: Checkpoint, key: str, *, default: bool) -> bool:
    """Return a switch of the config; ``default`` stands for a key that is absent or null."""
    return default if checkpoint.config.get(key) is None else checkpoint.require(key, bool)


def entries(checkpoint: Checkpoint, key: str) -> list[Any]:
    """Return a list of the config, empty where the key is absent or null."""
    return [] if checkpoint.config.get(key) is None else checkpoint.require(key, list)


def objects(checkpoint: Checkpoint, key: str) -> dict[str, dict[str, Any]]:
    """Return an object of objects of the config without those that are null, empty where the key is absent or null."""
    found = {} if checkpoint.config.get(key) is None else checkpoint.require(key, dict)
    for name, value in found.items():
        if not isinstance(value, dict | None):
            raise CheckpointError(
                f"{key!r} in {checkpoint.config_name} has {value!r:.80} at {name!r}, wanted an object; "
                f"correct the config"
            )
    return {name: value for name, value in found.items() if value is not None}


def check_heads(checkpoint: Checkpoint, *, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuse heads that attention can't share or rotate."""
    if head_dim % ROTARY_MULTIPLE:
        raise CheckpointError(
            f"{checkpoint.config_name} has heads of {head_dim} dimensions, supported are multiples of {ROTARY_MULTIPLE}"
        )
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{checkpoint.config_name} has {num_heads} query heads for {num_kv_heads} key and value heads, wanted a "
            f"multiple; correct the config"
        )


def rope(
    checkpoint: Checkpoint, *, head_dim: int, max_positions: int, parameters: Mapping[str, Any] | None = None
) -> RotaryEmbedding:
    """Return the rotary embedding of a config; ``parameters`` where a config has several kinds of them."""
    # transformers 5 keeps theta and the scaling in one block, earlier releases in two keys.
    given = _rope_parameters(checkpoint) if parameters is None else parameters
    theta = given.get("rope_theta", checkpoint.config.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise CheckpointError(
            f"'rope_theta' in {checkpoint.config_name} is {theta!r:.80}, wanted a positive finite number; "
            f"correct the config"
        )
    return rotary_embedding(head_dim=head_dim, theta=theta, scaling=dict(given), max_positions=max_positions)


def rotary_dim(checkpoint: Checkpoint, head_dim: int, *, default: float) -> int:
    """Return how many dimensions of a head are rotated."""
    otherwise = checkpoint.config.get("partial_rotary_factor", default)
    factor = _rope_parameters(checkpoint).get("partial_rotary_factor", otherwise)
    if not isinstance(factor, int | float) or not 0 < factor <= 1 or int(head_dim * factor) % ROTARY_MULTIPLE:
        raise CheckpointError(
            f"'partial_rotary_factor' in {checkpoint.config_name} is {factor!r}, wanted a share of {head_dim} "
            f"dimensions that is a multiple of {ROTARY_MULTIPLE}"
        )
    return int(head_dim * factor)


def _rope_parameters(checkpoint: Checkpoint) -> Mapping[str, Any]:
    given = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"the rope scaling in {checkpoint.config_name} is {given!r:.80}, wanted an object")
    return given


def require_values(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    """Refuse a config that says otherwise than ``wanted``; a key that is absent agrees."""
    for key, value in wanted.items():
        if (found := checkpoint.config.get(key, value)) != value:
            raise CheckpointError(f"{key!r} in {checkpoint.config_name} is {found!r}, only {value!r} is supported")


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint of a multimodal model with its text model's config; others as they are.

    As in transformers the whole model says whether its head is tied; its ``eos_token_id`` stands in for the text's.
    """
    outer = {key: value for key, value in checkpoint.config.items() if value is not None}
    if not isinstance(text := outer.get("text_config"), dict):
        return checkpoint
    config = {**text, "model_type": checkpoint.require("model_type", str)}
    if "tie_word_embeddings" in outer:
        config["tie_word_embeddings"] = outer["tie_word_embeddings"]
    if text.get("eos_token_id") is None and "eos_token_id" in outer:
        config["eos_token_id"] = outer["eos_token_id"]
    return dataclasses.replace(checkpoint, config=config)


def text_prefix(checkpoint: Checkpoint) -> str:
    """Return what the names of the text model's tensors begin with."""
    nested = any(name.startswith("model.language_model.") for name in checkpoint.tensors.names())
    return "model.language_model." if nested else "model."
