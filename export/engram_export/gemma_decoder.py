"""Gemma 4's decoder, and what Gemma 3n shares with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.decoder import Decoder, Step
from engram_export.engram_site import EngramSite
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm
from engram_export.per_layer_inputs import PerLayerConfig, PerLayerGate, PerLayerInputs
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import TextConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """A decoder apart from its layers.

    Attributes:
        logit_softcap: logits become ``cap * tanh(logit / cap)``; None leaves them.
        per_layer: of the per-layer embeddings, or None where there are none.
    """

    text: TextConfig
    logit_softcap: float | None
    per_layer: PerLayerConfig | None
    rotations: Mapping[str, RotaryEmbedding]


class GeluMlp(nn.Module):
    """GeGLU, its gate perhaps sparse.

    With ``cutoff`` c a gate becomes how far it is above mean + c * deviation of its token's gates, or 0.
    """

    def __init__(
        self, name: str, hidden_size: int, intermediate_size: int, weights: WeightFormat, cutoff: float | None = None
    ) -> None:
        super().__init__()
        self.gate_up = weights.make_linear(f"{name}.gate_up", hidden_size, 2 * intermediate_size)
        self.down = weights.make_linear(f"{name}.down", intermediate_size, hidden_size)
        self.cutoff = cutoff

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.cutoff is not None:
            gate = above_cutoff(gate, self.cutoff)
        down: Tensor = self.down(functional.gelu(gate, approximate="tanh") * up)
        return down


def above_cutoff(x: Tensor, cutoff: float) -> Tensor:
    """Return ``relu(x - mean - cutoff * deviation)`` over the last axis."""
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = torch.sqrt((centred * centred).mean(dim=-1, keepdim=True))
    return functional.relu(centred - cutoff * deviation)


class GemmaLayer(nn.Module):
    """Attention, feed-forward and per-layer input, each normed before it is added to the stream."""

    def __init__(
        self, text: TextConfig, mixer: nn.Module, feed_forward: nn.Module, per_layer: nn.Module | None
    ) -> None:
        super().__init__()
        self.mixer_norm = RmsNorm(text.hidden_size, text.rms_norm_eps)
        self.mixer = mixer
        self.mixer_out_norm = RmsNorm(text.hidden_size, text.rms_norm_eps)
        self.feed_forward_norm = RmsNorm(text.hidden_size, text.rms_norm_eps)
        self.feed_forward = feed_forward
        self.feed_forward_out_norm = RmsNorm(text.hidden_size, text.rms_norm_eps)
        self.per_layer = per_layer


class ScaledLayer(GemmaLayer):
    """Gemma 4's layer, its result multiplied by a number of its own."""

    def __init__(
        self, text: TextConfig, mixer: nn.Module, feed_forward: nn.Module, per_layer: PerLayerGate | None
    ) -> None:
        super().__init__(text, mixer, feed_forward, per_layer)
        self.scale = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, layer_input: Tensor | None, step: Step) -> Tensor:
        """Map the stream ``[T, D]`` to the next layer's; ``layer_input [T, width]``."""
        x = x + self.mixer_out_norm(self.mixer(self.mixer_norm(x), step))
        x = x + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x)))
        if self.per_layer is not None:
            x = x + self.per_layer(x, layer_input)
        return x * self.scale


class GemmaDecoder(Decoder):
    """Gemma 4: scaled embedding, layers on one stream, norm, head, softcap."""

    def __init__(
        self,
        config: GemmaConfig,
        layers: Sequence[GemmaLayer],
        sites: Sequence[EngramSite],
        *,
        context_length: int,
        weights: WeightFormat,
    ) -> None:
        super().__init__(context_length, config.rotations)
        text = config.text
        self.config = config
        self.embedding = weights.make_embedding("embedding", text.vocab_size, text.hidden_size)
        self.per_layer = None if config.per_layer is None else PerLayerInputs("per_layer", config.per_layer, weights)
        self.layers = nn.ModuleList(layers)
        self.sites = nn.ModuleDict({str(site.config.layer_id): site for site in sites})
        self.norm = RmsNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = None if text.tied else weights.make_linear("lm_head", text.hidden_size, text.vocab_size)

    def hidden(self, step: Step) -> Tensor:
        """See `Decoder`."""
        x = self.embedded(step)
        inputs = self.layer_inputs(x, step)
        for index, (layer, layer_input) in enumerate(zip(self.layers, inputs, strict=True)):
            if str(index) in self.sites:
                x = self.sites[str(index)](x, step)
            x = layer(x, layer_input, step)
        return x

    def embedded(self, step: Step) -> Tensor:
        """Return the scaled embeddings ``[T, D]``."""
        scaled: Tensor = self.embedding(step.token_ids) * self.config.text.hidden_size**0.5
        return scaled

    def layer_inputs(self, embedded: Tensor, step: Step) -> Sequence[Tensor | None]:
        """Return each layer's input ``[T, width]``."""
        if self.per_layer is None:
            return [None] * len(self.layers)
        inputs: Tensor = self.per_layer(embedded, step)
        return [inputs[:, layer] for layer in range(len(self.layers))]

    def normed(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        normed: Tensor = self.norm(hidden)
        return normed

    def head(self, normed: Tensor) -> Tensor:
        """See `Decoder`."""
        logits: Tensor = self.embedding.logits(normed) if self.lm_head is None else self.lm_head(normed)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
