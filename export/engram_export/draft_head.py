"""A head that drafts the token after the next (NextN, "MTP"): one more layer on the model's last hidden states.

At position t, with h the hidden state after the model's final norm and x the tokens:
    z = W [norm(embedding(x[t + 1])); norm(h[t])]
    g = norm(layer(z))                                  a layer like the model's, with a cache of its own, at position t
    logits = head(g), for the ids of the draft vocabulary alone

The most likely one is a draft of x[t + 2]. Fed back with g in place of h[t + 1], it leads to one of x[t + 3].
Embedding, head and rotary tables are the model's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram_export.decoder import Rotation, Step, state_specs_of
from engram_export.draft_source import DraftConfig
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import Layer, TextConfig
from engram_runtime.manifest import StateSpec


class DraftLayer(nn.Module):
    """What a head has of its own; ``vocabulary [n]`` are the ids it tells apart."""

    def __init__(self, draft: DraftConfig, hidden_size: int, layer: Layer, weights: WeightFormat) -> None:
        super().__init__()
        self.embedding_norm = RmsNorm(hidden_size, draft.norm_eps)
        self.hidden_norm = RmsNorm(hidden_size, draft.norm_eps)
        self.fc = weights.make_linear("mtp.fc", 2 * hidden_size, hidden_size)
        self.layers = nn.ModuleList([layer])
        self.norm = RmsNorm(hidden_size, draft.norm_eps)
        self.vocabulary = nn.Parameter(torch.empty(draft.vocabulary_size, dtype=torch.int64), requires_grad=False)

    def forward(self, embedded: Tensor, hidden: Tensor, step: Step) -> Tensor:
        """Map embeddings ``[T, D]`` of the next tokens and hidden states ``[T, D]`` to those of the tokens after."""
        x = self.fc(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        for layer in self.layers:
            x = layer(x, step)
        normed: Tensor = self.norm(x)
        return normed


class DraftHead(nn.Module):
    """The head with the parts of the model it shares, under the names they have there."""

    def __init__(
        self,
        config: TextConfig,
        layer: DraftLayer,
        rope: RotaryEmbedding,
        *,
        context_length: int,
        weights: WeightFormat,
    ) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.rotations = nn.ModuleDict({"full": Rotation(rope, context_length)})
        self.embedding = weights.make_embedding("embedding", config.vocab_size, config.hidden_size)
        self.lm_head = None if config.tied else weights.make_linear("lm_head", config.hidden_size, config.vocab_size)
        self.mtp = layer

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Return the states in the order `forward` takes them."""
        return state_specs_of(self)

    def forward(
        self, token_ids: Tensor, position: Tensor, logit_rows: Tensor, hidden: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run T positions after ``position [1]`` earlier ones.

        Args:
            token_ids: ``[T]`` int64, the token after each position.
            logit_rows: ``[R]`` int64, which of the T positions get logits.
            hidden: ``[T, D]`` of each position, the model's or what this returned for the position before.
            states: in the order of `state_specs`.

        Returns:
            ``[R, n]`` logits of the draft vocabulary, hidden states ``[T, D]`` to go on with, and the next states.
        """
        rotation = self.rotations["full"]
        specs = self.state_specs()
        step = Step(
            token_ids=token_ids,
            position=position,
            rows={},
            states={spec.name: state for spec, state in zip(specs, states, strict=True)},
            rotations={"full": (rotation.cos, rotation.sin)},  # type: ignore[dict-item]
        )
        following = self.mtp(self.embedding(token_ids), hidden, step)
        head: Any = self.embedding if self.lm_head is None else self.lm_head  # either can be restricted
        logits = head.restricted(following.index_select(0, logit_rows), self.mtp.vocabulary)
        return logits, following, *(step.states[spec.name] for spec in specs)
