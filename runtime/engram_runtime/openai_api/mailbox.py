"""Events of the engine's thread, read by an event loop."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence

from engram_runtime.serving.events import Event

Told = tuple[int, Event]


class Mailbox:
    """Keeps what the engine tells until it is read; the loop is woken once for all that came since it last read.

    What is kept is bounded by the tokens a request may have.
    """

    def __init__(self) -> None:
        """Make one for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: deque[Told] = deque()
        self._arrived = asyncio.Event()
        self._asleep = True

    def tell(self, index: int, event: Event) -> None:
        """Put an event in; from any thread."""
        self._events.append((index, event))
        if self._asleep:
            self._asleep = False
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody reads
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def batches(self) -> AsyncIterator[Sequence[Told]]:
        """Yield what has come since the last batch, without end."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._asleep = True  # before reading: what comes from now on wakes the loop again
            yield [self._events.popleft() for _ in range(len(self._events))]
