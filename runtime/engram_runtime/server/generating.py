"""The routes that generate: one answer, or a stream of server-sent events."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.job import Job, prepare
from engram_runtime.openai_api.json_body import parse_body
from engram_runtime.openai_api.mailbox import Mailbox
from engram_runtime.openai_api.respond import asked, take
from engram_runtime.server.body import Bodies
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import Models

STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
END = b"data: [DONE]\n\n"


class Generating:
    """An ASGI application for ``/v1/chat/completions`` and ``/v1/completions``; a client that leaves ends its texts."""

    def __init__(self, models: Models, metrics: Metrics, bodies: Bodies) -> None:
        self._models = models
        self._bodies = bodies
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with self._bodies.read(request) as body:
            job = await self._bodies.work(partial(self._prepare, request.url.path), body)
            del body
        refused: ApiError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_until_disconnect, receive, tasks.cancel_scope.cancel)
            try:
                async with asked(job, client=scope["state"]["client"]) as mailbox:
                    await (self._stream if job.stream else self._whole)(job, mailbox, scope, receive, send)
            except ApiError as error:  # here, as a task group would make a group of it
                refused = error
            tasks.cancel_scope.cancel()
        if refused is not None:
            raise refused

    def _prepare(self, path: str, body: bytes) -> Job:
        raw = parse_body(body)
        return prepare(self._models.engines_for(raw.get("model")), path, raw)

    async def _whole(self, job: Job, mailbox: Mailbox, scope: Scope, receive: Receive, send: Send) -> None:
        async for batch in mailbox.batches():
            self._metrics.count(job.engine.name, batch)
            take(job, batch)
            if not job.answer.unfinished:
                break
        await JSONResponse(job.answer.whole())(scope, receive, send)

    async def _stream(self, job: Job, mailbox: Mailbox, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await _send(send, job.answer.open())
        try:
            async for batch in mailbox.batches():
                self._metrics.count(job.engine.name, batch)
                await _send(send, take(job, batch))
                if not job.answer.unfinished:
                    break
        except ApiError as error:  # the status has gone out
            await _send(send, [error.body()], END, more=False)
            return
        await _send(send, job.answer.close(), END, more=False)


async def _until_disconnect(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


async def _send(send: Send, chunks: Iterable[dict[str, Any]], end: bytes = b"", *, more: bool = True) -> None:
    """Send chunks as one piece; waits while the client doesn't read."""
    events = b"".join(b"data: " + _compact(chunk) + b"\n\n" for chunk in chunks) + end
    if events or not more:
        await send({"type": "http.response.body", "body": events, "more_body": more})


def _compact(chunk: dict[str, Any]) -> bytes:
    return json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
