"""Gemma 3n's decoder: layers on several residual streams, with a low-rank shortcut beside attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engram_export.altup import AltUp, AltUpConfig, Streams
from engram_export.decoder import Step
from engram_export.formats import WeightFormat
from engram_export.gemma_decoder import GemmaConfig, GemmaDecoder, GemmaLayer
from engram_export.norms import RmsNorm
from engram_export.per_layer_inputs import PerLayerGate
from engram_export.text_decoder import TextConfig


class Laurel(nn.Module):
    """Learned augmented residual: ``x + norm(right(left(x)))``."""

    def __init__(self, name: str, text: TextConfig, rank: int, weights: WeightFormat) -> None:
        super().__init__()
        self.left = weights.make_linear(f"{name}.left", text.hidden_size, rank)
        self.right = weights.make_linear(f"{name}.right", rank, text.hidden_size)
        self.norm = RmsNorm(text.hidden_size, text.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        augmented: Tensor = x + self.norm(self.right(self.left(x)))
        return augmented


class AltUpLayer(GemmaLayer):
    """Gemma 3n's layer."""

    def __init__(
        self,
        text: TextConfig,
        mixer: nn.Module,
        feed_forward: nn.Module,
        per_layer: PerLayerGate,
        altup: AltUp,
        laurel: Laurel,
    ) -> None:
        super().__init__(text, mixer, feed_forward, per_layer)
        self.altup = altup
        self.laurel = laurel
        scaled = altup.config.scale_correction
        self.correction_scale = nn.Parameter(torch.empty(text.hidden_size), requires_grad=False) if scaled else None

    def forward(self, x: Tensor, layer_input: Tensor, step: Step) -> Tensor:
        """Map the streams ``[T, P, D]`` to the next layer's; ``layer_input [T, width]``."""
        predicted = self.altup.predict(x)
        corrected = self.altup.correct(predicted, self.updated(predicted[:, self.altup.config.active], step))
        return self.with_layer_input(corrected, layer_input)

    def updated(self, x: Tensor, step: Step) -> Tensor:
        """Map the active stream ``[T, D]`` as an ordinary layer does."""
        normed = self.mixer_norm(x)
        attended = x + self.mixer_out_norm(self.mixer(normed, step))
        x = (attended + self.laurel(normed)) * 0.5**0.5
        updated: Tensor = x + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x)))
        return updated

    def with_layer_input(self, corrected: Tensor, layer_input: Tensor) -> Tensor:
        """Add to all streams but the first what the active one makes of the layer's input."""
        assert self.per_layer is not None
        active = corrected[:, self.altup.config.active]
        gated = active if self.correction_scale is None else active * self.correction_scale
        update = self.per_layer(gated, layer_input)
        return torch.cat([corrected[:, :1], corrected[:, 1:] + update[:, None]], dim=1)


class Gemma3nDecoder(GemmaDecoder):
    """Gemma 3n."""

    def __init__(
        self,
        config: GemmaConfig,
        altup: AltUpConfig,
        layers: Sequence[AltUpLayer],
        *,
        context_length: int,
        weights: WeightFormat,
    ) -> None:
        super().__init__(config, layers, (), context_length=context_length, weights=weights)
        self.streams = Streams("streams", altup, weights)

    def hidden(self, step: Step) -> Tensor:
        """See `Decoder`; the one hidden state made of all streams."""
        embedded = self.embedded(step)
        x = self.streams.split(embedded)
        for layer, layer_input in zip(self.layers, self.layer_inputs(embedded, step), strict=True):
            x = layer(x, layer_input, step)
        return self.streams.join(x)
