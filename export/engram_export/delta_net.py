"""Gated DeltaNet: linear attention with a decaying state corrected by the delta rule (arXiv 2412.06464).

Reference: transformers ``modeling_qwen3_5_moe.py``, ``Qwen3_5MoeGatedDeltaNet``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engram_export.decoder import Stateful, Step
from engram_export.formats import WeightFormat
from engram_export.gate_operators import decay_and_rate, gated_rms_norm
from engram_export.linear import FloatLinear, empty_parameter
from engram_export.recurrent_operators import causal_conv, gated_delta
from engram_export.stream_operators import branchwise_rms_norm
from engram_runtime.manifest import StateSpec

L2_EPS = 1e-6  # under the root of the norms of queries and keys


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetConfig:
    """Sizes; every key head serves ``num_value_heads / num_key_heads`` consecutive value heads."""

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    norm_eps: float
    gate_activation: str

    @property
    def key_width(self) -> int:
        """Features of all key heads."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Features of all value heads."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_width(self) -> int:
        """Features the convolution runs over: queries, keys and values."""
        return 2 * self.key_width + self.value_width


class GatedDeltaNet(Stateful):
    """A mixer whose states are the convolution's window and one matrix per value head."""

    def __init__(self, name: str, layer: int, config: DeltaNetConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self.state_specs = _states(layer, config)
        self.qkv = weights.make_linear(f"{name}.qkv", config.hidden_size, config.conv_width)
        self.gate = weights.make_linear(f"{name}.gate", config.hidden_size, config.value_width)
        self.decay_rate = FloatLinear(f"{name}.decay_rate", config.hidden_size, 2 * config.num_value_heads)
        self.conv = empty_parameter(config.conv_width, 1, config.conv_kernel)
        self.time_bias = empty_parameter(config.num_value_heads)
        self.decay_scale = empty_parameter(config.num_value_heads)  # -exp(A_log)
        self.norm_gain = empty_parameter(config.value_head_dim)
        self.output = weights.make_linear(f"{name}.output", config.value_width, config.hidden_size)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map ``x [T, D]`` to what the mixer adds to it."""
        config = self.config
        window, state = (spec.name for spec in self.state_specs)
        mixed, step.states[window] = causal_conv(
            self.qkv(x), self.conv, step.states[window], dilation=1, activation="silu"
        )
        query, key, value = torch.split(mixed, [config.key_width, config.key_width, config.value_width], dim=-1)
        time_step, rate = self.decay_rate(x).chunk(2, dim=-1)
        decay, rate = decay_and_rate(time_step, rate, self.time_bias, self.decay_scale)
        attended, step.states[state] = gated_delta(
            self._normalised(query),
            self._normalised(key),
            value,
            decay,
            rate,
            step.states[state],
            num_heads=config.num_value_heads,
        )
        gated = gated_rms_norm(
            attended, self.norm_gain, self.gate(x), activation=config.gate_activation, eps=config.norm_eps
        )
        projected: Tensor = self.output(gated)
        return projected

    def _normalised(self, heads: Tensor) -> Tensor:
        """Return heads of length one: x / |x| is x / rms(x) / sqrt(dk)."""
        width = self.config.key_head_dim
        normed = branchwise_rms_norm(heads, None, branches=self.config.num_key_heads, eps=L2_EPS / width)
        scaled: Tensor = normed * width**-0.5
        return scaled


def _states(layer: int, config: DeltaNetConfig) -> tuple[StateSpec, StateSpec]:
    window = (config.conv_kernel - 1, config.conv_width)
    state = (1, config.num_value_heads, config.key_head_dim, config.value_head_dim)
    return (
        StateSpec(name=f"conv.{layer}", dtype="float32", shape=window, kind="window"),
        StateSpec(name=f"delta.{layer}", dtype="float32", shape=state, kind="recurrent"),
    )
