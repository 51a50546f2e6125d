"""Qwen4-Exp (Qwen3.8-Flash-Next), the text model: n-gram memory, hyper-connections, delta nets, indexed attention, experts.

Reference: transformers ``modeling_qwen4_exp.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from engram_export.attention import AttentionConfig
from engram_export.checkpoint import Checkpoint
from engram_export.delta_net import DeltaNetConfig, GatedDeltaNet
from engram_export.engram_site import EngramSite
from engram_export.families.llama import attention_config, text_config
from engram_export.families.mixture import (
    LINEAR,
    OTHER_PARTS,
    SUPPORTED,
    delta_config,
    delta_names,
    gated_attention_names,
    mixture_names,
    partial_rope,
    shared_mixture_config,
)
from engram_export.families.reading import count, names, require_values, text_part, text_prefix
from engram_export.formats import WeightFormat
from engram_export.hyper_connection import StreamsConfig
from engram_export.hyper_decoder import HyperDecoder, HyperLayer
from engram_export.indexed_attention import IndexedAttention, IndexerConfig
from engram_export.mixture import Mixture, MixtureConfig
from engram_export.ngram_site import NgramSite, NgramSiteConfig
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import TextConfig
from engram_export.weight_map import Joined, Recipe, one_plus
from engram_runtime.errors import CheckpointError

INDEXED = ("indexed_attention", "full_attention")  # published configs say the latter and mean the former


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen4ExpArchitecture:
    """A checkpoint of ``model_type`` qwen4_exp or qwen4_exp_text."""

    text: TextConfig
    streams: StreamsConfig
    attention: AttentionConfig
    indexer: IndexerConfig
    delta: DeltaNetConfig
    layer_types: tuple[str, ...]
    mixture: MixtureConfig
    sites: dict[int, NgramSiteConfig]
    rope: RotaryEmbedding
    recipes: dict[str, Recipe]
    ignored: Sequence[str]

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        return self.recipes

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> HyperDecoder:
        """Make the model's module with uninitialised parameters."""
        layers = [self._layer(index, context_length, weights) for index in range(self.text.num_layers)]
        return HyperDecoder(
            self.text,
            self.streams,
            layers,
            context_length=context_length,
            rotations={"full": self.rope},
            weights=weights,
        )

    def _layer(self, index: int, context_length: int, weights: WeightFormat) -> HyperLayer:
        name = f"layers.{index}"
        site = self.sites.get(index)
        return HyperLayer(
            name,
            self.streams,
            self._mixer(f"{name}.mixer", index, context_length, weights),
            Mixture(f"{name}.feed_forward", self.mixture, weights),
            None if site is None else NgramSite(f"{name}.site", site, self.streams, weights),
            weights,
        )

    def _mixer(self, name: str, index: int, context_length: int, weights: WeightFormat) -> nn.Module:
        if self.layer_types[index] == LINEAR:
            return GatedDeltaNet(name, index, self.delta, weights)
        return IndexedAttention(
            name, index, self.attention, self.indexer, context_length=context_length, weights=weights
        )
