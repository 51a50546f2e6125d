"""Mixture-of-experts operators with two faces, as in `operators`: plain torch when run, one ONNX node when exported.

Both route as Mixtral and Qwen3-MoE do: the softmax of all router logits, of which every token takes its ``top_k``
largest. Of equal logits the lower expert comes first; onnxruntime alone takes the higher one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from engram_export.onnx_functions import DOMAIN
from engram_export.operators import ACCURACY_LEVEL, dequantise_blocks
from engram_export.quantise import BLOCK

QMOE_SCALES = (3, 6)  # the inputs that are scales of gate_up and down

# onnxruntime's CPU kernels know one gated activation: silu(gate) * up, gate and up in alternate rows.
SILU_GATE: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatExperts:
    """A float32 ``weight [E, N, K]``."""

    weight: Tensor

    def of(self, expert: int) -> Tensor:
        """Return ``[N, K]`` of one expert."""
        return self.weight[expert]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedExperts:
    """A block-quantised weight of each of E experts.

    codes: ``[E, N, K * bits / 8]`` uint8, two 4-bit codes a byte, the even one in the low half.
    scales: ``[E, N, K / 32]`` float32.
    zeros: 4-bit zero points packed to ``[E, N, ceil(K / 64)]`` uint8, or None for 2 ** (bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    def of(self, expert: int) -> Tensor:
        """Return ``[N, K]`` float32 of one expert."""
        codes = self.codes[expert].reshape(*self.scales.shape[1:], BLOCK * self.bits // 8)
        zeros = None if self.zeros is None else self.zeros[expert]
        return dequantise_blocks(codes, self.scales[expert], zeros, bits=self.bits)


ExpertWeights = FloatExperts | QuantisedExperts


def mix_experts(
    x: Tensor, router_logits: Tensor, gate_up: ExpertWeights, down: ExpertWeights, *, top_k: int, normalise: bool
) -> Tensor:
    """Return ``[T, D]``, the weighted sum of every token's experts' outputs.

    Args:
        x: ``[T, D]`` float32.
        router_logits: ``[T, E]`` float32.
        gate_up: ``[E, 2 * I, D]``, gate and up in alternate rows.
        down: ``[E, D, I]``, in the same format as ``gate_up``.
        normalise: divide the weights of a token's experts by their sum.
    """
    if not torch.compiler.is_exporting():
        return _mix(x, router_logits, gate_up, down, top_k=top_k, normalise=normalise)
    attributes = {**SILU_GATE, "k": top_k, "normalize_routing_weights": int(normalise)}
    match gate_up, down:
        case FloatExperts(), FloatExperts():
            inputs = [x, router_logits, gate_up.weight, None, down.weight, None]
            if normalise:
                return _node("com.microsoft::MoE", x, inputs, attributes)
            return _node(f"{DOMAIN}::UnnormalisedMoE", x, [x, router_logits, gate_up.weight, down.weight], {"k": top_k})
        case QuantisedExperts(bits=bits), QuantisedExperts() if down.bits == bits:
            inputs = _qmoe_inputs(x, router_logits, gate_up, down)
            blocks = {"expert_weight_bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
            return _node("com.microsoft::QMoE", x, inputs, {**attributes, **blocks})
    raise TypeError("gate_up and down of experts are stored in two formats, one node holds one")


def _qmoe_inputs(
    x: Tensor, router_logits: Tensor, gate_up: QuantisedExperts, down: QuantisedExperts
) -> list[Tensor | None]:
    # Without weights of their own onnxruntime's CPU kernel divides them by their sum whatever the attribute says.
    router_weights = torch.softmax(router_logits, dim=-1)
    first = [x, router_logits, gate_up.codes, gate_up.scales, None, down.codes, down.scales]
    return [*first, *[None] * 4, gate_up.zeros, down.zeros, None, router_weights]


def _node(operator: str, x: Tensor, inputs: Sequence[Tensor | None], attributes: dict[str, Any]) -> Tensor:
    node: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)
    return node


def _mix(
    x: Tensor, router_logits: Tensor, gate_up: ExpertWeights, down: ExpertWeights, *, top_k: int, normalise: bool
) -> Tensor:
    chosen = torch.sort(router_logits, dim=-1, descending=True, stable=True).indices[:, :top_k]  # [T, k]
    weights = torch.softmax(router_logits, dim=-1).gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, slot = torch.where(chosen == expert)
        hidden = functional.linear(x[token], gate_up.of(expert))
        y = functional.linear(functional.silu(hidden[:, ::2]) * hidden[:, 1::2], down.of(expert))
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def keep_float_activations(graph: onnx.GraphProto) -> None:
    """Change a graph's QMoE nodes so that onnxruntime leaves activations in float32, slowly.

    Its 8-bit kernel does so only for one scale a channel, so the spreading of scales over blocks is bypassed.
    """
    spread = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Expand"}
    for node in (node for node in graph.node if node.op_type == "QMoE"):
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        removed = {"accuracy_level"}
        if values["expert_weight_bits"] == 8:
            removed.add("block_size")
            for index in QMOE_SCALES:
                node.input[index] = spread.get(node.input[index], node.input[index])
        kept = [attribute for attribute in node.attribute if attribute.name not in removed]
        del node.attribute[:]
        node.attribute.extend(kept)
