"""Mixtures of experts on one residual stream: Mixtral, Qwen3-MoE and the text model of Qwen3.5-MoE.

Reference: transformers ``modeling_mixtral.py``, ``modeling_qwen3_moe.py`` and ``modeling_qwen3_5_moe.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from engram_export.attention import Attention, AttentionConfig
from engram_export.checkpoint import Checkpoint
from engram_export.delta_net import DeltaNetConfig, GatedDeltaNet
from engram_export.engram_site import EngramSite
from engram_export.families.llama import (
    attention_config,
    attention_names,
    mlp_names,
    norm_names,
    text_config,
    text_names,
)
from engram_export.families.reading import (
    count,
    entries,
    flag,
    names,
    require_values,
    rope,
    rotary_dim,
    text_part,
    text_prefix,
)
from engram_export.formats import WeightFormat
from engram_export.host_table import TableSource
from engram_export.mixture import Mixture, MixtureConfig
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import Layer, Mlp, TextConfig, TextDecoder
from engram_export.weight_map import Chained, HeadPart, Joined, Mapped, Recipe, Stacked, one_plus
from engram_runtime.errors import CheckpointError

FULL, LINEAR = "full_attention", "linear_attention"
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "sliding_window": None}
# What else a multimodal checkpoint holds, and draft heads.
OTHER_PARTS = (r"model\.visual\..*", r"mtp\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureArchitecture:
    """A checkpoint of one of the families above.

    Attributes:
        layer_types: FULL or LINEAR for each layer. ``delta`` is None where no layer is LINEAR.
        dense_layers: layers with a plain feed-forward of ``dense_size``.
        recipes: what every weight is made of.
    """

    text: TextConfig
    attention: AttentionConfig
    delta: DeltaNetConfig | None
    layer_types: tuple[str, ...]
    mixture: MixtureConfig
    dense_layers: frozenset[int]
    dense_size: int
    rope: RotaryEmbedding
    recipes: dict[str, Recipe]
    ignored: Sequence[str] = OTHER_PARTS

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        return self.recipes

    def tables(self, checkpoint: Checkpoint) -> Sequence[TableSource]:
        """The families have no tables of their own."""
        return ()

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> TextDecoder:
        """Make the model's module with uninitialised parameters."""
        layers = [
            Layer(self.text, self._mixer(index, context_length, weights), self._feed_forward(index, weights))
            for index in range(self.text.num_layers)
        ]
        return TextDecoder(
            self.text, layers, sites, context_length=context_length, rotations={"full": self.rope}, weights=weights
        )

    def _mixer(self, index: int, context_length: int, weights: WeightFormat) -> nn.Module:
        name = f"layers.{index}.mixer"
        if self.layer_types[index] == LINEAR:
            assert self.delta is not None
            return GatedDeltaNet(name, index, self.delta, weights)
        return Attention(name, index, self.attention, context_length=context_length, weights=weights)

    def _feed_forward(self, index: int, weights: WeightFormat) -> nn.Module:
        name = f"layers.{index}.feed_forward"
        if index in self.dense_layers:
            return Mlp(name, self.text.hidden_size, self.dense_size, weights)
        return Mixture(name, self.mixture, weights)


def read_mixtral(checkpoint: Checkpoint) -> MixtureArchitecture:
    """Read a checkpoint of ``model_type`` mixtral."""
    require_values(checkpoint, SUPPORTED)
    mixture = MixtureConfig(
        hidden_size=count(checkpoint, "hidden_size"),
        num_experts=count(checkpoint, "num_local_experts"),
        top_k=_top_k(checkpoint, "num_local_experts"),
        intermediate_size=count(checkpoint, "intermediate_size"),
        normalise=True,
    )
    return _on_attention(checkpoint, mixture, norm_eps=None, dense_layers=frozenset())


def read_qwen3_moe(checkpoint: Checkpoint) -> MixtureArchitecture:
    """Read a checkpoint of ``model_type`` qwen3_moe."""
    require_values(checkpoint, SUPPORTED)
    key = "num_experts" if "num_experts" in checkpoint.config else "num_local_experts"
    mixture = MixtureConfig(
        hidden_size=count(checkpoint, "hidden_size"),
        num_experts=count(checkpoint, key),
        top_k=_top_k(checkpoint, key),
        intermediate_size=count(checkpoint, "moe_intermediate_size"),
        normalise=flag(checkpoint, "norm_topk_prob", default=False),
    )
    eps = checkpoint.require("rms_norm_eps", float)
    return _on_attention(checkpoint, mixture, norm_eps=eps, dense_layers=_dense_layers(checkpoint))


def read_qwen3_5_moe(checkpoint: Checkpoint) -> MixtureArchitecture:
    """Read a checkpoint of ``model_type`` qwen3_5_moe or qwen3_5_moe_text."""
    checkpoint = text_part(checkpoint)
    require_values(checkpoint, SUPPORTED)
    text, prefix = text_config(checkpoint), text_prefix(checkpoint)
    attention = attention_config(checkpoint, norm_eps=text.rms_norm_eps, output_gate=True)
    layer_types = names(checkpoint, "layer_types", length=text.num_layers, known=(FULL, LINEAR))
    recipes = {**text_names(prefix), "norm.weight": one_plus(f"{prefix}norm.weight")}
    for layer, kind in enumerate(layer_types):
        recipes |= norm_names(prefix, layer, one_plus) | mixture_names(
            checkpoint, f"{prefix}layers.{layer}.mlp.", layer
        )
        recipes |= delta_names(prefix, layer) if kind == LINEAR else gated_attention_names(prefix, layer, attention)
    return MixtureArchitecture(
        text=text,
        attention=attention,
        delta=delta_config(checkpoint, gate_activation="silu"),
        layer_types=layer_types,
        mixture=shared_mixture_config(checkpoint),
        dense_layers=frozenset(),
        dense_size=0,
        rope=partial_rope(checkpoint, attention, text),
        recipes=recipes,
    )


def shared_mixture_config(checkpoint: Checkpoint) -> MixtureConfig:
    """Read the mixture with a shared expert of Qwen3.5 and Qwen4-Exp; both normalise the weights of experts."""
    require_values(checkpoint, {"norm_topk_prob": True})
    return MixtureConfig(
        hidden_size=count(checkpoint, "hidden_size"),
        num_experts=count(checkpoint, "num_experts"),
        top_k=_top_k(checkpoint, "num_experts"),
        intermediate_size=count(checkpoint, "moe_intermediate_size"),
        normalise=True,
        shared_size=count(checkpoint, "shared_expert_intermediate_size"),
    )


def delta_config(checkpoint: Checkpoint, *, gate_activation: str) -> DeltaNetConfig:
    """Read the sizes of the linear-attention layers."""
    config = DeltaNetConfig(
        hidden_size=count(checkpoint, "hidden_size"),
        num_key_heads=count(checkpoint, "linear_num_key_heads"),
        num_value_heads=count(checkpoint, "linear_num_value_heads"),
        key_head_dim=count(checkpoint, "linear_key_head_dim"),
        value_head_dim=count(checkpoint, "linear_value_head_dim"),
        conv_kernel=count(checkpoint, "linear_conv_kernel_dim", least=2),
        norm_eps=checkpoint.require("rms_norm_eps", float),
        gate_activation=gate_activation,
    )
    if config.num_value_heads % config.num_key_heads:
        raise CheckpointError(
            f"{checkpoint.config_name} has {config.num_value_heads} linear value heads for {config.num_key_heads} key "
            f"heads, wanted a multiple; correct the config"
        )
    return config


def partial_rope(
    checkpoint: Checkpoint, attention: AttentionConfig, text: TextConfig, *, default: float = 0.25
) -> RotaryEmbedding:
    """Read the rotation of the first dimensions of a head; a text's three mrope positions are all the same."""
    rotated = rotary_dim(checkpoint, attention.head_dim, default=default)
    return rope(checkpoint, head_dim=rotated, max_positions=text.max_positions)


def gated_attention_names(prefix: str, layer: int, attention: AttentionConfig) -> dict[str, Recipe]:
    """Return attention whose query rows stand head by head before those of the output gate."""
    source, target = f"{prefix}layers.{layer}.self_attn.", f"layers.{layer}.mixer."
    dim, kv_rows = attention.head_dim, attention.num_kv_heads * attention.head_dim
    query, gate = (HeadPart(f"{source}q_proj.weight", dim, 2, part) for part in range(2))
    parts: tuple[tuple[Recipe, int], ...] = (
        (query, attention.num_heads * dim),
        (Joined(f"{source}k_proj.weight"), kv_rows),
        (Joined(f"{source}v_proj.weight"), kv_rows),
    )
    return {
        **attention_names(prefix, layer, one_plus),
        f"{target}qkv.weight": Chained(parts),
        f"{target}gate.weight": gate,
    }


def delta_names(prefix: str, layer: int) -> dict[str, Recipe]:
    """Return a layer's gated delta net."""
    source, target = f"{prefix}layers.{layer}.linear_attn.", f"layers.{layer}.mixer."
    return {
        f"{target}qkv.weight": Joined(f"{source}in_proj_qkv.weight"),
        f"{target}gate.weight": Joined(f"{source}in_proj_z.weight"),
        f"{target}decay_rate.weight": Joined(f"{source}in_proj_a.weight", f"{source}in_proj_b.weight"),
        f"{target}conv": Joined(f"{source}conv1d.weight"),
        f"{target}time_bias": Joined(f"{source}dt_bias"),
        f"{target}decay_scale": Mapped(Joined(f"{source}A_log"), lambda log: -np.exp(log)),
        f"{target}norm_gain": Joined(f"{source}norm.weight"),
        f"{target}output.weight": Joined(f"{source}out_proj.weight"),
    }


def mixture_names(
    checkpoint: Checkpoint,
    source: str,
    layer: int,
    gate_up: Sequence[str] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
) -> dict[str, Recipe]:
    """Return a layer's mixture; a checkpoint has its experts one by one or all in one tensor."""
    target = f"layers.{layer}.feed_forward."
    fused = f"{source}experts.gate_up_proj"
    if fused in checkpoint.tensors.names():
        experts: tuple[Recipe, Recipe] = (Joined(fused), Joined(f"{source}experts.down_proj"))
    else:
        each = f"{source}experts.{{expert}}."
        experts = Stacked(tuple(f"{each}{part}.weight" for part in gate_up)), Stacked((f"{each}{down}.weight",))
    return {
        f"{target}router.weight": Joined(f"{source}gate.weight"),
        f"{target}experts.gate_up.weight": experts[0],
        f"{target}experts.down.weight": experts[1],
        f"{target}shared.gate_up.weight": Joined(
            *(f"{source}shared_expert.{part}_proj.weight" for part in ("gate", "up"))
        ),
        f"{target}shared.down.weight": Joined(f"{source}shared_expert.down_proj.weight"),
        f"{target}shared_gate.weight": Joined(f"{source}shared_expert_gate.weight"),
    }


def _on_attention(
    checkpoint: Checkpoint, mixture: MixtureConfig, *, norm_eps: float | None, dense_layers: frozenset[int]
) -> MixtureArchitecture:
    text, attention = text_config(checkpoint), attention_config(checkpoint, norm_eps=norm_eps)
    recipes = text_names("model.")
    for layer in range(text.num_layers):
        recipes |= norm_names("model.", layer) | attention_names("model.", layer)
        recipes |= mlp_names("model.", layer) if layer in dense_layers else _mixture_names(checkpoint, layer)
    return MixtureArchitecture(
        text=text,
        attention=attention,
        delta=None,
        layer_types=(FULL,) * text.num_layers,
        mixture=mixture,
        dense_layers=dense_layers,
        dense_size=count(checkpoint, "intermediate_size"),
        rope=rope(checkpoint, head_dim=attention.head_dim, max_positions=text.max_positions),
        recipes=recipes,
    )


def _mixture_names(checkpoint: Checkpoint, layer: int) -> dict[str, Recipe]:
    mixtral = f"model.layers.{layer}.block_sparse_moe."
    if f"{mixtral}gate.weight" in checkpoint.tensors.names():
        return mixture_names(checkpoint, mixtral, layer, ("w1", "w3"), "w2")
    return mixture_names(checkpoint, f"model.layers.{layer}.mlp.", layer)


def _dense_layers(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the layers Qwen3-MoE keeps dense."""
    layers, step = count(checkpoint, "num_hidden_layers"), count(checkpoint, "decoder_sparse_step", default=1)
    listed = entries(checkpoint, "mlp_only_layers")
    return frozenset(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _top_k(checkpoint: Checkpoint, experts: str) -> int:
    top_k, num_experts = count(checkpoint, "num_experts_per_tok"), count(checkpoint, experts)
    if top_k > num_experts:
        raise CheckpointError(
            f"'num_experts_per_tok' in {checkpoint.config_name} is {top_k}, there are {num_experts} experts; "
            f"correct the config"
        )
    return top_k
