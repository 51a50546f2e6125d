"""Attention of Gemma 3n and Gemma 4: normed queries, keys and values, windows, caches shared by the last layers.

Scores are not scaled: the gains of the query norm hold the scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.attention import cache_specs
from engram_export.attention_operators import group_query_attention, shared_attention
from engram_export.decoder import Stateful, Step
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm

SCALE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaAttentionConfig:
    """One layer's attention.

    Attributes:
        kind: of `Step.rotations`.
        window: tokens a query sees, itself included; None for all before it.
        caches_of: the layer whose caches hold the keys and values, the layer itself if it computes them.
        keys_are_values: whether one projection gives both, normed differently.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    kind: str
    window: int | None
    caches_of: int
    keys_are_values: bool = False


class GemmaAttention(Stateful):
    """Attention that extends caches of its own."""

    def __init__(self, name: str, config: GemmaAttentionConfig, *, context_length: int, weights: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self.state_specs = cache_specs(config.caches_of, config.num_kv_heads, context_length, config.head_dim)
        projections = 1 if config.keys_are_values else 2
        self.widths = [heads * config.head_dim for heads in (config.num_heads, *[config.num_kv_heads] * projections)]
        self.qkv = weights.make_linear(f"{name}.qkv", config.hidden_size, sum(self.widths))
        self.query_norm = RmsNorm(config.head_dim, config.norm_eps)
        self.key_norm = RmsNorm(config.head_dim, config.norm_eps)
        self.output = weights.make_linear(f"{name}.output", self.widths[0], config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map ``x [T, D]`` to what attention gives, ``[T, D]``."""
        keys, values = (spec.name for spec in self.state_specs)
        attended, step.states[keys], step.states[values] = group_query_attention(
            self.normed(self.qkv(x)),
            step.states[keys],
            step.states[values],
            step.position,
            *step.rotations[self.config.kind],
            num_heads=self.config.num_heads,
            scale=SCALE,
            window=self.config.window,
        )
        projected: Tensor = self.output(attended)
        return projected

    def normed(self, projected: Tensor) -> Tensor:
        """Norm every head; returns queries, keys and values ``[T, (H + 2 * Hkv) * hd]``."""
        query, key, *rest = torch.split(projected, self.widths, dim=-1)
        value = rest[0] if rest else key
        parts = [normed_heads(query, self.query_norm), normed_heads(key, self.key_norm), self.unit(value)]
        return torch.cat(parts, dim=-1)

    def unit(self, value: Tensor) -> Tensor:
        """Norm the value heads, without a gain."""
        shape = (self.config.head_dim,)
        heads = torch.unflatten(value, -1, (-1, *shape))
        return functional.rms_norm(heads, shape, torch.ones(shape), self.config.norm_eps).flatten(-2)


class GemmaSharedAttention(nn.Module):
    """Attention over the caches of an earlier layer."""

    def __init__(self, name: str, config: GemmaAttentionConfig, *, weights: WeightFormat) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.config = config
        self.query = weights.make_linear(f"{name}.query", config.hidden_size, width)
        self.query_norm = RmsNorm(config.head_dim, config.norm_eps)
        self.output = weights.make_linear(f"{name}.output", width, config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map ``x [T, D]`` to what attention gives, ``[T, D]``."""
        attended = shared_attention(
            normed_heads(self.query(x), self.query_norm),
            step.states[f"key.{self.config.caches_of}"],
            step.states[f"value.{self.config.caches_of}"],
            step.position,
            *step.rotations[self.config.kind],
            num_heads=self.config.num_heads,
            scale=SCALE,
            window=self.config.window,
        )
        projected: Tensor = self.output(attended)
        return projected


def normed_heads(projected: Tensor, norm: RmsNorm) -> Tensor:
    """Norm each head of ``[T, n * hd]``."""
    normed: Tensor = norm(torch.unflatten(projected, -1, (-1, len(norm.weight)))).flatten(-2)
    return normed
