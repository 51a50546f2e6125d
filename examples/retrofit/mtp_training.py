"""Train a draft head on text that the model wrote, against the model's own distributions."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file
from examples.retrofit.mtp_artefact import save_head
from examples.retrofit.mtp_data import Batch, Example, Labels, batches, pad, soft_labels
from examples.retrofit.mtp_head import DraftHead, Frozen
from examples.retrofit.mtp_loss import chain_losses, measure, narrowed
from examples.retrofit.whole_files import write_text

DEVELOPMENT = 160  # examples that are measured and never trained
RIDGE_EXAMPLES = 120
RIDGE = 1e-2  # of the mean of the diagonal
WARM_UP, CHECKPOINT_STEPS = 50, 250  # steps


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


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm up linearly, then fall along half a cosine to a fiftieth."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, total - WARM_UP))))


@torch.inference_mode()
def initialise(head: DraftHead, model: Any, examples: Sequence[Example]) -> float:
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


@dataclass(frozen=True, slots=True)
class Data:
    """What a head is trained and measured on; held [vocabulary]: whether the draft vocabulary has a token."""

    frozen: Frozen
    training: Sequence[tuple[Example, Labels]]
    development: Sequence[Batch]
    held: Tensor

    @classmethod
    def of(cls, model: Any, head: DraftHead, examples: Sequence[Example], recipe: Recipe) -> "Data":
        """Label examples with what the model thought; the first `DEVELOPMENT` of a seeded order are only measured."""
        order = list(examples)
        random.Random(recipe.seed).shuffle(order)
        frozen = Frozen.of(model, head.draft_vocab, torch.bfloat16)
        held = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        held[head.draft_vocab.long()] = True
        with click.progressbar(order, label="what the model says", width=30) as shown:
            labelled = [(each, soft_labels(each.hidden, frozen.rows, recipe.temperature)) for each in shown]
        measured, trained = labelled[:DEVELOPMENT], labelled[DEVELOPMENT:]
        development = [pad(measured[i : i + recipe.batch], held) for i in range(0, len(measured), recipe.batch)]
        return cls(frozen, trained, development, held)


@dataclass(slots=True)
class Training:
    """A training under way in a folder: `head.safetensors`, `checkpoint.pt` to go on from, `training.json`, the log.

    made_of: tells trainings apart, so that none goes on from the checkpoint of another.
    """

    head: DraftHead
    optimiser: torch.optim.AdamW
    folder: Path
    recipe: Recipe
    made_of: str
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    draws: torch.Generator = field(default_factory=torch.Generator)

    @classmethod
    def start(cls, head: DraftHead, folder: Path, recipe: Recipe, made_of: str) -> "Training":
        """Begin, or go on from the folder's checkpoint.

        Raises:
            RequestError: the checkpoint is of another training.
        """
        matrices = [weight for weight in head.parameters() if weight.ndim > 1]
        vectors = [weight for weight in head.parameters() if weight.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
        training = cls(head, optimiser, folder, recipe, made_of)
        if (folder / "checkpoint.pt").exists():
            training._resume(folder / "checkpoint.pt")
        return training

    def _resume(self, checkpoint: Path) -> None:
        kept = torch.load(checkpoint)
        if kept.get("made_of") != self.made_of:
            raise RequestError(f"{checkpoint} is the state of another training; remove it, or choose another --work")
        self.head.load_state_dict(kept["head"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.step, self.log = kept["step"], kept["log"]

    def save(self) -> None:
        """Write what a later run goes on from; a run that is cut off leaves the checkpoint before."""
        state = {
            "made_of": self.made_of,
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "log": self.log,
        }
        with new_file(self.folder / "checkpoint.pt", replace=True) as file:
            torch.save(state, file)
        save_head(self.head, self.folder / "head.safetensors")
        record = {"recipe": asdict(self.recipe), "log": self.log}
        write_text(self.folder / "training.json", json.dumps(record, indent=1))

    def num_steps(self, data: Data) -> int:
        """Return the steps of the whole training."""
        return self.recipe.epochs * -(-len(data.training) // self.recipe.batch)

    def remaining(self, data: Data) -> Iterator[Batch]:
        """Yield the batches that are still to be trained on."""
        groups = (
            group
            for epoch in range(self.recipe.epochs)
            for group in batches(data.training, self.recipe.batch, random.Random(self.recipe.seed + epoch))
        )
        return (pad(group, data.held) for group in itertools.islice(groups, self.step, None))

    def update(self, frozen: Frozen, batch: Batch, total: int) -> float:
        """Make one step; returns the mean loss of the first draft."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, total, self.recipe.learning_rate)
        self.draws.manual_seed(random.Random(f"{self.recipe.seed} step {self.step}").getrandbits(62))
        frozen, batch = narrowed(frozen, batch, self.draws)
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

    def record(self, data: Data, losses: Sequence[float]) -> None:
        """Measure the head, log that beside the losses since the last time, and save."""
        shares, loss = measure(self.head, data.frozen, data.development)
        mean = sum(losses) / len(losses)
        self.log.append({"step": self.step, "loss": mean, "development_loss": loss, "right": shares})
        click.echo(f"  {json.dumps(self.log[-1])}")
        self.save()


def train(
    model: Any, head: DraftHead, examples: Sequence[Example], folder: Path, recipe: Recipe, *, made_of: str
) -> Training:
    """Train a head of a model in a folder; takes up an interrupted run.

    Args:
        made_of: tells trainings apart by what they are given.

    Raises:
        RequestError: the folder has the checkpoint of another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = Training.start(head, folder, recipe, made_of)
    data = Data.of(model, head, examples, recipe)
    if training.step == 0:
        fitted = initialise(head, model, [example for example, _ in data.training[-RIDGE_EXAMPLES:]])
        click.echo(f"ridge fit: R2 {fitted:.3f}")
    total = training.num_steps(data)
    losses: list[float] = []
    with click.progressbar(length=total, label="draft head", width=30) as bar:
        bar.update(training.step)
        for batch in training.remaining(data):
            losses.append(training.update(data.frozen, batch, total))
            bar.update(1)
            if training.step % CHECKPOINT_STEPS == 0 or training.step == total:
                training.record(data, losses)
                losses.clear()
    return training
