"""Operators that carry a state of fixed size from token to token, with the two faces of `engram_export.operators`."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule (arXiv 2412.06464) over T tokens.

    With S the state of a head and d = exp(log_decay), token by token: delta = (value - d * S^T key) * beta,
    S = d * S + key delta^T, out = S^T query / sqrt(dk). Each key head serves H / Hk neighbouring value heads.

    Args:
        query: ``[T, Hk * dk]``, already normalised where the model does so. ``key`` alike.
        value: ``[T, H * dv]``.
        log_decay: ``[T, H]``, at most 0.
        beta: ``[T, H]``.
        state: ``[1, H, dk, dv]`` float32; zeros before the first token.
        num_heads: H, of the values.

    Returns:
        ``[T, H * dv]`` and the next state.
    """
    if torch.compiler.is_exporting():
        return _gated_delta_node(query, key, value, log_decay, beta, state, num_heads=num_heads)
    tokens, key_dim = query.shape[0], state.shape[2]
    group = num_heads * key_dim // key.shape[1]
    queries, keys = (part.reshape(tokens, -1, key_dim).repeat_interleave(group, dim=1) for part in (query, key))
    values = value.reshape(tokens, num_heads, -1)
    memory, outs = state[0], []
    for q, k, v, decay, rate in zip(queries, keys, values, log_decay.exp(), beta, strict=True):
        memory = memory * decay[:, None, None]
        delta = (v - torch.einsum("hkv,hk->hv", memory, k)) * rate[:, None]
        memory = memory + k[:, :, None] * delta[:, None]
        outs.append(torch.einsum("hkv,hk->hv", memory, q) * key_dim**-0.5)
    return torch.stack(outs).flatten(1), memory[None]


def _gated_delta_node(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *, num_heads: int
) -> tuple[Tensor, Tensor]:
    key_dim = state.shape[2]
    out, following = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (query[None], key[None], value[None], state, log_decay[None], beta[None]),
        {
            "q_num_heads": key.shape[1] // key_dim,
            "kv_num_heads": num_heads,
            "update_rule": "gated_delta",
            "scale": key_dim**-0.5,
        },
        dtypes=(value.dtype, state.dtype),
        shapes=((1, *value.shape), state.shape),
        version=1,
    )
    return out.squeeze(0), following


def causal_conv(
    x: Tensor, weight: Tensor, window: Tensor, *, dilation: int, activation: Literal["silu", "none"]
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its current and earlier steps: ``x [T, C] -> [T, C]``.

    Args:
        weight: ``[C, 1, kernel]``; the last tap is the current step.
        window: ``[W, C]`` the steps before x, W = (kernel - 1) * dilation; zeros before the first token.

    Returns:
        ``[T, C]`` and the next window.
    """
    if torch.compiler.is_exporting():
        return _causal_conv_node(x, weight, window, dilation=dilation, activation=activation)
    steps = torch.cat([window, x])
    out = functional.conv1d(steps.T, weight, groups=x.shape[1], dilation=dilation).T
    return functional.silu(out) if activation == "silu" else out, steps[x.shape[0] :]


def _causal_conv_node(
    x: Tensor, weight: Tensor, window: Tensor, *, dilation: int, activation: str
) -> tuple[Tensor, Tensor]:
    out, following = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::CausalConvWithState",
        (x[None], weight, None, window[None]),
        {"activation": activation, "channels_last": 1, "dilation": dilation},
        dtypes=(x.dtype, window.dtype),
        shapes=((1, *x.shape), (1, *window.shape)),
        version=1,
    )
    return out.squeeze(0), following.squeeze(0)
