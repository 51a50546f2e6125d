"""What a sweep shows: loss against the share of the table, with the noise of documents and of seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.evaluation.intervals import NORMAL_975, student_975
from examples.allocation.model import Decoder
from examples.allocation.sizes import Division
from examples.allocation.training import Outcome, Run

RESAMPLES, RESAMPLING_SEED = 2_000, 0
CURVE_POINTS = 10

Outcomes = Mapping[int, Sequence[Outcome]]  # those of all seeds, by the number of experts


@dataclass(frozen=True, slots=True)
class Difference:
    """Loss of one division less that of another in nats per token, seeds averaged.

    Attributes:
        document_error: standard error from which documents were drawn, both measured on the same.
        seed_error: standard error from initialisation and order of the training text, the spread of seeds pooled over
            all divisions; NaN where there is one seed.
        seed_degrees: degrees of freedom of that spread: of each division, the seeds but one.
    """

    mean: float
    document_error: float
    seed_error: float
    seed_degrees: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval from both errors, of documents alone where there is one seed.

        The sum has at least the degrees of freedom of the seeds, so their quantile is rather too wide than too narrow.
        """
        known = self.seed_degrees > 0
        error = math.hypot(self.document_error, self.seed_error) if known else self.document_error
        reach = (student_975(self.seed_degrees) if known else NORMAL_975) * error
        return self.mean - reach, self.mean + reach

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name, None for an error that is not known."""
        seed_error = None if math.isnan(self.seed_error) else self.seed_error
        return {**asdict(self), "seed_error": seed_error, "interval": self.interval}


def report(runs: Sequence[Run], outcomes: Sequence[Outcome], bytes_per_token: float) -> dict[str, Any]:
    """Return what is written to ``results.json``."""
    by_experts: dict[int, list[Outcome]] = {}
    for run, outcome in zip(runs, outcomes, strict=True):
        by_experts.setdefault(run.experts, []).append(outcome)
    sizes, recipe = runs[0].sizes, runs[0].recipe
    return {
        "sizes": asdict(sizes),
        "recipe": asdict(recipe),
        "training_tokens": recipe.steps * recipe.windows * recipe.window_tokens,
        "validation_tokens": int(outcomes[0].document_tokens.sum()),
        "validation_documents": len(outcomes[0].document_tokens),
        "bytes_per_token": bytes_per_token,
        "seeds": len(outcomes) // len(by_experts),
        "divisions": [division_report(Division(sizes, experts), by_experts) for experts in by_experts],
        "best": best_report(by_experts, sizes.most_experts, sizes.active_experts),
    }


def division_report(division: Division, outcomes: Outcomes) -> dict[str, Any]:
    """Return sizes and losses of one division."""
    own = outcomes[division.experts]
    total, active = count_parameters(division)
    curve = np.mean([each.training_losses for each in own], 0)
    return {
        "share": division.share,
        "experts": division.experts,
        "table_rows": int(division.primes.sum()) if division.has_table else 0,
        "parameters": total,
        "active_parameters": active,
        "validation_loss": mean_loss(own),
        "validation_loss_of_seeds": [outcome.validation_loss for outcome in own],
        "against_no_table": difference(outcomes, division.experts, division.sizes.most_experts).to_json(),
        "training_curve": [float(part.mean()) for part in np.array_split(curve, CURVE_POINTS)],
        "balance_at_end": float(np.mean([each.balances[-len(curve) // CURVE_POINTS :] for each in own])),
        "cpu_s": [outcome.cpu_s for outcome in own],
    }


def best_report(outcomes: Outcomes, most_experts: int, fewest_experts: int) -> dict[str, Any]:
    """Return the best division between the two ends and how it compares with them: a U has both intervals below 0."""
    between = outcomes.keys() - {most_experts, fewest_experts}
    best = min(between, key=lambda experts: mean_loss(outcomes[experts]))
    against_ends = [difference(outcomes, best, end) for end in (most_experts, fewest_experts)]
    return {
        "experts": best,
        "against_no_table": against_ends[0].to_json(),
        "against_all_table": against_ends[1].to_json(),
        "is_u": all(against.interval[1] < 0 for against in against_ends),
    }


def count_parameters(division: Division) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them take part in one token."""
    model, sizes = Decoder(division), division.sizes
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = (division.experts - sizes.active_experts) * sizes.expert_parameters
    if model.site is not None:
        idle += model.site.table.weight.numel() - sizes.memory_dim
    return total, total - idle


def mean_loss(outcomes: Sequence[Outcome]) -> float:
    """Return the validation loss, seeds averaged."""
    return float(np.mean([outcome.validation_loss for outcome in outcomes]))


def difference(outcomes: Outcomes, experts: int, other: int) -> Difference:
    """Return how the losses of two divisions differ."""
    own, against = outcomes[experts], outcomes[other]
    excess = np.mean([each.document_losses for each in own], 0) - np.mean([each.document_losses for each in against], 0)
    tokens = own[0].document_tokens
    seed_error = 0.0 if experts == other else pooled_deviation(outcomes) * math.sqrt(2 / len(own))
    seed_degrees = len(outcomes) * (len(own) - 1)
    return Difference(float(excess.sum() / tokens.sum()), document_error(excess, tokens), seed_error, seed_degrees)


def document_error(losses: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Return the standard error of the mean per token over documents drawn anew, by bootstrap.

    Args:
        losses: ``[M]``, summed over each document.
        tokens: ``[M]``, of each document.
    """
    rng = np.random.default_rng(RESAMPLING_SEED)
    drawn = (rng.integers(0, len(losses), len(losses)) for _ in range(RESAMPLES))
    return float(np.std([losses[documents].sum() / tokens[documents].sum() for documents in drawn]))


def pooled_deviation(outcomes: Outcomes) -> float:
    """Return the standard deviation of the loss between seeds, over all divisions; NaN where there is one seed."""
    losses = np.array([[each.validation_loss for each in own] for own in outcomes.values()])
    return float(np.sqrt(losses.var(1, ddof=1).mean())) if losses.shape[1] > 1 else math.nan
