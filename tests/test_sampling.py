"""Sampling equals transformers' logits processors, draws the stated distribution, and refuses bad input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation import logits_process as reference

from engram_runtime.errors import NumericError, RequestError
from engram_runtime.sampling import SamplingOptions, distribution, make_sampler


def random_logits(size: int, seed: int = 0) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def reference_probabilities(
    logits: NDArray[np.float32], token_ids: Sequence[int], options: SamplingOptions
) -> NDArray[np.float64]:
    """Probabilities ``[V]`` of transformers, in float64 so that rounding decides nothing."""
    processors = [
        reference.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)),
        reference.TemperatureLogitsWarper(float(options.temperature)),
        reference.TopKLogitsWarper(options.top_k or logits.size),
        reference.TopPLogitsWarper(options.top_p),
        reference.MinPLogitsWarper(options.min_p),
    ]
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for process in processors:
        scores = process(torch.tensor([list(token_ids)], dtype=torch.int64), scores)
    return np.asarray(torch.softmax(scores, dim=-1)[0].numpy())


def probabilities(
    logits: NDArray[np.float32], token_ids: Sequence[int], options: SamplingOptions
) -> NDArray[np.float64]:
    kept_ids, weights = distribution(logits, token_ids, options)
    result = np.zeros(logits.size)
    result[kept_ids] = weights / weights.sum()
    return result


@settings(max_examples=200, deadline=None)
@given(
    size=st.sampled_from([1, 2, 50, 300, 5000]),
    seed=st.integers(0, 2**32 - 1),
    token_ids=st.lists(st.integers(0, 6000), max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 40, 10_000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 10.0]),
)
def test_distribution_equals_the_processors_of_transformers(
    size: int, seed: int, token_ids: list[int], **options: Any
) -> None:
    chosen = SamplingOptions(**options)
    logits = random_logits(size, seed)
    expected = reference_probabilities(logits, token_ids, chosen)
    # 1e-12 is rounding: the two normalise at different steps
    np.testing.assert_allclose(probabilities(logits, token_ids, chosen), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.001, 0.01, 0.1, 0.5, 0.999999])
def test_top_p_finds_the_nucleus_however_many_tokens_it_has(top_p: float) -> None:
    options = SamplingOptions(temperature=4.0, top_p=top_p)
    logits = random_logits(20_000)
    expected = reference_probabilities(logits, [], options)
    np.testing.assert_allclose(probabilities(logits, [], options), expected, rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), penalty=st.sampled_from([0.5, 1.0, 1.3, 10.0]))
def test_greedy_takes_the_likeliest_after_the_penalty_of_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(100, seed)
    token_ids = [int(np.argmax(logits)), 3, 3, 99, 100, 5000]
    process = reference.RepetitionPenaltyLogitsProcessor(penalty)
    expected = process(torch.tensor([token_ids]), torch.from_numpy(logits.astype(np.float64))[None])
    sample = make_sampler(SamplingOptions(repetition_penalty=penalty))
    assert sample(logits, token_ids) == int(expected.argmax())


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert make_sampler(SamplingOptions())(np.array([1, 7, 7, 0], dtype=np.float32), []) == 1


def test_top_k_keeps_ties_with_the_last() -> None:
    logits = np.array([5, 1, 3, 3, 3, 0], dtype=np.float32)
    kept_ids, _ = distribution(logits, [], SamplingOptions(temperature=1.0, top_k=2))
    assert kept_ids.tolist() == [0, 2, 3, 4]


def test_top_p_keeps_the_first_of_a_tie() -> None:
    kept_ids, _ = distribution(np.zeros(10_000, dtype=np.float32), [], SamplingOptions(temperature=1.0, top_p=0.25))
    assert kept_ids.tolist() == list(range(2500))


def test_top_p_that_falls_on_a_sum_keeps_no_token_more() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32)
    kept_ids, _ = distribution(logits, [], SamplingOptions(temperature=1.0, top_p=0.75 - 1e-6))
    assert kept_ids.tolist() == [0, 1]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1000)
    sample = make_sampler(SamplingOptions(temperature=5e-324, seed=1))
    assert sample(logits, []) == int(np.argmax(logits))


def test_the_largest_logits_do_not_overflow() -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([largest, -largest, largest / 2], dtype=np.float32)
    options = SamplingOptions(temperature=0.01, top_k=2, top_p=0.9, min_p=0.1, repetition_penalty=0.01, seed=1)
    assert make_sampler(options)(logits, [0, 1]) == 0


def test_draws_follow_the_distribution() -> None:
    options = SamplingOptions(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    logits, token_ids, num_draws = random_logits(200), [1, 2, 3, 150], 20_000
    sample = make_sampler(options)
    counts = np.bincount([sample(logits, token_ids) for _ in range(num_draws)], minlength=logits.size)
    expected = reference_probabilities(logits, token_ids, options) * num_draws
    kept = expected > 0
    chi_square = np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept])
    degrees = np.count_nonzero(kept) - 1
    assert counts[~kept].sum() == 0
    # chi-square has mean `degrees` and variance 2 * degrees: four deviations, for the one seed above
    assert 8 <= degrees <= 19
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_a_seed_repeats_the_draws() -> None:
    def draw(seed: int | None) -> list[int]:
        sample = make_sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sample(random_logits(1000), []) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_draws_of_a_seed_stay_the_same_over_releases() -> None:
    sample = make_sampler(SamplingOptions(temperature=1.0, top_k=50, top_p=0.9, seed=2024))
    waves = [(4 * np.sin(step * np.arange(1000))).astype(np.float32) for step in range(1, 9)]
    assert [sample(logits, []) for logits in waves] == [674, 205, 300, 902, 988, 150, 81, 173]


def test_a_sampler_leaves_the_logits_as_they_are() -> None:
    logits = random_logits(100)
    before = logits.copy()
    make_sampler(SamplingOptions(temperature=0.5, top_k=5, repetition_penalty=2.0, seed=0))(logits, [1, 2])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    logits = np.array([1, np.nan, np.inf, -np.inf, 2], dtype=np.float32)
    with pytest.raises(NumericError) as caught:
        make_sampler(SamplingOptions(temperature=temperature))(logits, [])
    assert str(caught.value) == (
        "the model produced 3 logits of 5 that are nan or infinite, wanted finite numbers; "
        "check the bundle, or export it with a wider dtype"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, wanted between 0 and 100"),
        ({"temperature": float("nan")}, "temperature is nan, wanted between 0 and 100"),
        ({"temperature": float("inf")}, "temperature is inf, wanted between 0 and 100"),
        ({"top_k": -1}, "top_k is -1, wanted 0 for no limit or a positive number of tokens"),
        ({"top_p": 0.0}, "top_p is 0.0, wanted above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01, wanted above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan, wanted above 0 and at most 1"),
        ({"min_p": -0.5}, "min_p is -0.5, wanted between 0 and 1"),
        ({"min_p": float("nan")}, "min_p is nan, wanted between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, wanted between 0.01 and 100"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan, wanted between 0.01 and 100"),
        ({"seed": -1}, "seed is -1, wanted 0 or a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingOptions(**options)
    assert str(caught.value) == message
