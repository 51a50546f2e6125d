"""Gemma 3n's text model.

Reference: transformers ``modeling_gemma3n.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from engram_export.altup import AltUp, AltUpConfig
from engram_export.checkpoint import Checkpoint
from engram_export.engram_site import EngramSite
from engram_export.families.gemma import SUPPORTED, GemmaArchitecture, gemma_config
from engram_export.families.gemma_layers import (
    FULL,
    SLIDING,
    caches_of,
    gemma3n_inner_sizes,
    layer_kinds,
)
from engram_export.families.reading import check_heads, count, objects, require_values, text_part, text_prefix
from engram_export.formats import WeightFormat
from engram_export.gemma3n_decoder import AltUpLayer, Gemma3nDecoder, Laurel
from engram_export.gemma_attention import GemmaAttentionConfig
from engram_export.gemma_decoder import GeluMlp
from engram_export.per_layer_inputs import PerLayerGate
from engram_export.weight_map import Joined, Recipe
from engram_runtime.errors import CheckpointError

SOFTCAP = 30.0  # where the config says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3nArchitecture(GemmaArchitecture):
    """A checkpoint of ``model_type`` gemma3n or gemma3n_text.

    Attributes:
        cutoffs: of each layer's `GeluMlp`.
    """

    altup: AltUpConfig
    intermediate_sizes: Sequence[int]
    cutoffs: Sequence[float | None]
    laurel_rank: int

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        others = range(self.altup.num_streams - 1)
        found = self.shared_names()
        found["streams.spread.weight"] = Joined(*(f"{self.prefix}altup_projections.{i}.weight" for i in others))
        for i in others:
            found[f"streams.merge.{i}.weight"] = Joined(f"{self.prefix}altup_unembed_projections.{i}.weight")
        for layer in range(self.text.num_layers):
            found |= _layer_names(self.prefix, layer)
        return found

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> Gemma3nDecoder:
        """Make the model's module with uninitialised parameters."""
        if sites:
            raise CheckpointError(
                f"gemma3n has {self.altup.num_streams} residual streams, an engram site is made for one; "
                f"export without --engram"
            )
        mixers = self.mixers(context_length, weights)
        layers = [self._layer(f"layers.{index}", index, mixer, weights) for index, mixer in enumerate(mixers)]
        return Gemma3nDecoder(self.config, self.altup, layers, context_length=context_length, weights=weights)

    def _layer(self, name: str, index: int, mixer: Any, weights: WeightFormat) -> AltUpLayer:
        assert self.config.per_layer is not None
        size, inner = self.text.hidden_size, self.intermediate_sizes[index]
        return AltUpLayer(
            self.text,
            mixer,
            GeluMlp(f"{name}.feed_forward", size, inner, weights, self.cutoffs[index]),
            PerLayerGate(f"{name}.per_layer", self.config.per_layer, weights),
            AltUp(f"{name}.altup", self.altup),
            Laurel(f"{name}.laurel", self.text, self.laurel_rank, weights),
        )


def read(checkpoint: Checkpoint) -> Gemma3nArchitecture:
    """Read the architecture of a checkpoint."""
    prefix, checkpoint = text_prefix(checkpoint), text_part(checkpoint)
    require_values(checkpoint, SUPPORTED)
    head_dim = count(checkpoint, "head_dim")
    config = gemma_config(
        checkpoint,
        head_dims={SLIDING: head_dim, FULL: head_dim},
        rope_parameters=_rope_parameters(checkpoint),
        default_softcap=SOFTCAP,
    )
    if config.per_layer is None:
        raise CheckpointError(f"{checkpoint.config_name} has no per-layer embeddings; no gemma3n is without them")
    return Gemma3nArchitecture(
        config=config,
        attention=_attention(checkpoint, head_dim),
        prefix=prefix,
        altup=_altup(checkpoint),
        intermediate_sizes=gemma3n_inner_sizes(checkpoint),
        cutoffs=_cutoffs(checkpoint),
        laurel_rank=count(checkpoint, "laurel_rank"),
    )


def _attention(checkpoint: Checkpoint, head_dim: int) -> list[GemmaAttentionConfig]:
    window = count(checkpoint, "sliding_window")
    num_heads, num_kv_heads = count(checkpoint, "num_attention_heads"), count(checkpoint, "num_key_value_heads")
    check_heads(checkpoint, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return [
        GemmaAttentionConfig(
            hidden_size=count(checkpoint, "hidden_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=checkpoint.require("rms_norm_eps", float),
            kind=kind,
            window=window if kind == SLIDING else None,
            caches_of=source,
        )
        for kind, source in zip(layer_kinds(checkpoint), caches_of(checkpoint), strict=True)
    ]


def _altup(checkpoint: Checkpoint) -> AltUpConfig:
    num_streams = count(checkpoint, "altup_num_inputs", least=2)
    active = count(checkpoint, "altup_active_idx", least=0)
    if active >= num_streams:
        raise CheckpointError(
            f"'altup_active_idx' in {checkpoint.config_name} is {active}, there are {num_streams} streams"
        )
    return AltUpConfig(
        hidden_size=count(checkpoint, "hidden_size"),
        num_streams=num_streams,
        active=active,
        scale_correction=checkpoint.require("altup_correct_scale", bool),
        norm_eps=checkpoint.require("rms_norm_eps", float),
    )


def _cutoffs(checkpoint: Checkpoint) -> tuple[float | None, ...]:
    """Return how many deviations above the mean a share of normally distributed gates lies; None for no share."""
    layers = count(checkpoint, "num_hidden_layers")
    shares = checkpoint.require("activation_sparsity_pattern", list)
    if len(shares) != layers or not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        raise CheckpointError(
            f"'activation_sparsity_pattern' in {checkpoint.config_name} is {shares!r:.80}, wanted {layers} shares "
            f"from 0 to below 1"
        )
    return tuple(NormalDist().inv_cdf(share) if share > 0 else None for share in shares)


def _rope_parameters(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return parameters by kind; checkpoints older than transformers 5 have two thetas instead."""
    config = checkpoint.config
    scaling = {} if config.get("rope_scaling") is None else checkpoint.require("rope_scaling", dict)
    given = objects(checkpoint, "rope_parameters")
    defaults = {
        SLIDING: {"rope_theta": config.get("rope_local_base_freq", 10_000.0)},
        FULL: {"rope_theta": config.get("rope_theta", 1_000_000.0), **scaling},
    }
    return {kind: {**default, **given.get(kind, {})} for kind, default in defaults.items()}


def _layer_names(prefix: str, layer: int) -> dict[str, Recipe]:
    source, target = f"{prefix}layers.{layer}.", f"layers.{layer}."
    sources = {
        "altup.router_norm.weight": "altup.router_norm.weight",
        "altup.router.weight": "altup.modality_router.weight",
        "altup.prediction.weight": "altup.prediction_coefs.weight",
        "altup.correction.weight": "altup.correction_coefs.weight",
        "correction_scale": "altup.correct_output_scale",
        "laurel.left.weight": "laurel.linear_left.weight",
        "laurel.right.weight": "laurel.linear_right.weight",
        "laurel.norm.weight": "laurel.post_laurel_norm.weight",
    }
    return {f"{target}{ours}": Joined(f"{source}{theirs}") for ours, theirs in sources.items()}
