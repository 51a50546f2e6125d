"""Train a draft head on text that the model wrote, against the model's own distributions."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel

from examples.retrofit.mtp_artefact import save_head
from examples.retrofit.mtp_data import ROWS, Batch, Example, Labels, batches, pad, soft_labels
from examples.retrofit.mtp_head import MAX_STEPS, Chain, DraftHead, Frozen

DEVELOPMENT = 160  # examples that are measured and never trained
RIDGE_EXAMPLES = 120
RIDGE = 1e-2  # of the mean of the diagonal
WARM_UP, CHECKPOINT_STEPS = 50, 250  # steps
SAMPLED = 2048  # rows of the output layer beside those of a batch's labels
SMALLEST = 1e-30  # probability whose logarithm is taken


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a head is trained; `step_weights`: of the losses of the first, second, .. draft of a chain."""

    epochs: int = 3
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 1.0
    step_weights: tuple[float, ...] = (1.0, 0.7)
    seed: int = 0


class DraftLoss(torch.autograd.Function):
    """Cross-entropy against soft labels without keeping the logits: the gradient is made on the way forward.

    Takes states [n, hidden_size], rows [draft_vocab, hidden_size], places and weights as of `Labels`. Returns the sum
    over n, and which states choose the label's most likely token.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, hits)."""
        total, hits, gradients = torch.zeros(()), [], []
        chunks = zip(states.split(ROWS), places.split(ROWS), weights.split(ROWS), strict=True)
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
        loss, hits = DraftLoss.apply(state[at], frozen.rows, batch.rows[label], batch.weights[label])
        right = torch.zeros_like(right)
        right[at] = hits
        yield loss, right


def narrowed(frozen: Frozen, batch: Batch) -> tuple[Frozen, Batch]:
    """Leave of the draft vocabulary what the batch's labels name and `SAMPLED` others: three times as fast."""
    size = len(frozen.rows)
    used = torch.zeros(size, dtype=torch.bool)
    used[batch.rows[batch.weights > 0]] = True
    used[torch.randint(size, (SAMPLED,))] = True
    places = used.cumsum(0) - 1
    return replace(frozen, rows=frozen.rows[used]), replace(batch, rows=places[batch.rows])


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm up linearly, then fall along half a cosine to a fiftieth."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, total - WARM_UP))))


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


@torch.inference_mode()
def initialise(head: DraftHead, model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Fit the head's first product to what the last block reads one token later; returns the R2 of the ridge fit.

    With it the head starts as the last block one token ahead. The first position is left out: its state is an outlier.
    """
    entering: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    inputs, outputs = [], []
    for example in examples:
        hidden = model.model(example.tokens[None]).last_hidden_state[0]
        embedding = head.pre_fc_norm_embedding(model.model.embed_tokens(example.tokens[1:]))
        inputs.append(torch.cat((embedding, head.pre_fc_norm_hidden(hidden[:-1])), dim=-1)[1:].float())
        outputs.append(entering.pop()[0, 2:].float())
    hook.remove()
    x, y = torch.cat(inputs), torch.cat(outputs)
    moments = x.T @ x
    moments.diagonal().add_(moments.diagonal().mean() * RIDGE)
    weight = torch.linalg.solve(moments, x.T @ y)
    head.fc.weight.copy_(weight.T)
    return 1 - float(((x @ weight - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@dataclass(slots=True)
class Training:
    """A training under way in a folder: `head.safetensors`, `checkpoint.pt` to go on from, `training.json`, the log."""

    head: DraftHead
    optimiser: torch.optim.AdamW
    folder: Path
    recipe: Recipe
    step: int
    log: list[dict[str, Any]]

    @classmethod
    def start(cls, head: DraftHead, folder: Path, recipe: Recipe) -> "Training":
        """Begin, or go on from the folder's checkpoint."""
        matrices = [weight for weight in head.parameters() if weight.ndim > 1]
        vectors = [weight for weight in head.parameters() if weight.ndim == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
        training = cls(head, optimiser, folder, recipe, 0, [])
        if (folder / "checkpoint.pt").exists():
            state = torch.load(folder / "checkpoint.pt")
            head.load_state_dict(state["head"])
            optimiser.load_state_dict(state["optimiser"])
            training.step, training.log = state["step"], state["log"]
        return training

    def save(self) -> None:
        """Write what a later run goes on from; a run that is cut off leaves the checkpoint before."""
        state = {
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "log": self.log,
        }
        torch.save(state, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")
        save_head(self.head, self.folder / "head.safetensors")
        record = {"recipe": asdict(self.recipe), "log": self.log}
        (self.folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def update(self, frozen: Frozen, batch: Batch, total: int) -> float:
        """Make one step; returns the mean loss of the first draft."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, total, self.recipe.learning_rate)
        frozen, batch = narrowed(frozen, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [loss for loss, _ in chain_losses(self.head, frozen, batch, len(self.recipe.step_weights))]
        roots = batch.counted[0].sum()
        weighted = [weight * loss for weight, loss in zip(self.recipe.step_weights, losses, strict=True)]
        self.optimiser.zero_grad()
        (torch.stack(weighted).sum() / roots).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return float(losses[0].detach() / roots)


def label(examples: Sequence[Example], frozen: Frozen, temperature: float) -> list[tuple[Example, Labels]]:
    """Say for every example what the model thought."""
    with click.progressbar(examples, label="labels", width=30) as shown:
        return [(example, soft_labels(example.hidden, frozen.rows, temperature)) for example in shown]


def train(
    model: PreTrainedModel, head: DraftHead, examples: Sequence[Example], folder: Path, recipe: Recipe
) -> Training:
    """Train a head, measuring it on the first `DEVELOPMENT` examples of a seeded order; takes up an interrupted run."""
    folder.mkdir(parents=True, exist_ok=True)
    order = list(examples)
    random.Random(recipe.seed).shuffle(order)
    frozen = Frozen.of(model, head.draft_vocab, torch.bfloat16)
    held = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    held[head.draft_vocab.long()] = True
    development = label(order[:DEVELOPMENT], frozen, 1.0)
    measured = [pad(development[i : i + 16], held) for i in range(0, len(development), 16)]
    data = label(order[DEVELOPMENT:], frozen, recipe.temperature)
    if not (folder / "checkpoint.pt").exists():
        click.echo(f"ridge fit: R2 {initialise(head, model, order[-RIDGE_EXAMPLES:]):.3f}")
    training = Training.start(head, folder, recipe)
    per_epoch = -(-len(data) // recipe.batch)
    total, losses = recipe.epochs * per_epoch, []
    with click.progressbar(length=total, label="draft head", width=30) as bar:
        bar.update(training.step)
        for epoch in range(training.step // per_epoch, recipe.epochs):
            groups = batches(data, recipe.batch, random.Random(recipe.seed + epoch))
            for group in groups[training.step - epoch * per_epoch :]:
                losses.append(training.update(frozen, pad(group, held), total))
                bar.update(1)
                if training.step % CHECKPOINT_STEPS == 0 or training.step == total:
                    shares, loss = measure(head, frozen, measured)
                    mean = sum(losses) / len(losses)
                    training.log.append(
                        {"step": training.step, "loss": mean, "development_loss": loss, "right": shares}
                    )
                    click.echo(f"  step {training.step}: {training.log[-1]}")
                    losses.clear()
                    training.save()
    return training
