"""A draft head in the NextN form: one block that predicts the token after next, chained by its own output.

Source of the form: DeepSeek-V3 (arXiv 2412.19437, section 2.2); names as Qwen3-Next's ``mtp.*``.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.retrofit.generation import projections

MAX_STEPS = 3


@dataclass(slots=True)
class Chain:
    """What the steps of a chain attend to.

    `keys`, `values`: one pair for every step, [batch, key_value_heads, tokens, dim]; the first is that of the true
    hidden states, which queries see up to their own root, the others are seen by their own root alone.
    """

    keys: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the head shares with its model: embedding, rotary positions and the output rows of the draft vocabulary."""

    model: Any
    rows: Tensor

    @classmethod
    def of(cls, model: Any, draft_vocab: Tensor, dtype: torch.dtype) -> "Frozen":
        """Take the rows of the output layer that the draft vocabulary names, in the given type."""
        return cls(model, model.lm_head.weight.detach()[draft_vocab.long()].to(dtype))

    def rotary(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of `count` positions, [1, count, head_dim], float32."""
        positions = torch.arange(start, start + count)[None]
        cosine, sine = self.model.model.rotary_emb(torch.zeros(1), positions)
        return cosine, sine


class DraftHead(nn.Module):
    """Head of a model; embedding, rotary positions and the tied output rows stay the model's.

    draft_vocab: ids of the rows of the output layer that the head chooses from, ascending.
    """

    draft_vocab: Tensor

    def __init__(self, model: Any, draft_vocab: Tensor) -> None:
        super().__init__()
        decoder, width = model.model, model.config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([copy.deepcopy(decoder.layers[-1])])
        self.norm = copy.deepcopy(decoder.norm)
        self.pre_fc_norm_embedding = copy.deepcopy(decoder.norm)
        self.pre_fc_norm_hidden = copy.deepcopy(decoder.norm)
        for norm in (self.pre_fc_norm_embedding, self.pre_fc_norm_hidden):
            nn.init.ones_(norm.weight)
        self.requires_grad_(True)
        self.register_buffer("draft_vocab", draft_vocab.to(torch.int32))

    def fused(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Join the embedding of the newest token and the state before it, both [batch, tokens, hidden_size]."""
        normed = torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), dim=-1)
        joined: Tensor = self.fc(normed)
        return joined

    def forward(self, embedding: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        """Return the next states, [batch, tokens, hidden_size], after the head's norm: one step for every root at once.

        embedding: of the token after `hidden`'s. rotary: of the positions of `hidden`. chain: of the steps before,
        extended in place.
        """
        layer: Any = self.layers[0]
        x = self.fused(embedding, hidden)
        x = x + self._attend(layer.input_layernorm(x), rotary, chain)
        states: Tensor = self.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
        return states

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], chain: Chain) -> Tensor:
        attention: Any = self.layers[0].self_attn
        query, key, value = projections(attention, x, rotary)
        groups = query.shape[1] // key.shape[1]
        chain.keys.append(key.repeat_interleave(groups, 1))
        chain.values.append(value.repeat_interleave(groups, 1))
        mixed = _chain_attention(query, chain, attention.scaling)
        projected: Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return projected


def _chain_attention(query: Tensor, chain: Chain, scale: float) -> Tensor:
    first, *own = chain.keys
    if not own:
        return F.scaled_dot_product_attention(query, first, chain.values[0], is_causal=True, scale=scale)
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shared = (query @ first.transpose(-1, -2)).masked_fill(future, float("-inf"))
    scores = torch.cat([shared, *[(query * key).sum(-1, keepdim=True) for key in own]], dim=-1)
    weights = torch.softmax(scores.float() * scale, dim=-1).to(query.dtype)
    mixed = weights[..., :length] @ chain.values[0]
    for step, value in enumerate(chain.values[1:]):
        mixed = mixed + weights[..., length + step, None] * value
    return mixed
