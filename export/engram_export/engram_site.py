"""The paper's Engram site on a single residual stream (arXiv 2601.07372 section 3; signed root from the demo code).

At one position, with e the concatenated rows and h the residual stream:
    k = W_K e,  v = W_V e
    s = <norm(h), norm(k)> / sqrt(D)
    g = sigmoid(sign(s) * sqrt(max(|s|, floor)) + bias)
    u = g * v
    h <- h + output_scale * (u + silu(conv(norm(u))))      without convolution: h + output_scale * u

Norms have a gain; where the checkpoint has none it is one.
"""

import math

import torch
from torch import Tensor, nn

from engram_export.decoder import GatedSite, Step, TableInput
from engram_export.engram_config import ConvConfig, EngramConfig
from engram_export.linear import LinearFactory
from engram_export.norms import RmsNorm
from engram_export.recurrent_operators import causal_conv
from engram_runtime.manifest import StateSpec


class CausalConv(nn.Module):
    """Depthwise dilated convolution over normalised steps, the last ``window`` of them carried as a state."""

    def __init__(self, hidden_size: int, config: ConvConfig) -> None:
        super().__init__()
        self.norm = RmsNorm(hidden_size, config.norm_eps)
        self.weight = nn.Parameter(torch.empty(hidden_size, 1, config.kernel), requires_grad=False)
        self.dilation = config.dilation

    def forward(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x [T, D]`` and the earlier steps ``window [W, D]`` to silu(conv(norm(x))) and the next window."""
        return causal_conv(self.norm(x), self.weight, window, dilation=self.dilation, activation="silu")


class EngramSite(GatedSite):
    """Gate rows of the table into the residual stream."""

    def __init__(self, config: EngramConfig, hidden_size: int, make_linear: LinearFactory) -> None:
        super().__init__()
        width = config.num_columns * config.row_dim
        self.config = config
        self.table_input = TableInput(config.site, config.num_columns, config.row_dim)
        self.state_specs = _window_specs(config, hidden_size)
        self.key_proj = make_linear(f"sites.{config.layer_id}.key_proj", width, hidden_size)
        self.value_proj = make_linear(f"sites.{config.layer_id}.value_proj", width, hidden_size)
        self.query_norm = RmsNorm(hidden_size, config.query_norm_eps)
        self.key_norm = RmsNorm(hidden_size, config.key_norm_eps)
        self.gate_bias = nn.Parameter(torch.empty(1), requires_grad=False) if config.gate_bias else None
        self.conv = CausalConv(hidden_size, config.conv) if config.conv else None

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        """Add to ``hidden [T, D]`` what the site's rows ``[T, C, d]`` say."""
        embedding = step.rows[self.config.site].flatten(1)  # [T, C * d]
        gate = self._gate(hidden, self.key_proj(embedding))
        update: Tensor = gate * self.value_proj(embedding)
        if self.conv is not None:
            (window,) = (spec.name for spec in self.state_specs)
            convolved, step.states[window] = self.conv(update, step.states[window])
            update = update + convolved
        update = self.config.output_scale * update
        self.tell(step, streams=hidden, update=update, gate=gate)
        return hidden + update

    def _gate(self, hidden: Tensor, key: Tensor) -> Tensor:
        """Return ``[T, 1]``."""
        products = self.query_norm(hidden) * self.key_norm(key)
        score = products.sum(dim=-1, keepdim=True) * (1 / math.sqrt(hidden.shape[-1]))
        root = torch.sign(score) * torch.sqrt(torch.clamp(torch.abs(score), min=self.config.signed_root_floor))
        return torch.sigmoid(root if self.gate_bias is None else root + self.gate_bias)


def _window_specs(config: EngramConfig, hidden_size: int) -> tuple[StateSpec, ...]:
    if config.conv is None:
        return ()
    shape = (config.conv.window, hidden_size)
    return (StateSpec(name=f"window.{config.site}", dtype="float32", shape=shape, kind="window"),)
