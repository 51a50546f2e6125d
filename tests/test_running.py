"""Texts that grow together are the texts they are alone, whatever comes and goes beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy_model import CONTEXT, VOCAB, Scripted, erratic
from tests.toy_serving import (
    END,
    POSITIONAL,
    RECURRENT,
    TakingTurns,
    Together,
    Told,
    said,
    said_alone,
    toy_bundle,
    toy_tokenizer,
)

from engram_runtime.drafting.opening import Decoding, Drafting
from engram_runtime.drafting.schedule import Always
from engram_runtime.errors import BundleError
from engram_runtime.generation import GrowingText
from engram_runtime.sampling import SamplingOptions
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.queue import FairQueue
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.running import RunningTexts
from engram_runtime.serving.text import Job, Text
from engram_runtime.serving.usage import Usage
from engram_runtime.session import Session

TOKENIZER = toy_tokenizer()


@dataclass(frozen=True)
class Arrival:
    """A request, the turn before which it comes, and the one before which it is cancelled, if it is."""

    request: TextRequest
    comes: int = 0
    cancelled: int | None = None


class Server:
    """Texts that run in sessions of a toy, turn by turn."""

    def __init__(self, model: TakingTurns, kind: str, slots: int, decoding: Decoding | None = None) -> None:
        self.bundle = toy_bundle(kind)
        self.sessions = [Session(self.bundle, model, []) for _ in range(slots)]
        self.running = RunningTexts(self.sessions, {END}, decoding, self._watch)
        self.queue = FairQueue()
        self.jobs: list[Job] = []
        self.told: list[Told] = []
        self.cancels: Job | None = None  # at the next pass of a prompt

    def _watch(self, figures: StepFigures) -> None:
        if self.cancels is not None and figures.prompt_tokens:
            self.cancels.cancelled = True

    def submit(self, request: TextRequest, growing_text: type[GrowingText] = GrowingText) -> Told:
        self.told.append(Told())
        self.jobs.append(Job("", self.told[-1], 0.0))
        growing = growing_text(TOKENIZER, request.stop, request.max_tokens)
        self.queue.add(Text(self.jobs[-1], 0, request, growing, Chooser(request, VOCAB, None), Usage([])))
        return self.told[-1]

    def turn(self) -> None:
        while self.queue and self.running.slots.free:
            self.running.admit(self.queue.take())
        self.running.turn()

    def serve(self, arrivals: Sequence[Arrival]) -> list[Told]:
        """Take turns until all have ended."""
        turn, waiting = 0, list(arrivals)
        by_arrival: dict[int, Told] = {}
        jobs: dict[int, Job] = {}
        while waiting or self.queue or len(self.running):
            for index, arrival in enumerate(arrivals):
                if arrival in waiting and arrival.comes <= turn and index not in by_arrival:
                    by_arrival[index] = self.submit(arrival.request)
                    jobs[index] = self.jobs[-1]
                    waiting.remove(arrival)
                if arrival.cancelled is not None and arrival.cancelled <= turn and index in jobs:
                    jobs[index].cancelled = True
            self.turn()
            turn += 1
        return [by_arrival[index] for index in range(len(arrivals))]


def asked(
    prompt: Sequence[int], max_tokens: int = 6, *, seed: int | None = None, stop: tuple[str, ...] = ()
) -> TextRequest:
    """Return a request, greedy without a seed."""
    sampling = SamplingOptions() if seed is None else SamplingOptions(temperature=1.0, seed=seed)
    far = 1e9  # jobs of these tests begin at 0
    return TextRequest(prompt_ids=tuple(prompt), max_tokens=max_tokens, sampling=sampling, stop=stop, time_limit_s=far)


prompts = st.lists(st.integers(1, 3), min_size=1, max_size=CONTEXT)
requests = st.builds(
    asked,
    prompts,
    st.integers(1, 12),
    seed=st.none() | st.integers(0, 9),
    stop=st.sampled_from([(), ("w3",), ("w12", "4")]),
)
arrivals = st.builds(Arrival, requests, comes=st.integers(0, 12), cancelled=st.none() | st.none() | st.integers(0, 20))
MODELS = {"together": Together, "taking turns": TakingTurns}


@pytest.mark.parametrize("kind", [POSITIONAL, RECURRENT])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("drafts", [None, 2])
@settings(max_examples=80, deadline=None)
@given(given_arrivals=st.lists(arrivals, min_size=1, max_size=7), slots=st.integers(1, 4))
def test_texts_are_those_of_sessions_that_are_alone(
    kind: str, model: str, drafts: int | None, given_arrivals: list[Arrival], slots: int
) -> None:
    decoding = None if drafts is None else Drafting(Scripted(erratic), Always(drafts))
    server = Server(MODELS[model](), kind, slots, decoding)
    told = server.serve(given_arrivals)
    lonely = Session(server.bundle, TakingTurns(), [])
    for arrival, of in zip(given_arrivals, told, strict=True):
        expected = said_alone(lonely, TOKENIZER, arrival.request)
        if of.ends:
            assert said(of.generation()) == expected
        else:
            assert arrival.cancelled is not None
            ids = tuple(token.token_id for token in of.tokens.get(0, []))
            assert ids == expected.token_ids[: len(ids)]
    assert len(server.running.slots.free) == slots


class Unfinished(GrowingText):
    """A text whose last bytes can't be decoded."""

    def finish(self) -> str:
        raise BundleError("tokenizer.json can't decode the tokens [1]")


@pytest.mark.parametrize("time_limit_s", [1e9, 0.1])
def test_a_text_whose_end_cant_be_decoded_fails_alone(time_limit_s: float) -> None:
    server = Server(Together(), POSITIONAL, 2)
    broken = server.submit(replace(asked([1, 2], 3), time_limit_s=time_limit_s), Unfinished)
    fine = server.submit(asked([1, 3], 3))
    while server.queue or len(server.running):
        server.turn()
    assert str(broken.error()) == "tokenizer.json can't decode the tokens [1]"
    lonely = Session(server.bundle, TakingTurns(), [])
    assert said(fine.generation()) == said_alone(lonely, TOKENIZER, asked([1, 3], 3))


def test_a_text_that_is_cancelled_during_a_prompt_s_pass_is_in_no_other() -> None:
    model = Together()
    server = Server(model, POSITIONAL, 2)
    server.submit(asked([1], 6))
    server.turn()
    (server.cancels,) = server.jobs
    server.submit(asked([2] * 8, 6))
    passes = len(model.passes)
    server.turn()
    assert model.passes[passes:] == [4]  # of the prompt, and none after it
    assert len(server.running.slots.free) == 1
