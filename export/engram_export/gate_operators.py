"""Gates around the delta rule; two faces like `engram_export.operators`."""

import torch
from torch import Tensor
from torch.nn import functional


def decay_and_rate(decay: Tensor, rate: Tensor, time_bias: Tensor, decay_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``decay_scale * softplus(decay + time_bias)`` and ``sigmoid(rate)``, all ``[T, H]`` or ``[H]``."""
    if torch.compiler.is_exporting():
        log_decay, beta = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::LinearAttentionGate",
            (decay[None], time_bias, decay_scale, rate[None]),
            {},
            dtypes=(decay.dtype, decay.dtype),
            shapes=((1, *decay.shape), (1, *rate.shape)),
            version=1,
        )
        return log_decay.squeeze(0), beta.squeeze(0)
    return decay_scale * functional.softplus(decay + time_bias), torch.sigmoid(rate)


def gated_rms_norm(x: Tensor, gain: Tensor, gate: Tensor, *, activation: str, eps: float) -> Tensor:
    """Normalise each head of ``x [T, H * C]``, times ``gain [C]``, times silu or sigmoid of ``gate [T, H * C]``."""
    if torch.compiler.is_exporting():
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatedRMSNorm",
            (x, gain, gate),
            {"activation": activation, "epsilon": eps},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return node
    heads = torch.unflatten(x, -1, (-1, len(gain)))
    normed = functional.rms_norm(heads, gain.shape, gain, eps).flatten(-2)
    return normed * (functional.silu(gate) if activation == "silu" else torch.sigmoid(gate))
