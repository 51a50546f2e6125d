"""Samples that draft for each other are those that are drawn alone, whatever the drafts; and what look-up drafts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.tiny import CONTEXT, VOCAB
from tests.workshop import THREADS, Workshop, random_ids

from engram_runtime import LLM, Generation, SamplingOptions
from engram_runtime.drafting.lookup import ORDERS
from engram_runtime.errors import RequestError, TableError
from engram_runtime.parallel.drafts import SiblingDrafter, SiblingLookup
from engram_runtime.parallel.samples import Sample, draw_samples, seeded

PROMPT = random_ids(30) * 2
WARM = SamplingOptions(temperature=0.6, top_p=0.9, repetition_penalty=1.05, seed=5)
COUNT, TOKENS = 5, 40


@pytest.fixture(scope="module", params=[1, THREADS])
def llm(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[LLM]:
    with LLM(workshop.positional().path, threads=request.param) as llm:
        yield llm


class Scripted:
    """Drafts what it is told to, more than there is to spare too.

    Attributes:
        texts: those that it was told of, the prompt and each sample's, in their order.
        drafted: how many drafts it made.
    """

    def __init__(self, script: Callable[[int, Sequence[int], int], list[int]]) -> None:
        """Draft ``script(sample, its tokens so far, most)``."""
        self._script = script
        self.texts: list[list[int]] = []
        self.drafted = 0

    def add(self, text: list[int], count: int) -> None:
        if not any(text is other for other in self.texts):
            self.texts.append(text)

    def drafts(self, texts: Sequence[list[int]], most: Sequence[int], spare: int) -> list[list[int]]:
        made = [self._of(text, room) for text, room in zip(texts, most, strict=True)]
        self.drafted += sum(map(len, made))
        return made

    def _of(self, text: list[int], most: int) -> list[int]:
        (index,) = (index for index, other in enumerate(self.texts[1:]) if text is other)
        return self._script(index, text[len(self.texts[0]) :], most)[:most]


def drawn(llm: LLM, drafter: SiblingDrafter, prompt: Sequence[int] = PROMPT, **options: Any) -> list[Sample]:
    llm.session.trim(len(llm.session))
    logits = llm.session.prefill(prompt)
    each = seeded(WARM, COUNT)
    options = {"max_tokens": TOKENS} | options
    samples = draw_samples(llm.session, logits, llm.tokenizer, each, drafter=drafter, **options)
    return sorted(samples, key=lambda sample: sample.index)


def alone(llm: LLM, index: int, prompt: Sequence[int] = PROMPT, **options: Any) -> Generation:
    sampling = dataclasses.replace(WARM, seed=5 + index)
    return llm.generate(prompt, sampling=sampling, **({"max_tokens": TOKENS} | options))


def facts(made: Sample | Generation) -> tuple[str, tuple[int, ...], str]:
    return made.text, made.token_ids, made.finish_reason


@pytest.fixture(scope="module")
def truth(llm: LLM) -> list[tuple[int, ...]]:
    return [alone(llm, index).token_ids for index in range(COUNT)]


def right(truth: Sequence[Sequence[int]], index: int, said: Sequence[int], most: int) -> list[int]:
    return list(truth[index][len(said) :])


def wrong(truth: Sequence[Sequence[int]], index: int, said: Sequence[int], most: int) -> list[int]:
    return [(token_id + 1) % VOCAB for token_id in truth[index][len(said) : len(said) + 4]]


def erratic(truth: Sequence[Sequence[int]], index: int, said: Sequence[int], most: int) -> list[int]:
    """Draft another number each time, right up to somewhere."""
    rng = np.random.default_rng([index, len(said)])
    drafts = list(truth[index][len(said) : len(said) + int(rng.integers(9))])
    return drafts if rng.random() < 0.5 else [*drafts[: len(drafts) // 2], *random_ids(3, index)]


@pytest.mark.parametrize("script", [right, wrong, erratic])
@pytest.mark.parametrize("stop", [(), ("e", "ou")])
def test_samples_are_those_drawn_alone_whatever_is_drafted(
    llm: LLM, truth: list[tuple[int, ...]], script: Callable[..., list[int]], stop: tuple[str, ...]
) -> None:
    drafter = Scripted(lambda index, said, most: script(truth, index, said, most))
    samples = drawn(llm, drafter, stop=stop)
    assert [facts(sample) for sample in samples] == [facts(alone(llm, i, stop=stop)) for i in range(COUNT)]
    assert [sample.logprob for sample in samples] == [sample.logprob for sample in drawn(llm, NOTHING, stop=stop)]
    assert drafter.drafted > COUNT


def nothing(index: int, said: Sequence[int], most: int) -> list[int]:
    return []


NOTHING = Scripted(nothing)


def test_right_drafts_take_fewer_steps(llm: LLM, truth: list[tuple[int, ...]]) -> None:
    lengths: list[int] = []

    def noted(index: int, said: Sequence[int], most: int) -> list[int]:
        lengths.append(len(said))
        return right(truth, index, said, 7)[:7]

    drawn(llm, Scripted(noted))
    assert lengths == [count for count in range(1, TOKENS, 8) for _ in range(COUNT)]


@pytest.mark.parametrize("script", [right, erratic])
def test_an_end_token_among_accepted_drafts_ends_its_sample(
    llm: LLM, truth: list[tuple[int, ...]], script: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = frozenset({truth[0][17], truth[1][5], truth[3][29]})
    monkeypatch.setattr(llm.tokenizer, "eos_token_ids", ends)
    samples = drawn(llm, Scripted(lambda index, said, most: script(truth, index, said, most)))
    assert [facts(sample) for sample in samples] == [facts(alone(llm, index)) for index in range(COUNT)]
    assert "stop" in {sample.finish_reason for sample in samples}


@pytest.mark.parametrize("room", [1, 2, 9])
def test_drafts_end_with_the_context(llm: LLM, room: int) -> None:
    prompt = (PROMPT * 4)[: CONTEXT - room]
    expected = [alone(llm, index, prompt) for index in range(COUNT)]
    texts = [each.token_ids for each in expected]
    for drafter in (Scripted(lambda index, said, most: right(texts, index, said, most)), SiblingLookup()):
        samples = drawn(llm, drafter, prompt)
        assert [facts(sample) for sample in samples] == [facts(each) for each in expected]
        assert {(len(sample.token_ids), sample.finish_reason) for sample in samples} == {(room + 1, "context")}


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_samples_that_look_up_each_other_are_those_drawn_alone(llm: LLM, count: int) -> None:
    samples = llm.samples(PROMPT, count, max_tokens=TOKENS, sampling=WARM)
    assert {each.index: facts(each) for each in samples} == {i: facts(alone(llm, i)) for i in range(count)}


def test_a_drafter_that_proposes_no_token_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        drawn(llm, Scripted(lambda index, said, most: [VOCAB]))


def test_rows_of_drafts_that_can_not_be_read_are_done_without(
    llm: LLM, truth: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = llm.session.sites
    gather, refused = site.gather, []

    def some(row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        if len(row_ids) == COUNT + 1:
            refused.append(row_ids)
            raise TableError("rows can't be read")
        gather(row_ids, out)

    monkeypatch.setattr(site, "gather", some)
    drafter = Scripted(lambda index, said, most: right(truth, index, said, 1)[:1] if index == 2 else [])
    assert [sample.token_ids for sample in drawn(llm, drafter)] == truth
    assert len(refused) == drafter.drafted > TOKENS // 2


def test_rows_of_tokens_that_can_not_be_read_are_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (site,) = llm.session.sites
    gather = site.gather

    def some(row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        if len(row_ids) == COUNT:
            raise TableError("rows can't be read")
        gather(row_ids, out)

    monkeypatch.setattr(site, "gather", some)
    with pytest.raises(TableError, match="rows can't be read"):
        drawn(llm, NOTHING)


# Look-up

IDS = st.lists(st.integers(0, 2), max_size=12)


def searched(steps: Sequence[tuple[int, int]], texts: Sequence[Sequence[int]], index: int, most: int) -> list[int]:
    """Search all texts for the longest ending of one that stood before; of several, that which went on last."""
    ends = [0] * len(texts)
    places = []  # as tokens came: the text and how many tokens of it come before
    for of, count in steps:
        places += [(of, end) for end in range(ends[of], ends[of] + count)]
        ends[of] += count
    for order in ORDERS:
        for of, end in reversed(places):
            if order <= min(end, len(texts[index])) and texts[of][end - order : end] == texts[index][-order:]:
                return list(texts[of][end : end + most])
    return []


@given(data=st.data())
def test_drafts_are_what_followed_the_longest_ending_in_any_text(data: st.DataObject) -> None:
    lookup = SiblingLookup()
    texts: list[list[int]] = [[], [], []]
    steps = []
    for _ in range(data.draw(st.integers(0, 12))):
        index, more = data.draw(st.integers(0, 2)), data.draw(st.lists(st.integers(0, 2), max_size=5))
        texts[index] += more
        lookup.add(texts[index], len(more))
        steps.append((index, len(more)))
    most = data.draw(st.integers(1, 5))
    found = [lookup.drafts([text], [most], most)[0] for text in texts]
    assert found == [searched(steps, texts, index, most) for index in range(3)]


def test_drafts_are_shared_out_by_place_then_length_of_the_ending() -> None:
    lookup = SiblingLookup()
    known = list(range(20))
    lookup.add(known, len(known))
    texts = [[90, 4, 5], [91, 92, 93], [1, 2, 3], [97, 7, 8]]
    most = [9, 9, 2, 9]
    assert lookup.drafts(texts, most, 0) == [[], [], [], []]
    assert lookup.drafts(texts, most, 2) == [[6], [], [4], []]
    assert lookup.drafts(texts, most, 6) == [[6, 7], [], [4, 5], [9, 10]]
    assert lookup.drafts(texts, most, 7) == [[6, 7, 8], [], [4, 5], [9, 10]]


def test_a_position_that_is_no_token_is_not_drafted() -> None:
    lookup = SiblingLookup()
    known = [1, 2, 3, -1, 5]
    lookup.add(known, len(known))
    assert lookup.drafts([[1, 2]], [4], 4) == [[3]]
