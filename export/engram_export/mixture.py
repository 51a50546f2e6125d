"""The sparse feed-forward of all mixtures of experts: router, routed experts, a shared expert where there is one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram_export.experts import Experts
from engram_export.formats import WeightFormat
from engram_export.linear import FloatLinear
from engram_export.text_decoder import Mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """Sizes of a mixture.

    Attributes:
        normalise: divide the weights of a token's experts by their sum.
        shared_size: intermediate size of the expert every token takes, or None where there is none.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    normalise: bool
    shared_size: int | None = None


class Mixture(nn.Module):
    """Routed experts, and a gated shared expert beside them."""

    def __init__(self, name: str, config: MixtureConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.router = FloatLinear(f"{name}.router", config.hidden_size, config.num_experts)
        self.experts = Experts(
            f"{name}.experts",
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            top_k=config.top_k,
            normalise=config.normalise,
            make_expert_linear=weights.make_expert_linear,
        )
        self.shared: Mlp | None = None
        if config.shared_size is not None:
            self.shared = Mlp(f"{name}.shared", config.hidden_size, config.shared_size, weights)
            self.shared_gate = FloatLinear(f"{name}.shared_gate", config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        routed: Tensor = self.experts(x, self.router(x))
        if self.shared is None:
            return routed
        mixed: Tensor = routed + torch.sigmoid(self.shared_gate(x)) * self.shared(x)
        return mixed
