"""Gated-residual hyper-connections of Qwen4-Exp: several residual streams, mixed down before a block.

Reference: transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextGatedResidual``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.formats import WeightFormat
from engram_export.linear import FloatLinear
from engram_export.stream_operators import branchwise_rms_norm, pre_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamsConfig:
    """Streams of ``hidden_size`` each, and the rank of the mixer that weighs their features."""

    streams: int
    hidden_size: int
    mixer_rank: int
    norm_eps: float

    @property
    def width(self) -> int:
        """Features of all streams together."""
        return self.streams * self.hidden_size


class StreamMixer(nn.Module):
    """The input of a block: the mean of the normalised streams, each feature weighed by a low-rank gate."""

    def __init__(self, name: str, config: StreamsConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(config.width), requires_grad=False)
        self.down = weights.make_linear(f"{name}.down", config.width, config.mixer_rank)
        self.up = weights.make_linear(f"{name}.up", config.mixer_rank, config.width)

    def forward(self, streams: Tensor) -> Tensor:
        """Map ``[T, G * D]`` to ``[T, D]``."""
        return self.mixed(self.normalised(streams))

    def normalised(self, streams: Tensor) -> Tensor:
        """Normalise each stream."""
        return branchwise_rms_norm(streams, self.gain, branches=self.config.streams, eps=self.config.norm_eps)

    def mixed(self, normed: Tensor) -> Tensor:
        """Map normalised streams to ``[T, D]``."""
        low_rank = functional.silu(self.down(normed) * (1 / self.config.streams))
        return pre_mix(normed, torch.sigmoid(self.up(low_rank)), branches=self.config.streams)


class HyperConnection(StreamMixer):
    """A mixer that also says how strongly each stream takes up the block's output."""

    def __init__(self, name: str, config: StreamsConfig, weights: WeightFormat) -> None:
        super().__init__(name, config, weights)
        self.inject = FloatLinear(f"{name}.inject", config.width, config.streams)

    def open(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[T, G * D]`` to the block's input ``[T, D]`` and the weights ``[T, G]`` of its output."""
        normed = self.normalised(streams)
        return self.mixed(normed), 2 * torch.sigmoid(self.inject(normed) * (1 / self.config.streams))
