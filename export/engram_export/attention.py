"""Grouped-query attention over a cache, with the variations of Llama, Qwen3 and Qwen3.5."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engram_export.attention_operators import group_query_attention
from engram_export.decoder import Stateful, Step
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm
from engram_runtime.manifest import StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Sizes of an attention layer.

    Attributes:
        norm_eps: of the norms of each query and key head, or None where there are none.
        output_gate: whether a sigmoid gate stands before the output projection.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float | None = None
    output_gate: bool = False


class Attention(Stateful):
    """Causal attention; its keys and values are positional states."""

    def __init__(
        self, name: str, layer: int, config: AttentionConfig, *, context_length: int, weights: WeightFormat
    ) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.config = config
        self.state_specs = cache_specs(layer, config.num_kv_heads, context_length, config.head_dim)
        self.qkv = weights.make_linear(
            f"{name}.qkv", config.hidden_size, width + 2 * config.num_kv_heads * config.head_dim
        )
        self.gate = weights.make_linear(f"{name}.gate", config.hidden_size, width) if config.output_gate else None
        self.query_norm = RmsNorm(config.head_dim, config.norm_eps) if config.norm_eps is not None else None
        self.key_norm = RmsNorm(config.head_dim, config.norm_eps) if config.norm_eps is not None else None
        self.output = weights.make_linear(f"{name}.output", width, config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map ``x [T, D]`` to what attention adds to it."""
        attended = self.attend(self.normalised(self.qkv(x)), x, step)
        if self.gate is not None:
            attended = attended * torch.sigmoid(self.gate(x))
        projected: Tensor = self.output(attended)
        return projected

    def attend(self, qkv: Tensor, x: Tensor, step: Step) -> Tensor:
        """Attend with ``qkv [T, (H + 2 * Hkv) * hd]`` and extend the caches; returns ``[T, H * hd]``."""
        keys, values = (spec.name for spec in self.state_specs[:2])
        attended, step.states[keys], step.states[values] = group_query_attention(
            qkv,
            step.states[keys],
            step.states[values],
            step.position,
            *step.rotations["full"],
            num_heads=self.config.num_heads,
            scale=self.config.head_dim**-0.5,
        )
        return attended

    def normalised(self, qkv: Tensor) -> Tensor:
        """Normalise each query and key head, where the model does."""
        if self.query_norm is None or self.key_norm is None:
            return qkv
        sizes = [count * self.config.head_dim for count in (self.config.num_heads, self.config.num_kv_heads)]
        query, key, value = torch.split(qkv, [*sizes, sizes[1]], dim=-1)
        normed = [
            norm(torch.unflatten(part, -1, (-1, self.config.head_dim))).flatten(-2)
            for norm, part in ((self.query_norm, query), (self.key_norm, key))
        ]
        return torch.cat([*normed, value], dim=-1)


def cache_specs(layer: int, num_kv_heads: int, context_length: int, head_dim: int) -> tuple[StateSpec, StateSpec]:
    """Return the key and value cache of a layer, ``[1, Hkv, S, hd]``."""
    shape = (1, num_kv_heads, context_length, head_dim)
    return (
        StateSpec(name=f"key.{layer}", dtype="float32", shape=shape, kind="positional"),
        StateSpec(name=f"value.{layer}", dtype="float32", shape=shape, kind="positional"),
    )
