"""How an engine works."""

from collections.abc import Callable
from dataclasses import dataclass

from engram_runtime.errors import RequestError
from engram_runtime.serving.figures import StepFigures, unwatched

DEFAULT_SLOTS, MOST_SLOTS = 4, 256
DEFAULT_QUEUE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine works.

    Attributes:
        slots: how many texts grow at once, each with states for a whole context.
        queue: how many jobs may wait.
        tables_on: False feeds zero rows; see `engram_runtime.session.Session`.
        watch: told of each forward pass, by the engine's thread.
    """

    slots: int = DEFAULT_SLOTS
    queue: int = DEFAULT_QUEUE
    tables_on: bool = True
    watch: Callable[[StepFigures], None] = unwatched

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MOST_SLOTS:
            raise RequestError(f"slots are {self.slots}, expected 1 to {MOST_SLOTS}")
        if self.queue < 1:
            raise RequestError(f"the queue is to hold {self.queue} jobs, expected at least 1")
