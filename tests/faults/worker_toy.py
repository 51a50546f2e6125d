"""The program of a worker whose toy model dies when it is told to: ``python -m tests.faults.worker_toy DESCRIPTOR``."""

import contextlib
import ctypes
import faulthandler
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.toy_serving import POSITIONAL, Logits, Together, toy_bundle, toy_tokenizer

from engram_runtime.executor import State
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.worker.child import Watch, end_with_server, run_worker
from engram_runtime.serving.worker.process import Worker
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.serving.worker.settings import WorkerSettings

COMMAND = (sys.executable, "-m", "tests.faults.worker_toy")
PASS_S = 0.002
SLOTS, QUEUE = 4, 16
# First tokens of prompts that are the end.
ABORT, SEGMENTATION, EXIT, MEMORY = 40, 41, 42, 43


def die(how: int) -> None:
    """End this process as native code would."""
    if how == ABORT:
        ctypes.CDLL(None).abort()
    if how == SEGMENTATION:
        ctypes.string_at(0)
    if how == EXIT:
        os._exit(3)
    taken = []
    while how == MEMORY:
        taken.append(b"\xff" * (4 << 20))


class Mortal(Together):
    """The toy model, at a speed that leaves time between passes."""

    def _pass(self, tokens: Sequence[tuple[Mapping[str, State], int, int]]) -> Logits:
        time.sleep(PASS_S)
        for _, token_id, position in tokens:
            if position == 0:
                die(token_id)
        return super()._pass(tokens)


@contextlib.contextmanager
def open_toy(settings: WorkerSettings, watch: Watch) -> Iterator[Engine]:
    """Yield the engine of the model."""
    options = EngineOptions(slots=settings.slots, queue=settings.queue, watch=watch)
    with BundleEngine(toy_bundle(POSITIONAL), Mortal(), [], toy_tokenizer(), options) as engine:
        yield engine


def toy_engine(start: Callable[[], Worker]) -> RemoteEngine:
    """Return the engine of the model in workers."""
    bundle = toy_bundle(POSITIONAL)
    settings = WorkerSettings(path=bundle.path, executor="toy", slots=SLOTS, queue=QUEUE)
    return RemoteEngine(bundle, toy_tokenizer(), settings, start)


if __name__ == "__main__":
    faulthandler.enable()
    end_with_server()
    sys.exit(run_worker(socket.socket(fileno=int(sys.argv[1])), open_toy))
