"""Attention over caches with two faces: plain torch when run, one ONNX node when exported.

`group_query_attention` is onnxruntime's operator of that name; the others are nodes of the domain ``engram``, which
`onnx_functions` spells out in operators onnxruntime has. Caches are float32 ``[1, Hkv, S, hd]``; row p belongs to
position p, rows from ``position + T`` on are never read.

Rotation tables are ``[S, rotary_dim / 2]``: the first ``rotary_dim`` dimensions of a head are rotated, the halves of
them as real and imaginary part. onnxruntime wants ``hd`` and ``rotary_dim`` to be multiples of 16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engram_export import eager_attention as eager
from engram_export.onnx_functions import DOMAIN

Attributes = dict[str, Any]  # of an ONNX node: whole numbers and floats


def group_query_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate, append to the cache and attend causally.

    Args:
        qkv: ``[T, (H + 2 * Hkv) * hd]`` queries, keys, values before rotation.
        key_cache: ``[1, Hkv, S, hd]``; the first ``position`` entries are filled. ``value_cache`` alike.
        position: ``[1]`` int64.
        cos: ``[S, rotary_dim / 2]``. ``sin`` alike.
        window: tokens a query sees, itself included; None for all before it.

    Returns:
        ``[T, H * hd]`` and the caches with T more entries.
    """
    if torch.compiler.is_exporting():
        total = (position + qkv.shape[0]).to(torch.int32)
        out, keys, values = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (qkv[None], None, None, key_cache, value_cache, total - 1, total.squeeze(0), cos, sin),
            {"do_rotary": 1, **_attributes(key_cache, num_heads, scale, window)},
            dtypes=(qkv.dtype, key_cache.dtype, value_cache.dtype),
            shapes=((1, qkv.shape[0], num_heads * key_cache.shape[-1]), key_cache.shape, value_cache.shape),
            version=1,
        )
        return out.squeeze(0), keys, values
    positions = eager.positions_of(qkv, position)
    query, keys, values = eager.append(qkv, key_cache, value_cache, positions, cos, sin, num_heads)
    return eager.attend(query, keys, values, eager.visible(positions, window), scale), keys, values


def shared_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Rotate queries and attend over the caches another layer has extended by the same T tokens.

    Args:
        query: ``[T, H * hd]`` before rotation.
        keys: ``[1, Hkv, S, hd]`` as `group_query_attention` of that layer returned them. ``values`` alike.

    Returns:
        ``[T, H * hd]``. The other arguments are those of `group_query_attention`.
    """
    if torch.compiler.is_exporting():
        node: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::SharedAttention",
            (query, keys, values, position, cos, sin),
            # A function's attributes have no defaults, so no window is written as onnxruntime's -1.
            {"local_window_size": -1, **_attributes(keys, num_heads, scale, window)},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        return node
    positions = eager.positions_of(query, position)
    rotated = eager.rotate(eager.split_heads(query, keys.shape[-1]), cos[positions], sin[positions])
    return eager.attend(rotated, keys, values, eager.visible(positions, window), scale)


def indexed_attention(
    qkv: Tensor,
    index_qk: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    index_cache: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    scale: float,
    budget: int,
    block: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate, append to the caches and attend causally to the blocks of tokens an indexer scores highest.

    Of the complete blocks a query sees, it attends to the ``budget / block`` with the highest score, the lower one
    of equals, and to the tokens after the last complete block. The score is sum_h relu(index query h . block key); a
    block's key is the mean of its raw index keys, RMS-normed and rotated to the block's first position.

    Args:
        qkv: ``[T, (H + 2 * Hkv) * hd]`` queries, keys, values, normed but not yet rotated.
        index_qk: ``[T, (Hi + 1) * hi]`` index queries and the one index key, neither normed nor rotated.
        query_gain: ``[hi]``, what the normed index query is multiplied by. ``key_gain`` alike for block keys.
        key_cache: ``[1, Hkv, S, hd]``. ``value_cache`` alike.
        index_cache: ``[1, 1, S, hi]``; a row holds the raw index key of its token, the last row of a complete block
            the block's key, which makes the raw one superfluous. Tokens can be forgotten by moving the end.
        position: ``[1]`` int64.
        cos: ``[S, rotary_dim / 2]``, of queries, keys, index queries and block keys. ``sin`` alike.
        budget: tokens of complete blocks, a multiple of ``block``.
        eps: of both norms of the indexer.

    Returns:
        ``[T, H * hd]`` and the three caches with T more entries.

    Reference: transformers ``Qwen4ExpTextQSAIndexer`` and ``Qwen4ExpTextAttention``; scores there are divided by
    sqrt(hi), which changes no order.
    """
    caches = (key_cache, value_cache, index_cache)
    if torch.compiler.is_exporting():
        attributes: Attributes = {
            **_attributes(key_cache, num_heads, scale, None),
            "index_heads": index_qk.shape[1] // index_cache.shape[-1] - 1,
            "rotary_dim": 2 * cos.shape[1],
            "budget": budget,
            "block": block,
            "epsilon": eps,
        }
        out, keys, values, index = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::IndexedAttention",
            (qkv, index_qk, query_gain, key_gain, *caches, position, cos, sin),
            attributes,
            dtypes=(qkv.dtype, *(cache.dtype for cache in caches)),
            shapes=((qkv.shape[0], num_heads * key_cache.shape[-1]), *(cache.shape for cache in caches)),
            version=1,
        )
        return out, keys, values, index
    positions = eager.positions_of(qkv, position)
    *index_heads, index_key = eager.split_heads(index_qk, index_cache.shape[-1])
    index = eager.extend_index(index_cache, index_key, key_gain, positions, cos, sin, block, eps)
    normed = functional.rms_norm(torch.stack(index_heads), query_gain.shape, query_gain, eps)
    index_query = eager.rotate(normed, cos[positions], sin[positions])
    seen = eager.visible(positions, None) & eager.selected(index_query, index, positions, budget // block, block)
    query, keys, values = eager.append(qkv, key_cache, value_cache, positions, cos, sin, num_heads)
    return eager.attend(query, keys, values, seen, scale), keys, values, index


def _attributes(keys: Tensor, num_heads: int, scale: float, window: int | None) -> Attributes:
    attributes: Attributes = {"num_heads": num_heads, "kv_num_heads": keys.shape[1], "scale": scale}
    if window is not None:
        attributes["local_window_size"] = window
    return attributes
