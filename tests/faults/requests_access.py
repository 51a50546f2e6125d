"""Row D10: every route of the application without a key, with a wrong one, by another name and from another page."""

import asyncio
from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp
from tests.faults.requests_asgi import Asked, Headers, ask, fault_of, running, toy_app
from tests.faults.row import Outcome, Row

from engram_runtime.server.access import Access, access_for
from engram_runtime.server.guard import Guard

KEY = "0123456789abcdef"
OPEN = {"/health", "/", "/api.js", "/icon.svg", "/page.css", "/page.js", "/reply.js"}
WITH_KEY = {
    *("/v1/models", "/v1/models/{model}", "/metrics", "/openapi.json"),
    *("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"),
}
HOST = (b"host", b"127.0.0.1:8080")
NO_KEYS: list[Headers] = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer  ")],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Basic " + KEY.encode())],
    [(b"authorization", b"Bearer " + KEY.encode()[:-1])],
    [(b"authorization", b"Bearer " + KEY.encode() + b"0")],
    [(b"authorization", b"Bearer " + KEY.upper().encode())],
    [(b"authorization", b"Bearer \xff\xfe")],
    [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer " + KEY.encode())],
    [(b"x-api-key", KEY.encode())],
    [(b"cookie", b"authorization=Bearer " + KEY.encode())],
]
FOREIGN_HOSTS = [
    b"evil.example",
    b"127.0.0.1.evil.example",
    b"",
    b"0.0.0.0",
    b"127.0.0.1:80:80",
    b"localhost@evil",
    b"\xff",
]
FOREIGN_ORIGINS = [b"http://evil.example", b"null", b"http://127.0.0.1:8081", b"http://127.0.0.1", b"", b"file://"]
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE")


def access(count: int) -> Outcome:
    """Ask every route that the application has, ``count`` times over."""
    with toy_app(access=access_for("127.0.0.1", [KEY])) as guarded, toy_app(access=Access()) as plain:
        paths = set(_paths(guarded))
        failures = [f"route {path} is not listed in this row" for path in sorted(paths ^ (OPEN | WITH_KEY))]
        tries = [each for path in sorted(paths) for each in _tries(path)] * count
        failures += asyncio.run(_faults(guarded, tries))
        strangers = [each for each in tries if each[1] == 403]
        failures += asyncio.run(_faults(plain, strangers))
    tried = len(tries) + len(strangers)
    figure = f"{len(paths)} routes"
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures[:10]))


def _paths(app: ASGIApp) -> Iterator[str]:
    """Yield the paths that the application itself knows."""
    assert isinstance(app, Guard)
    assert isinstance(app.app, Starlette)
    for route in app.app.routes:
        yield route.path if isinstance(route, Route) else repr(route)


def _tries(path: str) -> Iterator[tuple[Asked, int]]:
    """Yield requests to a path, and the status each has to have; 0 for any but 401 and 403."""
    place = path.replace("{model}", "toy")
    key = (b"authorization", b"Bearer " + KEY.encode())
    for method in METHODS:
        for headers in NO_KEYS:
            asked = Asked(method=method, path=place, headers=[HOST, *headers], body=b"{}")
            yield asked, 0 if path in OPEN else 401
        yield Asked(method=method, path=place, headers=[HOST, key], body=b"{}"), 0
        for host in FOREIGN_HOSTS:
            yield Asked(method=method, path=place, headers=[(b"host", host), key], body=b"{}"), 403
        for origin in FOREIGN_ORIGINS:
            yield Asked(method=method, path=place, headers=[HOST, (b"origin", origin), key], body=b"{}"), 403


async def _faults(app: ASGIApp, tries: list[tuple[Asked, int]]) -> list[str]:
    async with running(app):
        return [fault for asked, status in tries if (fault := await _fault(app, asked, status)) is not None]


async def _fault(app: ASGIApp, asked: Asked, status: int) -> str | None:
    answered = await ask(app, asked)
    fault = fault_of(asked, answered)
    wrong = answered.status != status if status else answered.status in (401, 403)
    if fault is None and wrong:
        fault = f"status {answered.status}, wanted {status or 'neither 401 nor 403'}"
    return fault and f"{asked.method} {asked.path} {asked.headers}: {fault}"


ROWS = (
    Row(
        name="D10",
        fault="every route of the application without a key, with a wrong one, from a foreign host or page",
        expected="401 or 403 on every route, /health and the page's files open; no route that isn't listed",
        quick=1,
        full=1,
        run=access,
    ),
)
