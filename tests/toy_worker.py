"""Workers of the toy model that are threads: all of what processes say to each other, without starting any."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.toy_serving import POSITIONAL, TakingTurns, toy_bundle, toy_tokenizer

from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.worker.child import OpenBundle, Watch, run_worker
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.serving.worker.settings import WorkerSettings

TOKENIZER = toy_tokenizer()


class ThreadWorker:
    """A worker in a thread; see `engram_runtime.serving.worker.process.Worker`."""

    def __init__(self, opening: OpenBundle) -> None:
        self.connection, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=run_worker, args=(self._theirs, opening), daemon=True)
        self._thread.start()

    def die(self) -> None:
        """Be gone from one moment to the next."""
        self._theirs.shutdown(socket.SHUT_RDWR)

    def end(self, patience_s: float) -> str:
        self._thread.join(min(patience_s, 0.1))  # threads can't be killed
        self.connection.close()
        return "has died"


class ToyWorkers:
    """Starts workers of one model.

    Attributes:
        started: all of them.
    """

    def __init__(self, model: TakingTurns, kind: str = POSITIONAL) -> None:
        self.started: list[ThreadWorker] = []
        self._model, self._kind = model, kind

    def __call__(self) -> ThreadWorker:
        self.started.append(ThreadWorker(self._open))
        return self.started[-1]

    @contextlib.contextmanager
    def _open(self, settings: WorkerSettings, watch: Watch) -> Iterator[Engine]:
        options = EngineOptions(slots=settings.slots, queue=settings.queue, watch=watch)
        with BundleEngine(toy_bundle(self._kind), self._model, [], TOKENIZER, options) as engine:
            yield engine


def remote_engine(workers: ToyWorkers, kind: str, options: EngineOptions) -> RemoteEngine:
    """Return the engine of a toy model in a worker."""
    bundle = toy_bundle(kind)
    settings = WorkerSettings(path=bundle.path, executor="toy", slots=options.slots, queue=options.queue)
    return RemoteEngine(bundle, TOKENIZER, settings, workers, options.watch)
