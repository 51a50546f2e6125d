"""A routed mixture of experts by weight format: what each layer of the experts stores, and what the block computes.

A layer holds one weight ``[E, N, K]``. `encode` takes any run of experts, so that slabs of many GB can be streamed
from the checkpoint to the bundle a few experts at a time; the modules themselves may be traced without any data.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_export.linear import Arrays, empty_parameter, pack_nibbles
from engram_export.moe_operators import ExpertWeights, FloatExperts, QuantisedExperts, mix_experts
from engram_export.quantise import BLOCK, num_blocks, quantise_int4, quantise_int8

GATE_AND_UP, ALONE = 2, 1  # parts of a layer's outputs
ENCODED_ROWS = 1024  # rows of each part that are quantised at once

ByPart = Mapping[str, Sequence[NDArray[Any]]]  # parameters by name, of some rows each


class ExpertLinear(Protocol):
    """The same linear layer of each of E experts, parameters by name with a leading axis of E."""

    label: str

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """Return the parameters of n experts for ``weight [n, N, K]``, its parts one after the other along N."""
        ...

    def weights(self) -> ExpertWeights:
        """Return the weights of all experts."""
        ...


class ExpertFactory(Protocol):
    """Makes the layer ``name`` of ``num_experts`` experts, whose outputs are ``parts`` of equal size."""

    def __call__(
        self, name: str, num_experts: int, in_features: int, out_features: int, parts: int
    ) -> ExpertLinear: ...


class FloatExpertLinear(nn.Module):
    """Float32 ``weight [E, N, K]``, rows of its parts in turn."""

    label = "float32"

    def __init__(self, name: str, num_experts: int, in_features: int, out_features: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = empty_parameter(num_experts, out_features, in_features)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `ExpertLinear`."""
        return {"weight": interleave(weight, self.parts)}

    def weights(self) -> ExpertWeights:
        """See `ExpertLinear`."""
        return FloatExperts(weight=self.weight)


class Int8ExpertLinear(nn.Module):
    """int8 per output channel as `engram_export.linear.Int8Linear`, rows of its parts in turn."""

    label = "int8"

    def __init__(self, name: str, num_experts: int, in_features: int, out_features: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.blocks = num_blocks(name, in_features)
        self.codes = empty_parameter(num_experts, out_features, in_features, dtype=torch.uint8)
        self.scale = empty_parameter(num_experts, out_features, 1)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `ExpertLinear`."""
        parts = [quantise_int8(rows) for rows in _in_turn(weight, self.parts)]
        arrays: ByPart = {"codes": [part.codes for part in parts], "scale": [part.scale for part in parts]}
        return _by_expert(arrays, len(weight))

    def weights(self) -> ExpertWeights:
        """See `ExpertLinear`."""
        scales = self.scale.expand(*self.codes.shape[:2], self.blocks)
        return QuantisedExperts(codes=self.codes, scales=scales, zeros=None, bits=8)


class Int4ExpertLinear(nn.Module):
    """Two-level int4 as `engram_export.linear.Int4Linear`, rows of its parts in turn."""

    label = "int4"

    def __init__(self, name: str, num_experts: int, in_features: int, out_features: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        blocks = num_blocks(name, in_features)
        self.codes = empty_parameter(num_experts, out_features, blocks * BLOCK // 2, dtype=torch.uint8)
        self.multiplier = empty_parameter(num_experts, out_features, blocks, dtype=torch.uint8)
        self.zero = empty_parameter(num_experts, out_features, (blocks + 1) // 2, dtype=torch.uint8)
        self.scale = empty_parameter(num_experts, out_features, 1)

    def encode(self, weight: NDArray[np.float32]) -> Arrays:
        """See `ExpertLinear`."""
        parts = [quantise_int4(rows) for rows in _in_turn(weight, self.parts)]
        arrays: ByPart = {
            "codes": [pack_nibbles(part.codes) for part in parts],
            "multiplier": [part.multiplier for part in parts],
            "zero": [pack_nibbles(part.zero) for part in parts],
            "scale": [part.scale for part in parts],
        }
        return _by_expert(arrays, len(weight))

    def weights(self) -> ExpertWeights:
        """See `ExpertLinear`."""
        scales = self.multiplier.float() * self.scale
        return QuantisedExperts(codes=self.codes, scales=scales, zeros=self.zero, bits=4)


class Experts(nn.Module):
    """E SiLU-gated feed-forward networks, of which every token takes the ``top_k`` with the largest router logits.

    ``gate_up.encode`` takes ``[n, 2 * I, D]``, all gate rows before the up rows; ``down.encode`` takes ``[n, D, I]``.
    """

    def __init__(
        self,
        name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        top_k: int,
        normalise: bool,
        make_expert_linear: ExpertFactory,
    ) -> None:
        """Make the block.

        Args:
            name: prefix of its layers' names in errors.
            normalise: divide the weights of a token's experts by their sum.

        Raises:
            CheckpointError: a size the weight format can't hold.
        """
        super().__init__()
        self.top_k = top_k
        self.normalise = normalise
        self.gate_up = make_expert_linear(
            f"{name}.gate_up", num_experts, hidden_size, 2 * intermediate_size, GATE_AND_UP
        )
        self.down = make_expert_linear(f"{name}.down", num_experts, intermediate_size, hidden_size, ALONE)

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        return mix_experts(
            x,
            router_logits,
            self.gate_up.weights(),
            self.down.weights(),
            top_k=self.top_k,
            normalise=self.normalise,
        )


def interleave(weight: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Return ``[n, N, K]`` with row i of every part before row i + 1 of any; the parts come one after the other."""
    count, rows, columns = weight.shape
    in_turn = weight.reshape(count, parts, rows // parts, columns).swapaxes(1, 2)
    return np.ascontiguousarray(in_turn).reshape(weight.shape)


def _in_turn(weight: NDArray[np.float32], parts: int) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of `interleave` in order, some at a time, as one expert may take hundreds of MB."""
    for expert in weight:
        by_part = expert.reshape(parts, -1, expert.shape[-1])
        for start in range(0, by_part.shape[1], ENCODED_ROWS):
            rows = by_part[:, start : start + ENCODED_ROWS]
            yield np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(-1, expert.shape[-1])


def _by_expert(arrays: ByPart, count: int) -> Arrays:
    return {name: np.concatenate(parts).reshape(count, -1, parts[0].shape[-1]) for name, parts in arrays.items()}
