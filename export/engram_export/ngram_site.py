"""The n-gram memory of Qwen4-Exp on several residual streams.

Per position, with e the rows of the table, h_g the streams, k_g = W_K^g e and v = W_V e:
    gate_g = sigmoid(signed_root(<norm(k_g), norm(h_g)> / sqrt(D))),  u_g = gate_g * v
    h_g <- h_g + (u_g + silu(conv(norm(u)))_g)

Reference: transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextPLELayer``.
"""

import torch
from torch import Tensor

from engram_export.decoder import GatedSite, Step, TableInput
from engram_export.formats import WeightFormat
from engram_export.hyper_connection import StreamsConfig
from engram_export.linear import empty_parameter
from engram_export.ngram_config import NgramSiteConfig
from engram_export.recurrent_operators import causal_conv
from engram_export.stream_operators import engram_gate
from engram_runtime.manifest import StateSpec

_LEAST_NORM = 1e-18  # of a value that a gate is read from: squares of smaller ones are no float32


class NgramSite(GatedSite):
    """Gate rows of the table into every stream."""

    def __init__(self, name: str, config: NgramSiteConfig, streams: StreamsConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.config, self.streams = config, streams
        self.table_input = TableInput(config.site, config.columns, config.row_dim)
        window = (config.window, streams.width)
        self.state_specs = (StateSpec(name=f"window.{config.site}", dtype="float32", shape=window, kind="window"),)
        width = config.columns * config.row_dim
        self.key = weights.make_linear(f"{name}.key", width, streams.width)
        self.value = weights.make_linear(f"{name}.value", width, streams.hidden_size)
        self.key_gain, self.query_gain, self.conv_gain = (empty_parameter(streams.width) for _ in range(3))
        self.conv = empty_parameter(streams.width, 1, config.conv_kernel)

    def forward(self, streams: Tensor, step: Step) -> Tensor:
        """Add to ``streams [T, G * D]`` what the site's rows ``[T, C, d]`` say."""
        embedding = step.rows[self.config.site].flatten(1)  # [T, C * d]
        value = self.value(embedding)
        gated, normed = engram_gate(
            self.key(embedding),
            streams,
            value,
            self.key_gain,
            self.query_gain,
            self.conv_gain,
            branches=self.streams.streams,
            eps=self.streams.norm_eps,
        )
        (window,) = (spec.name for spec in self.state_specs)
        convolved, step.states[window] = causal_conv(
            normed, self.conv, step.states[window], dilation=self.config.conv_dilation, activation="silu"
        )
        update = gated + convolved
        self.tell(step, streams=streams, update=update, gate=self._gate(gated, value))
        return streams + update

    def _gate(self, gated: Tensor, value: Tensor) -> Tensor:
        """Return ``[T, G]``, read back from ``gated [T, G * D]``, as the gate's node keeps it; 0 without a value."""
        let_through = torch.linalg.vector_norm(torch.unflatten(gated, -1, (self.streams.streams, -1)), dim=-1)
        whole = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        gate: Tensor = let_through / torch.clamp(whole, min=_LEAST_NORM)
        return gate
