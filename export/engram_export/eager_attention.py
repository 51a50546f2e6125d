"""Attention over caches in plain torch, for `attention_operators`.

A cache is ``[1, H, S, hd]``; only the rows up to the last of ``positions [T]`` are read.
"""

import torch
from torch import Tensor
from torch.nn import functional


def positions_of(new: Tensor, position: Tensor) -> Tensor:
    """Return the positions ``[T]`` of ``new [T, ...]``."""
    return torch.arange(new.shape[0]) + position


def split_heads(joined: Tensor, head_dim: int) -> Tensor:
    """Split ``[T, H * hd]`` to ``[H, T, hd]``."""
    return joined.view(joined.shape[0], -1, head_dim).transpose(0, 1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of ``[H, T, hd]`` by ``[T, rotary_dim / 2]`` angles, the half-split way of Llama."""
    half = cos.shape[-1]
    first, second, rest = torch.split(heads, [half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def append(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries ``[H, T, hd]`` and the caches with the rotated keys and the values."""
    _, kv_heads, _, head_dim = key_cache.shape
    query, key, value = torch.split(split_heads(qkv, head_dim), [num_heads, kv_heads, kv_heads])
    query, key = (rotate(part, cos[positions], sin[positions]) for part in (query, key))
    return query, key_cache.index_copy(2, positions, key[None]), value_cache.index_copy(2, positions, value[None])


def visible(positions: Tensor, window: int | None) -> Tensor:
    """Return which of the cached tokens each query may see, bool ``[T, position + T]``."""
    distance = positions[:, None] - torch.arange(int(positions[-1]) + 1)
    return (distance >= 0) & (distance < (window or len(distance[0])))


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attend with ``[H, T, hd]`` over cache rows where ``visible [T, L]``; return ``[T, H * hd]``."""
    group = query.shape[0] // keys.shape[1]
    keys, values = (cache[0, :, : visible.shape[1]].repeat_interleave(group, dim=0) for cache in (keys, values))
    scores = query @ keys.transpose(1, 2) * scale  # [H, T, L]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def extend_index(
    index_cache: Tensor,
    index_key: Tensor,
    gain: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    block: int,
    eps: float,
) -> Tensor:
    """Append raw index keys ``[T, hi]`` and put the keys of the blocks they complete into those blocks' last rows."""
    rows = index_cache[0, 0].index_copy(0, positions, index_key)
    first, end = int(positions[0]) // block, (int(positions[-1]) + 1) // block
    starts = torch.arange(first, end) * block
    means = rows[first * block : end * block].reshape(end - first, block, rows.shape[1]).mean(dim=1)
    block_keys = rotate(functional.rms_norm(means, gain.shape, gain, eps), cos[starts], sin[starts])
    return rows.index_copy(0, starts + block - 1, block_keys)[None, None]


def selected(index_query: Tensor, index: Tensor, positions: Tensor, count: int, block: int) -> Tensor:
    """Return which cached tokens are in a query's ``count`` best blocks or after them, bool ``[T, position + T]``."""
    total = int(positions[-1]) + 1
    block_keys = index[0, 0, block - 1 : total : block]
    scores = functional.relu(index_query @ block_keys.T).sum(dim=0)  # [T, blocks]
    unfinished = torch.arange(len(block_keys)) >= (positions[:, None] + 1) // block
    scores = scores.masked_fill(unfinished, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = functional.pad(unfinished.scatter(1, best, True), (0, 1), value=True)
    return chosen[:, torch.arange(total) // block]
