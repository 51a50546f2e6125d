"""A small decoder with routed experts in every block and, where its division has a table, one Engram site."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.allocation.experts import MATMUL_DTYPE, Experts
from examples.allocation.sizes import Division, Sizes

ROPE_BASE = 10_000.0
EMBEDDING_STD = 0.02
ROW_STD = 0.01
LEAST_SCORE = 1e-6  # of the gate, below which the signed root has no use for a gradient


class Dense(nn.Module):
    """A SwiGLU that every token takes."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[..., D]``."""
        gate, up = self.gate_up(hidden).chunk(2, -1)
        output: Tensor = self.down(functional.silu(gate) * up)
        return output


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``[B, T, D]``; ``rotation`` holds the cosines and sines, ``[T, head_dim]``."""
        batch, tokens, width = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, rotation), rotate(key, rotation), value, is_causal=True
        )
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return output


class Site(nn.Module):
    """The Engram site of arXiv 2601.07372 without convolution: rows, gated by how well they fit the residual."""

    def __init__(self, rows: int, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, sizes.row_dim, sparse=True)
        self.key = nn.Linear(sizes.memory_dim, sizes.hidden, bias=False)
        self.value = nn.Linear(sizes.memory_dim, sizes.hidden, bias=False)
        self.key_norm = nn.RMSNorm(sizes.hidden)
        self.query_norm = nn.RMSNorm(sizes.hidden)
        nn.init.normal_(self.table.weight, std=ROW_STD)

    def forward(self, hidden: Tensor, row_ids: Tensor) -> Tensor:
        """Return what is added to the residual, ``[B, T, D]``; ``row_ids`` are ``[B, T, C]``."""
        rows = self.table(row_ids).flatten(-2)
        score = (self.key_norm(self.key(rows)) * self.query_norm(hidden)).sum(-1, keepdim=True)
        score = score / math.sqrt(hidden.shape[-1])
        gate = torch.sigmoid(score.sign() * score.abs().clamp_min(LEAST_SCORE).sqrt())
        output: Tensor = gate * self.value(rows)
        return output


class Block(nn.Module):
    """Attention, then experts and perhaps a dense MLP beside them."""

    def __init__(self, division: Division, dense_hidden: int) -> None:
        super().__init__()
        sizes = division.sizes
        self.attention_norm, self.mlp_norm = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.attention = Attention(sizes.hidden, sizes.heads)
        self.experts = Experts(sizes.hidden, sizes.expert_hidden, division.experts, sizes.active_experts)
        self.dense = Dense(sizes.hidden, dense_hidden) if dense_hidden > 0 else None

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``[B, T, D]`` and the balance loss of the router."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation)
        normed = self.mlp_norm(hidden)
        mixed, balance = self.experts(normed.flatten(0, 1))
        if self.dense is not None:
            hidden = hidden + self.dense(normed)
        return hidden + mixed.view_as(hidden), balance


class Decoder(nn.Module):
    """The model of one division; the output layer is the embedding."""

    def __init__(self, division: Division) -> None:
        super().__init__()
        sizes = division.sizes
        self.site_block, self.head_dim = sizes.site_block, sizes.hidden // sizes.heads
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.hidden)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        widths = [division.dense_hidden if index == sizes.site_block else 0 for index in range(sizes.blocks)]
        self.blocks = nn.ModuleList(Block(division, width) for width in widths)
        self.site = Site(int(division.primes.sum()), sizes) if division.has_table else None
        self.norm = nn.RMSNorm(sizes.hidden)

    def forward(self, token_ids: Tensor, row_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual after the last norm and the mean balance loss of the routers.

        Args:
            token_ids: ``[B, T]``.
            row_ids: ``[B, T, C]``, None for a model without a table.

        Returns:
            ``[B, T, D]``, to be multiplied by the embedding, and a scalar.
        """
        rotation = rotary(token_ids.shape[1], self.head_dim)
        hidden, balances = self.embedding(token_ids), []
        for index, block in enumerate(self.blocks):
            if self.site is not None and index == self.site_block:
                hidden = hidden + self.site(hidden, row_ids)
            hidden, balance = block(hidden, rotation)
            balances.append(balance)
        return self.norm(hidden), torch.stack(balances).mean()

    def training_loss(self, token_ids: Tensor, row_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy in nats of the tokens after the first, and the balance loss."""
        hidden, balance = self(token_ids[:, :-1], None if row_ids is None else row_ids[:, :-1])
        losses = functional.linear_cross_entropy(
            hidden.flatten(0, 1).to(MATMUL_DTYPE),
            self.embedding.weight.to(MATMUL_DTYPE),
            token_ids[:, 1:].flatten(),
            reduction="none",
        )
        return losses.float().mean(), balance


def rotary(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary positions, each ``[T, head_dim]``."""
    rates = ROPE_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = (torch.arange(tokens)[:, None] * rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys ``[..., T, head_dim]`` turned by their positions (arXiv 2104.09864)."""
    cosine, sine = rotation
    first, second = states.chunk(2, -1)
    return states * cosine + torch.cat([-second, first], -1) * sine
