"""C12: fork after a model was loaded, at any moment of other threads' work."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from tests.faults.libraries_code import PROMPT_IDS, compiled_bundle
from tests.faults.row import Outcome, Row

from engram_runtime import LLM, Bundle, SamplingOptions
from engram_runtime.errors import ForkError
from engram_runtime.serving.events import Token
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.request import TextRequest

WATCHDOG_S, TICK_S = 10.0, 0.002
LONGEST_WAIT_S = 0.05  # before a fork, so that it meets other work at any moment of it
SAID = 16
SAMPLING = SamplingOptions(temperature=1.0, seed=1)
REFUSED, OTHERWISE, ENDED = 17, 18, 0  # exit codes of children

Action = Callable[[], object]


def forks(count: int) -> Outcome:
    """Fork so many times while other threads generate, and have each child go on with what was loaded."""
    rng, failures = random.Random("C12"), []
    longest_s = 0.0
    with loaded() as (actions, work), working(work):
        for number in range(count):
            name, wanted = rng.choice(list(actions.items()))
            action, code = wanted
            time.sleep(rng.random() * LONGEST_WAIT_S)
            began = time.monotonic()
            found = code_of(child(action))
            longest_s = max(longest_s, time.monotonic() - began)
            if found != code:
                failures.append(f"fork {number}, {name}: {found}, wanted {code}")
    return Outcome(
        tried=count,
        survived=count - len(failures),
        figure=f"children took up to {longest_s:.1f} s",
        failures=tuple(failures[:10]),
    )


@contextlib.contextmanager
def loaded() -> Iterator[tuple[Mapping[str, tuple[Action, int]], list[Action]]]:
    """Yield what children do, with the exit codes that are wanted, and what threads of the parent do meanwhile."""
    with contextlib.ExitStack() as opened:
        bundle: Bundle = opened.enter_context(compiled_bundle())
        tvm = opened.enter_context(LLM(bundle.path, threads=2))
        onnx = opened.enter_context(LLM(bundle.path, "onnxruntime", threads=2))
        engine = opened.enter_context(open_engine(bundle.path, options=EngineOptions(slots=2), threads=2))
        request = TextRequest(prompt_ids=tuple(PROMPT_IDS), max_tokens=SAID, sampling=SAMPLING)

        def ask() -> None:
            ended = threading.Event()
            engine.submit([request], lambda index, event: None if isinstance(event, Token) else ended.set())
            ended.wait(WATCHDOG_S)

        yield (
            {
                "generate": (lambda: tvm.generate(PROMPT_IDS, max_tokens=SAID), REFUSED),
                "generate with onnxruntime": (lambda: onnx.generate(PROMPT_IDS, max_tokens=SAID), REFUSED),
                "samples": (lambda: [*tvm.samples(PROMPT_IDS, 2, max_tokens=SAID, sampling=SAMPLING)], REFUSED),
                "submit": (lambda: engine.submit([request], lambda index, event: None), REFUSED),
                "load": (lambda: engine.load, REFUSED),
                "drain": (lambda: engine.drain(1.0), REFUSED),
                "close the engine": (engine.close, ENDED),
                "close": (tvm.close, ENDED),
            },
            [
                lambda: tvm.generate(PROMPT_IDS, max_tokens=SAID),
                lambda: onnx.generate(PROMPT_IDS, max_tokens=SAID),
                ask,
            ],
        )


@contextlib.contextmanager
def working(work: list[Action]) -> Iterator[None]:
    """Have a thread for each of these do it again and again."""
    over = threading.Event()

    def repeat(action: Action) -> None:
        while not over.is_set():
            action()

    threads = [threading.Thread(target=repeat, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
        if not all(thread.is_alive() for thread in threads):
            raise RuntimeError("a thread that was to work meanwhile has ended: see above")
    finally:
        over.set()
        for thread in threads:
            thread.join()


def child(action: Action) -> int:
    """Fork a process that does something and ends with `REFUSED` where it is told not to; returns its id."""
    if process := os.fork():
        return process
    try:
        action()
        code = ENDED
    except ForkError as error:
        code = REFUSED if "spawn" in str(error) else OTHERWISE
    except BaseException:  # noqa: BLE001 - a forked test must not go on as its parent
        code = OTHERWISE
    os._exit(code)


def code_of(process: int) -> int | str:
    """Wait for a process and return its exit code; one that hangs is killed."""
    end = time.monotonic() + WATCHDOG_S
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(TICK_S)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "hung"


ROWS = (
    Row(
        name="C12",
        fault="fork after load while other threads generate, then use of what was loaded",
        expected='an error that says "spawn", never a wait of 10 s',
        quick=50,
        full=2000,
        run=forks,
    ),
)
