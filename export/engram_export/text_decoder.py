"""A decoder around one residual stream: embedding, layers of a mixer and a feed-forward, norm, head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.decoder import Decoder, Step
from engram_export.engram_site import EngramSite
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm
from engram_export.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """What decoders of all families have; ``tied`` means that the embedding is the head."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_positions: int
    tied: bool


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, name: str, hidden_size: int, intermediate_size: int, weights: WeightFormat) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up = weights.make_linear(f"{name}.gate_up", hidden_size, 2 * intermediate_size)
        self.down = weights.make_linear(f"{name}.down", intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        down: Tensor = self.down(functional.silu(gate) * up)
        return down


class Layer(nn.Module):
    """A mixer over positions and a feed-forward, both with a norm before and added to the stream."""

    def __init__(self, config: TextConfig, mixer: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the stream ``[T, D]`` to the next layer's."""
        x = x + self.mixer(self.mixer_norm(x), step)
        updated: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return updated


class TextDecoder(Decoder):
    """The decoder, its Engram sites before the layers they belong to."""

    def __init__(
        self,
        config: TextConfig,
        layers: Sequence[Layer],
        sites: Sequence[EngramSite],
        *,
        context_length: int,
        rotations: Mapping[str, RotaryEmbedding],
        weights: WeightFormat,
    ) -> None:
        super().__init__(context_length, rotations)
        self.embedding = weights.make_embedding("embedding", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.sites = nn.ModuleDict({str(site.config.layer_id): site for site in sites})
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tied else weights.make_linear("lm_head", config.hidden_size, config.vocab_size)

    def hidden(self, step: Step) -> Tensor:
        """See `Decoder`."""
        x = self._embedded(step)
        for index, layer in enumerate(self.layers):
            if str(index) in self.sites:
                x = self.sites[str(index)](x, step)
            x = layer(x, step)
        return x

    def _embedded(self, step: Step) -> Tensor:
        """Return the input embeddings ``[T, D]``."""
        embedded: Tensor
        if step.embeddings is None:
            embedded = self.embedding(step.token_ids)
            return embedded
        given = step.token_ids < 0
        embedded = self.embedding(torch.where(given, 0, step.token_ids))
        return torch.where(given.unsqueeze(-1), step.embeddings, embedded)

    def normed(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        normed: Tensor = self.norm(hidden)
        return normed

    def head(self, normed: Tensor) -> Tensor:
        """See `Decoder`."""
        logits: Tensor = self.embedding.logits(normed) if self.lm_head is None else self.lm_head(normed)
        return logits
