"""Requests to an application in this process, and what every answer must be whatever was asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.types import ASGIApp, Message
from tests.faults.requests_toy import ToyEngine

from engram_runtime.server.access import LOOPBACK_NAMES, Access
from engram_runtime.server.app import create_app
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import Models

Headers = Sequence[tuple[bytes, bytes]]
LOCAL: Headers = ((b"host", b"127.0.0.1"),)
ANSWER_S = 60.0  # beyond which a request counts as one that hangs
ERROR_KEYS = {"message", "type", "param", "code"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request."""

    method: str
    path: str
    headers: Headers = LOCAL
    body: bytes = b""


@dataclass(slots=True)
class Answered:
    """What came of it; ``status`` is 0 where nothing was sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False


@contextmanager
def toy_app(engine: ToyEngine | None = None, access: Access | None = None) -> Iterator[ASGIApp]:
    """Yield the application of a server with the toy model."""
    with TemporaryDirectory() as folder, (engine or ToyEngine()).open(Path(folder)) as opened:
        models = Models([opened.name], created=1)
        models.engines[opened.name] = opened
        yield create_app(models, access or Access(LOOPBACK_NAMES), Metrics(models))


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[None]:
    """Have an application begin, and end, as a server does."""
    sent: asyncio.Queue[Message] = asyncio.Queue()
    told: asyncio.Queue[Message] = asyncio.Queue()
    task = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, sent.get, told.put))
    await sent.put({"type": "lifespan.startup"})
    assert (await told.get())["type"] == "lifespan.startup.complete"
    yield
    await sent.put({"type": "lifespan.shutdown"})
    await task


async def ask(app: ASGIApp, asked: Asked) -> Answered:
    """Send a request as uvicorn would and return the answer; raises what the application raises, or TimeoutError."""
    path, _, query = asked.path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query.encode("utf-8", "surrogateescape"),
        "root_path": "",
        "headers": list(asked.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    answered = Answered()
    parts = [asked.body[start : start + 60_000] for start in range(0, len(asked.body), 60_000)] or [b""]
    left = len(parts)
    ended = asyncio.Event()

    async def receive() -> Message:
        nonlocal left
        if left:
            left -= 1
            return {"type": "http.request", "body": parts[-left - 1], "more_body": left > 0}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answered.body += message.get("body", b"")
            if not message.get("more_body", False):
                answered.ended = True
                ended.set()

    async with asyncio.timeout(ANSWER_S):
        await app(scope, receive, send)
    return answered


def fault_of(asked: Asked, answered: Answered) -> str | None:
    """Return what is wrong with an answer, None if nothing is."""
    if not answered.ended:
        return "no whole answer"
    if not 200 <= answered.status < 500:
        return f"status {answered.status}: {answered.body[:200]!r}"
    if "x-request-id" not in answered.headers:
        return "no x-request-id"
    if asked.method == "HEAD":
        return None
    if answered.status >= 400:
        return _fault_of_error(answered)
    if answered.headers.get("content-type", "").startswith("text/event-stream"):
        return _fault_of_stream(answered.body)
    return None


def _fault_of_error(answered: Answered) -> str | None:
    try:
        told = json.loads(answered.body)
    except ValueError:
        return f"an error that isn't JSON: {answered.status} {answered.body[:200]!r}"
    return None if is_error(told) else f"an error of another shape: {answered.body[:200]!r}"


def is_error(told: Any) -> bool:
    """Whether a value is an error as OpenAI spells it."""
    return (
        isinstance(told, dict)
        and told.keys() == {"error"}
        and told["error"].keys() == ERROR_KEYS
        and isinstance(told["error"]["message"], str)
        and told["error"]["message"] != ""
    )


def _fault_of_stream(body: bytes) -> str | None:
    events = body.decode("utf-8").split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        return f"a stream that ends with {events[-2:]!r}"
    for event in events[:-2]:
        told = json.loads(event.removeprefix("data: "))
        if "error" in told and (not is_error(told) or told["error"]["type"] == "server_error"):
            return f"an error in a stream: {event[:200]}"
    return None
