"""Decoding by masks is the published loop, or, verified, plain decoding."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_families import compiled
from tests.test_manifest import sound_manifest
from tests.tiny import VOCAB as TINY_VOCAB
from tests.tiny_families import FAMILIES
from tests.workshop import Workshop, open_session, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.mask import (
    APPROXIMATE,
    VERIFIED,
    MaskOptions,
    confident,
    decode_by_masks,
    decode_by_verified_masks,
    find_mask_id,
)
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.generation import decode_tokens
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer

VOCAB, MASK, CONTEXT = 12, 11, 48
IDS = {"name": "ids", "dtype": "float32", "shape": [1, 1, CONTEXT, 1], "kind": "positional"}


# A model of twelve tokens that guesses at masks, now and then rightly and now and then surely


def drawn(*of: int) -> np.random.Generator:
    return np.random.default_rng([97, *of])


def next_token(text: Sequence[int]) -> int:
    """Return what follows a text, which depends on its last three tokens."""
    return int(drawn(*text[-3:]).integers(1, VOCAB - 1))


def toy_logits(prefix: Sequence[int]) -> NDArray[np.float32]:
    """Return ``[V]`` after tokens and masks; a mask is taken for what follows what is before it."""
    text: list[int] = []
    for token_id in prefix:
        text.append(next_token(text) if token_id == MASK else token_id)
    noise = drawn(*prefix)
    logits = noise.normal(size=VOCAB)
    astray = prefix[-1] == MASK and noise.random() < 0.25
    logits[noise.integers(1, VOCAB - 1) if astray else next_token(text)] += noise.choice([3.0, 5.0, 9.0])
    return logits.astype(np.float32)


class Toy:
    """An executor of that model, whose cache holds the ids by position."""

    name, threads, expert_bytes_read, float16_states = "toy", 1, None, ()
    experts_read = None

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [4] * (count // 4) + [1] * (count % 4)

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        cache = states["ids"][0, 0, :, 0]

        def step(inputs: StepInputs) -> NDArray[np.float32]:
            end = inputs.position + len(inputs.token_ids)
            cache[inputs.position : end] = inputs.token_ids
            prefixes = [cache[: inputs.position + row + 1].astype(int).tolist() for row in inputs.logit_rows]
            return np.array([toy_logits(prefix) for prefix in prefixes])

        return FunctionStep(step)


def toy_session() -> Session:
    raw = sound_manifest()
    raw["graphs"]["decoder"] |= {"states": [IDS], "inputs": raw["graphs"]["decoder"]["inputs"][:3]}
    raw["graphs"]["decoder"]["outputs"] = [{"name": "logits", "dtype": "float32", "shape": ["R", VOCAB]}]
    raw["model"] |= {"vocab_size": VOCAB, "context_length": CONTEXT}
    raw["tables"] = []
    return Session(Bundle(Path(), Manifest.from_dict(raw)), Toy(), [])


class NotedBlocks(DraftStatistics):
    """Statistics that keep each note."""

    notes: list[tuple[int, int]]

    def note(self, drafted: int, said: int) -> None:
        self.notes = [*getattr(self, "notes", []), (drafted, said)]
        super().note(drafted, said)


def published(
    prompt: Sequence[int], k: int, tau: float, sample: Callable[[NDArray[np.float32]], int]
) -> list[list[int]]:
    """Return the blocks of the paper's loop until the context is full, computing the whole text in each of its passes.

    Args:
        sample: draws a token where the block has no other.
    """
    text, blocks = list(prompt), []
    while len(text) + k - 1 <= CONTEXT:
        sequence = text + [MASK] * (k - 1)
        logits = [toy_logits(sequence[: end + 1]) for end in range(len(sequence))][-k:]
        accepted = []
        for row in logits:
            probabilities = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
            if probabilities.max() < tau:
                break
            accepted.append(int(np.argmax(row)))
        if len(accepted) <= 1:
            accepted = [sample(logits[0])]
        blocks.append(accepted)
        text += accepted
    return blocks


def plain(session: Session, logits: NDArray[np.float32], sampling: SamplingOptions, most: int) -> list[int]:
    return list(decode_tokens(session, logits, make_sampler(sampling), max_tokens=most, end_ids=(3,)))


GREEDY = SamplingOptions()
SAMPLED = SamplingOptions(temperature=1.5, repetition_penalty=1.3, seed=5)
PROMPTS = st.lists(st.integers(1, VOCAB - 2), min_size=1, max_size=5)
with_prompts = given(
    prompt=PROMPTS,
    k=st.integers(1, 6),
    tau=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    sampling=st.sampled_from([GREEDY, SamplingOptions(temperature=1.5, seed=5)]),
)


@with_prompts
@settings(deadline=None, max_examples=40)
def test_each_block_is_that_of_the_published_loop(
    prompt: list[int], k: int, tau: float, sampling: SamplingOptions
) -> None:
    sample, session, notes = make_sampler(sampling), toy_session(), NotedBlocks(drafter=APPROXIMATE)
    blocks = published(prompt, k, tau, lambda row: sample(row, []))
    options = MaskOptions(mask_id=MASK, most=k, confidence=tau)
    said = sum(map(len, blocks))
    found = decode_by_masks(
        session,
        session.prefill(prompt),
        make_sampler(sampling),
        options,
        max_tokens=said,
        end_ids=(),
        statistics=notes,
    )
    assert list(found) == [token_id for block in blocks for token_id in block]
    assert notes.notes == [(k - 1, len(block)) for block in blocks]


def test_the_toy_takes_blocks_of_every_length() -> None:
    lengths = {len(block) for seed in range(1, 8) for block in published([seed], 4, 0.9, lambda row: int(row.argmax()))}
    assert lengths == {1, 2, 3, 4}


@given(prompt=PROMPTS, k=st.integers(1, 6), tau=st.sampled_from([0.0, 0.5, 0.9]), most=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_an_approximate_text_ends_where_a_plain_one_would(prompt: list[int], k: int, tau: float, most: int) -> None:
    session = toy_session()
    options = MaskOptions(mask_id=MASK, most=k, confidence=tau)
    found = list(
        decode_by_masks(
            session,
            session.prefill(prompt),
            make_sampler(GREEDY),
            options,
            max_tokens=most,
            end_ids=(3,),
            statistics=DraftStatistics(drafter=APPROXIMATE),
        )
    )
    assert 3 not in found[:-1]
    assert found[-1] == 3 or len(found) == min(most, CONTEXT - len(prompt) + 1)


@given(
    prompt=PROMPTS,
    k=st.integers(1, 6),
    tau=st.sampled_from([0.0, 0.5, 0.9]),
    most=st.integers(1, 60),
    sampling=st.sampled_from([GREEDY, SAMPLED]),
    left=st.integers(1, 60),
)
@settings(deadline=None, max_examples=100)
def test_verified_text_is_plain_text_and_so_is_what_the_session_holds(
    prompt: list[int], k: int, tau: float, most: int, sampling: SamplingOptions, left: int
) -> None:
    """Until it is left after so many tokens."""
    reference, session = toy_session(), toy_session()
    expected = plain(reference, reference.prefill(prompt), sampling, min(most, left))
    options = MaskOptions(mask_id=MASK, most=k, confidence=tau)
    tokens = decode_by_verified_masks(
        session,
        session.prefill(prompt),
        make_sampler(sampling),
        options,
        max_tokens=most,
        end_ids=(3,),
        statistics=DraftStatistics(drafter=VERIFIED),
    )
    with contextlib.closing(tokens):
        found = [token_id for _, token_id in zip(range(left), tokens, strict=False)]
    assert found == expected
    assert session.token_ids == reference.token_ids


def test_verified_masks_say_several_tokens_a_pass() -> None:
    session, statistics = toy_session(), DraftStatistics(drafter=VERIFIED)
    list(
        decode_by_verified_masks(
            session,
            session.prefill([1]),
            make_sampler(GREEDY),
            MaskOptions(mask_id=MASK, confidence=0.5),
            max_tokens=40,
            end_ids=(),
            statistics=statistics,
        )
    )
    assert statistics.tokens == 39
    assert statistics.tokens_per_forward > 1.4


def test_the_confident_are_those_before_the_first_that_is_not() -> None:
    rows = np.log(np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9]]) + 1e-12).astype(np.float32)
    assert [confident(rows, tau) for tau in (0.9, 0.6, 0.4)] == [[0], [0], [0, 1, 2]]


# Compiled bundles


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_5_moe", marks=pytest.mark.exhaustive)])
def test_verified_masks_give_the_text_of_a_compiled_bundle(workshop: Workshop, family: str, threads: int) -> None:
    """Its logits are held against plain ones by the sampler, which sees the same bits."""
    bundle = workshop.ready() if family == "llama" else compiled(workshop, FAMILIES[family][0], "int8")
    prompt = random_ids(9)
    seen: list[list[NDArray[np.float32]]] = [[], []]

    def keeping(logits: list[NDArray[np.float32]]) -> Callable[[NDArray[np.float32], Sequence[int]], int]:
        def sample(row: NDArray[np.float32], token_ids: Sequence[int]) -> int:
            logits.append(row.copy())
            return int(row.argmax())

        return sample

    with open_session(bundle, "tvm", threads=threads) as session:
        expected = list(decode_tokens(session, session.prefill(prompt), keeping(seen[0]), max_tokens=24, end_ids=()))
    for k in (2, 4):
        seen[1].clear()
        with open_session(bundle, "tvm", threads=threads) as session:
            tokens = decode_by_verified_masks(
                session,
                session.prefill(prompt),
                keeping(seen[1]),
                MaskOptions(mask_id=TINY_VOCAB - 1, most=k, confidence=0.0),
                max_tokens=24,
                end_ids=(),
                statistics=DraftStatistics(drafter=VERIFIED),
            )
            assert list(tokens) == expected
        np.testing.assert_array_equal(np.array(seen[1]), np.array(seen[0]), strict=True)


# Options


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"most": 0}, "tokens a pass are 0, expected 1 to 16"),
        ({"most": 17}, "tokens a pass are 17, expected 1 to 16"),
        ({"confidence": 1.5}, "confidence is 1.5, expected 0 to 1"),
    ],
)
def test_options_that_cant_be_are_refused(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        MaskOptions(mask_id=0, **values)
    assert str(caught.value) == sentence


def test_a_mask_outside_the_vocabulary_is_refused() -> None:
    session = toy_session()
    logits = session.prefill([1])
    tokens = decode_by_masks(
        session,
        logits,
        make_sampler(GREEDY),
        MaskOptions(mask_id=VOCAB),
        max_tokens=4,
        end_ids=(),
        statistics=DraftStatistics(drafter=APPROXIMATE),
    )
    with pytest.raises(RequestError) as caught:
        next(tokens)
    assert str(caught.value) == "token id 12 is outside the vocabulary of 12"
    assert session.token_ids == [1]


def test_a_tokenizer_without_masks_says_so(workshop: Workshop) -> None:
    with pytest.raises(RequestError) as caught:
        find_mask_id(TextTokenizer.load(workshop.uncompiled().path))
    assert str(caught.value) == (
        "the tokenizer has no <|mtp_special_token_0|>, with which mask drafting marks unknown tokens; name the mask's "
        "id, or choose another drafter"
    )
