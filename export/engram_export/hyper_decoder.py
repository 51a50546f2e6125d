"""A decoder around several residual streams joined by hyper-connections, as Qwen4-Exp has it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engram_export.decoder import Decoder, Step
from engram_export.formats import WeightFormat
from engram_export.hyper_connection import HyperConnection, StreamMixer, StreamsConfig
from engram_export.ngram_site import NgramSite
from engram_export.rope import RotaryEmbedding
from engram_export.stream_operators import post_mix
from engram_export.text_decoder import TextConfig


class HyperLayer(nn.Module):
    """An n-gram site where the layer has one, a mixer and a feed-forward, each behind a hyper-connection."""

    def __init__(
        self,
        name: str,
        streams: StreamsConfig,
        mixer: nn.Module,
        feed_forward: nn.Module,
        site: NgramSite | None,
        weights: WeightFormat,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.site = site
        self.mixer_connection = HyperConnection(f"{name}.mixer_connection", streams, weights)
        self.mixer = mixer
        self.feed_forward_connection = HyperConnection(f"{name}.feed_forward_connection", streams, weights)
        self.feed_forward = feed_forward

    def forward(self, streams: Tensor, step: Step) -> Tensor:
        """Map the streams ``[T, G * D]`` to the next layer's."""
        if self.site is not None:
            streams = self.site(streams, step)
        mixed, inject = self.mixer_connection.open(streams)
        streams = post_mix(streams, self.mixer(mixed, step), inject, branches=self.streams.streams)
        mixed, inject = self.feed_forward_connection.open(streams)
        return post_mix(streams, self.feed_forward(mixed), inject, branches=self.streams.streams)


class HyperDecoder(Decoder):
    """The decoder; the embedding starts every stream, a last mixer joins them before the head."""

    def __init__(
        self,
        config: TextConfig,
        streams: StreamsConfig,
        layers: Sequence[HyperLayer],
        *,
        context_length: int,
        rotations: Mapping[str, RotaryEmbedding],
        weights: WeightFormat,
    ) -> None:
        super().__init__(context_length, rotations)
        self.streams = streams
        self.embedding = weights.make_embedding("embedding", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.mixer = StreamMixer("mixer", streams, weights)
        self.lm_head = None if config.tied else weights.make_linear("lm_head", config.hidden_size, config.vocab_size)

    def hidden(self, step: Step) -> Tensor:
        """Return the last streams ``[T, G * D]``."""
        streams = torch.cat([self.embedding(step.token_ids)] * self.streams.streams, dim=-1)
        for layer in self.layers:
            streams = layer(streams, step)
        return streams

    def normed(self, hidden: Tensor) -> Tensor:
        """See `Decoder`; ``hidden [R, G * D]``."""
        mixed: Tensor = self.mixer(hidden)
        return mixed

    def head(self, normed: Tensor) -> Tensor:
        """See `Decoder`."""
        logits: Tensor = self.embedding.logits(normed) if self.lm_head is None else self.lm_head(normed)
        return logits
