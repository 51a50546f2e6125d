"""The choice of a token: bias, penalties and what is told of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_runtime.errors import NumericError, RequestError
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.request import TextRequest

LOGITS = np.array([3.0, 2.5, 2.0, -1.0, 2.5], dtype=np.float32)


def chooser(**options: Any) -> Chooser:
    sampling = options.pop("sampling", SamplingOptions())
    return Chooser(TextRequest(prompt_ids=(0,), max_tokens=9, sampling=sampling, **options), len(LOGITS), None)


def chosen(choose: Chooser, count: int, logits: NDArray[np.float32] = LOGITS) -> list[int]:
    return [choose(logits, [0]) for _ in range(count)]


@given(
    st.lists(st.lists(st.floats(-9, 9, width=32), min_size=5, max_size=5), min_size=1, max_size=8), st.integers(0, 99)
)
def test_without_changes_it_draws_what_the_sampler_draws(rows: list[list[float]], seed: int) -> None:
    options = SamplingOptions(temperature=0.8, top_p=0.9, seed=seed)
    sample, choose = make_sampler(options), chooser(sampling=options, top_logprobs=2)
    logits = [np.array(row, dtype=np.float32) for row in rows]
    assert [choose(row, [0]) for row in logits] == [sample(row, [0]) for row in logits]


def test_bias_is_added_to_logits() -> None:
    assert chosen(chooser(logit_bias={3: 4.25}), 2) == [3, 3]
    assert chosen(chooser(logit_bias={0: -100.0, 1: -100.0}), 1) == [4]


def test_presence_is_penalised_once_and_not_in_the_prompt() -> None:
    assert chosen(chooser(presence_penalty=0.75), 5) == [0, 1, 4, 0, 0]


def test_frequency_is_penalised_each_time() -> None:
    # Token 0 is at 2.25 then, 1 and 4 are at 1.75, so that 2 comes with 2 when 0 is at 1.5.
    assert chosen(chooser(frequency_penalty=0.75), 5) == [0, 1, 4, 0, 2]


def test_bias_and_penalties_add_up() -> None:
    assert chosen(chooser(logit_bias={3: 4.75}, presence_penalty=0.25, frequency_penalty=0.25), 3) == [3, 3, 0]


def test_logits_stay_as_they_are() -> None:
    before = LOGITS.copy()
    chosen(chooser(logit_bias={1: 1.0}, frequency_penalty=1.0), 3)
    np.testing.assert_array_equal(before, LOGITS)


def test_log_probabilities_are_the_models_own() -> None:
    choose = chooser(logit_bias={3: 9.0}, top_logprobs=3, sampling=SamplingOptions(temperature=2.0, seed=0, top_k=1))
    assert chosen(choose, 1) == [3]
    probabilities = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()
    choice = choose.choices.popleft()
    assert choice.logprob == pytest.approx(np.log(probabilities[3]))
    assert [token_id for token_id, _ in choice.top] == [0, 1, 4]
    assert [logprob for _, logprob in choice.top] == pytest.approx(np.log(probabilities[[0, 1, 4]]).tolist())


@pytest.mark.parametrize(("top", "expected"), [(0, []), (2, [0, 1]), (9, [0, 1, 4, 2, 3])])
def test_the_likeliest_tokens_come_first_and_of_equal_ones_the_lower(top: int, expected: list[int]) -> None:
    choose = chooser(top_logprobs=top)
    chosen(choose, 1)
    assert [token_id for token_id, _ in choose.choices[0].top] == expected


def test_log_probabilities_are_told_only_where_they_are_wanted() -> None:
    choose = chooser()
    chosen(choose, 1)
    assert (choose.choices[0].logprob, choose.choices[0].top) == (None, ())


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NumericError, match="the model produced 1 logits of 5 that are nan or infinite"):
        chooser(logit_bias={0: 1.0}, top_logprobs=1)(np.array([0, np.nan, 1, 2, 3], dtype=np.float32), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan, wanted a finite number"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf, wanted a finite number"),
        ({"logit_bias": {4: float("-inf")}}, "logit_bias of 4 is -inf, wanted a finite number"),
        ({"top_logprobs": 101}, "top_logprobs is 101, wanted 0 to 100"),
        ({"time_limit_s": 0.0}, "time_limit_s is 0.0, wanted more than 0"),
        ({"time_limit_s": float("nan")}, "time_limit_s is nan, wanted more than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        chooser(**options)
    assert str(caught.value) == message
