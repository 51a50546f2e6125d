"""Operators on several residual streams held side by side, ``[T, G * D]``; two faces like `engram_export.operators`."""

import torch
from torch import Tensor
from torch.nn import functional


def branchwise_rms_norm(x: Tensor, gain: Tensor | None, *, branches: int, eps: float) -> Tensor:
    """Normalise each of ``branches`` equal parts of the last axis of ``x [T, G * D]``; ``gain [G * D]``."""
    if torch.compiler.is_exporting():
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::BranchwiseRMSNorm",
            (x,) if gain is None else (x, gain),
            {"num_branches": branches, "epsilon": eps},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return node
    parts = torch.unflatten(x, -1, (branches, -1))
    normed = functional.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2)
    return normed if gain is None else normed * gain


def pre_mix(streams: Tensor, mix: Tensor, *, branches: int) -> Tensor:
    """Return the mean over streams ``[T, D]`` of ``streams [T, G * D] * mix [T, G * D]``."""
    if torch.compiler.is_exporting():
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::HyperConnectionPreMix",
            (streams, mix),
            {"num_branches": branches, "reduction_scale": 1 / branches},
            dtype=streams.dtype,
            shape=(streams.shape[0], streams.shape[1] // branches),
            version=1,
        )
        return node
    return torch.unflatten(streams * mix, -1, (branches, -1)).mean(dim=-2)


def post_mix(streams: Tensor, output: Tensor, inject: Tensor, *, branches: int) -> Tensor:
    """Add ``output [T, D]`` times its weight ``inject [T, G]`` to each of ``streams [T, G * D]``."""
    if torch.compiler.is_exporting():
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::HyperConnectionPostMix",
            (streams, output, inject),
            {"num_branches": branches},
            dtype=streams.dtype,
            shape=streams.shape,
            version=1,
        )
        return node
    return streams + (inject.unsqueeze(-1) * output.unsqueeze(-2)).flatten(-2)


def engram_gate(
    key: Tensor,
    query: Tensor,
    value: Tensor,
    key_gain: Tensor,
    query_gain: Tensor,
    value_gain: Tensor,
    *,
    branches: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gate a value into every stream.

    Per stream: s = <norm(key), norm(query)> / sqrt(D), gate = sigmoid(sign(s) * sqrt(max(|s|, 1e-6))).

    Args:
        key: ``[T, G * D]``. ``query`` alike. ``value``: ``[T, D]``, shared by the streams.
        key_gain: ``[G * D]``. ``query_gain`` alike; ``value_gain`` is that of the second result.

    Returns:
        ``[T, G * D]`` gated values, and the same normalised per stream.
    """
    if torch.compiler.is_exporting():
        return _gate_node(key, query, value, key_gain, query_gain, value_gain, branches=branches, eps=eps)
    products = branchwise_rms_norm(key, key_gain, branches=branches, eps=eps) * branchwise_rms_norm(
        query, query_gain, branches=branches, eps=eps
    )
    score = torch.unflatten(products, -1, (branches, -1)).sum(dim=-1, keepdim=True) * value.shape[-1] ** -0.5
    gate = torch.sigmoid(torch.sign(score) * torch.sqrt(torch.clamp(torch.abs(score), min=1e-6)))
    gated = (gate * value.unsqueeze(-2)).flatten(-2)
    return gated, branchwise_rms_norm(gated, value_gain, branches=branches, eps=eps)


def _gate_node(
    key: Tensor,
    query: Tensor,
    value: Tensor,
    key_gain: Tensor,
    query_gain: Tensor,
    value_gain: Tensor,
    *,
    branches: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tokens, width = key.shape[0], value.shape[-1]
    grouped = [part.reshape(1, tokens, branches, width) for part in (key, query)]
    gains = [gain.reshape(branches, width) for gain in (key_gain, query_gain, value_gain)]
    gated, normed = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::EngramGate",
        (*grouped, value[None], *gains),
        {"epsilon": eps},
        dtypes=(key.dtype, key.dtype),
        shapes=((1, tokens, branches, width), (1, tokens, branches, width)),
        version=1,
    )
    return gated.reshape(tokens, branches * width), normed.reshape(tokens, branches * width)
