"""What every request passes before its route, and every answer after it."""

import json
import logging
import secrets
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engram_runtime.openai_api.errors import UNAUTHORISED, ApiError
from engram_runtime.server.access import Access
from engram_runtime.server.limits import MAX_HEADER_BYTES, MAX_HEADERS
from engram_runtime.server.metrics import Metrics

CLIENT_LEFT = 499  # as nginx logs it
OTHER_ROUTE = "other"
access_log = logging.getLogger(__name__)


class Guard:
    """Checks headers, host and key, answers errors in OpenAI's shape, and counts and logs requests without their text.

    Args:
        open_paths: that need no key.
        routes: whose requests are counted by path; those of others are counted together.
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, metrics: Metrics, open_paths: frozenset[str], routes: frozenset[str]
    ) -> None:
        self.app = app
        self._access = access
        self._metrics = metrics
        self._open_paths = open_paths
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = secrets.token_hex(8)
        status = CLIENT_LEFT

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._admit(scope, receive, send_marked)
        except ApiError as error:
            await error_response(error)(scope, receive, send_marked)
        finally:
            self._note(scope, request_id, status, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise ApiError(
                f"the request has {len(scope['headers'])} headers of {size} bytes, wanted at most {MAX_HEADERS} of "
                f"{MAX_HEADER_BYTES}",
                status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                code="headers_too_large",
            )
        self._access.check_host(headers)
        client = "" if scope["path"] in self._open_paths else self._access.client(headers)
        scope["state"]["client"] = client or (scope["client"] or ("",))[0]
        await self.app(scope, receive, send)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self._routes else OTHER_ROUTE
        self._metrics.requests.labels(route, status).inc()
        if not access_log.isEnabledFor(logging.INFO):
            return
        figures = {
            "request_id": request_id,
            "client": scope.get("state", {}).get("client"),
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1e3, 1),
        }
        access_log.info("%s", json.dumps(figures))


def error_response(error: ApiError) -> Response:
    """Return what is sent of an error."""
    headers = {"connection": "close"} if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else {}
    if error.status == UNAUTHORISED:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(error.body(), error.status, headers)
