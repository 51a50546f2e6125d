"""Per-layer embeddings: one row of a host table per token holds a vector for every layer.

The rows and a projection of the token's embedding make the layers' inputs; a gate in each layer reads its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.decoder import Step, TableInput, TableSite
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm

SITE = "per_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerConfig:
    """``width`` is a layer's share of a row, ``vocab_size`` the number of rows."""

    hidden_size: int
    num_layers: int
    width: int
    vocab_size: int
    norm_eps: float


class PerLayerInputs(TableSite):
    """The inputs of all layers."""

    def __init__(self, name: str, config: PerLayerConfig, weights: WeightFormat) -> None:
        super().__init__()
        row_dim = config.num_layers * config.width
        self.config = config
        self.table_input = TableInput(SITE, columns=1, row_dim=row_dim)
        self.projection = weights.make_linear(f"{name}.projection", config.hidden_size, row_dim)
        # The projection is divided by sqrt(D) before it is normed, which eps alone can tell.
        self.norm = RmsNorm(config.width, config.norm_eps * config.hidden_size)

    def forward(self, embedded: Tensor, step: Step) -> Tensor:
        """Map scaled embeddings ``[T, D]`` to ``[T, L, width]``."""
        shape = (self.config.num_layers, self.config.width)
        projected = self.norm(torch.unflatten(self.projection(embedded), -1, shape))
        rows = torch.unflatten(step.rows[SITE].flatten(1), -1, shape)
        inputs: Tensor = (projected + rows * self.config.width**0.5) * 0.5**0.5
        return inputs


class PerLayerGate(nn.Module):
    """Gates a layer's input by the residual stream."""

    def __init__(self, name: str, config: PerLayerConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.gate = weights.make_linear(f"{name}.gate", config.hidden_size, config.width)
        self.projection = weights.make_linear(f"{name}.projection", config.width, config.hidden_size)
        self.norm = RmsNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, layer_input: Tensor) -> Tensor:
        """Map ``x [T, D]`` and ``layer_input [T, width]`` to an update ``[T, D]``."""
        gate = functional.gelu(self.gate(x), approximate="tanh")
        update: Tensor = self.norm(self.projection(gate * layer_input))
        return update
