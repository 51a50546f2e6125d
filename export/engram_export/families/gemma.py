"""What the configs and checkpoints of Gemma 3n and Gemma 4 have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram_export.checkpoint import Checkpoint
from engram_export.families import PER_LAYER_TABLE
from engram_export.families.gemma_layers import layer_kinds
from engram_export.families.llama import mlp_names, text_names
from engram_export.families.reading import count, flag, rope
from engram_export.formats import WeightFormat
from engram_export.gemma_attention import GemmaAttention, GemmaAttentionConfig, GemmaSharedAttention
from engram_export.gemma_decoder import GemmaConfig
from engram_export.host_table import TableSource, table_source
from engram_export.per_layer_inputs import SITE, PerLayerConfig
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.text_decoder import TextConfig
from engram_export.weight_map import Joined, Recipe
from engram_runtime.errors import CheckpointError
from engram_runtime.keyer_spec import TokenKeyerSpec

SUPPORTED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaArchitecture:
    """What both families know of a checkpoint."""

    config: GemmaConfig
    attention: Sequence[GemmaAttentionConfig]
    prefix: str

    @property
    def text(self) -> TextConfig:
        """What decoders of all families have."""
        return self.config.text

    @property
    def ignored(self) -> Sequence[str]:
        """Towers of other inputs, and weights that stand in checkpoints although no layer uses them."""
        shared = "|".join(str(layer) for layer, config in enumerate(self.attention) if config.caches_of != layer)
        prefix = self.prefix.replace(".", r"\.")
        return (
            r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*",
            rf"{prefix}layers\.({shared})\.self_attn\.(k|v)_(proj|norm)\.weight",
            rf"{prefix}layers\.\d+\.altup\.correct_output_scale",
        )

    def tables(self, checkpoint: Checkpoint) -> Sequence[TableSource]:
        """Describe the per-layer embeddings; ids beyond their vocabulary read row 0."""
        if (config := self.config.per_layer) is None:
            return ()
        tensors = checkpoint.tensors
        if not isinstance(tensors, SafetensorsFile | SafetensorsShards):
            raise CheckpointError(f"{checkpoint.source} has per-layer embeddings, but its tensors are not safetensors")
        table = table_source(
            site=SITE,
            keyer=TokenKeyerSpec(vocab_size=config.vocab_size, pad_id=0),
            token_map=None,
            columns=config.num_layers * config.width,
            tensors=tensors,
            payload=[f"{self.prefix}{PER_LAYER_TABLE}"],
        )
        return (table,)

    def mixers(self, context_length: int, weights: WeightFormat) -> list[GemmaAttention | GemmaSharedAttention]:
        """Make every layer's attention."""
        return [
            GemmaAttention(f"layers.{layer}.mixer", config, context_length=context_length, weights=weights)
            if config.caches_of == layer
            else GemmaSharedAttention(f"layers.{layer}.mixer", config, weights=weights)
            for layer, config in enumerate(self.attention)
        ]

    def shared_names(self) -> dict[str, Recipe]:
        """Return what the weights both families have are made of."""
        found = text_names(self.prefix)
        found["per_layer.projection.weight"] = Joined(f"{self.prefix}per_layer_model_projection.weight")
        found["per_layer.norm.weight"] = Joined(f"{self.prefix}per_layer_projection_norm.weight")
        for layer, config in enumerate(self.attention):
            found |= mlp_names(self.prefix, layer) | _layer_names(self.prefix, layer)
            found |= _attention_names(self.prefix, layer, config)
        return found


def _layer_names(prefix: str, layer: int) -> dict[str, Recipe]:
    source, target = f"{prefix}layers.{layer}.", f"layers.{layer}."
    sources = {
        "mixer_norm": "input_layernorm",
        "mixer_out_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
        "per_layer.gate": "per_layer_input_gate",
        "per_layer.projection": "per_layer_projection",
        "per_layer.norm": "post_per_layer_input_norm",
    }
    return {f"{target}{ours}.weight": Joined(f"{source}{theirs}.weight") for ours, theirs in sources.items()}


def _attention_names(prefix: str, layer: int, config: GemmaAttentionConfig) -> dict[str, Recipe]:
    source, target = f"{prefix}layers.{layer}.self_attn.", f"layers.{layer}.mixer."
    projections = "qk" if config.keys_are_values else "qkv"
    return {
        f"{target}qkv.weight": Joined(*(f"{source}{part}_proj.weight" for part in projections)),
        f"{target}query.weight": Joined(f"{source}q_proj.weight"),
        f"{target}query_norm.weight": Joined(f"{source}q_norm.weight"),
        f"{target}key_norm.weight": Joined(f"{source}k_norm.weight"),
        f"{target}output.weight": Joined(f"{source}o_proj.weight"),
    }


def gemma_config(
    checkpoint: Checkpoint,
    *,
    head_dims: Mapping[str, int],
    rope_parameters: Mapping[str, Mapping[str, Any]],
    default_softcap: float | None,
) -> GemmaConfig:
    """Read a decoder apart from its layers; head dimensions and rope parameters are given by kind of attention."""
    text = TextConfig(
        family=checkpoint.require("model_type", str),
        vocab_size=count(checkpoint, "vocab_size"),
        hidden_size=count(checkpoint, "hidden_size"),
        num_layers=count(checkpoint, "num_hidden_layers"),
        rms_norm_eps=checkpoint.require("rms_norm_eps", float),
        max_positions=count(checkpoint, "max_position_embeddings"),
        tied=flag(checkpoint, "tie_word_embeddings", default=True),
    )
    capped = checkpoint.config.get("final_logit_softcapping", default_softcap) is not None
    kinds = sorted(set(layer_kinds(checkpoint)))
    if missing := [kind for kind in kinds if kind not in rope_parameters]:
        raise CheckpointError(
            f"'rope_parameters' in {checkpoint.config_name} has no {missing[0]!r}; correct the config"
        )
    return GemmaConfig(
        text=text,
        logit_softcap=_positive(checkpoint, "final_logit_softcapping", default_softcap) if capped else None,
        per_layer=_per_layer(checkpoint, text),
        rotations={
            kind: rope(
                checkpoint,
                head_dim=head_dims[kind],
                max_positions=text.max_positions,
                parameters=rope_parameters[kind],
            )
            for kind in kinds
        },
    )


def _positive(checkpoint: Checkpoint, key: str, default: float | None) -> float:
    if key not in checkpoint.config and default is not None:
        return default
    if not (value := checkpoint.require(key, float)) > 0:
        raise CheckpointError(f"{key!r} in {checkpoint.config_name} is {value}, wanted a positive number or null")
    return value


def _per_layer(checkpoint: Checkpoint, text: TextConfig) -> PerLayerConfig | None:
    width = count(checkpoint, "hidden_size_per_layer_input", default=0, least=0)
    if width == 0:
        return None
    return PerLayerConfig(
        hidden_size=text.hidden_size,
        num_layers=text.num_layers,
        width=width,
        vocab_size=count(checkpoint, "vocab_size_per_layer_input"),
        norm_eps=text.rms_norm_eps,
    )
