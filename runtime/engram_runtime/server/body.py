"""Bodies of requests, counted as they come: each of them, and all that are held at a time."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import to_thread
from starlette.requests import Request

from engram_runtime.openai_api.errors import TOO_LARGE, UNAVAILABLE, ApiError
from engram_runtime.server.limits import LARGE_BODY_BYTES, MAX_BODY_BYTES, MAX_HELD_BYTES

RETRY_S = 1.0
REST, LONGEST_REST_S = 2.0, 0.5  # of the thread for large bodies, times what the last one took
Made = TypeVar("Made")


class Bodies:
    """The bodies that a server holds.

    Reading and tokenising a large one takes a hundred milliseconds and tens of megabytes. These have a thread of their
    own, so that nobody else waits for them, and that the allocator, which keeps memory by threads, keeps theirs once.
    The thread rests after each, twice as long as that took: parsers hold the interpreter's lock for up to 40 ms, and
    without a pause every token of another text waited that long.
    """

    def __init__(self) -> None:
        self._held_bytes = 0
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")
        self._turn = asyncio.Lock()
        self._rests_until = 0.0  # by the clock

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield a request's body, which counts until the end of the block.

        Raises:
            ApiError: it has more than ``MAX_BODY_BYTES``, whatever its headers say, or it is large and all of them
                together have more than ``MAX_HELD_BYTES``.
            ClientDisconnect: the client went away before its end.
        """
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in request.stream():
                size += len(piece)
                self._held_bytes += len(piece)
                if size > MAX_BODY_BYTES:
                    raise _too_large()
                if size > LARGE_BODY_BYTES and self._held_bytes > MAX_HELD_BYTES:
                    raise _too_many()
                pieces.append(piece)
            whole = b"".join(pieces)
            pieces.clear()
            yield whole
        finally:
            self._held_bytes -= size

    async def work(self, make: Callable[[bytes], Made], body: bytes) -> Made:
        """Have a thread make something of a body; large ones wait their turn, and until that thread has rested."""
        if len(body) <= LARGE_BODY_BYTES:
            return await to_thread.run_sync(make, body)
        async with self._turn:
            await asyncio.sleep(max(0, self._rests_until - time.monotonic()))
            began = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._large, make, body)
            finally:
                ended = time.monotonic()
                self._rests_until = ended + min(REST * (ended - began), LONGEST_REST_S)


def _too_large() -> ApiError:
    return ApiError(
        f"the body has more than {MAX_BODY_BYTES} bytes; shorten it", status=TOO_LARGE, code="request_too_large"
    )


def _too_many() -> ApiError:
    return ApiError(
        f"the requests under way have more than {MAX_HELD_BYTES} bytes together, so that none of more than "
        f"{LARGE_BODY_BYTES} is taken; ask again",
        status=UNAVAILABLE,
        code="server_busy",
        retry_after_s=RETRY_S,
    )
