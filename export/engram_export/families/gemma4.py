"""Gemma 4's dense text models, with per-layer embeddings or without.

Reference: transformers ``modeling_gemma4.py``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram_export.checkpoint import Checkpoint
from engram_export.engram_site import EngramSite
from engram_export.families.gemma import SUPPORTED, GemmaArchitecture, gemma_config
from engram_export.families.gemma_layers import (
    FULL,
    SLIDING,
    caches_of,
    gemma4_inner_sizes,
    layer_kinds,
    layer_sizes,
    with_last_full,
)
from engram_export.families.reading import (
    check_heads,
    count,
    flag,
    objects,
    require_values,
    text_part,
    text_prefix,
)
from engram_export.formats import WeightFormat
from engram_export.gemma_attention import GemmaAttentionConfig
from engram_export.gemma_decoder import GeluMlp, GemmaDecoder, ScaledLayer
from engram_export.per_layer_inputs import PerLayerGate
from engram_export.weight_map import Joined, Recipe
from engram_runtime.errors import CheckpointError

ROPE_PARAMETERS: Mapping[str, Mapping[str, Any]] = {  # where the config says nothing
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
LAYER_SIZES = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Architecture(GemmaArchitecture):
    """A checkpoint of ``model_type`` gemma4 or gemma4_text."""

    intermediate_sizes: Sequence[int]

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        scales = {
            f"layers.{layer}.scale": Joined(f"{self.prefix}layers.{layer}.layer_scalar")
            for layer in range(self.text.num_layers)
        }
        return self.shared_names() | scales

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> GemmaDecoder:
        """Make the model's module with uninitialised parameters."""
        layers = []
        for index, mixer in enumerate(self.mixers(context_length, weights)):
            name, per_layer = f"layers.{index}", self.config.per_layer
            inner = self.intermediate_sizes[index]
            mlp = GeluMlp(f"{name}.feed_forward", self.text.hidden_size, inner, weights)
            gate = PerLayerGate(f"{name}.per_layer", per_layer, weights) if per_layer else None
            layers.append(ScaledLayer(self.text, mixer, mlp, gate))
        return GemmaDecoder(self.config, layers, sites, context_length=context_length, weights=weights)


def read(checkpoint: Checkpoint) -> Gemma4Architecture:
    """Read the architecture of a checkpoint; raises CheckpointError for one with experts."""
    prefix, checkpoint = text_prefix(checkpoint), with_last_full(text_part(checkpoint))
    _check_supported(checkpoint)
    attention = _attention(checkpoint)
    _check_kinds(checkpoint, attention)
    rope_parameters: Mapping[str, Mapping[str, Any]] = ROPE_PARAMETERS
    if checkpoint.config.get("rope_parameters") is not None:
        rope_parameters = objects(checkpoint, "rope_parameters")
    config = gemma_config(
        checkpoint,
        head_dims={config.kind: config.head_dim for config in attention},
        rope_parameters=rope_parameters,
        default_softcap=None,
    )
    return Gemma4Architecture(
        config=config,
        attention=attention,
        prefix=prefix,
        intermediate_sizes=gemma4_inner_sizes(checkpoint),
    )


def _check_supported(checkpoint: Checkpoint) -> None:
    if flag(checkpoint, "enable_moe_block", default=False):
        raise CheckpointError(
            f"{checkpoint.config_name} has experts ('enable_moe_block'), of Gemma 4 only dense models are supported"
        )
    if checkpoint.config.get("use_bidirectional_attention") == "all":
        raise CheckpointError(f"{checkpoint.config_name} lets tokens see later ones; only causal models are supported")
    require_values(checkpoint, SUPPORTED)


def _attention(checkpoint: Checkpoint) -> list[GemmaAttentionConfig]:
    window = count(checkpoint, "sliding_window")
    keys_are_values = flag(checkpoint, "attention_k_eq_v", default=False)
    layers = enumerate(zip(layer_kinds(checkpoint), caches_of(checkpoint), strict=True))
    return [
        GemmaAttentionConfig(
            hidden_size=count(checkpoint, "hidden_size"),
            num_heads=count(checkpoint, "num_attention_heads"),
            num_kv_heads=count(sizes, "num_key_value_heads"),
            head_dim=count(sizes, "head_dim"),
            norm_eps=checkpoint.require("rms_norm_eps", float),
            kind=kind,
            window=window if kind == SLIDING else None,
            caches_of=source,
            keys_are_values=keys_are_values and kind == FULL,
        )
        for layer, (kind, source) in layers
        for sizes in [_with_layer_sizes(checkpoint, layer, kind)]
    ]


def _with_layer_sizes(checkpoint: Checkpoint, layer: int, kind: str) -> Checkpoint:
    """Return the checkpoint with the config of one layer, whose heads may have other sizes."""
    overrides = layer_sizes(checkpoint, layer, kind)
    if unknown := sorted(overrides.keys() - set(LAYER_SIZES)):
        raise CheckpointError(
            f"{checkpoint.config_name} overrides {unknown[0]!r} for layer {layer}, only {list(LAYER_SIZES)} are "
            f"supported"
        )
    sizes = dataclasses.replace(checkpoint, config={**checkpoint.config, **overrides})
    check_heads(
        sizes,
        num_heads=count(sizes, "num_attention_heads"),
        num_kv_heads=count(sizes, "num_key_value_heads"),
        head_dim=count(sizes, "head_dim"),
    )
    return sizes


def _check_kinds(checkpoint: Checkpoint, attention: Sequence[GemmaAttentionConfig]) -> None:
    """Refuse layers that could not share caches and rotations with others of their kind."""
    for kind in (SLIDING, FULL):
        sizes = {(config.num_kv_heads, config.head_dim) for config in attention if config.kind == kind}
        if len(sizes) > 1:
            raise CheckpointError(
                f"layers with {kind} in {checkpoint.config_name} have key and value heads of {sorted(sizes)}, "
                f"wanted one number and size"
            )
