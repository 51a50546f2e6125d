"""The engine, here and in a worker: who may come, in which order, and how texts end that don't end by themselves."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from tests import toy_serving
from tests.toy_model import CONTEXT, LOGITS, VOCAB
from tests.toy_serving import (
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
from tests.toy_worker import ToyWorkers, remote_engine

from engram_runtime.errors import NumericError, RequestError, TableError
from engram_runtime.memory import FreeMemory
from engram_runtime.parallel import group as groups
from engram_runtime.sampling import SamplingOptions
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import DEGRADED, OK, BusyError, Engine, EngineError, Load
from engram_runtime.serving.events import Event
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.session import Session

TOKENIZER = toy_tokenizer()
LONG = 20  # tokens of a text that isn't to end by itself before the test is over


def engine_here(model: TakingTurns, kind: str, options: EngineOptions) -> BundleEngine:
    return BundleEngine(toy_bundle(kind), model, [], TOKENIZER, options)


def engine_away(model: TakingTurns, kind: str, options: EngineOptions) -> RemoteEngine:
    return remote_engine(ToyWorkers(model, kind), kind, options)


make_engine: Callable[[TakingTurns, str, EngineOptions], BundleEngine | RemoteEngine] = engine_here


@pytest.fixture(autouse=True, params=["here", "away"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engines of a test in its process, and in workers."""
    if request.param == "away":
        monkeypatch.setattr(sys.modules[__name__], "make_engine", engine_away)


only_here = pytest.mark.parametrize("place", ["here"], indirect=True)


@contextlib.contextmanager
def engine_of(model: TakingTurns, kind: str = POSITIONAL, **options: Any) -> Iterator[BundleEngine | RemoteEngine]:
    with make_engine(model, kind, EngineOptions(**options)) as engine:
        yield engine
        if model.turns is not None:
            model.turns.release(1000)


def asked(*prompt: int, max_tokens: int = 3, seed: int = 5, **options: Any) -> TextRequest:
    """Return a request of a text without an end token, which seed 5 is for."""
    sampling = SamplingOptions(temperature=1.0, seed=seed)
    return TextRequest(prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling, **options)


def held(turns: int = 0) -> Together:
    """Return a model that runs so many passes until it is let go on."""
    model = Together()
    model.turns = threading.Semaphore(turns)
    return model


def let_go(model: TakingTurns) -> None:
    assert model.turns is not None
    model.turns.release(1000)


def wait_until_running(engine: Engine, count: int = 1) -> None:
    until = time.monotonic() + 10
    while engine.load.running != count:
        assert time.monotonic() < until


def test_many_texts_at_once_are_those_they_are_alone() -> None:
    requests = [asked(1, 2, 3 + i % 4, max_tokens=4 + i % 5, seed=i) for i in range(24)]
    told = [Told() for _ in requests]
    with engine_of(Together(), slots=3, queue=100) as engine:
        threads = [
            threading.Thread(target=engine.submit, args=([request], each), kwargs={"client": str(i % 5)})
            for i, (request, each) in enumerate(zip(requests, told, strict=True))
        ]
        for thread in threads:
            thread.start()
        generations = [each.generation() for each in told]
    lonely = Session(toy_bundle(POSITIONAL), TakingTurns(), [])
    assert [said(each) for each in generations] == [said_alone(lonely, TOKENIZER, each) for each in requests]


@pytest.mark.parametrize("kind", [POSITIONAL, RECURRENT])
def test_texts_of_a_job_compute_their_prompt_once(kind: str) -> None:
    requests, told = [asked(1, 2, 3, 4, seed=i) for i in range(5)], Told()
    model = Together()
    with engine_of(model, kind, slots=5) as engine:
        engine.submit(requests, told)
        generations = [told.generation(i) for i in range(5)]
    assert [each.prefilled_tokens for each in generations] == [4, 0, 0, 0, 0]
    lonely = Session(toy_bundle(kind), TakingTurns(), [])
    assert [said(each) for each in generations] == [said_alone(lonely, TOKENIZER, each) for each in requests]


@pytest.mark.parametrize(("kind", "computed"), [(POSITIONAL, [6, 2, 1, 3]), (RECURRENT, [6, 7, 6, 7])])
def test_what_slots_hold_of_a_prompt_is_not_computed_again(kind: str, computed: list[int]) -> None:
    prompts = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 8, 9), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 9, 9)]
    with engine_of(Together(), kind, slots=1) as engine:
        told = [Told() for _ in prompts]
        for prompt, each in zip(prompts, told, strict=True):
            engine.submit([asked(*prompt)], each)
            each.generation()
    assert [each.generation().prefilled_tokens for each in told] == computed


def test_a_conversation_goes_on_where_it_was() -> None:
    with engine_of(Together(), RECURRENT, slots=2) as engine:
        first, second = Told(), Told()
        engine.submit([asked(1, 2, 3, 4)], first)
        answer = first.generation().token_ids
        engine.submit([asked(1, 2, 3, 4, *answer, 9)], second)
        assert second.generation().prefilled_tokens == 2  # the last token of the answer was never held


def test_a_prompt_is_copied_from_a_text_that_runs() -> None:
    model = held(3)
    with engine_of(model, slots=2) as engine:
        first, second = Told(), Told()
        engine.submit([asked(1, 2, 3, 4, max_tokens=LONG)], first)
        first.wait_for_tokens(2)
        engine.submit([asked(1, 2, 3, 4, 5)], second)
        let_go(model)
        assert second.generation().prefilled_tokens == 1
        first.generation()


def test_the_slot_that_has_been_free_for_longest_forgets() -> None:
    with engine_of(Together(), slots=2) as engine:
        computed = []
        for prompt in [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 2, 2), (1, 1, 1)]:
            engine.submit([asked(*prompt)], told := Told())
            computed.append(told.generation().prefilled_tokens)
    assert computed == [3, 3, 3, 1, 3]


def test_a_prompt_that_only_begins_like_a_text_leaves_that_one_its_slot() -> None:
    with engine_of(Together(), slots=2) as engine:
        computed = []
        for prompt in [(1, 2, 3, 4, 5, 6), (1, 2, 9, 9, 9), (1, 2, 3, 4, 5, 6, 7)]:
            engine.submit([asked(*prompt)], told := Told())
            computed.append(told.generation().prefilled_tokens)
    assert computed == [6, 3, 1]


def test_clients_take_turns() -> None:
    model, names, ended = held(), ("a1", "a2", "a3", "b1", "c1", "b2"), Told()
    with engine_of(model, slots=1) as engine:
        engine.submit([asked(9)], Told())
        wait_until_running(engine)
        for place, name in enumerate(names):
            tell_of = partial(tell_as, ended, place)
            engine.submit([asked(1, max_tokens=1)], tell_of, client=name[0])
        let_go(model)
        for place in range(len(names)):
            ended.generation(place)
    assert [names[place] for place in dict.fromkeys(ended.order)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def tell_as(told: Told, place: int, index: int, event: Event) -> None:
    told(place, event)


def test_a_full_queue_says_when_to_come_again() -> None:
    model = held()
    with engine_of(model, slots=1, queue=2) as engine:
        running, told = Told(), Told()
        engine.submit([asked(1)], running)
        wait_until_running(engine)
        engine.submit([asked(1), asked(2), asked(3)], told)  # one job, however many texts
        engine.submit([asked(1)], Told())
        with pytest.raises(BusyError) as caught:
            engine.submit([asked(1)], Told())
        assert str(caught.value) == "2 requests are waiting, which is all that the queue holds; try again later"
        assert caught.value.retry_after_s == 1.0
        assert engine.load == Load(waiting=4, running=1, slots=1, cached_tokens=0)
        let_go(model)
        told.generation(2)


def test_a_full_queue_reads_no_grammar() -> None:
    model = held()
    with engine_of(model, slots=1, queue=1) as engine:
        engine.submit([asked(1)], Told())
        wait_until_running(engine)
        engine.submit([asked(2)], Told())
        with pytest.raises(BusyError):  # the toy has no tokenizer.json, so reading one raises what is no EngramError
            engine.submit([asked(3, grammar="start: /a/")], Told())
        let_go(model)


def test_cancelling_gives_room_in_the_queue() -> None:
    model = held()
    with engine_of(model, slots=1, queue=1) as engine:
        engine.submit([asked(1)], running := Told())
        wait_until_running(engine)
        waiting = engine.submit([asked(2)], cancelled := Told())
        waiting.cancel()
        waiting.cancel()
        engine.submit([asked(3)], told := Told())
        let_go(model)
        running.generation()
        told.generation()
    assert (cancelled.tokens, cancelled.ends) == ({}, {})


def test_a_text_that_is_cancelled_leaves_its_slot_within_a_pass_and_the_others_as_they_are() -> None:
    model = held()
    with engine_of(model, slots=2) as engine:
        going, cancelled = Told(), Told()
        engine.submit([asked(1, max_tokens=LONG)], going)
        ticket = engine.submit([asked(2, max_tokens=LONG)], cancelled)
        assert model.turns is not None
        model.turns.release(5)
        cancelled.wait_for_tokens(2)
        ticket.cancel()
        before = len(cancelled.tokens[0])
        if make_engine is engine_away:  # whose process may be busy when it is told
            threading.Event().wait(0.5)
        model.turns.release(2)  # the pass that it may be part of, and the next one
        wait_until_running(engine, 1)
        let_go(model)
        generation = going.generation()
    assert len(cancelled.tokens[0]) == before
    assert cancelled.ends == {}
    lonely = Session(toy_bundle(POSITIONAL), TakingTurns(), [])
    assert said(generation) == said_alone(lonely, TOKENIZER, asked(1, max_tokens=LONG))


def test_a_text_ends_with_its_time() -> None:
    model = held(3)
    with engine_of(model, slots=1) as engine:
        running, waiting = Told(), Told()
        engine.submit([asked(1, max_tokens=LONG, time_limit_s=0.2)], running)
        engine.submit([asked(2, max_tokens=LONG, time_limit_s=0.1)], waiting)
        running.wait_for_tokens(2)
        threading.Event().wait(0.2)
        let_go(model)
        ended, late = running.generation(), waiting.generation()
    assert ended.finish_reason == late.finish_reason == "time"
    assert 2 <= len(ended.token_ids) <= 4
    assert (late.token_ids, late.text, late.prompt_tokens) == ((), "", 1)


def test_an_error_on_purpose_fails_the_texts_of_its_pass_and_no_other() -> None:
    model = held(2)
    model.error, model.broken = TableError("rows can't be read"), 42
    with engine_of(model, slots=3) as engine:
        fine, failing, later = Told(), Told(), Told()
        assert (engine.health.status, engine.health.since) == (OK, None)
        engine.submit([asked(1, max_tokens=2)], fine)
        fine.wait_for_tokens(1)
        engine.submit([asked(2, 42, 3)], failing)
        let_go(model)
        assert str(failing.error()) == "rows can't be read"
        fine.generation()
        engine.submit([asked(2, 3)], later)
        request = asked(2, 3)
        assert said(later.generation()) == said_alone(
            Session(toy_bundle(POSITIONAL), TakingTurns(), []), TOKENIZER, request
        )
        assert engine.failure is None
        assert (engine.health.status, engine.health.reason) == (DEGRADED, "rows can't be read")
        assert time.time() - 60 < (engine.health.since or 0) <= time.time()


@pytest.mark.parametrize("kind", [POSITIONAL, RECURRENT])
def test_of_texts_that_decode_together_the_one_with_damaged_rows_fails_and_leaves_a_slot_that_can_be_used(
    kind: str,
) -> None:
    model = Together()
    with engine_of(model, kind, slots=2) as engine:
        told = Told()
        requests = [asked(1, 2, max_tokens=LONG, logit_bias={42: -1e4}), asked(1, 3, logit_bias={42: 1e4})]
        model.error, model.broken = TableError("rows can't be read"), 42
        engine.submit(requests, told)
        assert str(told.error(1)) == "rows can't be read"
        other = said(told.generation(0))
        model.error = None
        engine.submit([asked(1, 2), asked(1, 3)], again := Told())
        made = [said(again.generation(index)) for index in range(2)]
    lonely = Session(toy_bundle(kind), TakingTurns(), [])
    assert other == said_alone(lonely, TOKENIZER, requests[0])
    lonely = Session(toy_bundle(kind), TakingTurns(), [])
    assert made == [said_alone(lonely, TOKENIZER, asked(1, 2)), said_alone(lonely, TOKENIZER, asked(1, 3))]


@only_here
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_ends_the_engine_and_says_so() -> None:
    model = Together()
    model.error, model.broken = ZeroDivisionError("by zero"), 42
    with engine_of(model, slots=1) as engine:
        told, waiting = Told(), Told()
        engine.submit([asked(1, max_tokens=LONG)], Told())
        engine.submit([asked(42)], told)
        with contextlib.suppress(EngineError):  # it may have ended by now
            engine.submit([asked(1)], waiting)
        message = "a defect has ended the engine: ZeroDivisionError('by zero'); start it anew"
        assert (type(told.error()), str(told.error())) == (EngineError, message)
        assert str(engine.failure) == message
        with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
            engine.submit([asked(1)], Told())


def test_closing_ends_texts() -> None:
    model = held(3)
    with engine_of(model, slots=1) as engine:
        engine.submit([asked(1, max_tokens=LONG)], running := Told())
        engine.submit([asked(2)], waiting := Told())
        running.wait_for_tokens(2)
        threading.Timer(0.05, let_go, [model]).start()
        engine.close()
        for told in (running, waiting):
            assert type(told.error()) is BusyError
            assert str(told.error()) == "the engine was closed while the text was generated; ask again"
        with pytest.raises(BusyError) as caught:
            engine.submit([asked(1)], Told())
        assert str(caught.value) == "the engine is being closed; ask again when it has been started anew"
        engine.close()


@only_here
def test_draining_lets_texts_end_and_takes_no_more() -> None:
    model = held(2)
    with engine_here(model, POSITIONAL, EngineOptions(slots=1)) as engine:
        engine.submit([asked(1)], running := Told())
        engine.submit([asked(2)], waiting := Told())
        assert not engine.drain(0.01)
        with pytest.raises(BusyError):
            engine.submit([asked(3)], Told())
        let_go(model)
        assert engine.drain(10)
        assert len(running.ends) == len(waiting.ends) == 1


def test_passes_are_watched() -> None:
    figures: list[StepFigures] = []
    with engine_of(Together(), slots=2, watch=figures.append) as engine:
        engine.submit([asked(1, 2, 3, 4, 5), asked(1, 2, 3, 4, 5, seed=6)], told := Told())
        told.generation(0)
        told.generation(1)
    assert [(each.texts, each.prompt_tokens) for each in figures] == [(0, 4), (0, 1), (2, 0), (2, 0)]
    assert all(each.seconds > 0 for each in figures)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: asked(), "no tokens were given; the model needs at least one"),
        (
            lambda: asked(*[1] * (CONTEXT + 1)),
            f"{CONTEXT + 1} tokens exceed the context of {CONTEXT}; shorten the prompt",
        ),
        (lambda: asked(VOCAB), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (lambda: asked(1, logit_bias={-1: 1.0}), f"token id -1 is outside the vocabulary of {VOCAB}"),
        (lambda: asked(1, max_tokens=0), "max_tokens is 0, expected at least 1"),
        (lambda: asked(1, stop=("",)), "stop string '' has 0 characters, wanted 1 to 256"),
    ],
)
def test_requests_that_cant_be_served_are_refused(request_: Any, message: str) -> None:
    with engine_of(Together()) as engine:
        with pytest.raises(RequestError) as caught:
            engine.submit([asked(1), request_()], told := Told())
        assert str(caught.value) == message
        assert (engine.load.waiting, told.ends) == (0, {})


@only_here
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots are 0, expected 1 to 256"),
        ({"slots": 257}, "slots are 257, expected 1 to 256"),
        ({"queue": 0}, "the queue is to hold 0 jobs, expected at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        EngineOptions(**options)
    assert str(caught.value) == message


def test_more_slots_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "free_memory", lambda: FreeMemory(num_bytes=100))
    with pytest.raises(RequestError) as caught, engine_of(Together()):
        pass
    assert str(caught.value) == (
        "the states of 4 sequences of 32 tokens need 0.0 GiB, 0.0 GiB of memory are available; "
        "ask for fewer sequences or tokens"
    )


def test_logits_that_are_not_finite_fail_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(Together()) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(toy_serving, "LOGITS", np.full_like(LOGITS, np.nan))
            engine.submit([asked(1)], broken := Told())
            assert type(broken.error()) is NumericError
        engine.submit([asked(1)], told := Told())
        assert len(told.generation().token_ids) == 3
