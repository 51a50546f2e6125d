"""The loss of a draft head: cross-entropy of every step of a chain against what the model itself says."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from examples.retrofit.mtp_data import ROWS, Batch
from examples.retrofit.mtp_head import MAX_STEPS, Chain, DraftHead, Frozen

SAMPLED = 2048  # rows of the output layer beside those of a batch's labels
SMALLEST = 1e-30  # probability whose logarithm is taken


class DraftLoss(torch.autograd.Function):
    """Cross-entropy against soft labels without keeping the logits: the gradient is made on the way forward.

    Takes states [n, hidden_size], rows [draft_vocab, hidden_size], places and weights as of `Labels`. Returns the sum
    over n, and which states choose the label's most likely token.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, hits)."""
        total, hits, gradients = torch.zeros(()), [], []
        chunks = zip(*(torch.split(part, ROWS) for part in (states, places, weights)), strict=True)
        for chunk, place, weight in chunks:
            chosen = torch.softmax((chunk.to(rows.dtype) @ rows.T).float(), dim=-1)
            labelled = chosen.gather(1, place)
            total -= (weight * labelled.clamp_min(SMALLEST).log()).sum()
            hits.append(labelled[:, 0] >= chosen.amax(1))
            chosen.scatter_add_(1, place, -weight)
            gradients.append(chosen.to(rows.dtype) @ rows)
        found = torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool)
        ctx.save_for_backward(torch.cat(gradients) if gradients else states)
        ctx.mark_non_differentiable(found)
        return total, found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the states alone."""
        return (ctx.saved_tensors[0] * gradients[0]).float(), None, None, None


def draft_loss(states: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `DraftLoss`."""
    found: tuple[Tensor, Tensor] = DraftLoss.apply(states, rows, places, weights)  # type: ignore[no-untyped-call]
    return found


def chain_losses(head: DraftHead, frozen: Frozen, batch: Batch, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for every step, the summed loss and which roots all drafts so far were right at, [batch, roots].

    A step is trained only from roots whose drafts before it are right: no other is ever verified.
    """
    roots = batch.hidden.shape[1] - 1
    state, chain, right = batch.hidden[:, :roots], Chain([], []), torch.ones_like(batch.counted[0])
    for step in range(steps):
        embedding = frozen.model.model.embed_tokens(batch.tokens[:, step + 1 : step + 1 + roots]).detach()
        state = head(embedding, state, frozen.rotary(step, roots), chain)
        at = (right & batch.counted[step]).nonzero(as_tuple=True)
        label = (at[0], at[1] + step + 1)
        loss, hits = draft_loss(state[at], frozen.rows, batch.rows[label], batch.weights[label])
        right = torch.zeros_like(right)
        right[at] = hits
        yield loss, right


def narrowed(frozen: Frozen, batch: Batch, draws: torch.Generator) -> tuple[Frozen, Batch]:
    """Leave of the draft vocabulary what the batch's labels name and `SAMPLED` others: three times as fast.

    Args:
        draws: what the others are drawn with.
    """
    size = len(frozen.rows)
    used = torch.zeros(size, dtype=torch.bool)
    used[batch.rows[batch.weights > 0]] = True
    used[torch.randint(size, (SAMPLED,), generator=draws)] = True
    places = (used.cumsum(0) - 1).clamp_min(0)  # padding names a place too
    return replace(frozen, rows=frozen.rows[used]), replace(batch, rows=places[batch.rows])


@torch.inference_mode()
def measure(head: DraftHead, frozen: Frozen, data: Sequence[Batch]) -> tuple[list[float], float]:
    """Return the share of roots at which the first 1, 2, .. drafts are all right, and the loss of the first draft."""
    right, total, loss_sum = [0] * MAX_STEPS, 0, 0.0
    for batch in data:
        total += int(batch.counted[0].sum())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for step, (loss, hits) in enumerate(chain_losses(head, frozen, batch, MAX_STEPS)):
                right[step] += int(hits.sum())
                loss_sum += loss.item() if step == 0 else 0.0
    return [count / total for count in right], loss_sum / total
