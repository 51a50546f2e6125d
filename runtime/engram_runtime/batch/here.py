"""A batch on this machine."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

from engram_runtime.batch.answering import Respond, answer_lines
from engram_runtime.batch.lines import LineIndex
from engram_runtime.batch.request import MAX_LINE_BYTES
from engram_runtime.batch.results import Put

OpenResponder = Callable[[], AbstractContextManager[Respond]]


def answer_here(pending: LineIndex, put: Put, *, open_responder: OpenResponder, at_once: int) -> None:
    """Answer lines, ``at_once`` of them at a time, and put the answers as they come."""
    with open_responder() as respond:
        asyncio.run(answer_lines(pending.lines(MAX_LINE_BYTES), respond, put, at_once=at_once))
