"""The Engram site as it is trained: projections and gate as modules, rows of the table updated one by one."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.keyers import NgramKeyer

QUERY_EPS, KEY_EPS, ROOT_FLOOR = 1e-5, 1e-6, 1e-6
ROW_DIM = 32
INITIAL_STD = 1e-3
QUERY_GAIN = 4.0  # with 1 the angles that tell questions apart would move the gate between 0.04 and 0.35 at most


def make_keyer(
    token_map: NDArray[np.int32],
    *,
    block: int,
    orders: tuple[int, ...],
    heads: int,
    rows_per_head: int,
    pad_id: int,
    seed: int,
) -> NgramKeyer:
    """Return the paper's hash for one site.

    Args:
        token_map: ``[V]`` raw id -> compressed id.
        pad_id: raw id that stands for tokens before the first.
    """
    (primes,) = derive_primes(layers=1, rows_per_head=[rows_per_head] * len(orders), num_heads=heads)
    vocab_size = int(token_map.max()) + 1
    no_ids = np.empty(0, dtype=np.int64)
    return NgramKeyer(
        orders=orders,
        num_heads=heads,
        multipliers=derive_multipliers(vocab_size=vocab_size, max_order=max(orders), layer_id=block, seed=seed),
        primes=primes,
        offsets=column_offsets(primes),
        pad_id=int(token_map[pad_id]),
        barrier_ids=no_ids,
        silent_ids=no_ids,
        token_map=token_map.astype(np.int64),
    )


class TrainableSite(nn.Module):
    """Projections and gate in float32; equations of `engram_export.engram_site.EngramSite`.

    Attributes:
        output_scale: what the update is multiplied with: the size of the residual stream where it is added.
    """

    def __init__(self, *, hidden_size: int, width: int, output_scale: float, gate_bias: float = 0.0) -> None:
        """Draw projections ``[hidden_size, width]``; ``width`` is C * d, the values of all rows of a token."""
        super().__init__()
        self.key_proj = nn.Parameter(torch.randn(hidden_size, width) / math.sqrt(width))
        self.value_proj = nn.Parameter(torch.randn(hidden_size, width) / math.sqrt(width))
        self.query_norm = nn.Parameter(torch.full((hidden_size,), QUERY_GAIN))
        self.gate_bias = nn.Parameter(torch.tensor([gate_bias]))
        self.output_scale = output_scale

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Return the update ``[..., D]`` float32 of the stream ``[..., D]``, from the rows ``[..., C * d]``."""
        query = functional.rms_norm(hidden.float(), self.query_norm.shape, self.query_norm, QUERY_EPS)
        key = functional.rms_norm(functional.linear(embedding, self.key_proj), self.query_norm.shape, None, KEY_EPS)
        score = (query * key).sum(-1, keepdim=True) / math.sqrt(key.shape[-1])
        root = score.sign() * score.abs().clamp_min(ROOT_FLOOR).sqrt()
        gate = torch.sigmoid(root + self.gate_bias)
        return self.output_scale * gate * functional.linear(embedding, self.value_proj)


class RowTable:
    """Rows ``[N, d]`` float32 with Adam's moments; a step costs what the rows of a batch cost, not the table.

    Moments of rows outside a batch stand still, as those of `torch.optim.SparseAdam` do.
    """

    BETAS, EPS = (0.9, 0.99), 1e-8

    def __init__(self, num_rows: int, row_dim: int = ROW_DIM, *, seed: int) -> None:
        """Draw rows near zero: a token that reads rows never trained then gets next to nothing."""
        self.values = torch.randn(num_rows, row_dim, generator=torch.Generator().manual_seed(seed)) * INITIAL_STD
        self.first = torch.zeros_like(self.values)
        self.second = torch.zeros_like(self.values)
        self.steps = 0

    def gather(self, row_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the distinct ids ``[U]``, their rows as a leaf ``[U, d]``, and the embedding ``[..., C * d]``.

        Args:
            row_ids: ``[..., C]`` int64.
        """
        distinct, places = torch.unique(row_ids, return_inverse=True)
        rows = self.values[distinct].requires_grad_()
        return distinct, rows, functional.embedding(places, rows).flatten(-2)

    @torch.no_grad()
    def step(self, row_ids: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Update the rows of distinct ids ``[U]`` with their gradient ``[U, d]``."""
        self.steps += 1
        beta1, beta2 = self.BETAS
        first = self.first[row_ids].lerp_(gradient, 1 - beta1)
        second = self.second[row_ids].lerp_(gradient.square(), 1 - beta2)
        self.first[row_ids], self.second[row_ids] = first, second
        size = (second / (1 - beta2**self.steps)).sqrt_().add_(self.EPS)
        self.values[row_ids] -= learning_rate / (1 - beta1**self.steps) * first / size
