"""Linear layers and embeddings by weight format: what each stores, and what it computes.

Every class says with `encode` how a float weight becomes its parameters, so that weights can be streamed from the
checkpoint to the bundle one at a time; the modules themselves may be traced without any data.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engram_export.operators import TWO_PLANES, gather_int8, matmul_nbits
from engram_export.quantise import BLOCK, Int4Weight, num_blocks, quantise_int4, quantise_int8

Arrays = Mapping[str, NDArray[Any]]


class WeightModule(Protocol):
    """A module whose parameters are computed from one float weight."""

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """Return the module's parameters by name for ``weight [N, K]``."""
        ...


LinearFactory = Callable[[str, int, int], nn.Module]  # (name, in_features, out_features) -> linear layer


class FloatLinear(nn.Module):
    """``x @ weight.T`` with a float32 weight ``[N, K]``."""

    label = "float32"

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `WeightModule`."""
        return {"weight": weight}

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def restricted(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Return ``[R, n]`` for ``x [R, K]``: of the outputs ``[n]`` alone."""
        return functional.linear(x, self.weight.index_select(0, outputs))


class Int8Linear(nn.Module):
    """int8 per output channel: `engram_export.quantise.Int8Weight`."""

    label = "int8"

    def __init__(self, name: str, in_features: int, out_features: int, planes: int = TWO_PLANES) -> None:
        super().__init__()
        blocks = num_blocks(name, in_features)
        self.planes = planes
        self.codes = empty_parameter(out_features, blocks, BLOCK, dtype=torch.uint8)
        self.scale = empty_parameter(out_features, 1)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `WeightModule`."""
        quantised = quantise_int8(weight)
        return {"codes": quantised.codes.reshape(len(weight), -1, BLOCK), "scale": quantised.scale}

    def forward(self, x: Tensor) -> Tensor:
        return matmul_nbits(x, self.codes, self.scale.expand(self.codes.shape[:2]), None, bits=8, planes=self.planes)

    def restricted(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `FloatLinear.restricted`."""
        codes, scale = (part.index_select(0, outputs) for part in (self.codes, self.scale))
        return matmul_nbits(x, codes, scale.expand(codes.shape[:2]), None, bits=8, planes=self.planes)


class Int4Linear(nn.Module):
    """Two-level int4: `engram_export.quantise.Int4Weight`."""

    label = "int4"

    def __init__(self, name: str, in_features: int, out_features: int, planes: int = TWO_PLANES) -> None:
        super().__init__()
        blocks = num_blocks(name, in_features)
        self.planes = planes
        self.codes = empty_parameter(out_features, blocks, BLOCK // 2, dtype=torch.uint8)
        self.multiplier = empty_parameter(out_features, blocks, dtype=torch.uint8)
        self.zero = empty_parameter(out_features, (blocks + 1) // 2, dtype=torch.uint8)
        self.scale = empty_parameter(out_features, 1)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `WeightModule`."""
        return int4_arrays(quantise_int4(weight))

    def forward(self, x: Tensor) -> Tensor:
        scales = self.multiplier.float() * self.scale
        return matmul_nbits(x, self.codes, scales, self.zero, bits=4, planes=self.planes)


class BlockLinear(nn.Module):
    """GGUF's Q4_0 or Q8_0 kept exactly: codes and one float scale per block of 32."""

    def __init__(self, name: str, in_features: int, out_features: int, bits: int) -> None:
        super().__init__()
        blocks = num_blocks(name, in_features)
        self.bits = bits
        self.label = f"Q{bits}_0"
        self.codes = empty_parameter(out_features, blocks, BLOCK * bits // 8, dtype=torch.uint8)
        self.block_scale = empty_parameter(out_features, blocks)

    def encode_blocks(self, codes: NDArray[np.uint8], block_scale: NDArray[np.float32]) -> Arrays:
        """Return the parameters for codes ``[N, K]`` and scales ``[N, K / 32]`` read from the checkpoint."""
        packed = codes if self.bits == 8 else pack_nibbles(codes)
        return {"codes": packed.reshape(len(codes), -1, BLOCK * self.bits // 8), "block_scale": block_scale}

    def forward(self, x: Tensor) -> Tensor:
        return matmul_nbits(x, self.codes, self.block_scale, None, bits=self.bits)

    def restricted(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `FloatLinear.restricted`."""
        codes, scales = (part.index_select(0, outputs) for part in (self.codes, self.block_scale))
        return matmul_nbits(x, codes, scales, None, bits=self.bits)


class FloatEmbedding(nn.Module):
    """Float32 table ``[V, D]``; `logits` is the tied head."""

    label = "float32"

    def __init__(self, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `WeightModule`."""
        return {"weight": weight}

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``x [R, D]``."""
        return functional.linear(x, self.weight)

    def restricted(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `FloatLinear.restricted`."""
        return functional.linear(x, self.weight.index_select(0, outputs))


class Int8Embedding(Int8Linear):
    """int8 table with one scale per token; `logits` is the tied head."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__(name, hidden_size, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return gather_int8(self.codes, self.scale.expand(self.codes.shape[:2]), ids)

    def logits(self, x: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``x [R, D]``."""
        return Int8Linear.forward(self, x)


def int4_arrays(quantised: Int4Weight) -> Arrays:
    """Return the parameters of an `Int4Linear`."""
    return {
        "codes": pack_nibbles(quantised.codes).reshape(len(quantised.codes), -1, BLOCK // 2),
        "multiplier": quantised.multiplier,
        "zero": pack_nibbles(quantised.zero),
        "scale": quantised.scale,
    }


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack pairs of 4-bit codes along the last axis, the even one in the low half; an odd last one stands alone."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), dtype=np.uint8)], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << np.uint8(4)


def empty_parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter that is never trained, its memory not yet written."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
