"""What is accepted or drawn anew has exactly the model's distribution, whatever is drafted and from whatever odds."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_runtime.drafting.acceptance import accept_or_redraw, by_rejection, by_sampling
from engram_runtime.drafting.drafter import Draft, Odds
from engram_runtime.sampling import SamplingOptions, draw, make_sampler

VOCAB, DRAWS = 64, 100_000
ALL = np.arange(VOCAB)
LEAST_P = 0.01
Probabilities = NDArray[np.float64]


def soft(seed: int, spread: float) -> Probabilities:
    weights = np.exp(spread * np.random.default_rng(seed).standard_normal(VOCAB))
    return np.asarray(weights / weights.sum())


def only(probabilities: Probabilities, kept: NDArray[np.bool_]) -> Probabilities:
    return np.asarray(np.where(kept, probabilities, 0) / probabilities[kept].sum())


MODEL = soft(1, 1.5)
LIKELY = np.median(MODEL) < MODEL
DRAFTED: dict[str, tuple[Probabilities, Probabilities]] = {  # what the model says, and what drafts are drawn from
    "another": (MODEL, soft(2, 1.5)),
    "the model's own": (MODEL, MODEL),
    "nearly the model's": (MODEL, only(MODEL + 1e-17 * np.arange(VOCAB), ALL >= 0)),
    "nothing where the model has something": (MODEL, only(soft(2, 1.5), ~LIKELY)),
    "something where the model has nothing": (only(MODEL, LIKELY), soft(2, 1.5)),
    "disjoint": (only(MODEL, LIKELY), only(MODEL, ~LIKELY)),
    "one token, unlikely": (MODEL, np.eye(VOCAB)[MODEL.argmin()]),
    "one token, likely": (MODEL, np.eye(VOCAB)[MODEL.argmax()]),
    "flat": (MODEL, np.full(VOCAB, 1 / VOCAB)),
    "the model turned round": (MODEL, MODEL[::-1].copy()),
}

DEFAULT = ("another", "the model's own", "nothing where the model has something", "disjoint")


def odds(probabilities: Probabilities) -> Odds:
    """Return the tokens with any probability, as samplers keep them."""
    kept = np.flatnonzero(probabilities)
    return Odds(kept, probabilities[kept])


def chi_square_p(counts: NDArray[np.int64], probabilities: Probabilities) -> float:
    """Return how likely counts are to be at least this far off; 0 where something impossible was drawn.

    By Wilson and Hilferty's normal approximation, which is within 0.001 for as many degrees of freedom as here.
    """
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    expected = counts.sum() * probabilities[possible]
    statistic, freedom = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    spread = 2 / (9 * freedom)
    normal = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(normal / math.sqrt(2))


def counted(draw_once: Callable[[], int], draws: int = DRAWS) -> NDArray[np.int64]:
    return np.bincount([draw_once() for _ in range(draws)], minlength=VOCAB)


@pytest.mark.parametrize(
    "name", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in DRAFTED if name not in DEFAULT)]
)
def test_text_from_drawn_drafts_has_the_models_distribution(name: str) -> None:
    model, drafted = DRAFTED[name]
    drafter, verifier = np.random.default_rng(3), np.random.default_rng(4)
    wanted, proposed = odds(model), odds(drafted)

    def draw_once() -> int:
        return accept_or_redraw(wanted, draw(*proposed, drafter), proposed, verifier)

    assert chi_square_p(counted(draw_once), model) > LEAST_P


def test_the_statistic_finds_out_a_distribution_that_is_a_little_off() -> None:
    model, drafted = DRAFTED["another"]
    rng = np.random.default_rng(5)
    assert chi_square_p(counted(lambda: draw(*odds(0.98 * model + 0.02 * drafted), rng)), model) < 1e-6


@pytest.mark.parametrize("name", ["another", "the model's own", "disjoint"])
def test_as_many_drafts_are_accepted_as_both_distributions_share(name: str) -> None:
    model, drafted = DRAFTED[name]
    drafter, verifier = np.random.default_rng(6), np.random.default_rng(7)
    wanted, proposed = odds(model), odds(drafted)
    drafts = [draw(*proposed, drafter) for _ in range(20_000)]
    accepted = sum(accept_or_redraw(wanted, draft, proposed, verifier) == draft for draft in drafts)
    assert accepted / len(drafts) == pytest.approx(np.minimum(model, drafted).sum(), abs=0.012)


@pytest.mark.parametrize("drafted", ["likely", "unlikely", "none"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_certain_drafts_leave_the_draws_of_a_seed_as_they_are(drafted: str, temperature: float) -> None:
    logits = np.log(MODEL).astype(np.float32)
    options = SamplingOptions(temperature=temperature, top_p=0.95, seed=9)
    certain = {"likely": Draft(int(MODEL.argmax())), "unlikely": Draft(int(MODEL.argmin())), "none": None}[drafted]
    plain = make_sampler(options)
    expected = [plain(logits, []) for _ in range(200)]
    for choose in (by_sampling(make_sampler(options)), by_rejection(options)):
        assert [choose(logits, [], certain) for _ in range(200)] == expected


def test_rejection_keeps_to_temperature_and_nucleus() -> None:
    options = SamplingOptions(temperature=0.7, top_k=20, min_p=0.01, seed=10)
    logits = np.log(MODEL).astype(np.float32)
    cold = MODEL ** (1 / 0.7)
    cold = only(cold, (cold >= np.sort(cold)[-20]) & (cold >= 0.01 * cold.max()))
    drafter, proposed = np.random.default_rng(11), odds(soft(2, 1.5))
    choose = by_rejection(options)
    counts = counted(lambda: choose(logits, [], Draft(draw(*proposed, drafter), proposed)), 30_000)
    assert chi_square_p(counts, cold) > LEAST_P
