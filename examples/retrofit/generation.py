"""Greedy text of a model, many prompts at a time, with the hidden states that a draft head is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CACHE_STEP = 32


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model says to a prompt.

    hidden: [prompt + generated - 1, hidden_size], after the final norm, one row for every token but the last.
    """

    prompt_ids: list[int]
    generated_ids: list[int]
    hidden: Tensor


class KeyValueCache:
    """Keys and values of every layer, [layers, batch, key_value_heads, capacity, head_dim], filled from the left.

    starts: int64 [batch], the slot of the first token of every sequence; the slots before it are padding. The capacity
    grows in steps and attention reads all of it: a slice of the filled part would be copied by every product.
    """

    def __init__(self, model: Any, starts: Tensor) -> None:
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, len(starts), config.num_key_value_heads, 0, head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype)
        self.values = torch.zeros(shape, dtype=model.dtype)
        self.starts = starts
        self.length = 0

    def make_room(self, tokens: int) -> None:
        """Grow, where needed, to hold `tokens` more."""
        missing = self.length + tokens - self.keys.shape[3]
        if missing > 0:
            grow = (0, 0, 0, -(-missing // CACHE_STEP) * CACHE_STEP)
            self.keys, self.values = F.pad(self.keys, grow), F.pad(self.values, grow)

    def hidden_slots(self, tokens: int) -> Tensor:
        """Return what the next `tokens` must not see, [batch, tokens, capacity].

        Padding sees itself: a row that sees nothing would be NaN and spread.
        """
        slots = torch.arange(self.keys.shape[3])
        own = torch.arange(self.length, self.length + tokens)[:, None]
        return (slots > own) | ((slots < self.starts[:, None, None]) & (slots != own))

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences that are not in `rows`."""
        self.keys, self.values, self.starts = self.keys[:, rows], self.values[:, rows], self.starts[rows]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions in the half-split form. x [batch, heads, tokens, dim]; cosine, sine [.., tokens, dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cosine.unsqueeze(1) + turned * sine.unsqueeze(1)


def projections(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of x [batch, tokens, hidden_size], each [batch, heads, tokens, head_dim], rotated."""
    shape = (*x.shape[:2], -1, attention.head_dim)
    query, key = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
    value = attention.v_proj(x).view(shape).transpose(1, 2)
    if hasattr(attention, "q_norm"):  # qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    return rotate(query.transpose(1, 2), *rotary), rotate(key.transpose(1, 2), *rotary), value


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """Attend with several query heads to each key head.

    query [batch, heads, tokens, dim]; keys, values [batch, key_value_heads, capacity, dim]; unseen bool
    [batch, tokens, capacity]; returns the query's shape.
    """
    batch, heads, tokens, dim = query.shape
    groups = heads // keys.shape[1]
    folded = query.reshape(batch, keys.shape[1], groups * tokens, dim)
    scores = folded @ keys.transpose(-1, -2) * scale
    scores.masked_fill_(unseen.repeat(1, groups, 1).unsqueeze(1), float("-inf"))
    return (torch.softmax(scores, dim=-1) @ values).view(query.shape)


def forward(model: Any, ids: Tensor, cache: KeyValueCache) -> Tensor:
    """Run tokens [batch, tokens] after what the cache holds; returns the hidden states after the final norm."""
    tokens = ids.shape[1]
    here = slice(cache.length, cache.length + tokens)
    cache.make_room(tokens)
    unseen = cache.hidden_slots(tokens)
    x = model.model.embed_tokens(ids)
    positions = (torch.arange(here.start, here.stop) - cache.starts[:, None]).clamp_min(0)
    rotary = model.model.rotary_emb(x, positions)
    for layer, keys, values in zip(model.model.layers, cache.keys, cache.values, strict=True):
        attention = layer.self_attn
        query, keys[:, :, here], values[:, :, here] = projections(attention, layer.input_layernorm(x), rotary)
        mixed = grouped_attention(query, keys, values, unseen, attention.scaling)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    cache.length += tokens
    states: Tensor = model.model.norm(x)
    return states


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], limit: int, end_id: int) -> list[Continuation]:
    """Continue prompts greedily, each to its first `end_id` or `limit` tokens; prompts of like length waste least."""
    width = max(len(prompt) for prompt in prompts)
    starts = torch.tensor([width - len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), width + limit, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) : width] = torch.tensor(prompt)
    hidden = torch.zeros(len(prompts), width + limit - 1, model.config.hidden_size, dtype=model.dtype)
    ends = _continue(model, tokens, hidden, starts, width, end_id)
    return [
        Continuation(row[start:width].tolist(), row[width:end].tolist(), states[start : end - 1].clone())
        for row, start, end, states in zip(tokens, starts.tolist(), ends.tolist(), hidden, strict=True)
    ]


def _continue(model: Any, tokens: Tensor, hidden: Tensor, starts: Tensor, width: int, end_id: int) -> Tensor:
    """Fill `tokens` and `hidden` in place; returns where each sequence ends."""
    total = tokens.shape[1]
    ends, rows = torch.full((len(tokens),), total), torch.arange(len(tokens))
    cache = KeyValueCache(model, starts)
    while len(rows) and cache.length < total - 1:
        start = cache.length
        states = forward(model, tokens[rows, start : max(width, start + 1)], cache)
        hidden[rows, start : cache.length] = states
        chosen = model.lm_head(states[:, -1]).float().argmax(-1)
        tokens[rows, cache.length] = chosen
        ended = rows[chosen == end_id]
        ends[ended] = ends[ended].clamp(max=cache.length + 1)
        running = ends[rows] == total
        if int(running.sum()) <= len(rows) * 7 // 8:  # dropping a row copies the cache: not for each single one
            cache.keep(running.nonzero()[:, 0])
            rows = rows[running]
    return ends
