"""Spans of time in lanes, and counts beside them, as trace events that Perfetto and Chrome show.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

HASH, READ, WAIT, GRAPH, SAMPLE, DRAFT, VERIFY = LANES = ("hash", "read", "wait", "graph", "sample", "draft", "verify")

Event = dict[str, Any]


class Timeline:
    """Events in the order in which they ended; to be added from any thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin now.

        Args:
            clock: tells seconds.
        """
        self.now = clock
        self._began = clock()
        self._events: list[Event] = []

    def span(self, lane: str, name: str, began: float, **figures: float) -> float:
        """Add what ends now to one of `LANES`, and return when that is.

        Args:
            began: what `now` said; after the end of the one before it in the lane.
            figures: shown with it.
        """
        ended = self.now()
        self.add(lane, name, began, ended, **figures)
        return ended

    def add(self, lane: str, name: str, began: float, ended: float, **figures: float) -> None:
        """Add a span that may have ended before now; see `span`."""
        times = {"ts": self._microseconds(began), "dur": (ended - began) * 1e6}
        self._events.append({"ph": "X", "name": name, **times, **_place(lane), "args": figures})

    def count(self, name: str, value: float) -> None:
        """Add a value that a count has from now on."""
        at = {"ts": self._microseconds(self.now()), "pid": os.getpid()}
        self._events.append({"ph": "C", "name": name, **at, "args": {name: value}})

    def to_json(self) -> bytes:
        """Return the content of a file of trace events."""
        found = {"displayTimeUnit": "ms", "traceEvents": [*_lane_names(), *self._events]}
        return (json.dumps(found) + "\n").encode()

    def _microseconds(self, seconds: float) -> float:
        return (seconds - self._began) * 1e6


def _lane_names() -> Iterator[Event]:
    for place, lane in enumerate(LANES):
        yield {"ph": "M", "name": "thread_name", **_place(lane), "args": {"name": lane}}
        yield {"ph": "M", "name": "thread_sort_index", **_place(lane), "args": {"sort_index": place}}


def _place(lane: str) -> Event:
    return {"pid": os.getpid(), "tid": 1 + LANES.index(lane)}
