"""Training and measuring one model of the sweep; a run that was stopped goes on where its last checkpoint is."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from engram_runtime.keyers import NgramKeyer
from engram_runtime.new_file import new_file
from examples.allocation.model import Decoder
from examples.allocation.sizes import Division, Sizes
from examples.allocation.text import Corpus

BETAS = (0.9, 0.95)
LEAST_RATE = 0.1  # of the learning rate, at the last step
DIGEST_DIGITS = 12

Optimiser = torch.optim.AdamW | torch.optim.SparseAdam


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every model of a sweep is trained.

    Attributes:
        windows: sequences per step.
        window_tokens: predicted tokens of a sequence.
        table_rate: learning rate of the table's rows, as a multiple of ``learning_rate``; they have no weight decay.
        balance: weight of the routers' balance loss.
        validation_tokens: how many tokens of the validation text are predicted.
        checkpoint_steps: after how many steps a run can go on.
    """

    steps: int
    windows: int = 4
    window_tokens: int = 128
    learning_rate: float = 4e-3
    table_rate: float = 5.0
    weight_decay: float = 0.1
    warm_up_steps: int = 50
    largest_gradient: float = 1.0
    balance: float = 0.01
    validation_tokens: int = 200_000
    checkpoint_steps: int = 100

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates: linear warm-up, then a cosine."""
        if step < self.warm_up_steps:
            return (step + 1) / self.warm_up_steps
        done = (step - self.warm_up_steps) / (self.steps - self.warm_up_steps)
        return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Run:
    """One model of a sweep."""

    sizes: Sizes
    recipe: Recipe
    experts: int
    seed: int

    def place(self, folder: Path) -> Path:
        """Return the file its outcome is written to: another for other sizes or another recipe."""
        text = json.dumps([asdict(self.sizes), asdict(self.recipe)])
        digest = sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]
        return folder / f"sweep-{digest}" / f"experts-{self.experts}-seed-{self.seed}.npz"


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        document_losses: ``[M]`` float64, summed cross entropy in nats of each validation document.
        document_tokens: ``[M]`` int64, its predicted tokens.
        training_losses: ``[steps]`` float64, mean cross entropy of each step, of text not seen before.
        balances: ``[steps]`` float64, how unequally the routers load the experts, 1 where not at all.
        cpu_s: processor time of the training.
    """

    document_losses: NDArray[np.float64]
    document_tokens: NDArray[np.int64]
    training_losses: NDArray[np.float64]
    balances: NDArray[np.float64]
    cpu_s: float

    @property
    def validation_loss(self) -> float:
        """Mean cross entropy in nats per token."""
        return float(self.document_losses.sum() / self.document_tokens.sum())


def read_outcome(place: Path) -> Outcome:
    """Read what `finish_run` wrote."""
    with np.load(place) as parts:
        arrays = {name: parts[name] for name in parts.files if name != "cpu_s"}
        return Outcome(**arrays, cpu_s=float(parts["cpu_s"]))


def finish_run(run: Run, corpus: Corpus, folder: Path, on_steps: Callable[[int], None]) -> Outcome:
    """Return the outcome of a run, trained from its last checkpoint if it is not there yet.

    Args:
        on_steps: told how many steps have been done since it was last told, those of earlier calls included.
    """
    place = run.place(folder)
    if place.is_file():
        on_steps(run.recipe.steps)
        return read_outcome(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    training = Training(run, corpus)
    checkpoint = place.with_suffix(".checkpoint")
    if checkpoint.is_file():
        training.load(checkpoint)
        on_steps(len(training.losses))
    for _ in training.steps():
        on_steps(1)
        if len(training.losses) % run.recipe.checkpoint_steps == 0:
            training.save(checkpoint)
    losses, tokens = validate(training.model, training.keyer, corpus, run.recipe)
    outcome = Outcome(losses, tokens, np.array(training.losses), np.array(training.balances), training.cpu_s)
    with new_file(place, replace=True) as file:
        np.savez_compressed(file, allow_pickle=False, **vars(outcome))
    checkpoint.unlink(missing_ok=True)
    return outcome


class Training:
    """A model that is being trained, with all that a checkpoint holds."""

    def __init__(self, run: Run, corpus: Corpus) -> None:
        torch.manual_seed(run.seed)
        division = Division(run.sizes, run.experts)
        self.recipe = run.recipe
        self.model = Decoder(division)
        self.keyer = division.keyer(corpus.token_map, corpus.end_id) if division.has_table else None
        self.optimisers = list(make_optimisers(self.model, run.recipe))
        self.losses: list[float] = []
        self.balances: list[float] = []
        self.cpu_s = 0.0
        self._text = cut_windows(corpus.training, run.recipe.window_tokens)
        self._order = np.random.default_rng(run.seed).permutation(len(self._text))

    def steps(self) -> Iterator[None]:
        """Do the steps that are left, one each time the next is asked for."""
        while len(self.losses) < self.recipe.steps:
            began = time.process_time()
            loss, balance = self._step(len(self.losses))
            self.losses.append(loss)
            self.balances.append(balance)
            self.cpu_s += time.process_time() - began
            yield

    def _step(self, step: int) -> tuple[float, float]:
        token_ids = self._batch(step)
        loss, balance = self.model.training_loss(torch.from_numpy(token_ids), row_ids(self.keyer, token_ids))
        torch.autograd.backward(loss + self.recipe.balance * balance)
        clip_grad_norm_([parameter for _, parameter in dense_parameters(self.model)], self.recipe.largest_gradient)
        for optimiser, base_rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = base_rate * self.recipe.rate(step)
            optimiser.step()
            optimiser.zero_grad()
        return float(loss.detach()), float(balance.detach())

    def _batch(self, step: int) -> NDArray[np.int64]:
        places = np.arange(step * self.recipe.windows, (step + 1) * self.recipe.windows) % len(self._order)
        return self._text[self._order[places]].astype(np.int64)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "losses": self.losses,
            "balances": self.balances,
            "cpu_s": self.cpu_s,
        }
        with new_file(path, replace=True) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Read what `save` wrote of the same run."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.losses, self.balances, self.cpu_s = state["losses"], state["balances"], state["cpu_s"]


def make_optimisers(model: Decoder, recipe: Recipe) -> Iterator[tuple[Optimiser, float]]:
    """Yield each optimiser with its base learning rate: AdamW for what every step touches, sparse Adam for rows."""
    dense = dense_parameters(model)
    groups = [
        {"params": [parameter for _, parameter in dense if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for _, parameter in dense if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    yield torch.optim.AdamW(groups, betas=BETAS, fused=True), recipe.learning_rate
    if model.site is not None:
        rows = [model.site.table.weight]
        yield torch.optim.SparseAdam(rows, betas=BETAS), recipe.learning_rate * recipe.table_rate


def dense_parameters(model: Decoder) -> list[tuple[str, torch.nn.Parameter]]:
    """Return names and values of all parameters but the table."""
    return [(name, parameter) for name, parameter in model.named_parameters() if name != "site.table.weight"]


def cut_windows(tokens: NDArray[np.int32], window_tokens: int) -> NDArray[np.int32]:
    """Return ``[W, window_tokens + 1]``: each begins with the last token of the one before, not predicted."""
    number = (len(tokens) - 1) // window_tokens
    starts = np.arange(number)[:, None] * window_tokens
    return tokens.take(starts + np.arange(window_tokens + 1))


def row_ids(keyer: NgramKeyer | None, token_ids: NDArray[np.int64]) -> Tensor | None:
    """Return ``[B, T, C]`` rows of the table for ``[B, T]`` token ids, None for a model without one."""
    if keyer is None:
        return None
    return torch.from_numpy(np.stack([keyer.row_ids((), window) for window in token_ids]))


@torch.no_grad()
def validate(
    model: Decoder, keyer: NgramKeyer | None, corpus: Corpus, recipe: Recipe
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the summed loss in nats and the predicted tokens of each validation document."""
    windows = cut_windows(corpus.validation[: recipe.validation_tokens + 1], recipe.window_tokens).astype(np.int64)
    losses = []
    for first in range(0, len(windows), recipe.windows):
        token_ids = windows[first : first + recipe.windows]
        targets = torch.from_numpy(token_ids[:, 1:])
        hidden, _ = model(torch.from_numpy(token_ids[:, :-1]), row_ids(keyer, token_ids[:, :-1]))
        logits = functional.linear(hidden, model.embedding.weight)
        losses.append(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").numpy())
    targets_in_line = windows[:, 1:].flatten()
    document = np.cumsum(targets_in_line == corpus.end_id) - (targets_in_line == corpus.end_id)
    summed = np.bincount(document, np.concatenate(losses))
    return summed.astype(np.float64), np.bincount(document).astype(np.int64)
