"""The text model of Qwen4-Exp (Qwen3.8-Flash-Next): n-gram memory, streams, delta nets, sparse attention, experts.

Reference: transformers ``modeling_qwen4_exp.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
from engram_export.families.qwen4_memory import CONSTANTS, FACTOR, NgramMemory, memory_names, read_memories
from engram_export.families.reading import count, names, require_values, rotary_dim, text_part, text_prefix
from engram_export.formats import WeightFormat
from engram_export.host_table import TableSource
from engram_export.hyper_connection import StreamsConfig
from engram_export.hyper_decoder import HyperDecoder, HyperLayer
from engram_export.indexed_attention import IndexedAttention, IndexerConfig
from engram_export.mixture import Mixture, MixtureConfig
from engram_export.ngram_site import NgramSite
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import TextConfig
from engram_export.weight_map import Joined, Recipe, one_plus
from engram_runtime.errors import CheckpointError

MEMORY_CONSTANTS = tuple(rf".*\.ple_embedding\.{name}" for name in (*CONSTANTS, FACTOR))
GATE_ACTIVATIONS = ("silu", "sigmoid")
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
    memories: dict[int, NgramMemory]
    rope: RotaryEmbedding
    recipes: dict[str, Recipe]
    ignored: Sequence[str] = (*OTHER_PARTS, *MEMORY_CONSTANTS)

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        return self.recipes

    def tables(self, checkpoint: Checkpoint) -> Sequence[TableSource]:
        """Describe the n-gram tables."""
        return [memory.table(checkpoint) for memory in self.memories.values()]

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> HyperDecoder:
        """Make the model's module with uninitialised parameters."""
        if sites:
            raise CheckpointError(
                f"qwen4_exp has {self.streams.streams} residual streams, an engram site is made for one; "
                f"export without --engram"
            )
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
        memory = self.memories.get(index)
        return HyperLayer(
            name,
            self.streams,
            self._mixer(f"{name}.mixer", index, context_length, weights),
            Mixture(f"{name}.feed_forward", self.mixture, weights),
            None if memory is None else NgramSite(f"{name}.site", memory.site, self.streams, weights),
            weights,
        )

    def _mixer(self, name: str, index: int, context_length: int, weights: WeightFormat) -> nn.Module:
        if self.layer_types[index] == LINEAR:
            return GatedDeltaNet(name, index, self.delta, weights)
        return IndexedAttention(
            name, index, self.attention, self.indexer, context_length=context_length, weights=weights
        )


def read(checkpoint: Checkpoint) -> Qwen4ExpArchitecture:
    """Read the architecture of a checkpoint."""
    checkpoint = text_part(checkpoint)
    require_values(checkpoint, {**SUPPORTED, "indexer_kv_heads": 1})
    text, prefix = text_config(checkpoint), text_prefix(checkpoint)
    attention = attention_config(checkpoint, norm_eps=text.rms_norm_eps, output_gate=True)
    layer_types = names(checkpoint, "layer_types", length=text.num_layers, known=(LINEAR, *INDEXED))
    memories = read_memories(checkpoint, prefix, layer_types)
    recipes = _outer_names(prefix)
    for layer, kind in enumerate(layer_types):
        recipes |= _layer_names(checkpoint, prefix, layer, attention, linear=kind == LINEAR)
        recipes |= memory_names(prefix, layer) if layer in memories else {}
    return Qwen4ExpArchitecture(
        text=text,
        streams=StreamsConfig(
            streams=count(checkpoint, "hc_count", least=2),
            hidden_size=text.hidden_size,
            mixer_rank=count(checkpoint, "hc_lowrank"),
            norm_eps=text.rms_norm_eps,
        ),
        attention=attention,
        indexer=_indexer(checkpoint, attention, text.rms_norm_eps),
        delta=delta_config(checkpoint, gate_activation=_gate_activation(checkpoint)),
        layer_types=layer_types,
        mixture=shared_mixture_config(checkpoint),
        memories=memories,
        rope=partial_rope(checkpoint, attention, text, default=1.0),
        recipes=recipes,
    )


def _indexer(checkpoint: Checkpoint, attention: AttentionConfig, norm_eps: float) -> IndexerConfig:
    budget, block = count(checkpoint, "indexer_budget"), count(checkpoint, "indexer_compress_ratio")
    if budget % block:
        raise CheckpointError(
            f"'indexer_budget' in {checkpoint.config_name} is {budget}, wanted a multiple of "
            f"'indexer_compress_ratio' {block}; correct the config"
        )
    rotated = rotary_dim(checkpoint, attention.head_dim, default=1.0)
    if (head_dim := count(checkpoint, "indexer_head_dim")) < rotated:
        raise CheckpointError(
            f"'indexer_head_dim' in {checkpoint.config_name} is {head_dim}, fewer than the {rotated} rotated "
            f"dimensions of attention; correct the config"
        )
    return IndexerConfig(
        num_heads=count(checkpoint, "indexer_n_heads"),
        head_dim=head_dim,
        budget=budget,
        block=block,
        norm_eps=norm_eps,
    )


def _gate_activation(checkpoint: Checkpoint) -> str:
    activation = checkpoint.config.get("output_gate_type") or "silu"
    if activation not in GATE_ACTIVATIONS:
        raise CheckpointError(
            f"'output_gate_type' in {checkpoint.config_name} is {activation!r}, supported are {list(GATE_ACTIVATIONS)}"
        )
    return str(activation)


def _outer_names(prefix: str) -> dict[str, Recipe]:
    """Return the weights outside the layers."""
    return {
        "embedding.weight": Joined(f"{prefix}embed_tokens.weight"),
        "lm_head.weight": Joined("lm_head.weight"),
        **_mixer_names("mixer.", f"{prefix}hyper_connection_mixer."),
    }


def _mixer_names(target: str, source: str) -> dict[str, Recipe]:
    return {
        f"{target}gain": one_plus(f"{source}hc_norm.weight"),
        f"{target}down.weight": Joined(f"{source}input_mix_weight_down.weight"),
        f"{target}up.weight": Joined(f"{source}input_mix_weight_up.weight"),
        f"{target}inject.weight": Joined(f"{source}block_inject_weight.weight"),
    }


def _layer_names(
    checkpoint: Checkpoint, prefix: str, layer: int, attention: AttentionConfig, *, linear: bool
) -> dict[str, Recipe]:
    source, target = f"{prefix}layers.{layer}.", f"layers.{layer}."
    index_source, index_target = f"{source}self_attn.indexer.", f"{target}mixer."
    indexer: dict[str, Recipe] = {
        f"{index_target}index.weight": Joined(f"{index_source}index_qk_proj.weight"),
        f"{index_target}index_query_norm.weight": one_plus(f"{index_source}q_layernorm.weight"),
        f"{index_target}index_key_norm.weight": one_plus(f"{index_source}k_layernorm.weight"),
    }
    return {
        **_mixer_names(f"{target}mixer_connection.", f"{source}attn_hyper_connection."),
        **_mixer_names(f"{target}feed_forward_connection.", f"{source}mlp_hyper_connection."),
        **mixture_names(checkpoint, f"{source}mlp.", layer),
        **(delta_names(prefix, layer) if linear else gated_attention_names(prefix, layer, attention) | indexer),
    }
