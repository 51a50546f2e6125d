"""From a line of a batch to the line that answers it."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from engram_runtime.batch.lines import Line, LineIndex
from engram_runtime.batch.request import MAX_LINE_BYTES, BadLine, parse_request
from engram_runtime.batch.result import Result, result_text
from engram_runtime.batch.results import Put
from engram_runtime.openai_api.errors import ApiError

OK = 200  # of HTTP
BAD_LINE = "invalid_line"  # error code of what is no request at all

Respond = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Answers the body of a request to a URL such as ``/v1/completions``, or raises ApiError; several may be under way."""

OpenResponder = Callable[[], AbstractContextManager[Respond]]
"""Loads what answers."""


async def answer_line(line: Line, respond: Respond) -> Result:
    """Answer one line; what is wrong with it is its answer."""
    request = parse_request(line)
    if isinstance(request, BadLine):
        error = {"code": BAD_LINE, "message": request.reason}
        return Result(text=result_text(line.number, request.custom_id, None, error), failed=True)
    try:
        body = await respond(request.url, request.body)
    except ApiError as error:
        return _failure(line.number, request.custom_id, error)
    return Result(
        text=result_text(line.number, request.custom_id, _response(OK, body), None),
        failed=False,
        prompt_tokens=body["usage"]["prompt_tokens"],
        completion_tokens=body["usage"]["completion_tokens"],
    )


def _failure(number: int, custom_id: str, error: ApiError) -> Result:
    body = error.body()
    told = {"code": error.code or body["error"]["type"], "message": str(error)}
    return Result(text=result_text(number, custom_id, _response(error.status, body), told), failed=True)


def _response(status_code: int, body: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"status_code": status_code, "request_id": f"req_{uuid.uuid4().hex}", "body": body}


async def answer_lines(lines: Iterable[Line], respond: Respond, put: Put, *, at_once: int) -> None:
    """Answer lines, ``at_once`` of them at a time, and put each answer when it is there."""
    left = iter(lines)

    async def take_turns() -> None:
        for line in left:
            put(await answer_line(line, respond))

    await asyncio.gather(*(take_turns() for _ in range(at_once)))


def answer_here(pending: LineIndex, put: Put, *, open_responder: OpenResponder, at_once: int) -> None:
    """Answer lines on this machine, ``at_once`` of them at a time, and put the answers as they come."""
    with open_responder() as respond:
        asyncio.run(answer_lines(pending.lines(MAX_LINE_BYTES), respond, put, at_once=at_once))
