"""HTTP/1.1 with deadlines: uvicorn has none for receiving a request, nor for a client that stops reading."""

import asyncio
import json
import socket

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engram_runtime.openai_api.errors import UNAVAILABLE, ApiError
from engram_runtime.server.body import RETRY_S
from engram_runtime.server.guard import error_response
from engram_runtime.server.limits import BODY_S, HEADERS_S, MAX_CONNECTIONS, SEND_BUFFER_BYTES, STALLED_READER_S

RECEIPT_S = {h11.IDLE: HEADERS_S, h11.SEND_BODY: BODY_S}  # by what the client is about to send


def _no_http() -> bytes:
    told = json.dumps(ApiError("the request is no valid HTTP; correct the client", code="invalid_http").body())
    head = f"content-type: application/json\r\ncontent-length: {len(told)}\r\nconnection: close"
    return f"HTTP/1.1 400 Bad Request\r\n{head}\r\n\r\n{told}".encode()


NO_HTTP = _no_http()  # as bytes, since h11 may be in any state


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request of one connection too many."""
    error = ApiError(
        f"there are {MAX_CONNECTIONS} connections, which is all that are taken; ask again",
        status=UNAVAILABLE,
        code="server_busy",
        retry_after_s=RETRY_S,
    )
    response = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


class DeadlineProtocol(H11Protocol):
    """A connection that is closed when a request takes too long to arrive or its answer too long to be read."""

    _receiving: object = None
    _receipt: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._watch_receipt()
        # Of its own, as uvicorn's answer doesn't say when to come back.
        self.limit_concurrency = None
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = refuse_connection

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receipt()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_receipt()  # of a request that came while the one before was answered

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun already
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:  # what it would answer has no place any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(NO_HTTP)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._receipt, self._stall):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALLED_READER_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch_receipt(self) -> None:
        """Give each part of a request one deadline, however many pieces it comes in."""
        if self.conn.their_state is self._receiving:
            return
        self._receiving = self.conn.their_state
        if self._receipt is not None:
            self._receipt.cancel()
        limit_s = RECEIPT_S.get(self._receiving)
        self._receipt = None if limit_s is None else self.loop.call_later(limit_s, self.transport.abort)
