"""The Engram site of DeepSeek-V4.1, on G hyper-connection streams, after the published inference code.

At one position, with e the concatenated rows and h_g the streams:
    k_1 .. k_G, v = W_kv e
    s_g = <h_g, gain_g * k_g> / (rms(h_g) * rms(k_g) * sqrt(D))
    a_g = sigmoid(copysign(sqrt(max(|s_g|, floor)), s_g))
    h_g <- h_g + a_g * v

The gains of both norms only ever appear as their product. Tokens without rows have e = 0, hence k = v = 0, and leave h
as it was. There is no convolution and so no state.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.decoder import TableInput
from engram_export.linear import LinearFactory

SIGNED_ROOT_FLOOR = 1e-6  # a score of zero, -0 included, counts as +1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiStreamConfig:
    """Sizes of a site: G streams of D values read C rows of d values; ``eps`` is that of both norms."""

    table: TableInput
    num_streams: int
    hidden_size: int
    eps: float


class MultiStreamSite(nn.Module):
    """Gate rows of the table into every residual stream."""

    def __init__(self, config: MultiStreamConfig, make_linear: LinearFactory) -> None:
        """Make the site with uninitialised parameters."""
        super().__init__()
        streams, size, width = config.num_streams, config.hidden_size, config.table.columns * config.table.row_dim
        self.config = config
        self.key_value = make_linear("key_value", width, (streams + 1) * size)
        self.gain = nn.Parameter(torch.empty(streams, size), requires_grad=False)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return ``hidden [T, G, D]`` with what the rows ``[T, C, d]`` say added."""
        streams = self.config.num_streams
        projected = self.key_value(rows.flatten(1)).unflatten(1, (streams + 1, self.config.hidden_size))
        keys, value = projected[:, :streams], projected[:, streams:]
        updated: Tensor = hidden + self._gate(hidden, keys) * value
        return updated

    def _gate(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Return ``[T, G, 1]``."""
        score = (self._normed(hidden) * self.gain * self._normed(keys)).sum(dim=-1, keepdim=True)
        score = score / math.sqrt(self.config.hidden_size)
        root = torch.sqrt(torch.clamp(torch.abs(score), min=SIGNED_ROOT_FLOOR))
        return torch.sigmoid(torch.where(score < 0, -root, root))

    def _normed(self, x: Tensor) -> Tensor:
        # One operator: written out, the ONNX optimiser drops the sum with an eps of 1e-20, and zero rows give NaN.
        return functional.rms_norm(x, x.shape[-1:], torch.ones(x.shape[-1]), self.config.eps)
