"""Alternating updates: a layer works on one of several residual streams and corrects the others by its result.

Reference: "Alternating Updates for Efficient Transformers" (arXiv 2301.13310); transformers ``Gemma3nTextAltUp``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram_export.formats import WeightFormat
from engram_export.linear import FloatLinear
from engram_export.norms import RmsNorm

LEAST_MEAN_SQUARE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class AltUpConfig:
    """``active`` is the stream layers read, ``scale_correction`` whether it is scaled before the per-layer gate."""

    hidden_size: int
    num_streams: int
    active: int
    scale_correction: bool
    norm_eps: float


class AltUp(nn.Module):
    """Predicts the streams after a layer, and corrects the prediction by what the layer says."""

    def __init__(self, name: str, config: AltUpConfig) -> None:
        super().__init__()
        streams = config.num_streams
        self.config = config
        self.router_norm = RmsNorm(config.hidden_size, config.norm_eps)
        # Mixing coefficients of every channel hang on these few weights, so they stay float32 in every format.
        self.router = FloatLinear(f"{name}.router", config.hidden_size, streams)
        self.prediction = FloatLinear(f"{name}.prediction", streams, streams * streams)
        self.correction = FloatLinear(f"{name}.correction", streams, streams)

    def predict(self, x: Tensor) -> Tensor:
        """Map the streams ``[T, P, D]`` to predicted ones."""
        streams = self.config.num_streams
        coefficients = torch.unflatten(self.prediction(self._route(x[:, self.config.active])), -1, (streams, streams))
        predicted: Tensor = x + coefficients @ x
        return predicted

    def correct(self, predicted: Tensor, updated: Tensor) -> Tensor:
        """Correct ``predicted [T, P, D]`` by what the layer made of the active stream, ``updated [T, D]``."""
        coefficients = self.correction(self._route(updated)) + 1.0
        innovation = updated - predicted[:, self.config.active]
        corrected: Tensor = predicted + coefficients[:, :, None] * innovation[:, None]
        return corrected

    def _route(self, x: Tensor) -> Tensor:
        return torch.tanh(self.router(self.router_norm(x)) * (1 / self.config.hidden_size))


class Streams(nn.Module):
    """Makes streams of the embedding, and one hidden state of the streams."""

    def __init__(self, name: str, config: AltUpConfig, weights: WeightFormat) -> None:
        super().__init__()
        size, others = config.hidden_size, config.num_streams - 1
        self.shape = (others, size)
        self.spread = weights.make_linear(f"{name}.spread", size, others * size)
        self.merge = nn.ModuleList([weights.make_linear(f"{name}.merge.{i}", size, size) for i in range(others)])

    def split(self, embedded: Tensor) -> Tensor:
        """Map ``[T, D]`` to streams ``[T, P, D]``, the first of them the embedding itself."""
        first, others = embedded[:, None], torch.unflatten(self.spread(embedded), -1, self.shape)
        return torch.cat([first, _as_large_as(first, others)], dim=1)

    def join(self, x: Tensor) -> Tensor:
        """Map streams ``[T, P, D]`` to their mean ``[T, D]`` after each was projected."""
        first = x[:, :1]
        others = torch.stack([linear(x[:, index + 1]) for index, linear in enumerate(self.merge)], dim=1)
        return torch.cat([first, _as_large_as(first, others)], dim=1).mean(dim=1)


def _as_large_as(target: Tensor, x: Tensor) -> Tensor:
    """Scale ``x`` to the root mean square of ``target``, over the last axis."""
    size = torch.sqrt((target * target).mean(dim=-1, keepdim=True))
    own = torch.sqrt((x * x).mean(dim=-1, keepdim=True).clamp(min=LEAST_MEAN_SQUARE))
    return x * (size / own)
