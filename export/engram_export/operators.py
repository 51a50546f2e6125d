"""Operators with two faces: plain torch when run, one ONNX node of ``com.microsoft`` when exported.

onnxruntime runs the nodes on CPU; `engram_compilers` lowers the same nodes to kernels. The domain's definitions:
onnxruntime's docs/ContribOperators.md.
"""

import torch
from torch import Tensor
from torch.nn import functional

from engram_compilers.signatures import PLANES_KEY
from engram_export.quantise import BLOCK

# onnxruntime quantises activations to int8 in blocks only at this accuracy level; lower ones are 50 times slower.
ACCURACY_LEVEL = 4
TWO_PLANES = 2  # of int8 for a row of activations: what kernels do where a node says nothing


def matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, planes: int = TWO_PLANES
) -> Tensor:
    """Multiply by a block-quantised weight: ``x [T, K] @ dequantise(codes).T -> [T, N]``.

    Args:
        codes: ``[N, K / 32, 32 * bits / 8]`` uint8, two 4-bit codes a byte, the even one in the low half.
        scales: ``[N, K / 32]`` float32.
        zeros: 4-bit zero points packed to ``[N, ceil(K / 64)]`` uint8, or None for 2 ** (bits - 1).
        planes: of int8 that kernels round a row of ``x`` to; torch leaves it as it is.
    """
    out_features, blocks = scales.shape
    if torch.compiler.is_exporting():
        inputs = (x, codes, scales) if zeros is None else (x, codes, scales, zeros)
        node: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            {
                "K": blocks * BLOCK,
                "N": out_features,
                "bits": bits,
                "block_size": BLOCK,
                "accuracy_level": ACCURACY_LEVEL,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], out_features),
            version=1,
            metadata_props={} if planes == TWO_PLANES else {PLANES_KEY: str(planes)},
        )
        return node
    return functional.linear(x, dequantise_blocks(codes, scales, zeros, bits=bits))


def gather_int8(codes: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    """Look up rows of an int8 table: ``ids [T] -> [T, K]``; ``codes [V, K / 32, 32]``, ``scales [V, K / 32]``."""
    if torch.compiler.is_exporting():
        rows: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (codes, ids, scales[:, :, None]),
            {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2},
            dtype=torch.float32,
            shape=(*ids.shape, *codes.shape[1:]),
            version=1,
        )
        return rows.flatten(-2)
    return dequantise_blocks(codes[ids], scales[ids], None, bits=8)


def dequantise_blocks(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int) -> Tensor:
    """Return ``[N, K]`` float32 of codes laid out as for `matmul_nbits`."""
    values = codes if bits == 8 else unpack_nibbles(codes)
    zero = torch.tensor(2.0 ** (bits - 1)) if zeros is None else unpack_nibbles(zeros)[:, : scales.shape[1], None]
    return values.float().sub_(zero).mul_(scales[:, :, None]).flatten(1)  # in place: an expert may take hundreds of MB


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Split bytes into 4-bit codes along the last axis, the low half first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
