"""Engines that are opened while the server runs already."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

from engram_runtime.errors import EngramError
from engram_runtime.server.models import Models
from engram_runtime.serving.engine_protocol import Engine

Open = Callable[[], AbstractContextManager[Engine]]


class Loader:
    """Opens engines one after the other in a thread, and closes them, all at once, at the end of its ``with``.

    Attributes:
        error: what kept one from being opened; a defect has shown its traceback.
    """

    def __init__(self, models: Models, openings: Mapping[str, Open], done: Callable[[], None]) -> None:
        """Begin at ``with``; ``done`` is called by the thread at its end, be it with an error."""
        self.error: EngramError | OSError | SystemExit | None = None
        self._models = models
        self._openings = openings
        self._done = done
        self._opened: list[ExitStack] = []
        # A daemon, as a server that is told to end doesn't wait until tables are loaded.
        self._thread = threading.Thread(target=self._load, name="loading", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _load(self) -> None:
        failure: EngramError | OSError | SystemExit | None = SystemExit(1)
        try:
            for name, opening in self._openings.items():
                opened = ExitStack()
                self._models.engines[name] = opened.enter_context(opening())
                self._opened.append(opened)
            failure = None
        except (EngramError, OSError) as error:
            failure = error
        finally:
            self.error = failure
            self._done()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._thread.is_alive() and self._opened:
            with ThreadPoolExecutor(len(self._opened)) as threads:  # each may take seconds, the server has ten
                list(threads.map(ExitStack.close, self._opened))
