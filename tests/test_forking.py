"""Forked processes: what was loaded before says that it is the parent's, and nothing waits for its threads."""

import os
import signal
from collections.abc import Callable

import pytest
from tests.test_engine import asked, engine_away
from tests.toy_serving import POSITIONAL, Together, Told, toy_bundle, toy_tokenizer
from tests.workshop import THREADS, Workshop

from engram_runtime import LLM, SamplingOptions
from engram_runtime.errors import ForkError
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.options import EngineOptions

WATCHDOG_S = 10
REFUSED, WENT_ON, OTHERWISE = 3, 4, 5


def in_a_child(act: Callable[[], object]) -> int:
    """Return the exit code of a forked child: `REFUSED` with the error's text as it must be."""
    if (child := os.fork()) == 0:
        signal.alarm(WATCHDOG_S)
        parent, code = os.getppid(), OTHERWISE
        try:
            act()
            code = WENT_ON
        except ForkError as error:
            code = REFUSED if str(error) == sentence(os.getpid(), parent) else OTHERWISE
        finally:
            os._exit(code)  # whatever else was raised: the child must not go on with the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sentence(own: int, parent: int) -> str:
    return (
        f"process {own} was forked from {parent} after that had loaded the model; start processes by spawn, as "
        f"multiprocessing.get_context('spawn') does, and load it in each"
    )


@pytest.mark.parametrize("executor", ["tvm", "onnxruntime"])
def test_a_child_does_not_generate_with_its_parents_model(workshop: Workshop, executor: str) -> None:
    sampling = SamplingOptions(temperature=1.0, seed=1)
    with LLM(workshop.ready().path, executor, threads=THREADS) as llm:
        expected = llm.generate([5, 6], max_tokens=3).token_ids
        assert in_a_child(lambda: llm.generate([5, 6], max_tokens=3)) == REFUSED
        assert in_a_child(lambda: [*llm.samples([5, 6], 2, max_tokens=3, sampling=sampling)]) == REFUSED
        assert in_a_child(llm.close) == WENT_ON
        assert llm.generate([5, 6], max_tokens=3).token_ids == expected


def test_a_child_asks_nothing_of_its_parents_engine() -> None:
    with BundleEngine(toy_bundle(POSITIONAL), Together(), [], toy_tokenizer(), EngineOptions()) as engine:
        ticket = engine.submit([asked(1)], told := Told())
        assert len(told.generation().token_ids) == 3
        for act in (lambda: engine.submit([asked(1)], Told()), lambda: engine.load, lambda: engine.drain(1)):
            assert in_a_child(act) == REFUSED
        assert in_a_child(ticket.cancel) == REFUSED
        assert in_a_child(engine.close) == WENT_ON
        engine.submit([asked(1)], told := Told())
        assert len(told.generation().token_ids) == 3


def test_a_child_asks_nothing_of_its_parents_worker() -> None:
    with engine_away(Together(), POSITIONAL, EngineOptions()) as engine:
        ticket = engine.submit([asked(1)], told := Told())
        assert len(told.generation().token_ids) == 3
        assert in_a_child(lambda: engine.submit([asked(1)], Told())) == REFUSED
        assert in_a_child(ticket.cancel) == REFUSED
        assert in_a_child(engine.close) == WENT_ON
        engine.submit([asked(1)], told := Told())
        assert len(told.generation().token_ids) == 3
