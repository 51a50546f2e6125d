"""A server that serves the chat page and says what a test wrote."""

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import engram_runtime

PAGE = Path(engram_runtime.__file__).parent / "server" / "page"
SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EVENT_STREAM = "text/event-stream"


@dataclass
class Conversation:
    """What is to be answered and what was asked.

    Attributes:
        models: answers to the next requests for models; the last of them stays.
        answers: to the next chats.
        asked: bodies of the chats.
        keys: Authorization headers of all requests of the API.
    """

    url: str = ""
    models: deque[Response] = field(default_factory=deque)
    answers: deque[Response] = field(default_factory=deque)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    async def list_models(self, request: Request) -> Response:
        self.keys.append(request.headers.get("Authorization"))
        return self.models.popleft() if len(self.models) > 1 else self.models[0]

    async def chat(self, request: Request) -> Response:
        self.keys.append(request.headers.get("Authorization"))
        self.asked.append(await request.json())
        return self.answers.popleft()


def model_list(*names: str) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)


def events(chunks: Iterable[dict[str, Any] | str]) -> bytes:
    """Return server-sent events, with what else the format allows: a comment, lines that end in CR LF."""
    data = (chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    return b": stream\r\n\r\n" + "".join(f"data: {text}\r\n\r\n" for text in data).encode()


def cut(stream: bytes, size: int) -> Response:
    """Answer with a stream of which every read has ``size`` bytes."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    return StreamingResponse(pieces(), media_type=EVENT_STREAM)


class Paused(StreamingResponse):
    """A stream that stays open after its first part, until the test goes on or the reader leaves."""

    def __init__(self, first: bytes, rest: bytes = b"") -> None:
        super().__init__(self.parts(first, rest), media_type=EVENT_STREAM)
        self.go_on = threading.Event()
        self.ended = threading.Event()

    async def parts(self, first: bytes, rest: bytes) -> AsyncIterator[bytes]:
        try:
            yield first
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield rest
        finally:
            self.ended.set()


def application(conversation: Conversation) -> Starlette:
    async def under_policy(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", SECURITY_POLICY.encode()))
            await send(message)

        await StaticFiles(directory=PAGE, html=True)(scope, receive, with_policy)

    return Starlette(
        routes=[
            Route("/v1/models", conversation.list_models),
            Route("/v1/chat/completions", conversation.chat, methods=["POST"]),
            Mount("/", under_policy),
        ]
    )


@contextmanager
def scripted_server() -> Iterator[Conversation]:
    """Serve at a free port of this machine until the block ends."""
    conversation = Conversation()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        conversation.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config(application(conversation), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield conversation
        finally:
            server.should_exit = True
            thread.join()
