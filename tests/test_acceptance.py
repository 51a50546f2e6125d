"""What is drawn has exactly the model's distribution, whatever is drafted: rejection sampling of certain drafts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest
from tests.toy_model import Scripted

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.schedule import Always
from engram_runtime.drafting.speculate import Speculation, decode_drafted
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session

VOCAB, CONTEXTS, TEXT, DRAWS = 64, 4, 400, 100_000
LEAST_P = 0.01
# What follows a token depends on its id modulo 4.
LOGITS = (1.5 * np.random.default_rng(1).standard_normal((CONTEXTS, VOCAB))).astype(np.float32)
IDS = {"name": "ids", "dtype": "float32", "shape": [1, 1, TEXT + 1, 1], "kind": "positional"}
OPTIONS = SamplingOptions(temperature=0.8, top_k=40)


class Chain:
    """An executor whose logits depend on the last token alone."""

    name, threads, expert_bytes_read, experts_read, float16_states = "chain", 1, None, None, ()

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [count]

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = LOGITS[inputs.token_ids[inputs.logit_rows] % CONTEXTS]
            return logits

        return FunctionStep(step)


def chain_session() -> Session:
    raw = sound_manifest()
    raw["graphs"]["decoder"] |= {"states": [IDS], "inputs": raw["graphs"]["decoder"]["inputs"][:3]}
    raw["graphs"]["decoder"]["outputs"] = [{"name": "logits", "dtype": "float32", "shape": ["R", VOCAB]}]
    raw["model"] |= {"vocab_size": VOCAB, "context_length": TEXT + 1}
    raw["tables"] = []
    return Session(Bundle(Path(), Manifest.from_dict(raw)), Chain(), [])


def exact() -> NDArray[np.float64]:
    """Return the odds ``[CONTEXTS, V]`` of each token, by the definition of temperature and top k."""
    odds = np.exp(LOGITS.astype(np.float64) / OPTIONS.temperature)
    odds[odds < np.sort(odds, axis=1)[:, -OPTIONS.top_k, None]] = 0
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def chi_square_p(counts: NDArray[np.int64], odds: NDArray[np.float64]) -> float:
    """Return how likely counts ``[C, V]`` are to be at least this far off; 0 where something impossible was drawn.

    By Wilson and Hilferty's normal approximation, which is within 0.001 for as many degrees of freedom as here.
    """
    possible = odds > 0
    if counts[~possible].any():
        return 0.0
    expected = counts.sum(axis=1, keepdims=True) * odds
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    freedom = possible.sum() - len(odds)
    spread = 2 / (9 * freedom)
    normal = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(normal / math.sqrt(2))


def likeliest(text: Sequence[int]) -> int:
    return int(LOGITS[text[-1] % CONTEXTS].argmax())


def unlikely(text: Sequence[int]) -> int:
    """Draft the least likely token that can be drawn."""
    row = LOGITS[text[-1] % CONTEXTS]
    return int(np.argsort(row)[-OPTIONS.top_k])


def impossible(text: Sequence[int]) -> int:
    return int(LOGITS[text[-1] % CONTEXTS].argmin())


def anything(text: Sequence[int]) -> int:
    return (31 * text[-1] + 17 * len(text)) % VOCAB


def by_turns(text: Sequence[int]) -> int:
    """Draft by a rule that what was said before chooses."""
    return (likeliest, unlikely, impossible, anything)[sum(text[-3:]) % 4](text)


def drawn(guess: Callable[[Sequence[int]], int], draws: int) -> tuple[NDArray[np.int64], DraftStatistics]:
    """Return how often each token was drawn after those of each context, ``[CONTEXTS, V]``."""
    session, statistics = chain_session(), DraftStatistics(drafter="any")
    counts = np.zeros((CONTEXTS, VOCAB), dtype=np.int64)
    for seed in range(draws // TEXT):
        session.trim(len(session))
        logits, sample = session.prefill([seed % VOCAB]), make_sampler(replace(OPTIONS, seed=seed))
        speculation = Speculation(Scripted(guess), Always(3), sample, statistics)
        tokens = decode_drafted(session, logits, speculation, max_tokens=TEXT, end_ids=())
        text = np.array([seed % VOCAB, *tokens])
        np.add.at(counts, (text[:-1] % CONTEXTS, text[1:]), 1)
    return counts, statistics


ALONE = [pytest.param(guess, marks=pytest.mark.exhaustive) for guess in (likeliest, unlikely, impossible, anything)]


@pytest.mark.parametrize("guess", [by_turns, *ALONE])
def test_drafted_text_has_the_models_distribution(guess: Callable[[Sequence[int]], int]) -> None:
    counts, statistics = drawn(guess, DRAWS)
    assert counts.sum() == DRAWS
    assert sum(statistics.drafted) > DRAWS / 2
    assert chi_square_p(counts, exact()) > LEAST_P


def test_the_statistic_finds_out_drafts_that_are_accepted_a_little_too_often() -> None:
    often = 0.97 * exact() + 0.03 * np.eye(VOCAB)[exact().argmax(axis=1)]
    counts = np.random.default_rng(5).multinomial(DRAWS // CONTEXTS, often)
    assert chi_square_p(counts, exact()) < 1e-6


def test_a_draft_is_accepted_with_the_probability_that_the_model_gives_it() -> None:
    counts, statistics = drawn(likeliest, 20_000)
    contexts = counts.sum(axis=1) / counts.sum()
    assert statistics.acceptance[0] == pytest.approx((contexts * exact().max(axis=1)).sum(), abs=0.02)
