"""Samples that are drawn together are those that are drawn alone; the best of them, and what they agree on."""

import dataclasses
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Command
from tests.tiny import CONTEXT
from tests.workshop import THREADS, Workshop

from engram_runtime import LLM, SamplingOptions
from engram_runtime.errors import RequestError
from engram_runtime.memory import FreeMemory
from engram_runtime.parallel import group as groups
from engram_runtime.parallel.samples import Sample, best_of, is_decided, log_probability, seeded, vote

PROMPT = "The tide comes in"
WARM = SamplingOptions(temperature=1.0, repetition_penalty=1.1, seed=5)
EXECUTORS = ["tvm", "onnxruntime"]
COUNT = 6


@pytest.fixture(scope="module", params=EXECUTORS)
def llm(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[LLM]:
    with LLM(workshop.ready().path, request.param, threads=THREADS) as llm:
        yield llm


def drawn(llm: LLM, count: int = COUNT, *, stop: tuple[str, ...] = (), max_tokens: int = 12) -> list[Sample]:
    samples = llm.samples(PROMPT, count, max_tokens=max_tokens, sampling=WARM, stop=stop)
    return sorted(samples, key=lambda sample: sample.index)


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_each_sample_is_the_generation_with_its_seed(llm: LLM, stop: tuple[str, ...]) -> None:
    samples = drawn(llm, stop=stop)
    assert [sample.seed for sample in samples] == list(range(5, 5 + COUNT))
    for sample in samples:
        options = dataclasses.replace(WARM, seed=sample.seed)
        alone = llm.generate(PROMPT, max_tokens=12, sampling=options, stop=stop)
        assert (sample.text, sample.token_ids) == (alone.text, alone.token_ids)
        assert sample.finish_reason == alone.finish_reason


def test_samples_end_with_the_context(llm: LLM) -> None:
    prompt = [7] * (CONTEXT - 3)
    samples = list(llm.samples(prompt, 2, max_tokens=50, sampling=WARM))
    assert [(len(sample.token_ids), sample.finish_reason) for sample in samples] == [(4, "context")] * 2


def test_a_sample_that_ends_earlier_comes_earlier(llm: LLM) -> None:
    samples = list(llm.samples(PROMPT, COUNT, max_tokens=12, sampling=WARM, stop=("e",)))
    lengths = [len(sample.token_ids) for sample in samples]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_log_probability_is_the_sum_over_the_tokens(llm: LLM) -> None:
    (sample,) = drawn(llm, 1)
    ids = llm.tokenizer.encode(PROMPT)
    logits = llm.logits([*ids, *sample.token_ids])[len(ids) - 1 : -1].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log(probabilities[np.arange(len(sample.token_ids)), list(sample.token_ids)]).sum()
    assert sample.logprob == pytest.approx(expected, rel=1e-3 if llm.executor.name == "onnxruntime" else 1e-5)


def test_the_log_probability_of_large_logits_does_not_overflow() -> None:
    assert log_probability(np.array([1e4, 1e4, -1e4], dtype=np.float32), 1) == pytest.approx(np.log(0.5))


def test_samples_without_a_seed_have_one_to_be_drawn_again_with(llm: LLM) -> None:
    free = dataclasses.replace(WARM, seed=None)
    first, second = (list(llm.samples(PROMPT, 1, max_tokens=8, sampling=free)) for _ in range(2))
    assert first[0].seed != second[0].seed
    again = llm.generate(PROMPT, max_tokens=8, sampling=dataclasses.replace(WARM, seed=first[0].seed))
    assert again.token_ids == first[0].token_ids


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        (WARM, 0, "n is 0, expected 1 to 1024"),
        (WARM, 1025, "n is 1025, expected 1 to 1024"),
        (SamplingOptions(), 3, "3 samples at temperature 0 are all the same; set a temperature"),
    ],
)
def test_samples_that_can_not_be_drawn_are_refused(options: SamplingOptions, count: int, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        seeded(options, count)


def test_more_samples_than_memory_holds_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "free_memory", lambda: FreeMemory(num_bytes=0))
    with pytest.raises(RequestError) as caught:
        drawn(llm)
    assert str(caught.value) == (
        "the states of 6 sequences of 12 tokens need 0.0 GiB, 0.0 GiB of memory are available; "
        "ask for fewer sequences or tokens"
    )


def test_one_sample_at_temperature_0_is_greedy(llm: LLM) -> None:
    (sample,) = llm.samples(PROMPT, 1, max_tokens=6, sampling=SamplingOptions())
    assert sample.token_ids == llm.generate(PROMPT, max_tokens=6).token_ids


# Choosing


def sample(index: int, text: str = "", logprob: float = 0.0) -> Sample:
    return Sample(index=index, seed=index, text=text, token_ids=(), finish_reason="stop", logprob=logprob)


def test_the_best_sample_has_the_highest_score_and_of_equal_ones_comes_first() -> None:
    samples = [sample(2, "bb", -3.0), sample(1, "a", -1.0), sample(0, "cc", -2.0)]
    assert best_of(samples).index == 1
    assert best_of(samples, lambda each: len(each.text)).index == 0


def generated(samples: Iterable[Sample]) -> Generator[Sample, None, None]:
    yield from samples


def test_a_vote_goes_to_the_most_frequent_answer() -> None:
    texts = ["3", "5", "no number", "5", "7"]
    made = vote(generated([sample(i, text) for i, text in enumerate(texts)]), 5, first_digit)
    assert (made.answer, dict(made.counts), len(made.samples)) == ("5", {"3": 1, "5": 2, "7": 1}, 5)


def first_digit(text: str) -> str | None:
    return text if text.isdigit() else None


def test_of_equally_frequent_answers_that_of_the_first_sample_wins() -> None:
    finished = [sample(2, "5"), sample(0, "3"), sample(3, "5"), sample(1, "3")]
    assert vote(generated(finished), 4, first_digit).answer == "3"


def test_samples_without_an_answer_have_no_vote() -> None:
    assert vote(generated([sample(0, "?"), sample(1, "!")]), 2, first_digit).answer is None


def test_a_vote_draws_no_more_samples_than_decide_it() -> None:
    remaining = iter([sample(i, text) for i, text in enumerate("5535555")])
    samples = generated(remaining)
    made = vote(samples, 7, first_digit)
    assert (made.answer, len(made.samples)) == ("5", 5)
    assert len(list(remaining)) == 2
    assert inspect.getgeneratorstate(samples) == inspect.GEN_CLOSED


@given(votes=st.lists(st.sampled_from("abc"), max_size=6), outstanding=st.integers(0, 4))
def test_a_vote_is_decided_exactly_when_no_votes_to_come_can_bring_another_level(
    votes: list[str], outstanding: int
) -> None:
    counts = Counter(votes)
    leader = max(counts, key=lambda answer: counts[answer]) if counts else None

    def stays_alone_in_front(more: tuple[str | None, ...]) -> bool:
        totals = counts + Counter(answer for answer in more if answer is not None)
        return leader is not None and all(totals[leader] > totals[other] for other in totals if other != leader)

    every = itertools.product(["a", "b", "c", "another", None], repeat=outstanding)
    assert is_decided(counts, outstanding) == all(stays_alone_in_front(more) for more in every)


def test_a_vote_over_samples_leaves_the_llm_as_it_was(llm: LLM) -> None:
    made = vote(llm.samples(PROMPT, 5, max_tokens=3, sampling=WARM), 5, lambda text: "the same")
    assert (made.answer, len(made.samples)) == ("the same", 3)
    assert llm.generate(PROMPT, max_tokens=12, sampling=WARM).token_ids == drawn(llm, 1)[0].token_ids


# The command


def run(command: Command, workshop: Workshop, *options: object) -> "tuple[str, str]":
    outcome = command(
        "engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 12, "--temperature", 1, "--seed", 5, *options
    )
    return outcome.out, outcome.err


def test_run_prints_every_sample(command: Command, workshop: Workshop) -> None:
    out, err = run(command, workshop, "--n", 3)
    alone = [run(command, workshop, "--seed", seed)[0] for seed in (5, 6, 7)]
    assert out == "".join(alone)
    figures = [line for line in err.splitlines() if line.startswith("[")]
    assert [line.partition(":")[0] for line in figures[:3]] == [f"[sample {i}, seed {5 + i}" for i in range(3)]
    tokens = sum(int(line.partition(": ")[2].partition(" ")[0]) for line in figures[:3])
    assert figures[3].startswith(f"[3 samples, {tokens} tokens in ")


def test_run_prints_the_best_sample(command: Command, workshop: Workshop) -> None:
    outcome = command(
        "engram", "run", workshop.ready().path, PROMPT, "--n", 4, "--best-of", "logprob", "--max-tokens", 12,
        "--temperature", 1, "--seed", 5, "--json",
    )  # fmt: skip
    samples = outcome.json["samples"]
    likeliest = max(samples, key=lambda sample: sample["logprob"])
    assert outcome.json["best"] == likeliest["index"]
    assert run(command, workshop, "--n", 4, "--best-of", "logprob")[0] == likeliest["text"] + "\n"


def test_run_has_nothing_to_choose_from_one_sample(command: Command, workshop: Workshop) -> None:
    assert run(command, workshop, "--best-of", "logprob") == (
        "",
        "engram: --best-of logprob chooses among samples; give --n 2 or more\n",
    )
