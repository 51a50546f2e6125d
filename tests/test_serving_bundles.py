"""Compiled bundles served to several at once: the texts, counts and site readings of each are those it has alone."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.test_compile import assert_same_bits
from tests.toy_serving import POSITIONAL, RECURRENT, TakingTurns, Told, said, toy_bundle
from tests.workshop import THREADS, Workshop, open_session

from engram_runtime import LLM, SamplingOptions
from engram_runtime.bundle import Bundle
from engram_runtime.drafting.options import APPROXIMATE_MASK, DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.parallel.sessions import JointSessions
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.request import TextRequest
from engram_runtime.session import Session
from engram_runtime.tables.options import TableOptions
from engram_runtime.tables.overlay_file import OverlaySpec, write_overlay

BUNDLES: dict[str, Callable[[Workshop], Bundle]] = {"window": Workshop.ready, "positional": Workshop.positional}
PROMPTS = ("The tide comes in", "A table of rows is read by the hash", "Über den Wolken", "twice", "日本語")
WARM = SamplingOptions(temperature=0.9, top_p=0.9, repetition_penalty=1.1)
TOKENS = 12
LOOKUP = DraftOptions(drafter="lookup", drafts=2)


@pytest.fixture(params=["window", "positional"])
def bundle(request: pytest.FixtureRequest, workshop: Workshop) -> Bundle:
    return BUNDLES[request.param](workshop)


@contextlib.contextmanager
def served(bundle: Bundle, executor: str = "tvm", drafts: DraftOptions | None = None) -> Iterator[BundleEngine]:
    options = EngineOptions(slots=3)
    with open_engine(
        bundle.path, executor, options=options, threads=THREADS, drafts=drafts or DraftOptions()
    ) as engine:
        yield engine


def requests(engine: BundleEngine) -> list[TextRequest]:
    """Return requests that end by length and by stop strings, some of which begin alike, and two that are the same."""
    texts = [*PROMPTS, PROMPTS[0], PROMPTS[0] + " twice a day"]
    return [
        TextRequest(
            prompt_ids=tuple(engine.tokenizer.encode(text)),
            max_tokens=TOKENS,
            sampling=dataclasses.replace(WARM, seed=index % 5),
            stop=("e",) if index == 3 else (),
        )
        for index, text in enumerate(texts)
    ]


def assert_served_as_alone(bundle: Bundle, executor: str, drafts: DraftOptions | None = None) -> None:
    with served(bundle, executor, drafts) as engine, LLM(bundle.path, executor, threads=THREADS) as llm:
        engine.submit(asked := requests(engine), told := Told())
        for index, request in enumerate(asked):
            llm.session.trim(len(llm.session))
            alone = llm.generate(
                request.prompt_ids, max_tokens=request.max_tokens, sampling=request.sampling, stop=request.stop
            )
            assert said(told.generation(index)) == said(alone)


@pytest.mark.parametrize("drafts", [None, LOOKUP])
def test_texts_are_those_that_are_generated_alone(bundle: Bundle, drafts: DraftOptions | None) -> None:
    assert_served_as_alone(bundle, "tvm", drafts)


def test_texts_take_turns_where_the_executor_runs_one_at_a_time(workshop: Workshop) -> None:
    assert_served_as_alone(workshop.ready(), "onnxruntime")


def test_a_text_counts_its_own_rows(bundle: Bundle) -> None:
    with served(bundle) as engine, LLM(bundle.path, threads=THREADS) as llm:
        alike = [request for request in requests(engine)[:3] if not request.stop]
        engine.submit(alike, told := Told())
        for index, request in enumerate(alike):
            llm.session.trim(len(llm.session))
            alone = llm.generate(request.prompt_ids, max_tokens=TOKENS, sampling=request.sampling)
            generation = told.generation(index)
            assert generation.tables == alone.tables
            assert generation.prefilled_tokens == alone.prefilled_tokens
            assert generation.forwards == alone.forwards


def test_a_text_that_is_alone_is_drafted(bundle: Bundle) -> None:
    with served(bundle, drafts=LOOKUP) as engine:
        engine.submit(requests(engine)[:1], told := Told())
        drafts = told.generation().drafts
        assert drafts is not None
        assert (drafts.drafter, drafts.tokens) == ("lookup", TOKENS - 1)
        shown = dataclasses.replace(requests(engine)[0], activity=True)
        engine.submit([shown], told := Told())
        assert told.generation().drafts is None


def test_tokens_come_with_what_sites_did_before_them(bundle: Bundle) -> None:
    with served(bundle) as engine, open_session(bundle, "tvm") as session:
        asked = [dataclasses.replace(each, activity=True) for each in requests(engine)[:3]]
        engine.submit([*asked, dataclasses.replace(asked[0], activity=False)], told := Told())
        for index, request in enumerate(asked):
            generation = told.generation(index)
            session.trim(len(session))
            session.prefill(request.prompt_ids)
            text = [*request.prompt_ids, *generation.token_ids]
            for place, token in enumerate(told.tokens[index], start=len(request.prompt_ids)):
                ((name, activity),) = session.activity.items()
                (site,) = session.sites
                assert token.sites is not None
                reading = token.sites[name]
                assert reading.gate == activity.gate[-1].mean()
                assert reading.contribution == activity.contribution[-1]
                before = site.keyer.row_ids(text[: place - 1], np.array(text[place - 1 : place]))
                assert reading.row_ids == before[0].tolist()
                session.decode([token.token_id])
        told.generation(3)
        assert all(token.sites is None for token in told.tokens[3])


def test_sessions_decode_together_as_each_does_alone(bundle: Bundle) -> None:
    with contextlib.ExitStack() as opened:
        alone = opened.enter_context(open_session(bundle, "tvm"))
        sessions = [opened.enter_context(Session(bundle, alone.executor, alone.sites)) for _ in range(5)]
        joint = opened.enter_context(JointSessions(sessions))
        for place, session in enumerate(sessions):
            session.prefill([5, 6, 7 + place])
        joint.decode([4, 0, 2, 1, 3], [11, 12, 13, 14, 15])
        sessions[2].trim(1)
        made = joint.decode([2, 0, 1], [16, 17, 18])
        for row, text in enumerate(([5, 6, 9, 16], [5, 6, 7, 12, 17], [5, 6, 8, 14, 18])):
            alone.trim(len(alone))
            assert_same_bits(made.logits[row], alone.prefill(text))
        assert sessions[2].token_ids == [5, 6, 9, 16]


@pytest.mark.parametrize(
    ("kind", "held", "count", "message"),
    [
        (POSITIONAL, 3, 4, "can't copy 4 tokens of a sequence that has computed 3"),
        (RECURRENT, 3, 2, "can't copy 2 tokens of a sequence that has computed 3"),
    ],
)
def test_tokens_that_cant_be_copied(kind: str, held: int, count: int, message: str) -> None:
    model, bundle = TakingTurns(), toy_bundle(kind)
    other, session = Session(bundle, model, []), Session(bundle, model, [])
    other.prefill([1] * held)
    session.prefill([2])
    with pytest.raises(RequestError) as caught:
        session.copy(other, count)
    assert str(caught.value) == message
    assert session.token_ids == [2]


def test_unverified_guesses_are_refused(tmp_path: Path) -> None:
    drafts = DraftOptions(drafter=APPROXIMATE_MASK)
    with pytest.raises(RequestError) as caught, open_engine(tmp_path, options=EngineOptions(), drafts=drafts):
        pass
    assert str(caught.value) == (
        "drafter 'mask-approximate' says its guesses unverified, so that a text would depend on what runs beside it; "
        "choose 'mask'"
    )


def test_an_engine_says_what_it_is(workshop: Workshop) -> None:
    with served(workshop.ready()) as engine, served(workshop.positional()) as other:
        assert (engine.name, engine.vocab_size, engine.context_length, engine.failure) == ("compiled", 300, 192, None)
        assert len(engine.fingerprint) == 12
        assert engine.fingerprint != other.fingerprint


def test_an_engine_with_an_overlay_says_that_it_is_another(workshop: Workshop, tmp_path: Path) -> None:
    bundle = workshop.ready()
    (table,) = bundle.manifest.tables
    rows = np.zeros((1, table.record.record_bytes), dtype=np.uint8)
    write_overlay(path := tmp_path / "o", OverlaySpec.of(bundle, table), np.array([1]), rows)
    names = []
    for overlays in [(), (path,)]:
        reading = TableOptions(overlays=overlays)
        with open_engine(bundle.path, options=EngineOptions(slots=1), threads=THREADS, tables=reading) as engine:
            names.append(engine.fingerprint)
    assert names[0] != names[1]
