"""Routed experts: each token is sent to the few MLPs that its router prefers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

MATMUL_DTYPE = torch.bfloat16  # of the large products; weights and what is added up stay float32


class Experts(nn.Module):
    """SwiGLU experts with softmax routing over the chosen; no token is dropped."""

    def __init__(self, hidden: int, expert_hidden: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, hidden, 2 * expert_hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, expert_hidden, hidden) * expert_hidden**-0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts' output and the router's balance loss.

        Args:
            hidden: ``[N, D]``, all tokens of a batch.

        Returns:
            ``[N, D]``, and a scalar that is 1 where all experts get equal parts (Switch, arXiv 2101.03961, eq. 4).
        """
        logits = self.router(hidden)
        best, chosen = logits.topk(self.active)
        probabilities = logits.softmax(-1)
        counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
        balance = (counts / counts.sum() * probabilities.mean(0)).sum() * len(counts)
        return self.mix(hidden, chosen, best.softmax(-1), counts), balance

    def mix(self, hidden: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        One batched product over all experts: each has as many places as the busiest needs.

        Args:
            chosen: ``[N, K]`` expert of each token.
            weights: ``[N, K]`` what its output is multiplied by.
            counts: ``[E]`` how often each expert is chosen.
        """
        experts, by_expert = chosen.flatten().sort(stable=True)
        first = (counts.cumsum(0) - counts)[experts]
        places = int(counts.max())
        place = experts * places + torch.arange(len(experts)) - first
        token = by_expert // self.active
        empty = torch.zeros(len(counts) * places, hidden.shape[-1], dtype=MATMUL_DTYPE)
        inputs = empty.index_copy(0, place, hidden.to(MATMUL_DTYPE)[token]).view(len(counts), places, -1)
        gate, up = torch.bmm(inputs, self.gate_up.to(MATMUL_DTYPE)).chunk(2, -1)
        outputs = torch.bmm(functional.silu(gate) * up, self.down.to(MATMUL_DTYPE)).flatten(0, 1)[place]
        return torch.zeros_like(hidden).index_add(0, token, outputs * weights.flatten()[by_expert, None])
