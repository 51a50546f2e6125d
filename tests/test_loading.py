"""Engines of a server: opened one after the other, closed all at once."""

import contextlib
import threading
from collections.abc import Iterator
from typing import cast

from engram_runtime.server.loading import Loader
from engram_runtime.server.models import Models
from engram_runtime.serving.engine_protocol import Engine


def test_engines_are_closed_at_once() -> None:
    both = threading.Barrier(2, timeout=20)
    opened: list[str] = []

    @contextlib.contextmanager
    def opening(name: str) -> Iterator[Engine]:
        opened.append(name)
        yield cast("Engine", name)
        both.wait()  # for the other one to be closed

    done = threading.Event()
    models = Models(("a", "b"), created=0)
    with Loader(models, {name: lambda name=name: opening(name) for name in "ab"}, done.set) as loader:  # type: ignore[misc]
        assert done.wait(20)
    assert (opened, list(models.engines), loader.error, both.broken) == (["a", "b"], ["a", "b"], None, False)
