"""Losses of a site's training: of answers it is to give or to leave alone, and its loudness elsewhere."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 256  # answer tokens whose logits are in memory at once


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy with the gradient taken along, so that no logits are kept."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss in nats."""
        gradient = torch.empty_like(states)
        total = torch.zeros(())
        for part in torch.split(torch.arange(len(labels)), CHUNK):
            log_probabilities = (states[part] @ weight.T).float().log_softmax(-1)
            total -= log_probabilities.gather(1, labels[part, None]).sum()
            probabilities = log_probabilities.exp_()
            probabilities[torch.arange(len(part)), labels[part]] -= 1
            gradient[part] = probabilities.to(states.dtype) @ weight
        context.save_for_backward(gradient / len(labels))
        return total / len(labels)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient that is already there."""
        (gradient,) = context.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of ``labels [N]`` under ``states [N, D] @ weight [V, D].T``."""
    loss: Tensor = _CrossEntropy.apply(states, weight, labels)  # type: ignore[no-untyped-call]
    return loss


def divergence(states: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence in nats from the model without the site to the one with it.

    Args:
        states: ``[N, D]``, what the output layer ``weight [V, D]`` is multiplied with.
        reference: ``[N, D]``, the same without the site; no gradient goes there.
    """
    with torch.no_grad():
        before = (reference @ weight.T).float().log_softmax(-1)
    after = (states @ weight.T).float().log_softmax(-1)
    return functional.kl_div(after, before, reduction="batchmean", log_target=True)


def loudness(update: Tensor, hidden: Tensor) -> Tensor:
    """Return ``[...]``: the size of the update ``[..., D]`` relative to the stream ``[..., D]`` it is added to."""
    ratio: Tensor = torch.linalg.vector_norm(update, dim=-1) / torch.linalg.vector_norm(hidden.float(), dim=-1)
    return ratio
