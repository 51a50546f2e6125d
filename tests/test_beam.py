"""Beam search finds what a plain statement of it finds, on a model whose logits depend on every token before."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest

from engram_runtime.bundle import Bundle
from engram_runtime.errors import NumericError, RequestError
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.memory import FreeMemory
from engram_runtime.parallel import group as groups
from engram_runtime.parallel.beam import Beam, beam_search, log_softmax
from engram_runtime.session import Session

VOCAB, CONTEXT = 7, 32
PROMPT = [3, 1]

Model = Callable[[Sequence[int]], NDArray[np.float32]]


def toy_model(seed: int) -> Model:
    """Return a model that draws the logits ``[V]`` after each text, those of the end tokens a little higher."""
    bonus = np.array([1.0, 0.5, 0, 0, 0, 0, 0])

    def logits(token_ids: Sequence[int]) -> NDArray[np.float32]:
        drawn = np.random.default_rng([seed, *token_ids]).standard_normal(VOCAB)
        return np.asarray(drawn * 1.5 + bonus, dtype=np.float32)

    return logits


class Remembering:
    """Keeps token ids in its one state, an entry per position, and asks a model for the logits after what is there."""

    name, threads, expert_bytes_read, float16_states = "remembering", 1, None, ()
    experts_read = None

    def __init__(self, model: Model) -> None:
        self._model = model

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [count]

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        (state,) = states.values()

        def step(inputs: StepInputs) -> NDArray[np.float32]:
            end = inputs.position + len(inputs.token_ids)
            state[0, 0, inputs.position : end, 0] = inputs.token_ids
            seen = state[0, 0, :end, 0].astype(int).tolist()
            return np.stack([self._model(seen[: inputs.position + row + 1]) for row in inputs.logit_rows.tolist()])

        return FunctionStep(step)


def session_of(model: Model) -> Session:
    raw = sound_manifest()
    shape = [1, 1, CONTEXT, 1]
    raw["graphs"]["decoder"]["states"] = [{"name": "seen", "dtype": "float32", "shape": shape, "kind": "positional"}]
    return Session(Bundle(Path(), Manifest.from_dict(raw)), Remembering(model), [])


def stated(model: Model, width: int, max_tokens: int, end_ids: Collection[int], penalty: float) -> list[Beam]:
    """Beam search as a sentence says it: every continuation of every beam is made and all are sorted."""

    def score(beam: Beam) -> float:
        return beam.logprob / float(len(beam.token_ids) ** penalty)

    finished: list[Beam] = []
    followed = [Beam(token_ids=(), logprob=0.0)]
    for _ in range(max_tokens):
        every = [
            Beam(token_ids=(*beam.token_ids, token_id), logprob=beam.logprob + float(logprobs[token_id]))
            for beam in followed
            for logprobs in log_softmax(model([*PROMPT, *beam.token_ids])[None])
            for token_id in range(VOCAB)
        ]
        every.sort(key=lambda beam: -beam.logprob)
        followed = [beam for beam in every if beam.token_ids[-1] not in end_ids][:width]
        last = every.index(followed[-1])
        finished += [beam for beam in every[:last] if beam.token_ids[-1] in end_ids]
        finished = sorted(finished, key=lambda beam: -score(beam))[:width]
        # What is followed can become longer, which divides its sum by more, but its sum only falls.
        if len(finished) == width and score(finished[-1]) >= followed[0].logprob / max_tokens**penalty:
            break
    return sorted([*finished, *followed], key=lambda beam: -score(beam))[:width]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 5),
    max_tokens=st.integers(1, 9),
    end_ids=st.sampled_from([(), (0,), (0, 1)]),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
)
def test_beams_are_those_of_a_plain_statement(
    seed: int, width: int, max_tokens: int, end_ids: tuple[int, ...], penalty: float
) -> None:
    model = toy_model(seed)
    with session_of(model) as session:
        logits = session.prefill(PROMPT)
        found = beam_search(
            session, logits, width=width, max_tokens=max_tokens, end_ids=end_ids, length_penalty=penalty
        )
        assert session.token_ids == PROMPT
    assert found == stated(model, width, max_tokens, end_ids, penalty)


def test_a_beam_of_one_without_an_end_is_greedy() -> None:
    model = toy_model(4)
    expected: list[int] = []
    for _ in range(8):
        expected.append(int(model([*PROMPT, *expected]).argmax()))
    with session_of(model) as session:
        (beam,) = beam_search(session, session.prefill(PROMPT), width=1, max_tokens=8, end_ids=())
    assert list(beam.token_ids) == expected


def test_the_search_ends_with_the_context() -> None:
    model = toy_model(4)
    with session_of(model) as session:
        beams = beam_search(session, session.prefill(PROMPT), width=2, max_tokens=100, end_ids=())
    assert [len(beam.token_ids) for beam in beams] == [CONTEXT - len(PROMPT) + 1] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "beam width is 0, expected 1 to 1024"),
        ({"width": 1025}, "beam width is 1025, expected 1 to 1024"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"length_penalty": -0.5}, "length_penalty is -0.5, expected 0 to 10"),
        ({"length_penalty": 10.5}, "length_penalty is 10.5, expected 0 to 10"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, expected 0 to 10"),
    ],
)
def test_options_out_of_range_are_refused(options: Mapping[str, float], message: str) -> None:
    chosen = {"width": 2, "max_tokens": 3, "length_penalty": 1.0, **options}
    with session_of(toy_model(0)) as session, pytest.raises(RequestError) as caught:
        beam_search(session, session.prefill(PROMPT), end_ids=(), **chosen)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(("max_tokens", "tokens", "needed"), [(3, 3, 12), (100, CONTEXT - len(PROMPT), 120)])
def test_more_beams_than_memory_holds_are_refused(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, tokens: int, needed: int
) -> None:
    monkeypatch.setattr(groups, "free_memory", lambda: FreeMemory(num_bytes=1024 * needed - 1))
    with session_of(toy_model(0)) as session, pytest.raises(RequestError) as caught:
        beam_search(session, session.prefill(PROMPT), width=1024, max_tokens=max_tokens, end_ids=())
    assert str(caught.value) == (
        f"the states of 1024 sequences of {tokens} tokens need 0.0 GiB, 0.0 GiB of memory are available; "
        f"ask for fewer sequences or tokens"
    )


@pytest.mark.parametrize("length", [len(PROMPT), len(PROMPT) + 1])
def test_logits_that_are_not_finite_end_the_search(length: int) -> None:
    def broken(token_ids: Sequence[int]) -> NDArray[np.float32]:
        logits = toy_model(4)(token_ids)
        logits[3] = np.nan if len(token_ids) == length else logits[3]
        return logits

    with session_of(broken) as session:
        logits = session.prefill(PROMPT)
        with pytest.raises(NumericError, match=r"the model produced \d logits of \d+ that are nan or infinite"):
            beam_search(session, logits, width=2, max_tokens=4, end_ids=())
